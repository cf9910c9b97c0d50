"""What is typed arrives: the type of a key decides how its value is read, in files and in overrides."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from configs import tiny_config
from megastruct.config import load_config
from megastruct.config.load import dump_config
from megastruct.errors import UserError

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "run" / "quickstart.yaml"
AS_TYPED = [
    "2024-01-01",
    "001",
    "0o17",
    "0x1F",
    "on",
    "no",
    "yes",
    "true",
    "null",
    "1e-4",
    "1_000",
    "1:30",
    ".inf",
    "3.10",
]
ALSO_IN_OVERRIDES = ["a #b", "set #2/x", "[ab]", "[ab]*.parquet", "{a: b}", "a: b", "&a", "*.parquet"]
ALSO_IN_OVERRIDES += ["!x", "%x", "@x", "`x", "- x", "? x", "a=b", "'a' b", "it's", " a ", "'", '"', "c:\\x"]


@pytest.mark.parametrize("text", AS_TYPED + ALSO_IN_OVERRIDES)
def test_text_in_an_override_stays_as_typed(text: str) -> None:
    config = load_config(QUICKSTART, [f"run.folder={text}", f"data.path={text}"])
    assert (config.run.folder, config.data.path) == (text, text)


@pytest.mark.parametrize("text", ["~/x", "~", "$HOME/x"])
def test_only_paths_are_expanded(text: str) -> None:
    config = load_config(QUICKSTART, [f"run.folder={text}", f"data.path={text}", f"data.text_column={text}"])
    assert config.run.folder == config.data.path == os.path.expandvars(os.path.expanduser(text))
    assert config.data.text_column == (None if text == "~" else text)  # YAML's null


def test_several_paths_in_an_override() -> None:
    overrides = ["data.kind=text", "data.path=[a, 01]", "data.tokenizer=a.model"]
    assert load_config(QUICKSTART, overrides).data.places[0].paths == ["a", "01"]


@pytest.mark.parametrize("text", AS_TYPED)
def test_text_in_a_file_stays_as_typed(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(f"include: {QUICKSTART}\nrun: {{name: x, folder: {text}}}\n")
    assert load_config(tmp_path / "run.yaml").run.folder == text


@settings(max_examples=40, deadline=None)
@given(text=st.text(min_size=1))
def test_any_text_survives_an_override_and_the_stored_config(tmp_path_factory: Any, text: str) -> None:
    assume("$" not in text and not text.startswith("~") and "://" not in text)  # which stand for something else
    config = tiny_config(run={"name": "tiny", "folder": text}, data={"kind": "tokens", "path": text})
    stored = tmp_path_factory.mktemp("stored") / "config.yaml"
    stored.write_text(dump_config(config), encoding="utf-8")
    assert load_config(stored) == config
    if text[0] not in "'\"" and text[0] != "[":  # quotes are YAML's, and lists are lists
        assert load_config(QUICKSTART, [f"data.path={text}"]).data.path == text


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.learning_rate=1e-4", 1e-4),
        ("optimizer.learning_rate=.5", 0.5),
        ("optimizer.learning_rate=2", 2.0),
        ("optimizer.eps=1e-6", 1e-6),
        ("optimizer.beta2=null", 0.95),
        ("training.num_steps=010", 10),
        ("training.num_steps=25_500", 25_500),
        ("training.num_steps=1e9", 10**9),
        ("training.num_steps=25.5e9", 25_500_000_000),
        ("ffn.rank=016", 16),
        ("logging.progress_bar=no", False),
        ("logging.progress_bar=On", True),
        ("guided.schedule=off", "off"),
        ("data.tokenizer=null", None),
        ("data.tokenizer=", None),
        ("data.tokenizer='null'", "null"),
        ('data.tokenizer="a\\tb"', "a\tb"),
        ("model.head_dim=~", None),
        ("data.path=[{path: a b, weight: 1e-1}]", [("a b", 0.1)]),
        ("data.path=[{path: 2024-01-01, weight: 3}, {path: on, weight: 1}]", [("2024-01-01", 3.0), ("on", 1.0)]),
    ],
)
def test_a_value_has_the_type_of_its_key(tmp_path: Path, override: str, value: object) -> None:
    path, _, text = override.partition("=")
    section, _, key = path.partition(".")
    (tmp_path / "run.yaml").write_text(f"include: {QUICKSTART}\n{section}: {{{key}: {text}}}\n")
    for config in (load_config(QUICKSTART, [override]), load_config(tmp_path / "run.yaml")):
        found = config.data.sources if isinstance(value, list) else getattr(getattr(config, section), key, None)
        if key in ("eps", "beta2", "rank"):
            found = (config.ffn.sizes | config.optimizer.settings)[key]
        assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("optimizer.learning_rate=nan", "nan"),
        ("optimizer.learning_rate=inf", "inf"),
        ("training.num_steps=1.5", "'1.5'"),
        ("training.num_steps=2024-01-01", "'2024-01-01'"),
        ("training.num_steps=1e99999999", "'1e99999999'"),
        ("model.num_layers=", "None"),
        ("logging.progress_bar=1", "'1'"),
        ("optimizer.beta1=many", "'many'"),
        ("ffn.rank=many", "'many'"),
    ],
)
def test_what_does_not_fit_is_shown_as_typed(override: str, found: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(QUICKSTART, [override])
    [problem] = caught.value.problems
    assert problem.found.startswith(found) and problem.places == (f"the override {override}",)


def test_a_number_in_quotes_is_text(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"include: {QUICKSTART}\noptimizer: {{learning_rate: '1e-4'}}\n")
    with pytest.raises(UserError, match=r"optimizer.learning_rate: '1e-4': input should be a valid number"):
        load_config(tmp_path / "run.yaml")


def test_large_integers_are_exact() -> None:
    assert load_config(QUICKSTART, ["run.seed=9007199254740993"]).run.seed == 2**53 + 1
    assert math.isclose(load_config(QUICKSTART, ["schedule.warmup_fraction=1e-400"]).schedule.warmup_fraction, 0)


@pytest.mark.parametrize("text", ["ffn:\n", "include:\n", ""])
def test_an_empty_section_changes_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(f"{text}run: {{seed: 5}}\n")
    (tmp_path / "all.yaml").write_text(f"include: [{QUICKSTART}, run.yaml]\n")
    assert load_config(tmp_path / "all.yaml", ["run.seed=1234"]) == load_config(QUICKSTART)


def test_a_section_that_is_null_has_its_defaults(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"include: {QUICKSTART}\nffn: null\n")
    assert load_config(tmp_path / "run.yaml").ffn.is_dense
    assert load_config(tmp_path / "run.yaml", ["ffn.structure=lowrank", "ffn.rank=8"]).ffn.sizes == {"rank": 8}
