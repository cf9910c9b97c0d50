"""The tokenizer's contract, on models with LLaMA's options and without."""

import hashlib
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megastruct.data import Tokenizer
from megastruct.data import tokenizer as tokenizer_module
from megastruct.data import words as words_module
from tiny_data import WORDS, train_model
from tools.train_tokenizer import TRAINING_OPTIONS

TEXTS = ["river stone light", "  two  spaces\nand a new line\t", "é 日本語 🙂", "</s> 1234 <s>", "\x00"]


@pytest.fixture(scope="module", params=["llama", "default", "high-eos"])
def tokenizer(request, tmp_path_factory):
    options = {
        "llama": TRAINING_OPTIONS,
        "default": {},
        "high-eos": {"bos_id": -1, "eos_id": 5, "pad_id": 0, "unk_id": 1},
    }
    return Tokenizer(train_model(tmp_path_factory.mktemp("model") / "x.model", **options[request.param]))


def test_documents_end_with_the_only_eod(tokenizer):
    for ids, document in zip(tokenizer.encode(TEXTS), tokenizer.encode_documents(TEXTS), strict=True):
        assert ids.dtype == document.dtype == np.int32
        assert document.tolist() == [*ids.tolist(), tokenizer.eod_id]
        assert tokenizer.eod_id not in ids and ids.min() >= 0 and ids.max() < tokenizer.vocab_size


def test_encoding_does_not_depend_on_the_batch(tokenizer):
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


ALPHABET = "ab iver stone\n\t.,</s>é日\u2581\u0308\u00a042-_\x00🙂"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(ALPHABET, max_size=60) | st.lists(st.sampled_from([*WORDS, "", "\n", "<s>", "e\u0301"])).map(" ".join))
def test_words_one_by_one_give_the_ids_of_the_whole(tokenizer, text):
    assert tokenizer._words is not None
    for _ in range(2):  # the second time from memory
        assert tokenizer.encode([text])[0].tolist() == tokenizer.processor.encode(text)


def test_the_memory_for_words_is_bounded(tokenizer, monkeypatch):
    monkeypatch.setattr(words_module, "_MAX_WORDS", 20)
    text = " ".join(f"w{i}" for i in range(200))
    assert tokenizer.encode([text])[0].tolist() == tokenizer.processor.encode(text)
    assert 0 < len(tokenizer._words) <= 20


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
    tokenizer = Tokenizer(train_model(tmp_path / "x.model", **options))
    assert tokenizer._words is None
    for text in TEXTS:
        assert tokenizer.encode([text])[0].tolist() == tokenizer.processor.encode(text)


def test_a_model_whose_pieces_span_words_is_not_cut_between_them(tmp_path, monkeypatch):
    path = train_model(tmp_path / "spans.model", split_by_whitespace=False, vocab_size=400)
    tokenizer = Tokenizer(path)
    monkeypatch.setattr(tokenizer_module, "_PART_CHARACTERS", 20)
    assert len(list(tokenizer._parts("river stone light " * 30))) == 1


def test_pickled_tokenizer_is_the_same(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))  # noqa: S301 - our own bytes
    assert copy.fingerprint == tokenizer.fingerprint == hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()
    assert [ids.tolist() for ids in copy.encode(TEXTS)] == [ids.tolist() for ids in tokenizer.encode(TEXTS)]


def test_llama_options_keep_every_character(tmp_path):
    tokenizer = Tokenizer(train_model(tmp_path / "llama.model", **TRAINING_OPTIONS))
    assert tokenizer.eod_id == 2
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode([text])[0]) == text
    assert tokenizer.decode(tokenizer.encode_documents(["river"])[0]) == "river"
    digits = tokenizer.encode(["42"])[0]
    assert len(digits) >= 2, "digits are split"
