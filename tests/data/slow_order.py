"""The data's order in its slowest and plainest form: lists, one token at a time."""

import hashlib

import numpy as np
import pyarrow.parquet as pq

from megastruct.data import open_tokenizer
from megastruct.data.order import Permutation, epoch_permutation, mix, shard_order


def is_held_out(text: str, fraction: float) -> bool:
    return int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) / 2**64 < fraction


def documents_of(path, held_out: bool, fraction: float) -> list[str]:
    texts = pq.read_table(path)["content"].to_pylist()
    return [text for text in texts if text and text.strip() and is_held_out(text, fraction) == held_out]


def tokens_of(paths, tokenizer_path, held_out: bool, fraction: float) -> list[int]:
    tokenizer = open_tokenizer(tokenizer_path)
    tokens = []
    for path in paths:
        for text in documents_of(path, held_out, fraction):
            tokens += [*tokenizer.encode([text])[0].tolist(), tokenizer.eod_id]
    return tokens


def rows_of(tokens: list[int], seq_length: int) -> list[list[int]]:
    return [tokens[start : start + seq_length + 1] for start in range(0, len(tokens) - seq_length, seq_length)]


def token_samples(tokens, seq_length, seed, num_samples):
    """The global order of token shards."""
    rows = rows_of(tokens, seq_length)
    order = []
    for epoch in range(num_samples // len(rows) + 1):
        permutation = epoch_permutation(seed, epoch, len(rows))
        order += [rows[int(permutation([i])[0])] for i in range(len(rows))]
    return order[:num_samples]


def text_samples(paths, tokenizer_path, fraction, seq_length, seed, num_streams, num_samples):
    """The global order of text shards."""
    streams = []
    for stream in range(num_streams):
        tokens, epoch = [], 0
        while len(tokens) < (num_samples // num_streams + 2) * seq_length:
            order = shard_order(len(paths), stream, num_streams, seed, epoch)
            tokens += tokens_of([paths[i] for i in order], tokenizer_path, False, fraction)
            epoch += 1
        streams.append(rows_of(tokens, seq_length))
    return [streams[i % num_streams][i // num_streams] for i in range(num_samples)]


def decipher(permutation: Permutation, values: np.ndarray) -> np.ndarray:
    """Undo the rounds of the network, from the last to the first."""
    left_size, right_size = permutation._left_size, permutation._right_size
    left, right = values % left_size, values // left_size
    for round_index, key in reversed(list(enumerate(permutation._keys))):
        if round_index % 2 == 0:
            left = (left + left_size - mix(right, key) % left_size) % left_size
        else:
            right = (right + right_size - mix(left, key) % right_size) % right_size
    return right * left_size + left


def inverse(permutation: Permutation, images: np.ndarray) -> np.ndarray:
    """The indices whose images under the permutation are `images`."""
    return permutation._walk(images, lambda values: decipher(permutation, values))
