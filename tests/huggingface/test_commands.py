"""The programs as users call them: what they refuse, what they leave behind, and the commands of the documentation."""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from exports import exported_config, llama_tokenizer
from megastruct.commands import export as export_command
from megastruct.commands import import_model
from megastruct.config.activations import ACTIVATIONS, register_activation
from megastruct.config.load import dump_config
from megastruct.config.schema import Config
from megastruct.data import open_data
from megastruct.data.options import DataOptions
from megastruct.errors import UserError
from megastruct.huggingface.export import check_form
from megastruct.huggingface.structured import STRUCTURES as IN_THE_MODELING_FILE
from megastruct.huggingface.tokenizer import write_tokenizer
from megastruct.inference.load import load_model
from megastruct.models.loss import cross_entropy
from megastruct.planning.cost import total_parameters
from megastruct.planning.steps import total_training_flops
from megastruct.structures import STRUCTURES
from processes import ROOT, environment, start
from tiny_data import make_texts, train_model, write_parquet
from trained import saved_run

SWIGLU, RMS = {"activation": "swiglu"}, {"norm": "rmsnorm"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: Any) -> Path:
    return llama_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture
def run(tokenizer: Path, tmp_path: Path) -> Path:
    return saved_run(exported_config("lowrank", run={"folder": str(tmp_path / "runs")}), 20, tokenizer)


def refused(capsys: Any, *arguments: Any) -> str:
    """The message of an export that ends with exit code 2."""
    with pytest.raises(SystemExit) as exit_:
        export_command.main([str(argument) for argument in arguments])
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_the_folder_has_the_permissions_of_new_files(run: Path, tmp_path: Path, capsys: Any) -> None:
    before = os.umask(0o027)
    try:
        (tmp_path / "out").mkdir()  # an empty folder may be there
        export_command.main([str(run), str(tmp_path / "out"), "--form", "structured", "--dtype", "bfloat16"])
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes["model.safetensors"] == 0o640 and set(modes.values()) == {0o640}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert sorted(modes) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_megastruct.py",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    printed = capsys.readouterr().out
    assert "MegastructForCausalLM" in printed and "bfloat16" in printed and "step 20" in printed


def test_the_model_card_is_filled_from_the_run(run: Path, tmp_path: Path) -> None:
    config = exported_config("lowrank", run={"folder": str(tmp_path / "runs")})
    records = [{"step": 10, "loss": 5.0}, {"step": 20, "loss": 4.25, "validation_loss": 4.5}, {"step": 30, "loss": 1.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step"')
    (run / "environment.json").write_text(json.dumps({"torch": "2.9", "git_commit": "abc123"}))
    (run / "data.json").write_text(json.dumps({"kind": "tokens", "num_train_tokens": 123456, "num_shards": None}))
    export_command.main([str(run), str(tmp_path / "out")])
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for row in (
        "| class | `Starcoder2ForCausalLM` |",
        f"| parameters as trained | {total_parameters(config):,} |",
        "| feed-forward layers | lowrank (rank 8), multiplied out to dense |",
        "| steps | 20 of 20 |",
        "| tokens | 20,480 |",
        "| training loss | 4.2500 |",
        "| validation loss | 4.5000 |",
        f"| training FLOPs | {total_training_flops(config):.3e} (matrix products, forward and backward) |",
        "| data | `unused`; 123,456 training tokens |",
        "| trained with | torch 2.9, commit abc123 |",
    ):
        assert row in card.splitlines(), row
    assert "also across documents" in card and "trained from scratch" in card and "guided phase" not in card


def test_an_output_that_is_not_empty_is_refused(run: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").write_text("mine")
    assert "is not empty" in refused(capsys, run, tmp_path / "out")
    assert "is a file" in refused(capsys, run, tmp_path / "out/file")
    assert (tmp_path / "out/file").read_text() == "mine"


def test_the_current_folder_is_refused_and_a_link_is_followed(run: Path, tmp_path: Path, capsys: Any, monkeypatch: Any):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "is the current folder" in refused(capsys, run, ".")
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    export_command.main([str(run), "../link"])
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there/model.safetensors").exists()


def test_a_run_without_a_checkpoint_and_one_in_its_guided_phase_are_refused(tokenizer, tmp_path, capsys) -> None:
    config = exported_config(run={"folder": str(tmp_path / "runs")}, guided={"schedule": "fixedstep"})
    run = saved_run(config, 5, tokenizer)
    assert "--allow-guided" in refused(capsys, run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_command.main([str(run), str(tmp_path / "out"), "--allow-guided"])
    assert (tmp_path / "out/model.safetensors").exists()
    assert "inside the guided phase (step 5 of 10)" in (tmp_path / "out/README.md").read_text()
    [file] = (run / "checkpoints/step_00000005").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-1])
    assert "damaged" in refused(capsys, run, tmp_path / "other")
    (run / "checkpoints").rename(run / "moved")
    assert "no complete checkpoint" in refused(capsys, run, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_tokenizer_that_would_give_other_ids_is_refused(run: Path, tmp_path: Path, capsys: Any) -> None:
    normalising = train_model(tmp_path / "nfkc.model")
    message = refused(capsys, run, tmp_path / "out", "--tokenizer", normalising)
    assert "transformers would give other ids" in message and "train_tokenizer.py" in message
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_a_disk_that_fills_leaves_nothing_behind(run: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the system refuses the same write."""
    command = [sys.executable, ROOT / "tools/export.py", run, tmp_path / "out"]
    limited = ["bash", "-c", 'ulimit -f 24 && exec "$@"', "bash", *map(str, command)]
    done = subprocess.run(limited, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and "could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_what_a_form_cannot_hold_is_refused_with_the_keys() -> None:
    with pytest.raises(UserError, match=r"model\.norm = layernorm, model\.activation = swiglu and model\.bias = true"):
        check_form(exported_config(model=SWIGLU), "merged")
    with pytest.raises(UserError, match="9 heads cannot be filled up"):
        odd = {"num_attention_heads": 9, "num_key_value_heads": 9, "head_dim": 4, "hidden_size": 8}
        check_form(exported_config("dense", RMS | odd), "merged")
    check_form(exported_config(model=SWIGLU), "structured")


def test_activations_and_structures_of_other_packages(monkeypatch: Any) -> None:
    register_activation(activation := type(ACTIVATIONS["gelu"])("own", "megastruct.layers.activations:gelu"))
    try:
        own = exported_config(model={"activation": "own"})
        for form in ("merged", "structured"):
            with pytest.raises(UserError, match=r"model\.activation = own"):
                check_form(own, form)
    finally:
        del ACTIVATIONS[activation.name]
    config = exported_config("lowrank")
    other = config.model_copy(update={"ffn": config.ffn.model_copy(update={"structure": "kronecker"})})
    check_form(other, "merged")
    with pytest.raises(UserError, match=r"ffn\.structure = kronecker"):
        check_form(other, "structured")
    assert set(IN_THE_MODELING_FILE) <= set(STRUCTURES)


def test_another_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    class Bytes:
        path, vocab_size, eod_id = Path("bytes"), 256, 0

    with pytest.raises(UserError, match=r"only SentencePiece models and tokenizer\.json can be"):
        write_tokenizer(tmp_path, Bytes(), 8)  # type: ignore[arg-type]


def section_commands(title: str) -> list[list[str]]:
    """The shell commands of a section of the page."""
    page = (ROOT / "docs/use_the_model.md").read_text()
    section = page.split(f"\n## {title}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line]


@pytest.fixture
def text_config(tokenizer: Path, tmp_path: Path) -> tuple[Path, Config]:
    """The config of a run of two steps on text, and its file."""
    write_parquet(tmp_path / "text.parquet", make_texts(0))
    data = {"kind": "text", "path": str(tmp_path / "text.parquet"), "tokenizer": str(tokenizer), "num_workers": 0}
    config = exported_config(
        "lowrank",
        run={"folder": str(tmp_path / "runs"), "name": "quickstart"},
        data=data,
        training={"num_steps": 2, "seq_length": 32},
        logging={"interval_steps": 1, "progress_bar": False},
    )
    (tmp_path / "quickstart.yaml").write_text(dump_config(config))
    return tmp_path / "quickstart.yaml", config


def test_the_commands_of_the_page(text_config: tuple[Path, Config], tokenizer: Path, tmp_path: Path, capsys) -> None:
    """Export, load in transformers, import at a smaller rank, and train: the first loss is that of the weights."""
    path, config = text_config
    saved_run(config, 2, tokenizer)
    places = {
        "runs/quickstart": str(tmp_path / "runs/quickstart"),
        "configs/run/quickstart.yaml": str(path),
        "exported": str(tmp_path / "exported"),
        "exported_structured": str(tmp_path / "exported_structured"),
    }
    programs = {"tools/export.py": export_command.main, "tools/import_model.py": import_model.main}
    commands = [*section_commands("Export to Hugging Face"), *section_commands("Start from a Hugging Face model")]
    *tools, train = [[places.get(word, word) for word in command] for command in commands]
    for python, program, *arguments in tools:
        assert python == ".venv/bin/python"
        programs[program](arguments)
    assert "all projected linears: relative error 0." in capsys.readouterr().out
    page = (ROOT / "docs/use_the_model.md").read_text()
    [snippet] = re.findall(r"```python\n(from transformers.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet.replace('"exported"', f'"{places["exported"]}"'), names)
    assert names["text"].startswith("The ")

    name = next(word for word in train if word.startswith("run.name="))
    compressed = tmp_path / "runs" / name.removeprefix("run.name=")
    model, config = load_model(compressed, "cpu")
    reader = open_data(DataOptions.of(config)).train_reader(16, 2, 0, 1)
    with torch.no_grad():
        losses = [cross_entropy(model(batch.ids), batch.labels) for batch, _ in zip(reader, range(8), strict=False)]
    assert train[0] == "./launch.sh"
    done = start(*train[1:], module="megastruct.train")
    assert done.returncode == 0, done.stderr
    first, _ = [json.loads(line) for line in (compressed / "metrics.jsonl").read_text().splitlines()]
    assert first["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert (compressed / "checkpoints/step_00000002").is_dir()
