"""Megatron's .bin/.idx files as a source of tokens, against a plain reader of their layout."""

import os

import numpy as np
import pytest

from json_tokenizers import write_folder
from megastruct.data.tokens import megatron
from megastruct.data.tokens.megatron import find_pairs
from megastruct.errors import UserError
from megatron_files import CODES, read_pair, write_index, write_pair
from tiny_data import SEED, open_kind, train_model

SEQ_LENGTH, FRACTION, EOD = 16, 0.3, 2
IDS = {"uint8": 256, "int8": 128, "int16": 330, "int32": 330, "int64": 330, "uint16": 330}


def draw(num_documents=200, top=330, seed=0):
    """Documents of 0 to 3 sequences that end with EOD; sequences and documents may be empty."""
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(num_documents):
        document = [rng.integers(3, top, rng.integers(0, 30)).tolist() for _ in range(rng.integers(0, 4))]
        if document:
            document[-1].append(EOD)
        documents.append(document)
    return documents


def joined(document):
    return np.array([token for sequence in document for token in sequence], np.int64)


def opened(path, tokenizer_path, **keys):
    values = {"seq_length": SEQ_LENGTH, "vocab_size": 512, "seed": SEED, "validation_fraction": FRACTION}
    path = path if isinstance(path, list) else str(path)
    return open_kind("tokens", path, tokenizer_path, **{**values, **keys})


def split_of(documents):
    """(training tokens, held-out tokens) by the rule of the page on data: a hash of the document's number."""
    flags = [
        bool(h < FRACTION * 2**64)
        for h in megatron.mix(
            np.arange(len(documents), dtype=np.uint64), np.uint64(megatron.derive_seed("data", "held out"))
        ).tolist()
    ]
    return [
        np.concatenate([np.empty(0, np.int64), *(d for d, flag in zip(documents, flags, strict=True) if flag == own)])
        for own in (False, True)
    ]


def rows_of(tokens):
    count = (len(tokens) - 1) // SEQ_LENGTH
    return {tuple(tokens[k * SEQ_LENGTH : (k + 1) * SEQ_LENGTH].tolist()) for k in range(count)}, count


@pytest.mark.parametrize("dtype", IDS)
@pytest.mark.parametrize("count_documents", [False, True])
def test_every_row_of_every_dtype_is_read_once_per_epoch(tmp_path, tokenizer_path, dtype, count_documents, monkeypatch):
    monkeypatch.setattr(megatron, "_DOCUMENTS_AT_ONCE", 7)
    prefix = tmp_path / "corpus.v1_text_document"
    write_pair(prefix, draw(top=IDS[dtype]), dtype, count_documents)
    if not count_documents:
        plain = read_pair(prefix)
        assert [d.tolist() for d in plain] == [joined(document).tolist() for document in draw(top=IDS[dtype])]
    train, held_out = split_of([joined(document) for document in draw(top=IDS[dtype])])
    rows, count = rows_of(train)
    data = opened(prefix, tokenizer_path)
    described = data.describe()
    assert (described["num_train_tokens"], described["num_validation_tokens"]) == (len(train), len(held_out))
    assert described["samples_per_epoch"] == count and 0.2 < len(held_out) / (len(train) + len(held_out)) < 0.4
    reader = data.train_reader(1, 1, 0, 1)
    for _ in range(2):
        assert {tuple(next(reader).ids[0].tolist()) for _ in range(count)} == rows
    batches = data.validation_batches(4, 2, 0, 1)
    np.testing.assert_array_equal(np.concatenate([b.ids.numpy() for b in batches]).ravel(), held_out[: 4 * SEQ_LENGTH])


def test_all_ways_to_name_the_files_are_the_same(tmp_path, tokenizer_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    write_pair(folder / "b.x", draw(seed=1), "int32")
    write_pair(folder / "sub" / "a", draw(seed=2))
    for path in (folder / "b.x", folder / "b.x.idx", folder / "b.x.bin"):
        assert find_pairs(str(path)) == [(folder / "b.x.idx", folder / "b.x.bin")]
    data = opened(folder, tokenizer_path)
    parts = [split_of([*map(np.int64, read_pair(folder / name))]) for name in ("b.x", "sub/a")]
    rows, count = rows_of(np.concatenate([part[0] for part in parts]))
    reader = data.train_reader(1, 1, 0, 1)
    assert {tuple(next(reader).ids[0].tolist()) for _ in range(count)} == rows
    assert data.describe()["num_shards"] == 2


def test_resuming_and_mixtures_are_as_those_of_token_shards(tmp_path, token_folder, tokenizer_path):
    write_pair(tmp_path / "a", draw(600))
    fraction = 0.15
    path = [(tmp_path / "a", 0.25), (token_folder, 0.75)]
    data = opened(path, tokenizer_path, seq_length=32, validation_fraction=fraction)
    reader = data.train_reader(8, 4, 0, 1)
    whole = [next(reader).ids.numpy() for _ in range(20)]
    cursor = data.train_reader(8, 4, 0, 1)
    for _ in range(6):
        next(cursor)
    place = cursor.cursor()
    again = opened(path, tokenizer_path, seq_length=32, validation_fraction=fraction)
    parts = [again.train_reader(8, 2, rank, 2, place) for rank in range(2)]
    for batch in range(6, 20):  # as two ranks with micro-batches of half the size
        dealt = [next(part).ids.numpy() for part in parts]
        np.testing.assert_array_equal(np.concatenate(dealt), whole[batch])
    alone = opened(tmp_path / "a", tokenizer_path, seq_length=32, validation_fraction=fraction).train_reader(1, 1, 0, 1)
    first = [row for batch in whole[:4] for row in batch][:16]
    own = [next(alone).ids[0].numpy().tolist() for _ in range(4)]
    assert [row.tolist() for row in first if row.tolist() in own] == own
    with pytest.raises(UserError, match=r"has the validation fraction 0\.15, .* has 0\.3"):
        opened(path, tokenizer_path, seq_length=32)


def test_sequences_may_lie_anywhere(tmp_path, tokenizer_path):
    """With gaps, overlaps and in another order than in the file."""
    write_pair(tmp_path / "a", [[[*range(3, 60), EOD]], [[*range(60, 120), EOD]], [[*range(120, 200), EOD]]])
    write_index(tmp_path / "a", "uint16", [81, 30, 58], [119 * 2, 89 * 2, 0], [0, 1, 3])
    plain = [document.tolist() for document in read_pair(tmp_path / "a")]
    assert plain == [[*range(120, 200), EOD], [*range(91, 120), EOD, *range(3, 60), EOD]]
    tokens = np.concatenate([*map(np.int64, plain)])
    data = opened(tmp_path / "a", tokenizer_path, validation_fraction=0.0)
    rows, count = rows_of(tokens)
    reader = data.train_reader(1, 1, 0, 1)
    assert {tuple(next(reader).ids[0].tolist()) for _ in range(count)} == rows


def test_files_of_more_than_two_billion_tokens(tmp_path, tokenizer_path):
    """Sparse, with tokens at the ends of documents; positions do not fit into 32 bits."""
    lengths = [1_500_000_000, 1_500_000_000, 1_000]
    with open(tmp_path / "a.bin", "wb") as file:
        os.truncate(tmp_path / "a.bin", 2 * sum(lengths))
        for end in np.cumsum(lengths).tolist():
            file.seek(2 * (end - 5))
            file.write(np.array([7, 8, 9, end % 300 + 3, EOD], "<u2").tobytes())
    if os.stat(tmp_path / "a.bin").st_blocks * 512 > 1 << 20:
        pytest.skip("the file system does not hold sparse files")
    pointers = 2 * np.cumsum([0, *lengths])[:-1]
    write_index(tmp_path / "a", "uint16", lengths, pointers, [0, 1, 2, 3])
    data = opened(tmp_path / "a", tokenizer_path, validation_fraction=0.0)
    assert data.describe()["num_train_tokens"] == 3_000_001_000 > 2**31
    rows = data._sources[0].train
    for end in np.cumsum(lengths).tolist():
        row = min((end - 5) // SEQ_LENGTH, rows.num_rows - 1)
        tokens = np.zeros(3 * SEQ_LENGTH, np.int64)
        place = end - 5 - row * SEQ_LENGTH
        tokens[place : place + 5] = [7, 8, 9, end % 300 + 3, EOD]
        np.testing.assert_array_equal(rows.read(np.array([row]))[0], tokens[: SEQ_LENGTH + 1])
    reader = data.train_reader(4, 4, 0, 1)
    assert all(int(next(reader).ids.max()) <= 330 for _ in range(3))


# Mistakes ---------------------------------------------------------------------------------------------------------


def refusal(path, tokenizer_path, **keys) -> str:
    with pytest.raises(UserError) as caught:
        opened(path, tokenizer_path, **keys)
    assert len(caught.value.problems) == 1
    return str(caught.value)


@pytest.fixture
def pair(tmp_path):
    write_pair(tmp_path / "a", draw())
    return tmp_path / "a"


def test_damaged_indices_are_named(pair, tokenizer_path):
    index = pair.with_suffix(".idx")
    content = index.read_bytes()
    cases = {
        "does not begin with MMIDIDX": b"TNTIDX\x00\x00" + content,
        "its header alone takes 34": content[:20],
        "is truncated": content[:-3],
        "has version 2": content[:9] + b"\x02" + content[10:],
        "dtype code 6": content[:17] + b"\x06" + content[18:],
        "do not cover": content[:-8] + bytes(8),
        "decrease": content[:-16] + (1 << 40).to_bytes(8, "little") + content[-8:],
        "outside of a.bin": content[:34] + b"\xff\xff\xff\x7f" + content[38:],
    }
    for found, damaged in cases.items():
        index.write_bytes(damaged)
        message = refusal(pair, tokenizer_path)
        assert message.startswith(f"{index}: ") and found in message, message
    index.write_bytes(content)
    size = pair.with_suffix(".bin").stat().st_size
    os.truncate(pair.with_suffix(".bin"), size - 2)
    assert f"outside of a.bin, which has {size - 2:,} bytes" in refusal(pair, tokenizer_path)
    pair.with_suffix(".bin").unlink()
    assert "a.idx: has no a.bin beside it" in refusal(pair, tokenizer_path)


def test_a_file_of_another_tokenizer_is_refused(pair, tmp_path, tokenizer_path):
    assert "data.tokenizer: is not set" in refusal(pair, None)
    other = train_model(tmp_path / "other.model", eos_id=5, pad_id=2)
    message = refusal(pair, other)
    assert "do not end with the end-of-document id 5" in message and "data.eod_token='<pad>'" in message
    opened(pair, other, eod_token="<pad>")
    write_pair(pair, [[[*range(3, 400), EOD]]] * 3)
    assert "a.bin: contains token id 330, but" in refusal(pair, tokenizer_path)
    write_pair(pair, [[[4, -1, EOD] * 10]] * 3, "int32")
    assert "a.bin: contains token id -1, but" in refusal(pair, tokenizer_path)
    write_pair(pair, [[[3, 4]] * 8 + [[5, 6, EOD]]] * 3 + [[[3] * 20]])
    assert "1 of 4 documents that were looked at do not end" in refusal(pair, tokenizer_path)


def test_an_id_that_the_model_has_not_is_found_where_it_is_read(pair, tokenizer_path):
    write_pair(pair, [[[*[3] * 400, 340, *[3] * 400, EOD]]])
    reader = opened(pair, tokenizer_path, vocab_size=335, validation_fraction=0.0).train_reader(1, 1, 0, 1)
    with pytest.raises(UserError, match=r"a\.bin: contains token id 340 \(token 400 of the file\)"):
        for _ in range(60):
            next(reader)


def test_a_tokenizer_json_may_have_made_it(tmp_path):
    folder = write_folder(tmp_path / "gpt2", "gpt2")
    write_pair(tmp_path / "a", [[[5, 6, 7, 0]]] * 40)
    data = opened(tmp_path / "a", folder)
    assert data.tokenizer.eod_id == 0 and data.describe()["tokenizer_fingerprint"] == data.tokenizer.fingerprint


def test_every_dtype_of_ids_is_known():
    assert {code for name, code in CODES.items() if not name.startswith("float")} == set(megatron.DTYPES)
    assert set(IDS) | {"float32", "float64"} == set(CODES)
