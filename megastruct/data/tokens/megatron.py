r"""Megatron-LM's token files: NAME.bin holds the tokens of all sequences, NAME.idx the places of all documents.

    NAME.idx   9 bytes "MMIDIDX\0\0", uint64 version 1, uint8 code of the tokens' dtype,
               uint64 number of sequences n, uint64 number of document borders m,
               int32 lengths [n] in tokens, int64 pointers [n] in bytes of NAME.bin, int64 borders [m]

Document k has the sequences borders[k] to borders[k + 1]; the first border is 0, the last one is n. All numbers are
little-endian. Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py.

An index is memory-mapped and read once, in blocks. What remains is a list of the runs of tokens that lie together and
belong to the same split, which is about as long as there are held-out documents.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megastruct.data.order import mix
from megastruct.data.protocols import Tokenizer
from megastruct.data.tokenizers.options import setting
from megastruct.data.tokens.files import TokenFiles
from megastruct.data.tokens.rows import Segments, TokenRows
from megastruct.errors import Problem, Problems, UserError
from megastruct.parallel.seeds import derive_seed

MAGIC, VERSION = b"MMIDIDX\0\0", 1
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats
_HEADER = struct.Struct("<9sQBQQ")
_DOCUMENTS_AT_ONCE = 1 << 18
_SAMPLED_DOCUMENTS, _SAMPLED_TOKENS = 256, 256
_COPY_AGAIN = "copy both files again, or make them again with Megatron's tools/preprocess_data.py"


class Pair(NamedTuple):
    """The index and the tokens of one prefix."""

    idx: Path
    bin: Path


def find_pairs(path: str) -> list[Pair]:
    """The pairs at a prefix, at one of the two files, or in a folder and its subfolders, sorted; empty if it has none.

    Raises:
        UserError: a file has no partner.
    """
    given = Path(path).expanduser().absolute()
    if given.is_dir():
        prefixes = {str(file)[:-4] for file in given.rglob("*.idx")}
        prefixes |= {str(file)[:-4] for file in given.rglob("*.bin")} if prefixes else set()
    else:
        prefixes = {str(given)[:-4] if given.suffix in (".idx", ".bin") else str(given)}
    pairs = [Pair(Path(f"{prefix}.idx"), Path(f"{prefix}.bin")) for prefix in sorted(prefixes)]
    pairs = [pair for pair in pairs if pair.idx.is_file() or pair.bin.is_file()]
    problems = Problems()
    for pair in pairs:
        for file, other in (pair, pair[::-1]):
            if not file.is_file():
                problems.append(Problem(str(other), f"has no {file.name} beside it", _COPY_AGAIN))
    problems.raise_if_any()
    return pairs


@dataclass(frozen=True)
class MegatronFiles:
    """Checked pairs of files.

    Attributes:
        paths: the files of tokens.
        tokens: the same, opened.
        train: runs of training tokens.
        validation: runs of held-out tokens.
    """

    paths: list[Path]
    tokens: TokenFiles
    train: Segments
    validation: Segments

    def rows(self, seq_length: int, vocab_size: int) -> tuple[TokenRows, TokenRows]:
        """The rows of both splits, training first."""
        parts = (self.train, self.validation)
        first, second = (TokenRows(self.paths, self.tokens, part, seq_length, vocab_size) for part in parts)
        return first, second


def open_pairs(pairs: Sequence[Pair], tokenizer: Tokenizer, validation_fraction: float, where: str) -> MegatronFiles:
    """Check the files and divide their documents. A document is held out by a hash of its number within its file.

    `where`: the key of the tokenizer, for messages.

    Raises:
        UserError: a file is truncated or damaged, or documents do not end with `tokenizer.eod_id`.
    """
    problems = Problems()
    indices = [problems.collect(partial(_Index, pair)) for pair in pairs]
    problems.raise_if_any()
    opened = [index for index in indices if index is not None]
    paths = [pair.bin for pair in pairs]
    tokens = TokenFiles(paths, [index.dtype for index in opened])
    splits: list[list[np.ndarray]] = [[], []]
    for number, index in enumerate(opened):
        problems.collect(partial(_divide, number, index, validation_fraction, splits))
    problems.raise_if_any()
    for number, index in enumerate(opened):
        problems.collect(partial(_check_ends, number, index, tokens, tokenizer, where))
    problems.raise_if_any()
    train, validation = (np.concatenate([np.empty((3, 0), np.int64), *split], axis=1) for split in splits)
    return MegatronFiles(paths, tokens, Segments(*train), Segments(*validation))


class _Index:
    """The memory-mapped arrays of an index whose sizes fit."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        try:
            num_bytes, self.bin_bytes = pair.idx.stat().st_size, pair.bin.stat().st_size
            with pair.idx.open("rb") as file:
                header = file.read(_HEADER.size)
        except OSError as error:
            raise self.error(f"cannot be read ({error.strerror})") from None
        if not header.startswith(MAGIC):
            advice = "give a .bin/.idx pair that Megatron-LM wrote with --dataset-impl mmap, or token shards"
            raise self.error("is no index of Megatron-LM: it does not begin with MMIDIDX", advice)
        if len(header) < _HEADER.size:
            raise self.error(f"is truncated: it has {num_bytes} bytes, and its header alone takes {_HEADER.size}")
        _, version, code, num_sequences, num_borders = _HEADER.unpack(header)
        if version != VERSION:
            raise self.error(f"has version {version}, but only version {VERSION} is known")
        if code not in DTYPES:
            raise self.error(f"has the dtype code {code}, which is none of token ids ({', '.join(map(str, DTYPES))})")
        self.dtype = np.dtype(DTYPES[code])
        needed = _HEADER.size + 12 * num_sequences + 8 * max(1, num_borders)
        if num_bytes < needed:
            raise self.error(f"is truncated: it has {num_bytes} bytes, and its header says {needed}")
        content = np.memmap(pair.idx, np.uint8, "r", _HEADER.size)

        def part(dtype: str, start: int, count: int) -> np.ndarray:
            found = content[start : start + np.dtype(dtype).itemsize * count]
            return found[: len(found) // np.dtype(dtype).itemsize * np.dtype(dtype).itemsize].view(dtype)

        self.lengths = part("<i4", 0, num_sequences)
        self.pointers = part("<i8", 4 * num_sequences, num_sequences)
        # Some writers count documents instead of borders, of which there is one more.
        counted = [part("<i8", 12 * num_sequences, count) for count in (num_borders, num_borders + 1)]
        whole = [borders for borders in counted if len(borders) and borders[0] == 0 and borders[-1] == num_sequences]
        if not whole:
            raise self.error(f"is damaged: its documents do not cover its {num_sequences:,} sequences")
        self.borders = whole[0]

    def error(self, found: str, suggestion: str = _COPY_AGAIN) -> UserError:
        return UserError(Problem(str(self.pair.idx), found, suggestion))

    @property
    def num_documents(self) -> int:
        return len(self.borders) - 1

    def sequences(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of documents `start` to `end`: number of sequences [end - start]; first token and length of each sequence.

        All int64. Raises UserError if one is not inside of the file of tokens.
        """
        borders = np.array(self.borders[start : end + 1])
        if (np.diff(borders) < 0).any():
            raise self.error("is damaged: the borders of its documents decrease")
        lengths = np.array(self.lengths[borders[0] : borders[-1]], np.int64)
        pointers = np.array(self.pointers[borders[0] : borders[-1]], np.int64)
        ends = pointers + lengths * self.dtype.itemsize
        wrong = np.flatnonzero((lengths < 0) | (pointers < 0) | (ends > self.bin_bytes))
        if len(wrong):
            first = int(wrong[0])
            found = (
                f"says that sequence {int(borders[0]) + first:,} has {lengths[first]:,} tokens from byte "
                f"{pointers[first]:,} on, outside of {self.pair.bin.name}, which has {self.bin_bytes:,} bytes"
            )
            raise self.error(found)
        if (pointers % self.dtype.itemsize).any():
            raise self.error(f"is damaged: a pointer is not a multiple of {self.dtype.itemsize} bytes")
        return np.diff(borders), pointers // self.dtype.itemsize, lengths


def _divide(number: int, index: _Index, validation_fraction: float, splits: list[list[np.ndarray]]) -> None:
    """Append the runs of file `number` to the splits: int64 [3, num_runs] of file, first token, length."""
    runs = [_runs(*_sequences_of(index, start, validation_fraction)) for start in _blocks(index)]
    offsets, lengths, held_out = (np.concatenate(parts) for parts in zip(*runs, strict=True))
    offsets, lengths, held_out = _runs(offsets, lengths, held_out)
    for split, own in zip(splits, (~held_out, held_out), strict=True):
        split.append(np.stack([np.full(int(own.sum()), number), offsets[own], lengths[own]]))


def _blocks(index: _Index) -> Iterator[int]:
    yield from range(0, max(1, index.num_documents), _DOCUMENTS_AT_ONCE)


def _sequences_of(index: _Index, start: int, fraction: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first token, length, whether it is held out) of every sequence of a block of documents."""
    end = min(start + _DOCUMENTS_AT_ONCE, index.num_documents)
    counts, offsets, lengths = index.sequences(start, end)
    hashes = mix(np.arange(start, end, dtype=np.uint64), np.uint64(derive_seed("data", "held out")))
    return offsets, lengths, np.repeat(hashes < np.float64(fraction) * 2.0**64, counts)


def _runs(offsets: np.ndarray, lengths: np.ndarray, held_out: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Join what lies together and is in the same split; empty sequences are left out."""
    some = lengths > 0
    offsets, lengths, held_out = offsets[some], lengths[some], held_out[some]
    if not len(offsets):
        return offsets, lengths, held_out
    begins = np.concatenate([[True], (offsets[1:] != offsets[:-1] + lengths[:-1]) | (held_out[1:] != held_out[:-1])])
    first = np.flatnonzero(begins)
    return offsets[first], np.add.reduceat(lengths, first), held_out[first]


def _check_ends(number: int, index: _Index, files: TokenFiles, tokenizer: Tokenizer, where: str) -> None:
    """Read the ends of documents that are spread over the file: they show whether the tokenizer is the right one."""
    documents = np.unique(np.linspace(0, index.num_documents - 1, _SAMPLED_DOCUMENTS).astype(np.int64))
    last: list[int] = []
    for document in documents.tolist() if index.num_documents else []:
        _, offsets, lengths = index.sequences(document, document + 1)
        some = np.flatnonzero(lengths)
        if not len(some):
            continue
        count = min(int(lengths[some[-1]]), _SAMPLED_TOKENS)
        end = int(offsets[some[-1]] + lengths[some[-1]])
        tokens = files.read(number, end - count, count).astype(np.int64)
        unknown = tokens[(tokens < 0) | (tokens >= tokenizer.vocab_size)]
        if len(unknown):
            found = f"contains token id {unknown[0]}, but {tokenizer.path} has {tokenizer.vocab_size:,} ids"
            advice = "give the tokenizer that made the file as data.tokenizer"
            raise UserError(Problem(str(index.pair.bin), found, advice))
        last.append(int(tokens[-1]))
    without = sum(token != tokenizer.eod_id for token in last)
    if without:
        found = (
            f"{without} of {len(last)} documents that were looked at do not end with the end-of-document id "
            f"{tokenizer.eod_id}"
        )
        usual = max(set(last), key=last.count)
        advice = "make the file with Megatron's --append-eod and this tokenizer"
        if last.count(usual) == len(last):
            name = next((text for text, id_ in tokenizer.pieces().items() if id_ == usual), "")
            chosen = setting("eod_token", where, repr(name))
            advice = f"{chosen}, which ends all of them, if it is a special token; else {advice}"
        raise UserError(Problem(str(index.pair.bin), found, advice))
