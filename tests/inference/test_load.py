"""Loading run folders and checkpoint folders, the forms of linears, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import megastruct
from megastruct.inference import crossover
from megastruct.inference.crossover import Crossover
from megastruct.inference.forms import FasterLinear, MergedLinear, structured_linears
from tiny_data import train_model
from trained import SIZES, model_config, redraw, saved_run

IDS = torch.arange(2 * 48).view(2, 48) % 330
# Largest difference of logits, as a share of the largest logit: merged against structured.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "megastruct" / "crossover.json"


@pytest.mark.parametrize("structure", SIZES)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_merged_and_structured_agree(tmp_path: Path, structure: str, dtype: torch.dtype) -> None:
    run = saved_run(model_config(tmp_path, structure))
    exact = redraw(megastruct.GPT(model_config(tmp_path, structure)))(IDS)
    logits = {
        form: megastruct.load(run, "cpu", dtype, form=form).model(IDS) for form in ("structured", "merged", "auto")
    }
    for form, found in logits.items():
        assert found.dtype == dtype
        assert (found - exact).abs().max() <= BOUNDS[dtype] * exact.abs().max(), form
    if dtype == torch.float32:
        assert torch.equal(logits["structured"], exact)


def test_auto_takes_the_faster_form(tmp_path: Path) -> None:
    run = saved_run(model_config(tmp_path))
    model = megastruct.load(run, "cpu", form="auto").model
    linears = [module for module in model.modules() if isinstance(module, FasterLinear)]
    assert len(linears) == 2 * 4
    linear = linears[0]
    linear.crossover = Crossover((True, True, False, True))
    x = torch.randn(9, 1, 16)
    for tokens, merged in ((1, True), (2, True), (4, False), (5, False), (6, True), (9, True)):
        wanted = linear.merged(x[:tokens]) if merged else linear.structured(x[:tokens])
        assert torch.equal(linear(x[:tokens]), wanted)


def test_the_crossover_is_measured_once(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = saved_run(model_config(tmp_path))
    megastruct.load(run, "cpu", form="auto")
    stored = json.loads(own_cache.read_text())
    assert len(stored) == 2 and all(len(faster) == 9 for faster in stored.values())  # fc1 and fc2; 1 to 256 tokens
    assert all("lowrank" in key and "rank=8" in key and "float32" in key for key in stored)

    def refuse(*arguments: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(crossover, "measure", refuse)
    megastruct.load(run, "cpu", form="auto")
    own_cache.write_text("not JSON")
    with pytest.raises(AssertionError, match="measured again"):
        megastruct.load(run, "cpu", form="auto")


def test_merged_keeps_no_factors(tmp_path: Path) -> None:
    model = megastruct.load(saved_run(model_config(tmp_path)), "cpu", form="merged").model
    assert not list(structured_linears(model))
    assert sum(isinstance(module, MergedLinear) for module in model.modules()) == 2 * 4


def test_a_checkpoint_folder_is_loaded_as_such(tmp_path: Path) -> None:
    config = model_config(tmp_path)
    run = saved_run(config, 10)
    saved_run(config, 20)
    assert megastruct.load(run, "cpu").step == 20
    loaded = megastruct.load(run / "checkpoints" / "step_00000010", "cpu")
    assert loaded.step == 10 and loaded.config == config
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(["river stone"])[0].tolist()) == "river stone"


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(megastruct.UserError) as caught:
        megastruct.load(*arguments, **options)
    assert isinstance(caught.value, megastruct.MegastructError)
    return str(caught.value)


def test_what_is_refused(tmp_path: Path) -> None:
    run = saved_run(model_config(tmp_path))
    checkpoint = run / "checkpoints" / "step_00000020"
    assert "does not exist" in refusal(tmp_path / "nothing")
    assert "no config.yaml" in refusal(tmp_path)
    assert "--form" in refusal(run, form="dense")
    assert "--device" in refusal(run, "cuda:77")
    assert "--device" in refusal(run, "toaster")
    assert "its tensors have no values" in refusal(run, "meta")
    assert "--dtype" in refusal(run, "cpu", "bfloat17") and "--dtype" in refusal(run, "cpu", torch.int8)
    assert "None is no path" in refusal(None)
    for record in ("[]", "null", "{"):
        (run / "data.json").write_text(record)
        assert megastruct.load(run, "cpu", "bfloat16").model.embedding.weight.dtype == torch.bfloat16
    with pytest.raises(megastruct.UserError, match="dict instead of a Config"):
        megastruct.GPT({})  # type: ignore[arg-type]
    train_model(tmp_path / "large.model", vocab_size=400, more_lines=[f"word{i} is number {i}" for i in range(300)])
    assert "400 pieces, but the model has 330 words" in refusal(run, tokenizer=tmp_path / "large.model")
    (run / "tokenizer.model").rename(run / "away")
    assert "tokenizer.model" in refusal(run)
    (run / "away").rename(run / "tokenizer.model")
    part = next(path for path in checkpoint.iterdir() if path.suffix == ".distcp")
    part.write_bytes(part.read_bytes()[:-4] + b"oops")
    assert "damaged" in refusal(run) and "damaged" in refusal(checkpoint)
    part.unlink()
    assert "damaged" in refusal(run)
    for path in [*checkpoint.iterdir()]:
        path.unlink()
    checkpoint.rmdir()
    assert "has no complete checkpoint" in refusal(run)


def test_a_config_with_fewer_layers_is_refused(tmp_path: Path) -> None:
    run = saved_run(model_config(tmp_path))
    text = (run / "config.yaml").read_text()
    layers = int(re.findall("num_layers: (.*)", text)[0])
    (run / "config.yaml").write_text(text.replace(f"num_layers: {layers}", f"num_layers: {layers - 1}"))
    assert f"weights that the model of config.yaml lacks, such as master.blocks.{layers - 1}." in refusal(run)


def test_a_guided_checkpoint_is_refused_unless_asked_for(tmp_path: Path) -> None:
    config = model_config(tmp_path, guided={"schedule": "fixedstep", "levels": 2})
    run = saved_run(config, 4)
    assert "inside the guided phase (step 4 of 10)" in refusal(run)
    assert megastruct.load(run, "cpu", allow_guided=True).step == 4
