"""Which part of a place is meant: a configuration, a split, files that match patterns."""

from __future__ import annotations

from dataclasses import dataclass

ALL_SPLITS = "all"  # as in `datasets`: the files of every split, and those of none


@dataclass(frozen=True)
class Choice:
    """What the user has chosen of a place; None and () if nothing was chosen.

    Attributes:
        config: name of a configuration of a dataset.
        split: name of a split, or `ALL_SPLITS`.
        include: patterns of names relative to the place, as in `hf download --include`: `*` matches `/` too.
    """

    config: str | None = None
    split: str | None = None
    include: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.config or self.split or self.include)

    def __str__(self) -> str:
        parts = [("configuration", self.config), ("split", self.split), ("files", " ".join(self.include))]
        return ", ".join(f"{what} {value}" for what, value in parts if value)


EVERYTHING = Choice()


def how_to_choose(where: str, **values: str) -> str:
    """How the user makes these choices (config, split, validation_split) for the place at `where`.

    `where` is an option of a tool, or a config key.
    """
    if where == "--input":
        return " ".join(f"--{key.replace('_', '-')} {value}" for key, value in values.items())
    if where == "data.path":
        return " ".join(f"data.{key}={value}" for key, value in values.items())
    if where.startswith("data.path."):
        return ", ".join(f"{key}: {value}" for key, value in values.items()) + " beside the path"
    return "give the folder, the files or a pattern (FOLDER/*.ENDING) of one of them"
