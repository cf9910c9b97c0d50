"""Numbers as people read them."""

from __future__ import annotations


def count(number: float) -> str:
    """A number of parameters or tokens, with k, M, G or T."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}" if unit in "TG" else f"{number / size:.1f} {unit}"
    return str(number)


def size(num_bytes: float) -> str:
    """A number of bytes, in KiB, MiB, GiB or TiB."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20)):
        if num_bytes >= 2**power:
            return f"{num_bytes / 2**power:.1f} {unit}"
    return f"{num_bytes / 2**10:.0f} KiB"


def duration(seconds: float) -> str:
    """A time as H:MM:SS, with days in front where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days} days " if days else "") + f"{hours}:{minutes:02}:{rest:02}"
