"""Runs whose tokenizer is a tokenizer.json: export, import, generation, evaluation and tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from exports import exported_config
from json_tokenizers import KINDS, MARKUP, TEXTS, write_folder
from megastruct.commands import evaluate, generate, import_model, prepare
from megastruct.data import open_tokenizer
from megastruct.data.tokenizers.options import TokenizerOptions
from megastruct.errors import UserError
from megastruct.huggingface.export import Trained, export
from megastruct.huggingface.first_weights import check_source
from megastruct.huggingface.source import open_source
from megastruct.inference.load import load
from megastruct.inference.text import TextGenerator, TextStream
from megastruct.models.gpt import GPT
from megatron_files import write_pair
from tiny_data import make_texts, train_model, write_parquet
from trained import redraw, saved_run

pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=KINDS)
def folder(request: Any, tmp_path_factory: Any) -> Path:
    return write_folder(tmp_path_factory.mktemp("tokenizers") / request.param, request.param)


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: Any) -> Path:
    return write_folder(tmp_path_factory.mktemp("llama3") / "llama3", "llama3")


def config_for(tokenizer: Any, **sections: Any) -> Any:
    model = {"vocab_size": tokenizer.vocab_size + 6, "activation": "swiglu", "norm": "rmsnorm"}
    return exported_config("dense", model, **sections)


def drawn(folder: Path, options: TokenizerOptions | None = None) -> Trained:
    tokenizer = open_tokenizer(folder, "", options)
    config = config_for(tokenizer)
    return Trained(folder, 20, redraw(GPT(config, init=False).eval()), tokenizer, config)


@pytest.mark.parametrize("bos", [None, ""])
def test_an_exported_tokenizer_has_the_same_ids(folder: Path, bos: str | None, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    trained = drawn(folder, TokenizerOptions(bos_token=bos))
    export(trained, tmp_path / "out")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), trained.tokenizer
    assert any(token in text for token in MARKUP for text in TEXTS)
    for text, ids, document in zip(TEXTS, ours.encode(TEXTS), ours.encode_documents(TEXTS), strict=True):
        assert theirs(text)["input_ids"] == document[:-1].tolist(), text
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids.tolist()
        assert theirs.decode(document.tolist(), skip_special_tokens=True) == ours.decode(document)
    assert theirs.eos_token_id == theirs.pad_token_id == ours.eod_id
    assert theirs.bos_token_id == (ours.eod_id if ours.bos_id is None else ours.bos_id)
    assert json.loads((tmp_path / "out/config.json").read_text())["bos_token_id"] == theirs.bos_token_id
    again = open_tokenizer(tmp_path / "out")  # a run on the exported folder makes the same ids
    for ids, document in zip(again.encode_documents(TEXTS), ours.encode_documents(TEXTS), strict=True):
        np.testing.assert_array_equal(ids, document)


def test_an_imported_model_has_the_tokenizer_of_its_folder(llama3: Path, tmp_path: Path) -> None:
    trained = drawn(llama3)
    export(trained, tmp_path / "out")
    source = open_source(tmp_path / "out")
    check_source(source, trained.config, trained.tokenizer)
    other = open_tokenizer(write_folder(tmp_path / "gpt2", "gpt2"))
    with pytest.raises(UserError, match=r"data\.tokenizer: .* pieces have another id"):
        check_source(source, trained.config, other)
    (tmp_path / "config.yaml").write_text(
        "run: {name: imported, folder: %s}\n" % (tmp_path / "runs")
        + "\n".join(
            f"{section}: {json.dumps(values)}"
            for section, values in trained.config.model_dump(exclude_none=True).items()
            if section != "run"
        )
    )
    text = write_parquet(tmp_path / "a.parquet", make_texts(1))
    keys = ["data.kind=text", f"data.path={text}", f"data.tokenizer={tmp_path / 'out'}"]
    import_model.main([str(tmp_path / "out"), str(tmp_path / "config.yaml"), *keys])
    loaded = load(tmp_path / "runs" / "imported", "cpu")
    assert loaded.tokenizer.bos_id == trained.tokenizer.bos_id
    assert loaded.tokenizer.encode(TEXTS)[6].tolist() == trained.tokenizer.encode(TEXTS)[6].tolist()


def test_characters_are_streamed_when_they_are_whole(folder: Path) -> None:
    tokenizer = open_tokenizer(folder)
    text = " river 🙂👩‍👩‍👧 日本 é \ufffd stone"
    ids = tokenizer.encode([text])[0].tolist()
    stream = TextStream(tokenizer, tokenizer.encode(["light"])[0].tolist())
    pieces = [stream.add(token) for token in [*ids, tokenizer.eod_id]]
    assert "".join([*pieces, stream.finish()]) == stream.text
    assert stream.text.strip() == text.strip() and stream.text.count("\ufffd") == 1
    assert sum(map(bool, pieces)) > len(text) / 3


def test_a_run_generates_from_the_beginning_of_a_document(llama3: Path, tmp_path: Path, capsys: Any) -> None:
    tokenizer = open_tokenizer(llama3)
    run = saved_run(config_for(tokenizer, run={"folder": str(tmp_path), "name": "run"}), tokenizer=llama3)
    loaded = load(run, "cpu")
    assert loaded.tokenizer.fingerprint == tokenizer.fingerprint
    generate.main(
        [str(run), "--prompt", "river <|end_of_text|>", "--temperature", "0", "--max-new-tokens", "6", "--json"]
    )
    made = json.loads(capsys.readouterr().out)
    ids = [tokenizer.bos_id, *tokenizer.encode(["river <|end_of_text|>"])[0].tolist()]
    for _ in range(made["num_tokens"]):
        with torch.no_grad():
            ids.append(int(loaded.model(torch.tensor([ids]))[-1, 0, : tokenizer.vocab_size].argmax()))
    prompt = len(tokenizer.encode(["river <|end_of_text|>"])[0]) + 1
    assert made["text"] == tokenizer.decode(ids[prompt:])
    assert TextGenerator(loaded)([""], 3)[0].num_tokens >= 1


def test_a_run_is_evaluated_on_tokens_of_every_kind(llama3: Path, tmp_path: Path, capsys: Any) -> None:
    """Text, token shards and files of Megatron with the same documents: the same loss and the same bytes."""
    tokenizer = open_tokenizer(llama3)
    run = saved_run(config_for(tokenizer, run={"folder": str(tmp_path), "name": "run"}), tokenizer=llama3)
    texts = ["river 🙂 stone", "日本 café <|end_of_text|>", "light   garden\n"] * 4
    write_parquet(tmp_path / "a.parquet", texts)
    output = ["--output", str(tmp_path / "tokens"), "--tokenizer", str(llama3), "--validation-fraction", "0"]
    prepare.main(["--input", str(tmp_path / "a.parquet"), *output])
    write_pair(tmp_path / "a", [[document.tolist()] for document in tokenizer.encode_documents(texts)], "int32")
    capsys.readouterr()
    data = [str(tmp_path / name) for name in ("a.parquet", "tokens", "a.idx")]
    names = ["--data", *(f"{name}={path}" for name, path in zip("xyz", data, strict=True))]
    evaluate.main([str(run), *names, "--split", "all", "--device", "cpu", "--json"])
    found = json.loads(capsys.readouterr().out)["sources"]
    assert {values["bytes"] for values in found.values()} == {sum(len(text.encode()) for text in texts)}
    assert len({values["loss"] for values in found.values()}) == 1 and len(found) == 3


def test_tasks_begin_documents_with_their_token(llama3: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from megastruct.evaluation.lm_eval import MegastructLM

    tokenizer = open_tokenizer(llama3)
    run = saved_run(config_for(tokenizer, run={"folder": str(tmp_path), "name": "run"}), tokenizer=llama3)
    loaded = load(run, "cpu")
    requests = [("river stone", " light"), ("", "light"), ("river<|eot_id|>", " a")]
    instances = [Instance("loglikelihood", {}, request, index) for index, request in enumerate(requests)]
    for (context, continuation), (found, _) in zip(
        requests, MegastructLM(loaded).loglikelihood(instances), strict=True
    ):
        before = [tokenizer.bos_id, *tokenizer.encode([context])[0].tolist()]
        after = tokenizer.encode([context + continuation])[0].tolist()[len(before) - 1 :]
        with torch.no_grad():
            logits = log_softmax(loaded.model(torch.tensor([before + after]))[:, 0], -1)
        wanted = sum(float(logits[len(before) - 1 + k, token]) for k, token in enumerate(after))
        assert found == pytest.approx(wanted, abs=1e-4)


def test_the_tokenizer_of_a_run_is_not_exchanged(llama3: Path, tmp_path: Path) -> None:
    tokenizer = open_tokenizer(llama3)
    config = config_for(tokenizer, run={"folder": str(tmp_path), "name": "run"})
    run = saved_run(config, tokenizer=llama3)
    (run / "data.json").write_text(json.dumps({"tokenizer_fingerprint": tokenizer.fingerprint}))
    assert load(run, "cpu", tokenizer=llama3).tokenizer.eod_id == tokenizer.eod_id
    other = train_model(tmp_path / "x.model")
    with pytest.raises(UserError, match="is not the tokenizer that"):
        load(run, "cpu", tokenizer=other)
