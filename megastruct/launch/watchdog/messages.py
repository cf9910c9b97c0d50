"""The messages that ranks send to each other, each one line of JSON in UTF-8."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

_EXACT = ConfigDict(strict=True, extra="forbid")  # no 1 for true, no "1" for 1, no unknown field

Count = Annotated[int, Field(ge=0)]
ExitCode = Annotated[int, Field(ge=0, le=255)]


@dataclass(frozen=True, config=_EXACT)
class Hello:
    """The first message of a connection to rank 0."""

    word: str  # the random word of the run, which only its ranks know
    rank: Count
    name: str  # process and host
    kind: Literal["hello"] = "hello"


@dataclass(frozen=True, config=_EXACT)
class Heartbeat:
    """What a rank says about itself, again and again."""

    step: Count = 0  # finished steps; a return to a checkpoint makes it smaller
    arrivals: Count = 0  # how often the main thread has begun a step; only grows
    doing: str = ""  # the place in the code where the main thread is
    failed: bool = False  # whether a collective operation has failed on this rank
    goodbye: ExitCode | None = None  # the code that the process is about to exit with; 0: all is well
    kind: Literal["heartbeat"] = "heartbeat"


@dataclass(frozen=True, config=_EXACT)
class Answer:
    """A sign of life from rank 0."""

    kind: Literal["answer"] = "answer"


@dataclass(frozen=True, config=_EXACT)
class End:
    """Tells a rank to exit with `code`; `message` is empty if another rank reports itself what happened."""

    code: ExitCode
    message: str = ""
    kind: Literal["end"] = "end"


Message = Hello | Heartbeat | Answer | End

_ADAPTER: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="kind")])


class MalformedError(ValueError):
    """A line is not a valid message."""


def encode(message: Message) -> bytes:
    """The message as one line, including the line end."""
    return _ADAPTER.dump_json(message) + b"\n"


def decode(line: bytes) -> Message:
    """The message of a line, with or without its end. Raises MalformedError for anything else."""
    try:
        return _ADAPTER.validate_json(line)
    except ValidationError as error:
        raise MalformedError(f"{len(line)} bytes are not a message") from error
