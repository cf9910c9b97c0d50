"""What the tests of the data room are made of: documents, broken ones among them, files of them, a tokenizer."""

import io
import random

import pyarrow as pa
import pyarrow.parquet as pq
import sentencepiece

from megastruct.config.data import DataConfig
from megastruct.data import open_data
from megastruct.data.options import DataOptions

VALIDATION_FRACTION = 0.15
SEED = 1234
SEQ_LENGTH = 32
NUM_SHARDS = 6
WORDS = ["river", "stone", "light", "garden", "winter", "letter", "market", "silver", "engine", "paper", "café", "42"]


def make_texts(shard: int) -> list:
    """Documents of 3 to 25 words, in the first shard more than are read at once; some are null, empty or blank."""
    rng = random.Random(shard)
    num_documents = 150 if shard == 0 else 48
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 25))) + "." for _ in range(num_documents)]
    texts[7 + shard], texts[20], texts[41] = None, "", " \n\t "
    return texts


def write_parquet(path, texts, column="content", row_group_size=25):
    array = texts if isinstance(texts, pa.Array) else pa.array(texts, pa.string())
    table = pa.table({column: array, "url": [f"http://x/{i}" for i in range(len(array))]})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def invalid_utf8(*contents: bytes) -> pa.Array:
    """A column that says it is text and holds these bytes."""
    array = pa.array(contents, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(array), array.buffers())


def open_kind(kind, path, tokenizer_path, *, seq_length, vocab_size, seed, cache_folder=None, **keys):
    """Open data by keys of the config's section `data`; text is tokenised by a thread if they do not say otherwise."""
    if isinstance(path, list):
        path = [{"path": str(name), "weight": weight} for name, weight in path]
    tokenizer = None if tokenizer_path is None else str(tokenizer_path)
    data = DataConfig(kind=kind, path=path, tokenizer=tokenizer, **{"num_workers": 0, **keys})
    return open_data(DataOptions(data, seq_length, vocab_size, seed, cache_folder))


def train_model(path, more_lines=(), **options):
    lines = [line for shard in range(NUM_SHARDS) for line in make_texts(shard) if line and line.strip()]
    lines += more_lines
    model = io.BytesIO()
    defaults = {"vocab_size": 330, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, **{**defaults, **options}
    )
    path.write_bytes(model.getvalue())
    return path
