"""The reference of all keys is current, and editors that use the JSON schema agree with the loader."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import jsonschema
import pytest
import yaml

from megastruct.config import Config
from megastruct.config.reference import keys, listing
from megastruct.config.typed import fields_of
from megastruct.errors import UserError
from megastruct.optimizers import OPTIMIZERS
from megastruct.start import main
from megastruct.structures import known_sizes

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((ROOT / "configs" / "schema.json").read_text())
SHIPPED = sorted((ROOT / "configs").glob("*/*.yaml"))


class EditorsYaml(yaml.SafeLoader):
    """YAML 1.2 with its core schema, which editors use."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


for tag, pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?",
}.items():
    EditorsYaml.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), None)
EditorsYaml.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value))


def errors(text: str) -> list[str]:
    """Where the schema refuses a config."""
    validator = jsonschema.Draft7Validator(SCHEMA)
    return [
        ".".join(map(str, error.absolute_path)) for error in validator.iter_errors(yaml.load(text, EditorsYaml) or {})
    ]


def test_page_and_schema_are_current() -> None:
    command = [sys.executable, str(ROOT / "tools" / "write_reference.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_every_key_has_a_meaning_and_no_other() -> None:
    every = [key for section in Config.model_fields for key in keys(section)]
    assert [key.name for key in every if not key.meaning or not key.type] == []
    names = {key.name for key in every}
    assert {f"ffn.{size}" for size in known_sizes()} <= names
    assert {f"optimizer.{key}" for optimizer in OPTIMIZERS.values() for key in optimizer.keys} <= names
    assert {f"{section}.{name}" for section in Config.model_fields for name in fields_of(section)} <= names


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_editors_accept_every_shipped_config(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    schema = first.removeprefix("# yaml-language-server: $schema=")
    assert schema != first and (path.parent / schema).resolve() == ROOT / "configs" / "schema.json"
    assert errors(path.read_text()) == []


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("modell: {}", ""),
        ("model: {hiden_size: 4}", "model"),
        ("model: {hidden_size: four}", "model.hidden_size"),
        ("model: {num_layers: 0}", "model.num_layers"),
        ("model: {activation: relu}", "model.activation"),
        ("ffn: {structure: lowrnk}", "ffn.structure"),
        ("ffn: {rank: 0}", "ffn.rank"),
        ("optimizer: {beta1: 1.5}", "optimizer.beta1"),
        ("optimizer: {momentun: 0.5}", "optimizer"),
        ("training: {compile: maybe}", "training.compile"),
        ("data: {path: [{path: a}]}", "data.path"),
        ("include: 5", "include"),
    ],
)
def test_editors_refuse_what_is_wrong(text: str, where: str) -> None:
    assert where in errors(text)


def test_a_part_of_a_config_is_enough() -> None:
    text = "include: [a.yaml]\ntraining: {num_tokens: 25_500_000_000}\noptimizer: {learning_rate: 1e-4, beta1: null}\n"
    assert errors(text) == []


def test_the_terminal_lists_sections_and_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--keys", "ffn"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert text == listing("ffn") + "\n" and "ffn.rank: integer >= 1; left out" in text and "model." not in text
    assert text.isascii()
    assert [name in listing() for name in ("run.seed: integer >= 0; default 1234", "reliability.max_spikes")] == [1, 1]
    assert listing("training.num_steps").count("\n  training.") == 1
    with pytest.raises(UserError, match="try: --keys optimizer"):
        listing("optimiser")
