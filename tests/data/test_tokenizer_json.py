"""A tokenizer.json of every kind: the ids of transformers, special tokens, copies, and mistakes of a user's."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from json_tokenizers import KINDS, MARKUP, SPECIAL, TEXTS, write_folder
from megastruct.data import open_tokenizer
from megastruct.data.tokenizers.options import TokenizerOptions
from megastruct.data.tokenizers.words import WordCache
from megastruct.errors import UserError
from tiny_data import WORDS, train_model


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("tokenizers") / request.param, request.param)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return open_tokenizer(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def library(folder):
    opened = Tokenizer.from_file(str(folder / "tokenizer.json"))
    opened.encode_special_tokens = True
    return opened


def their_ids(theirs, text):
    return theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def test_ids_are_those_of_transformers(tokenizer, theirs):
    texts = [text for text in TEXTS if not any(token in text for token in MARKUP)]
    for _ in range(2):  # the second time from memory
        for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
            assert ids.dtype == np.int32
            assert ids.tolist() == their_ids(theirs, text), text
            assert tokenizer.decode(ids) == theirs.decode(ids)
    assert tokenizer.encode([]) == []


PARTS = st.sampled_from(
    [*WORDS, "", "a", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\x00", "\u00a0", "\u0301", "é"]
)
MORE = st.sampled_from(["1", "22", "4444", "'s", "'LL", ".", ")\n", "/", "日本", "🙂", "\x1c", "\x85", "\u2028", "<s>"])
TEXT = st.lists(PARTS | MORE | st.text(" \n\ta1.'s", max_size=6), max_size=25)


@settings(max_examples=60, deadline=None)
@given(parts=TEXT, joint=st.sampled_from(["", " ", "\n"]))
def test_words_one_by_one_give_the_ids_of_the_whole(tokenizer, library, parts, joint):
    text = joint.join(parts)
    wanted = library.encode(text, add_special_tokens=False).ids
    for _ in range(2):
        assert tokenizer.encode([text])[0].tolist() == tokenizer.encode(["river", "", text])[2].tolist() == wanted


def test_byte_level_tokenizers_remember_words(tokenizer, folder):
    assert isinstance(tokenizer._words, WordCache) == (folder.name != "llama2")
    if tokenizer._words is not None:
        tokenizer._words._ids.clear()
        tokenizer.encode(["a  b\n\nc. d\ne \n f"])
        spaces = {"\0a  b\n\nc."} if folder.name == "gpt_neox" else {"\0a ", "b\n\nc."}
        last = {"\0e \n f"} if folder.name == "gpt_neox" else {"\0e \n", "f"}
        assert set(tokenizer._words._ids) == {*spaces, "d\n", *last}


def test_documents_have_their_ends_and_no_text_makes_them(tokenizer, theirs, folder):
    begins = folder.name in ("llama2", "llama3")
    assert tokenizer.eod_id == theirs.eos_token_id
    assert tokenizer.bos_id == (theirs.bos_token_id if begins else None)
    never = {theirs.convert_tokens_to_ids(token) for token in [*SPECIAL, *MARKUP] if token in theirs.get_vocab()}
    assert len(never) > 0 and tokenizer.vocab_size == max(theirs.get_vocab().values()) + 1
    for text, ids, document in zip(TEXTS, tokenizer.encode(TEXTS), tokenizer.encode_documents(TEXTS), strict=True):
        assert document.dtype == np.int32
        assert document.tolist() == [tokenizer.bos_id][: int(begins)] + ids.tolist() + [tokenizer.eod_id]
        assert not never & set(ids.tolist())
        assert document.tolist() == [*their_ids_with_bos(theirs, text, ids), theirs.eos_token_id]
        assert tokenizer.decode(document) == tokenizer.decode(ids)
        normal = text if folder.name in ("gpt2", "llama3") else unicodedata.normalize("NFC", text)
        assert tokenizer.decode(ids) == (text.replace("\u2581", " ") if folder.name == "llama2" else normal)
        assert tokenizer.num_bytes(document) == len(tokenizer.decode(document).encode())


def their_ids_with_bos(theirs, text, ids):
    if any(token in text for token in MARKUP):
        return [*theirs("")["input_ids"], *ids.tolist()]
    return theirs(text, split_special_tokens=True)["input_ids"]


def test_bytes_of_a_character_that_is_cut_off_count(tokenizer):
    ids = tokenizer.encode(["river 🙂"])[0]
    whole = [tokenizer.num_bytes(ids[:count]) for count in range(len(ids) + 1)]
    assert whole[0] == 0 and whole[-1] == len("river 🙂".encode()) == 10
    assert whole == sorted(set(whole)) and whole[-2] == 9


def test_special_tokens_are_made_of_text_if_that_is_asked_for(folder, theirs):
    tokenizer = open_tokenizer(folder, "", TokenizerOptions(special_tokens_in_text=True))
    for text in TEXTS:
        for part in text.split(theirs.eos_token):
            assert tokenizer.encode([part])[0].tolist() == theirs(part, add_special_tokens=False)["input_ids"]
    assert tokenizer.eod_id not in tokenizer.encode([f"a{theirs.eos_token}b"])[0]
    assert tokenizer.fingerprint != open_tokenizer(folder).fingerprint


def test_copies_are_the_same_tokenizer(tokenizer, folder, tmp_path):
    for options in (TokenizerOptions(), TokenizerOptions(bos_token="", special_tokens_in_text=True)):
        original = open_tokenizer(folder, "", options)
        for name, content in original.files.items():
            (tmp_path / name).write_bytes(content)
        copies = [open_tokenizer(tmp_path), open_tokenizer(tmp_path / original.file_name)]
        copies.append(pickle.loads(pickle.dumps(original)))  # noqa: S301 - our own bytes
        for copy in copies:
            assert (copy.fingerprint, copy.eod_id, copy.bos_id) == (
                original.fingerprint,
                original.eod_id,
                original.bos_id,
            )
            for ids, ours in zip(copy.encode_documents(TEXTS), original.encode_documents(TEXTS), strict=True):
                np.testing.assert_array_equal(ids, ours)
    (tmp_path / "tokenizer.json").write_bytes((tmp_path / "tokenizer.json").read_bytes() + b" ")
    with pytest.raises(UserError, match="was replaced by another model"):
        pickle.loads(pickle.dumps(copies[0]))  # noqa: S301


@pytest.mark.parametrize("model", ["unigram", "wordlevel"])
def test_models_that_would_make_special_tokens_of_text_do_not(tmp_path, model):
    words = ["<unk>", "</s>", "\u2581", "a", "b", "<", "/", "s", ">", "\u2581ab"]
    kinds = {
        "unigram": models.Unigram([(word, -float(index)) for index, word in enumerate(words)], unk_id=0),
        "wordlevel": models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"),
    }
    library = Tokenizer(kinds[model])
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit() if model == "wordlevel" else pre_tokenizers.Metaspace()
    library.add_special_tokens(["<unk>", "</s>"])
    library.encode_special_tokens = True
    assert 1 in library.encode("ab </s>").ids
    library.save(str(tmp_path / "x.json"))
    tokenizer = open_tokenizer(tmp_path / "x.json")
    assert tokenizer.eod_id == 1
    ids = tokenizer.encode(["ab </s> ab"])[0].tolist()
    assert 1 not in ids and (ids == [0, 0, 0] if model == "wordlevel" else ids == [9, 2, 5, 6, 7, 8, 9])


def test_what_is_saved_with_a_tokenizer_changes_no_ids(tmp_path):
    """Truncation, padding and dropout."""
    folder = write_folder(tmp_path / "gpt2", "gpt2")
    wanted = open_tokenizer(folder).encode(TEXTS)
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.enable_truncation(3)
    library.enable_padding(length=50)
    library.model.dropout = 0.5
    library.save(str(folder / "tokenizer.json"))
    for ids, whole in zip(open_tokenizer(folder).encode(TEXTS), wanted, strict=True):
        np.testing.assert_array_equal(ids, whole)


# The token that ends a document ----------------------------------------------------------------------------------


def refusal(path, where="data.tokenizer", options=None) -> str:
    with pytest.raises(UserError) as caught:
        open_tokenizer(path, where, options)
    assert len(caught.value.problems) == 1
    return str(caught.value)


@pytest.fixture
def llama3(tmp_path):
    return write_folder(tmp_path / "llama3", "llama3")


def test_the_end_is_what_the_folder_says(llama3):
    def opened(name, values):
        for file in llama3.glob("*config.json"):
            file.unlink()
        (llama3 / name).write_text(json.dumps(values))
        return open_tokenizer(llama3)

    ids = open_tokenizer(llama3).pieces()
    assert opened("tokenizer_config.json", {"eos_token": {"content": "<|eot_id|>"}}).eod_id == ids["<|eot_id|>"]
    assert opened("special_tokens_map.json", {"eos_token": "<|eot_id|>"}).eod_id == ids["<|eot_id|>"]
    (llama3 / "special_tokens_map.json").unlink()
    assert opened("generation_config.json", {"eos_token_id": ids["<|eot_id|>"]}).eod_id == ids["<|eot_id|>"]
    assert opened("config.json", {"eos_token_id": [ids["<|eot_id|>"]]}).eod_id == ids["<|eot_id|>"]
    assert opened("config.json", {"eos_token_id": [ids["<|eot_id|>"], 1]}).eod_id == ids["<|end_of_text|>"]
    assert opened("config.json", {}).bos_id == ids["<|begin_of_text|>"]
    assert opened("tokenizer_config.json", {"add_bos_token": False}).bos_id is None
    chosen = open_tokenizer(llama3, "", TokenizerOptions("<|eot_id|>", "<|end_of_text|>"))
    assert (chosen.eod_id, chosen.bos_id) == (ids["<|eot_id|>"], ids["<|end_of_text|>"])


def test_the_token_of_unknown_text_ends_no_document(tmp_path):
    """Not by a suggestion either. Where all bytes are tokens it stands for nothing, and may."""
    words = {"[UNK]": 0, "[SEP]": 1, "a": 2}
    library = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(["[UNK]"])
    library.save(str(tmp_path / "a.json"))
    assert "add a special token to" in refusal(tmp_path / "a.json")
    assert "'[UNK]' is what" in refusal(tmp_path / "a.json", options=TokenizerOptions("[UNK]"))
    library.add_special_tokens(["[SEP]"])
    library.save(str(tmp_path / "b.json"))
    assert "--eod-token '[SEP]'" in refusal(tmp_path / "b.json", "--tokenizer")
    assert "'[UNK]' is what" in refusal(tmp_path / "b.json", options=TokenizerOptions("[SEP]", "[UNK]"))
    every_byte = {symbol: index for index, symbol in enumerate(["<end>", *pre_tokenizers.ByteLevel.alphabet()])}
    bytes_ = Tokenizer(models.BPE(every_byte, [], unk_token="<end>"))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.add_special_tokens(["<end>"])
    bytes_.save(str(tmp_path / "c.json"))
    opened = open_tokenizer(tmp_path / "c.json", "", TokenizerOptions("<end>"))
    assert opened.eod_id == 0 and 0 not in opened.encode(["<end> \u2603\U0010fffd"])[0]


def test_an_end_that_cannot_be_told_is_asked_for(tmp_path):
    library = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    library.save(str(tmp_path / "x.json"))
    assert "add a special token to" in refusal(tmp_path / "x.json")
    library.add_tokens(["a-word"])
    library.add_special_tokens(["<|stop|>"])
    library.save(str(tmp_path / "x.json"))
    message = refusal(tmp_path / "x.json")
    assert message.startswith("data.eod_token: cannot be told from") and "data.eod_token='<|stop|>'" in message
    assert "--eod-token '<|stop|>'" in refusal(tmp_path / "x.json", "--tokenizer")
    options = TokenizerOptions("<|stop|>")
    assert open_tokenizer(tmp_path / "x.json", "", options).eod_id == 3
    for wrong, found in (("a", "'a' is an ordinary word of"), ("c", "'c' is no token of")):
        message = refusal(tmp_path / "x.json", options=TokenizerOptions(wrong))
        assert found in message and "data.eod_token='<|stop|>'" in message
    message = refusal(tmp_path / "x.json", options=TokenizerOptions("<|stop|>", "c"))
    assert "data.bos_token: 'c' is no token of" in message and "data.bos_token=''" in message


def test_sentencepiece_has_the_same_options(tmp_path):
    path = train_model(tmp_path / "x.model", control_symbols=["<end>"], user_defined_symbols=["<word>"])
    usual, other = open_tokenizer(path), open_tokenizer(path, "", TokenizerOptions("<end>", "<s>"))
    assert (usual.eod_id, usual.bos_id) == (2, None)
    assert (other.eod_id, other.bos_id) == (other.processor.piece_to_id("<end>"), 1)
    assert usual.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest() != other.fingerprint
    assert list(usual.files) == ["tokenizer.model"]
    (document,) = other.encode_documents(["a<end> <s> </s>"])
    ids = other.encode(["a<end> <s> </s>"])[0].tolist()
    assert document.tolist() == [1, *ids, other.eod_id] and not {1, 2, other.eod_id} & set(ids)
    (tmp_path / "copy").mkdir()
    for name, content in other.files.items():
        (tmp_path / "copy" / name).write_bytes(content)
    copy = open_tokenizer(tmp_path / "copy")
    assert (copy.fingerprint, copy.bos_id) == (other.fingerprint, 1)
    message = refusal(path, options=TokenizerOptions("<word>"))
    assert "data.eod_token: '<word>' is no control symbol" in message and "<s>, </s>, <end>" in message
    assert "SentencePiece makes no control symbol of text" in refusal(
        path, options=TokenizerOptions(special_tokens_in_text=True)
    )
    without = train_model(tmp_path / "y.model", eos_id=-1, control_symbols=["<end>"])
    assert "data.eod_token='<s>'" in refusal(without)
    assert open_tokenizer(without, "", TokenizerOptions("<end>")).eod_id > 0


# Mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "is empty"),
        (b"{", "is no tokenizer.json"),
        (b"[1]", "is no tokenizer.json"),
        (b'{"a": 1}', "is no tokenizer.json"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}}, "added_tokens": 3}', "is no tokenizer.json"),
        (
            b'{"model": {"type": "X", "vocab": {}}, "added_tokens": [{"content": "</s>", "id": 1, "special": 1}]}',
            "is no tokenizer.json that the library tokenizers reads",
        ),
    ],
)
def test_a_wrong_json_is_one_message(tmp_path, content, found):
    (tmp_path / "tokenizer.json").write_bytes(content)
    message = refusal(tmp_path)
    assert message.startswith(f"data.tokenizer: {tmp_path / 'tokenizer.json'} ") and found in message


def test_a_damaged_file_beside_it_is_named(llama3):
    (llama3 / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json: cannot be read as a JSON object" in refusal(llama3)
    open_tokenizer(llama3, "", TokenizerOptions("<|end_of_text|>", ""))


def test_a_folder_of_a_slow_tokenizer_is_converted_by_the_command_in_the_message(tmp_path):
    folder = write_folder(tmp_path / "slow", "gpt2")
    wanted = open_tokenizer(folder).encode(TEXTS)
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.model.save(str(folder))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    message = refusal(folder)
    assert "has no tokenizer.json and no tokenizer.model, only merges.txt, vocab.json" in message
    command = message[message.index("python -c ") + len('python -c "') : message.rindex('"')]
    exec(command, {})
    for ids, whole in zip(open_tokenizer(f"{folder}-fast").encode(TEXTS), wanted, strict=True):
        np.testing.assert_array_equal(ids, whole)
    shutil.rmtree(folder)
    folder.mkdir()
    assert "give the file of a tokenizer" in refusal(folder)


def test_a_tokenizer_of_tiktoken_is_recognised(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    assert "give the tokenizer.json of the same model" in refusal(tmp_path)


def test_one_process_encodes_with_one_thread(llama3):
    """Whatever the environment says: there are as many processes as the user wants cores to be used."""
    script = (
        "import sys, psutil; from megastruct.data.tokenizers.open import open_tokenizer;"
        "before = psutil.Process().num_threads(); open_tokenizer(sys.argv[1])._encode(['river stone'] * 64);"
        "print(psutil.Process().num_threads() - before)"
    )
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "4"}
    command = [sys.executable, "-c", script, str(llama3)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "0\n"
