"""The tokenizer's contract, on models with LLaMA's options and without."""

import hashlib
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megastruct.data import open_tokenizer
from megastruct.data.preparation.tokenizer import TRAINING_OPTIONS
from megastruct.data.tokenizers import sentence_piece as tokenizer_module
from megastruct.data.tokenizers import words as words_module
from tiny_data import WORDS, train_model

TEXTS = ["river stone light", "  two  spaces\nand a new line\t", "é 日本語 🙂", "</s> 1234 <s>", "\x00"]


@pytest.fixture(scope="module", params=["llama", "default", "high-eos"])
def tokenizer(request, tmp_path_factory):
    options = {
        "llama": TRAINING_OPTIONS,
        "default": {},
        "high-eos": {"bos_id": -1, "eos_id": 5, "pad_id": 0, "unk_id": 1},
    }
    return open_tokenizer(train_model(tmp_path_factory.mktemp("model") / "x.model", **options[request.param]))


def test_documents_end_with_the_only_eod(tokenizer):
    for ids, document in zip(tokenizer.encode(TEXTS), tokenizer.encode_documents(TEXTS), strict=True):
        assert ids.dtype == document.dtype == np.int32
        assert document.tolist() == [*ids.tolist(), tokenizer.eod_id]
        assert tokenizer.eod_id not in ids and ids.min() >= 0 and ids.max() < tokenizer.vocab_size


def test_encoding_does_not_depend_on_the_batch(tokenizer, monkeypatch):
    monkeypatch.setattr(words_module, "_CHARACTERS_AT_ONCE", 25)
    monkeypatch.setattr(words_module, "_WORDS_AT_ONCE", 2)
    together = tokenizer.encode(TEXTS)
    for text, ids in zip(TEXTS, together, strict=True):
        np.testing.assert_array_equal(tokenizer.encode([text])[0], ids)
    assert tokenizer.encode([]) == []


def test_long_texts_are_cut_where_it_changes_nothing(tokenizer, monkeypatch):
    """Parts of 20 characters give the ids of the whole; where there is no space they are cut at 50."""
    text = "river stone  light\n42 garden. winter a b é letter, x market silver engine paper 1 2 3 café river " * 30
    whole, run = tokenizer.encode([text, "w" * 170])
    monkeypatch.setattr(tokenizer_module, "_PART_CHARACTERS", 20)
    monkeypatch.setattr(tokenizer_module, "_MAX_PART_CHARACTERS", 50)
    assert len(list(tokenizer._parts(text))) > 40
    ids, cut_run, short = tokenizer.encode([text, "w" * 170, "river"])
    np.testing.assert_array_equal(ids, whole)
    np.testing.assert_array_equal(short, tokenizer.encode(["river"])[0])
    assert [len(part) for part in tokenizer._parts("w" * 170)] == [50, 50, 50, 20]
    assert tokenizer.decode(cut_run).replace(" ", "") == tokenizer.decode(run) == "w" * 170


ALPHABET = "ab iver stone\n\t\r.,</s>é日\u2581\u0308\u00a042-_\x00🙂"
LINES = st.tuples(st.sampled_from(["", " ", "  ", "    ", "\t", "\u2581"]), st.sampled_from([*WORDS, "", "a", "<s>"]))
TEXT = (
    st.text(ALPHABET, max_size=60)
    | st.text(" \u2581\n\ta", max_size=12)
    | st.lists(st.sampled_from([*WORDS, "", " ", "\n", "\t", "\r\n", "\u2581", "<s>", "e\u0301"])).map(" ".join)
    | st.lists(LINES.map("".join)).map("\n".join)
)
INDENTED = ["    river  stone", "\t\tlight", "  garden,", "        winter"] * 50


@pytest.fixture(scope="module")
def models_of_indented_lines(tmp_path_factory):
    """Of LLaMA's kind, with pieces of several spaces, and with symbols of spaces, line feeds and tabs."""
    folder = tmp_path_factory.mktemp("models")
    symbols = [[], ["\n"], ["\n\n", "\t", "\u2581\u2581"], ["\n\n", "a\tb", "\r\n", "\u2581ri", "er"]]
    options = TRAINING_OPTIONS | {"vocab_size": 320}
    paths = [
        train_model(folder / f"{number}.model", INDENTED, **options, user_defined_symbols=defined)
        for number, defined in enumerate(symbols)
    ]
    return [open_tokenizer(path) for path in paths]


def assert_same_ids(tokenizer, text):
    assert tokenizer._words is not None
    for _ in range(2):  # the second time from memory
        for ids in (tokenizer.encode([text])[0], tokenizer.encode(["river", "", text])[2]):
            assert ids.tolist() == tokenizer.processor.encode(text)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT)
def test_words_one_by_one_give_the_ids_of_the_whole(tokenizer, text):
    assert_same_ids(tokenizer, text)


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_so_do_words_of_lines_and_of_runs_of_spaces(models_of_indented_lines, text):
    for model in models_of_indented_lines:
        assert_same_ids(model, text)


def test_lines_are_cut_where_no_piece_spans_them(models_of_indented_lines):
    assert all(model.processor.piece_to_id("\u2581\u2581") > 2 for model in models_of_indented_lines)
    text = "river\n    stone  light\n\nriver\n    stone"
    remembered = []
    for model in models_of_indented_lines:
        words = words_module.words_of(model.processor)
        words.encode([text])
        remembered.append(set(words._ids))
    spaces = "\u2581" * 3
    lines = {"river", "\n", spaces + "stone", "\u2581light", "\nriver"}
    assert remembered[0] == remembered[1] == lines
    # With a piece of two line feeds the words on either side of one are a single word, as they always were.
    assert remembered[2] == remembered[3] == {"river\n", spaces + "stone", "\u2581light\n\nriver\n"}


@pytest.mark.parametrize("has_space", [True, False])
def test_unknown_characters_next_to_each_other_are_one_id(tmp_path, has_space):
    """Of a model that does not fall back to bytes; the line feed is one of them, and the space if it is no piece."""
    path = train_model(tmp_path / "x.model", **TRAINING_OPTIONS | {"byte_fallback": False, "vocab_size": 80})
    if not has_space:
        piece, other = (b"\x0a\x03" + character.encode() for character in "\u2581\u2582")
        assert path.read_bytes().count(piece) == 1
        path.write_bytes(path.read_bytes().replace(piece, other))
    tokenizer = open_tokenizer(path)
    assert (tokenizer._words is not None) == has_space
    for text in ["日\n本", "日\n", "river\n\nstone", "日 本 語", "日  本", "~ ~ ~", "river ~ stone"]:
        assert tokenizer.encode([text])[0].tolist() == tokenizer.processor.encode(text)
        assert (len(tokenizer.processor.encode("~ ~ ~")) == 1) != has_space


def test_the_memory_for_words_is_bounded(tokenizer, monkeypatch):
    monkeypatch.setattr(words_module, "_MAX_WORDS", 20)
    for start in range(0, 200, 5):
        assert_same_ids(tokenizer, " ".join(f"w{i}" for i in range(start, start + 5)) + " " + "long" * 10)
        assert 0 <= len(tokenizer._words) <= 20
        assert all(len(word) < 40 for word in tokenizer._words._ids)


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram", "vocab_size": 290},
        {"add_dummy_prefix": False},
        {"split_by_whitespace": False, "vocab_size": 400},
        {"user_defined_symbols": ["river stone"]},
    ],
)
def test_other_models_are_encoded_as_a_whole(tmp_path, options):
    """Of them the ids of a word may depend on its neighbours, or on whether it is the first."""
    tokenizer = open_tokenizer(train_model(tmp_path / "x.model", **options))
    assert tokenizer._words is None
    for text in TEXTS:
        assert tokenizer.encode([text])[0].tolist() == tokenizer.processor.encode(text)


def test_a_model_whose_pieces_span_words_is_not_cut_between_them(tmp_path, monkeypatch):
    path = train_model(tmp_path / "spans.model", split_by_whitespace=False, vocab_size=400)
    tokenizer = open_tokenizer(path)
    monkeypatch.setattr(tokenizer_module, "_PART_CHARACTERS", 20)
    assert len(list(tokenizer._parts("river stone light " * 30))) == 1


def test_pickled_tokenizer_is_the_same(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))  # noqa: S301 - our own bytes
    assert copy.fingerprint == tokenizer.fingerprint == hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()
    assert [ids.tolist() for ids in copy.encode(TEXTS)] == [ids.tolist() for ids in tokenizer.encode(TEXTS)]


def test_llama_options_keep_every_character(tmp_path):
    tokenizer = open_tokenizer(train_model(tmp_path / "llama.model", **TRAINING_OPTIONS))
    assert tokenizer.eod_id == 2
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode([text])[0]) == text
    assert tokenizer.decode(tokenizer.encode_documents(["river"])[0]) == "river"
    digits = tokenizer.encode(["42"])[0]
    assert len(digits) >= 2, "digits are split"
