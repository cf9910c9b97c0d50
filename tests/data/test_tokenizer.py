"""The tokenizer's contract, on models with LLaMA's options and without."""

import hashlib
import pickle

import numpy as np
import pytest

from megastruct.data import Tokenizer
from tiny_data import train_model
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
