"""Writes and reads Megatron-LM's .bin/.idx files, plainly, as its indexed_dataset.py lays them out."""

import struct
from itertools import pairwise

import numpy as np

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}


def write_pair(prefix, documents, dtype="uint16", count_documents=False):
    """`documents`: each a list of sequences of ids. `count_documents`: the header counts them, and not the borders."""
    code = np.dtype(dtype).newbyteorder("<")
    sequences = [np.array(sequence, code) for document in documents for sequence in document]
    with open(f"{prefix}.bin", "wb") as file:
        for sequence in sequences:
            file.write(sequence.tobytes())
    pointers = np.cumsum([0, *(sequence.nbytes for sequence in sequences)])[:-1]
    borders = np.cumsum([0, *map(len, documents)])
    write_index(prefix, dtype, list(map(len, sequences)), pointers, borders, len(borders) - count_documents)


def write_index(prefix, dtype, lengths, pointers, borders, count=None):
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, CODES[dtype]))
        file.write(struct.pack("<QQ", len(lengths), len(borders) if count is None else count))
        file.write(np.array(lengths, "<i4").tobytes())
        file.write(np.array(pointers, "<i8").tobytes())
        file.write(np.array(borders, "<i8").tobytes())


def read_pair(prefix):
    """The documents of a pair, each an array of ids."""
    content = open(f"{prefix}.idx", "rb").read()  # noqa: SIM115
    assert content[:9] == b"MMIDIDX\x00\x00"
    version, code, num_sequences, num_borders = struct.unpack("<QBQQ", content[9:34])
    assert version == 1
    dtype = np.dtype({code: name for name, code in CODES.items()}[code])
    at = 34
    lengths = np.frombuffer(content, "<i4", num_sequences, at)
    at += lengths.nbytes
    pointers = np.frombuffer(content, "<i8", num_sequences, at)
    at += pointers.nbytes
    borders = np.frombuffer(content, "<i8", num_borders, at)
    documents = []
    with open(f"{prefix}.bin", "rb") as file:
        for start, end in pairwise(borders):
            parts = [np.empty(0, dtype)]
            for sequence in range(start, end):
                file.seek(pointers[sequence])
                parts.append(np.frombuffer(file.read(int(lengths[sequence]) * dtype.itemsize), dtype))
            documents.append(np.concatenate(parts))
    return documents
