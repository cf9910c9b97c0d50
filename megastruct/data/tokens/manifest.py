"""The manifest of a folder of token shards: what the folder contains, and how it was made.

    FOLDER/manifest.json
    FOLDER/tokenizer.model            or tokenizer.json and tokenizer_options.json
    FOLDER/train/00000-000.bin        tokens of input shard 0, first part: little-endian uint16 or uint32, no header
    FOLDER/validation/00000-000.bin   the same for held-out documents

The files of a split, concatenated in the manifest's order, are one stream of tokens. Every document ends with the
end-of-document id.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from megastruct.data.sources.shards import MANIFEST_NAME
from megastruct.errors import Problem, Problems, UserError

FORMAT_NAME: Literal["megastruct-tokens"] = "megastruct-tokens"
FORMAT_VERSION: Literal[1] = 1
SPLITS = ("train", "validation")
_MAKE_AGAIN = "make the folder again with tools/prepare_data.py, or copy it again"

Count = Annotated[int, Field(ge=0)]


def _inside_folder(path: str) -> str:
    parts = PurePosixPath(path.replace("\\", "/"))
    if not path or parts.is_absolute() or ".." in parts.parts or ":" in path:
        raise ValueError(f"{path!r} must be a path inside of the folder (relative, without '..')")
    return path


InnerPath = Annotated[str, AfterValidator(_inside_folder)]


class Record(BaseModel):
    """A frozen record without unknown keys and without conversions of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TokenizerRecord(Record):
    """The tokenizer that made the tokens; `fingerprint` is its hash, as in `Tokenizer`."""

    file: InnerPath
    fingerprint: str
    vocab_size: Annotated[int, Field(ge=1)]
    eod_id: Count


class SourceRecord(Record):
    """One input shard."""

    name: str
    num_bytes: Count
    text_column: str | None = None  # None: that of the settings
    held_out: bool = False  # whether all of its documents are held out


class Settings(Record):
    """Everything that determines the tokens in the folder: the same settings give the same bytes."""

    tokenizer: TokenizerRecord
    text_column: str
    validation_fraction: Annotated[float, Field(ge=0, lt=1)]
    max_shard_tokens: Annotated[int, Field(ge=1)]
    sources: tuple[SourceRecord, ...]


class TokenFile(Record):
    """One file of tokens."""

    file: InnerPath
    num_tokens: Annotated[int, Field(ge=1)]
    num_documents: Count  # number of documents that end in this file
    num_bytes: Count
    sha256: str


class Splits(Record):
    """The files of each split, in order."""

    train: tuple[TokenFile, ...]
    validation: tuple[TokenFile, ...]


class Total(Record):
    """Sums over the files of one split."""

    num_tokens: Count
    num_documents: Count


class Totals(Record):
    """The sums of each split."""

    train: Total
    validation: Total


class Manifest(Record):
    """The contents of manifest.json; validation checks that the sums and sizes are consistent."""

    format: Literal["megastruct-tokens"]
    version: Literal[1]
    dtype: Literal["uint16", "uint32"]
    settings: Settings
    splits: Splits
    totals: Totals
    skipped_documents: dict[str, Count]  # by reason

    @model_validator(mode="after")
    def _adds_up(self) -> Manifest:
        for split in SPLITS:
            files, total = getattr(self.splits, split), getattr(self.totals, split)
            if total != total_of(files):
                raise ValueError(f"the totals of {split!r} are not the sums over its files")
            for file in files:
                if file.num_bytes != file.num_tokens * self.token_dtype.itemsize:
                    raise ValueError(f"{file.file}: {file.num_tokens} tokens do not take {file.num_bytes} bytes")
        return self

    @property
    def token_dtype(self) -> np.dtype:
        """The type of the tokens on disk, little-endian."""
        return np.dtype(self.dtype).newbyteorder("<")


def total_of(files: Iterable[TokenFile]) -> Total:
    """The sums of tokens and documents over `files`."""
    files = list(files)
    return Total(
        num_tokens=sum(file.num_tokens for file in files), num_documents=sum(file.num_documents for file in files)
    )


def dtype_for(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The name of the smallest type on disk that holds all ids in [0, vocab_size)."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def load_manifest(folder: Path) -> Manifest:
    """Read and validate the manifest of `folder`, without looking at the files that it lists.

    Raises:
        UserError: it cannot be read, or is invalid; with every invalid field.
    """
    path = folder / MANIFEST_NAME
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(Problem(str(path), f"cannot be read ({error.strerror})", _MAKE_AGAIN)) from None


def parse_manifest(content: bytes, path: str) -> Manifest:
    """The manifest in the bytes of a file; `path` is for messages.

    Raises:
        UserError: it is invalid; with every invalid field.
    """
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        problems = []
        for mistake in error.errors():
            place = ".".join(map(str, mistake["loc"]))
            problems.append(Problem(f"{path}: {place}" if place else path, mistake["msg"], _MAKE_AGAIN))
        raise UserError(problems) from None


def check_files(folder: Path, manifest: Manifest) -> None:
    """Check that every file exists with the size in the manifest, without reading it.

    Raises:
        UserError: with every missing or damaged file.
    """
    problems = Problems()
    for split in SPLITS:
        for file in getattr(manifest.splits, split):
            path = folder / file.file
            if not path.is_file():
                problems.append(Problem(str(path), "is listed in the manifest but does not exist", _MAKE_AGAIN))
            elif path.stat().st_size != file.num_bytes:
                found = f"has {path.stat().st_size} bytes, the manifest says {file.num_bytes}"
                problems.append(Problem(str(path), found, _MAKE_AGAIN))
    problems.raise_if_any()
