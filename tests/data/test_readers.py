"""Both kinds of data against the slow reference, on every layout, undisturbed and resumed."""

import numpy as np
import pytest

from megastruct.data.text import stream as text_stream
from megastruct.data.tokenizers.sentence_piece import SentencePieceTokenizer
from slow_order import rows_of, text_samples, token_samples, tokens_of
from tiny_data import SEED, SEQ_LENGTH, VALIDATION_FRACTION, open_kind

GLOBAL_BATCH_SIZE = 12
NUM_STEPS = 40  # more than two epochs of either kind
LAYOUTS = [(1, 12), (1, 1), (2, 3), (3, 2), (4, 1), (6, 2)]  # (dp_size, micro_batch_size)


def open_tiny(kind, folder, tokenizer_path, **options):
    defaults = {"seq_length": SEQ_LENGTH, "vocab_size": 512, "seed": SEED, "validation_fraction": VALIDATION_FRACTION}
    return open_kind(kind, str(folder), tokenizer_path, **{**defaults, **options})


@pytest.fixture(scope="module", params=["tokens", "text", "text-3-streams", "text-1-stream"])
def opened(request, token_folder, text_folder, tokenizer_path):
    """(data, expected samples in the global order)"""
    num_samples = NUM_STEPS * GLOBAL_BATCH_SIZE
    paths = sorted(text_folder.glob("*.parquet"))
    tokens = tokens_of(paths, tokenizer_path, False, VALIDATION_FRACTION)
    assert 2 * len(rows_of(tokens, SEQ_LENGTH)) < num_samples, "the steps must cover more than two epochs"
    if request.param == "tokens":
        expected = token_samples(tokens, SEQ_LENGTH, SEED, num_samples)
        return open_tiny("tokens", token_folder, tokenizer_path), expected
    num_streams = {"text": None, "text-3-streams": 3, "text-1-stream": 1}[request.param]
    data = open_tiny("text", text_folder, tokenizer_path, num_streams=num_streams)
    arguments = (VALIDATION_FRACTION, SEQ_LENGTH, SEED, num_streams or 4, num_samples)
    return data, text_samples(paths, tokenizer_path, *arguments)


def make_readers(data, dp_size, micro_batch_size, cursor=None, start_sample=0, global_batch_size=GLOBAL_BATCH_SIZE):
    return [
        data.train_reader(global_batch_size, micro_batch_size, rank, dp_size, cursor, start_sample)
        for rank in range(dp_size)
    ]


def merged_cursor(readers):
    """The cursor of the whole run: what a rank does not know is -1, so the largest value is the known one."""
    return np.maximum.reduce([reader.cursor() for reader in readers])


def run_step(readers, dp_size, micro_batch_size, global_batch_size=GLOBAL_BATCH_SIZE):
    """One step of all ranks, its samples put back into the global order: rows of ids and the last label."""
    samples = {}
    for rank, reader in enumerate(readers):
        for micro_batch in range(global_batch_size // dp_size // micro_batch_size):
            batch = next(reader)
            assert batch.ids.shape == batch.labels.shape == (micro_batch_size, SEQ_LENGTH)
            assert str(batch.ids.dtype) == str(batch.labels.dtype) == "torch.int64"
            assert (batch.ids[:, 1:] == batch.labels[:, :-1]).all()
            for i in range(micro_batch_size):
                row = [*batch.ids[i].tolist(), int(batch.labels[i, -1])]
                samples[(micro_batch * dp_size + rank) * micro_batch_size + i] = row
    return [samples[i] for i in range(global_batch_size)]


@pytest.mark.parametrize("dp_size, micro_batch_size", LAYOUTS)
def test_order_equals_the_reference_on_every_layout(opened, dp_size, micro_batch_size):
    data, expected = opened
    readers = make_readers(data, dp_size, micro_batch_size)
    for step in range(NUM_STEPS):
        step_expected = expected[step * GLOBAL_BATCH_SIZE : (step + 1) * GLOBAL_BATCH_SIZE]
        assert run_step(readers, dp_size, micro_batch_size) == step_expected


@pytest.mark.parametrize("stop_step", [0, 1, 33])
@pytest.mark.parametrize("before, after", [((2, 3), (2, 3)), ((3, 2), (4, 1)), ((6, 2), (1, 4)), ((1, 1), (12, 1))])
def test_resume_on_another_layout_equals_the_undisturbed_order(opened, before, after, stop_step):
    data, expected = opened
    readers = make_readers(data, *before)
    for _ in range(stop_step):
        run_step(readers, *before)
    cursor = merged_cursor(readers)
    assert cursor.dtype == np.int64 and cursor.min() >= 0

    start = stop_step * GLOBAL_BATCH_SIZE
    readers = make_readers(data, *after, cursor=cursor, start_sample=start)
    for step in range(stop_step, min(stop_step + 6, NUM_STEPS)):
        step_expected = expected[step * GLOBAL_BATCH_SIZE : (step + 1) * GLOBAL_BATCH_SIZE]
        assert run_step(readers, *after) == step_expected


def test_cursor_is_the_same_on_every_layout_and_after_a_resume(opened):
    data, _ = opened
    cursors = []
    for dp_size, micro_batch_size in LAYOUTS:
        readers = make_readers(data, dp_size, micro_batch_size)
        cursor = None
        for step in range(16):
            run_step(readers, dp_size, micro_batch_size)
            if step == 7:
                cursor = merged_cursor(readers)
                start = 8 * GLOBAL_BATCH_SIZE
                readers = make_readers(data, dp_size, micro_batch_size, cursor=cursor, start_sample=start)
        cursors.append(merged_cursor(readers))
    for cursor in cursors[1:]:
        np.testing.assert_array_equal(cursor, cursors[0])


def test_global_batch_size_may_change_at_a_resume(opened):
    data, expected = opened
    readers = make_readers(data, 2, 3)
    run_step(readers, 2, 3)
    cursor = merged_cursor(readers)
    readers = make_readers(data, 5, 1, cursor=cursor, start_sample=12, global_batch_size=5)
    got = [sample for _ in range(4) for sample in run_steps_of_five(readers)]
    assert got == expected[12:32]


def run_steps_of_five(readers):
    """One step of five samples on five ranks; the start is no multiple of five."""
    batches = [next(reader) for reader in readers]
    return [[*batch.ids[0].tolist(), int(batch.labels[0, -1])] for batch in batches]


def test_cursor_inside_a_step_is_refused(opened):
    reader = opened[0].train_reader(GLOBAL_BATCH_SIZE, 3, 0, 2)
    next(reader)
    with pytest.raises(RuntimeError, match="not consumed"):
        reader.cursor()
    next(reader)
    reader.cursor()


def stop_reading_ahead(reader):
    stream = reader._streams[0, 0]
    stream._chunks = text_stream.tokenised_documents(reader._sources[0], 0, stream.cursor)


def test_resume_reads_only_the_shard_under_the_cursor(text_folder, tokenizer_path, monkeypatch):
    data = open_tiny("text", text_folder, tokenizer_path, num_streams=1)
    reader = data.train_reader(4, 4, 0, 1)
    stop_reading_ahead(reader)  # so that nothing is read in the background when reading is watched
    num_steps = 0
    while (cursor := reader.cursor())[0, 1] < 3 or cursor[0, 2] < 10:  # shards and documents lie behind
        next(reader)
        num_steps += 1

    opened, encoded = [], []
    read_patiently, encode = text_stream.read_patiently, SentencePieceTokenizer.encode_documents
    monkeypatch.setattr(text_stream, "read_patiently", lambda *args: opened.append(args) or read_patiently(*args))
    monkeypatch.setattr(
        SentencePieceTokenizer,
        "encode_documents",
        lambda self, texts: encoded.append(len(texts)) or encode(self, texts),
    )
    reader = data.train_reader(4, 4, 0, 1, cursor, 4 * num_steps)
    stop_reading_ahead(reader)
    next(reader)
    assert len(opened) == 1 and opened[0][2] == cursor[0, 2]
    assert sum(encoded) <= 64


def test_skipped_documents_are_counted_once_per_epoch(text_folder, tokenizer_path):
    data = open_tiny("text", text_folder, tokenizer_path, num_streams=1)
    reader = data.train_reader(1, 1, 0, 1)
    while reader.cursor()[0, 0] < 2:
        next(reader)
    skipped = reader.skipped_documents
    assert 3 * 6 * 2 <= skipped <= 3 * 6 * 2 + 3  # three in each of six shards, two epochs, and the one just begun


def test_training_and_validation_share_no_document(text_folder, tokenizer_path, token_folder):
    paths = sorted(text_folder.glob("*.parquet"))
    for kind, folder in (("text", text_folder), ("tokens", token_folder)):
        data = open_tiny(kind, folder, tokenizer_path)
        expected = rows_of(tokens_of(paths, tokenizer_path, True, VALIDATION_FRACTION), SEQ_LENGTH)[:12]
        for dp_size, micro_batch_size in [(1, 1), (2, 3), (3, 2), (1, 12)]:
            rows = {}
            for rank in range(dp_size):
                batches = data.validation_batches(12, micro_batch_size, rank, dp_size)
                assert len(batches) == 12 // dp_size // micro_batch_size
                for j, batch in enumerate(batches):
                    for i in range(micro_batch_size):
                        row = [*batch.ids[i].tolist(), int(batch.labels[i, -1])]
                        rows[(j * dp_size + rank) * micro_batch_size + i] = row
            assert [rows[i] for i in range(12)] == expected, kind


def test_describe_has_plain_values(opened):
    described = opened[0].describe()
    assert all(value is None or type(value) in (int, float, str) for value in described.values())
    if described["kind"] == "tokens":
        assert described["samples_per_epoch"] == (described["num_train_tokens"] - 1) // SEQ_LENGTH
