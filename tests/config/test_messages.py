"""Messages about configs: the place of every mistake, suggestions that work, and sizes that no machine holds."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megastruct.config import load_config
from megastruct.config.load import places_in_errors
from megastruct.errors import Problem, UserError

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "run" / "quickstart.yaml"


def problems(path: Path, *overrides: str) -> list[Problem]:
    try:
        load_config(path, overrides)
    except UserError as error:
        return list(error.problems)
    return []


def layered(tmp_path: Path, base: str, run: str) -> Path:
    """A run config that includes base.yaml, which includes the quick start."""
    (tmp_path / "base.yaml").write_text(f"include: {QUICKSTART}\n{base}")
    (tmp_path / "run.yaml").write_text(f"# a comment\ninclude: [base.yaml]\n{run}")
    return tmp_path / "run.yaml"


def test_a_mistake_names_the_file_and_line_or_the_override(tmp_path: Path) -> None:
    base, run = tmp_path / "base.yaml", tmp_path / "run.yaml"
    layered(tmp_path, "model:\n  hiden_size: 4\n  num_layers: 0\nmodl: {}\n", "training: {num_steps: many}\n")
    places = {problem.where: problem.places for problem in problems(run, "run.name=a b", "evaluation.num_samples=7")}
    assert places == {
        "model.hiden_size": (f"{base}:3",),
        "model.num_layers": (f"{base}:4",),
        "modl": (f"{base}:5",),
        "training.num_steps": (f"{run}:3",),
        "run.name": ("the override run.name=a b",),
        "evaluation.num_samples": ("the override evaluation.num_samples=7",),
    }


def test_all_keys_of_a_contradiction_have_their_place(tmp_path: Path) -> None:
    run = layered(tmp_path, "model: {num_attention_heads: 5}\n", "\nmodel:\n  hidden_size: 96\n")
    [problem] = problems(run)
    assert problem.places == (f"{tmp_path}/base.yaml:2", f"{tmp_path}/run.yaml:5 (model.hidden_size)")
    assert f"\n    at: {tmp_path}/base.yaml:2\n    at: " in str(problem)
    [problem] = problems(run, "model.num_attention_heads=7", "model.hidden_size=100")
    assert problem.places == ("the override model.num_attention_heads=7", "the override model.hidden_size=100")


def test_places_inside_of_a_value(tmp_path: Path) -> None:
    run = layered(tmp_path, "data:\n  path:\n  - {path: a, weight: 1}\n  - path: b\n    weight: -1\n", "")
    [problem] = problems(run)
    assert (problem.where, problem.places) == ("data.path.1.weight", (f"{tmp_path}/base.yaml:6",))
    [problem] = problems(run, "data.path=[{path: a}]")
    assert problem.places == ("the override data.path=[{path: a}]",)


@pytest.mark.parametrize(
    ("base", "line", "found"),
    [
        ("model: [\n", 3, "while parsing a flow"),
        ("model:\n  hidden_size: 4\n hidden: 3\n", 4, ""),
        ("model:\n\tnum_layers: 4\n", 3, "cannot start any token"),
        ("a: 1\na: 2\n", 3, "given twice"),
        ("a: \x07\n", 2, "not allowed"),
        ("x: !!python/object/apply:os.system ['true']\n", 2, "constructor"),
        ("x: &a [*a]\n", 2, ""),
        ("x: *unknown\n", 2, "undefined alias"),
        ("? [a, b]\n: 1\n", 2, "plain word"),
    ],
)
def test_broken_yaml_in_an_included_file(tmp_path: Path, base: str, line: int, found: str) -> None:
    [problem] = problems(layered(tmp_path, base, ""))
    if "&a" in base:
        assert problem.where == "x"  # a list that contains itself is YAML, but no section
        return
    assert problem.where == f"{tmp_path}/base.yaml:{line}" and found in problem.found
    assert problem.places == (f"{tmp_path}/run.yaml:2",)


def test_broken_yaml_in_an_override(tmp_path: Path) -> None:
    """Where brackets can only be YAML. A path may begin with one."""
    overrides = ["evaluation.sources={a: x, a: y}", "training.batch_size_warmup=[{batch_size: 4", "data.path=[a"]
    found = {problem.where: problem.found for problem in problems(QUICKSTART, *overrides)}
    assert found["evaluation.sources"] == "'{a: x, a: y}': not valid YAML: key 'a' is given twice"
    assert found["training.batch_size_warmup"].startswith("'[{batch_size: 4': not valid YAML: ")
    assert "data.path" not in found


def test_a_file_that_is_not_there_and_a_wrong_include(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("\ninclude: [nowhere.yaml]\n")
    [problem] = problems(tmp_path / "run.yaml")
    assert (problem.where, problem.places) == (f"{tmp_path}/nowhere.yaml", (f"{tmp_path}/run.yaml:2",))
    (tmp_path / "run.yaml").write_text("run: {name: x}\ninclude: {a: b}\n")
    [problem] = problems(tmp_path / "run.yaml")
    assert (problem.where, problem.places) == ("include", (f"{tmp_path}/run.yaml:2",))


def test_later_errors_get_places_too(tmp_path: Path) -> None:
    path = layered(tmp_path, "data: {path: x}\n", "")
    with pytest.raises(UserError) as caught, places_in_errors(path, ["parallel.pp=4"]):
        raise UserError([Problem("data.path", "is empty"), Problem("--x", "does not go with parallel.pp = 4")])
    assert [problem.places for problem in caught.value.problems] == [
        (f"{tmp_path}/base.yaml:2",),
        ("the override parallel.pp=4",),
    ]


OVERRIDE = re.compile(r"\b[a-z]+\.[a-z]\w*=(?!\.\.\.|\[)[^\s,()]+")
WRONG = {
    "model.hidden_size": ["100", "96", "7", "0", "x"],
    "model.num_layers": ["1", "3", "0"],
    "model.num_attention_heads": ["3", "5", "6", "16", "0"],
    "model.num_key_value_heads": ["3", "4", "8"],
    "model.head_dim": ["7", "16", "33"],
    "model.ffn_hidden_size": ["100", "510", "129"],
    "model.vocab_size": ["5", "2049"],
    "model.activation": ["swiglu", "relu"],
    "model.norm": ["rms"],
    "model.base_width": ["64"],
    "ffn.structure": ["dense", "lowrank", "blockdense", "blockshuffle", "blokdense"],
    "ffn.rank": ["30", "4096", "null", "0"],
    "ffn.nblocks": ["3", "4", "48", "null"],
    "guided.schedule": ["fixedstep", "fixedflop", "always"],
    "guided.fraction": ["0.3", "2"],
    "guided.skip": ["coin", "row"],
    "guided.levels": ["7", "16", "999"],
    "training.seq_length": ["30", "7", "128"],
    "training.global_batch_size": ["30", "7", "64"],
    "training.micro_batch_size": ["0", "5", "64"],
    "training.num_tokens": ["1000"],
    "training.precision": ["bf16", "fp16"],
    "optimizer.kind": ["adam"],
    "optimizer.beta1": ["1.5", "x"],
    "optimizer.learning_rate": ["0", "x"],
    "schedule.warmup_fraction": ["2"],
    "parallel.pp": ["3", "5", "1"],
    "parallel.tp": ["2", "3", "4", "7"],
    "parallel.dp": ["3", "2"],
    "parallel.zero_stage": ["0", "2", "3", "4"],
    "evaluation.num_samples": ["65", "7"],
    "checkpoint.interval_steps": ["0"],
    "reliability.spike_factor": ["0.5", "2", "-1"],
    "logging.progress_bar": ["7"],
}
wrong_overrides = st.dictionaries(st.sampled_from(sorted(WRONG)), st.integers(0, 4), min_size=1, max_size=6).map(
    lambda chosen: [f"{key}={WRONG[key][index % len(WRONG[key])]}" for key, index in chosen.items()]
)


@settings(max_examples=80, deadline=None)
@given(overrides=wrong_overrides)
def test_every_suggestion_solves_its_problem_and_makes_no_other(overrides: list[str]) -> None:
    found = problems(QUICKSTART, *overrides)
    known = {problem.where for problem in found}
    for problem in found:
        for alternative in problem.suggestion.split(", or "):
            if fixes := OVERRIDE.findall(alternative):
                left = {other.where for other in problems(QUICKSTART, *overrides, *fixes)}
                assert problem.where not in left and left <= known, (problem, fixes, left - known)


@pytest.mark.parametrize(
    ("overrides", "suggestion"),
    [
        (["ffn.structure=dense", "ffn.rank=null", "guided.schedule=fixedstep"], "ffn.structure=lowrank ffn.rank=32"),
        (["training.micro_batch_size=5", "evaluation.num_samples=60"], "training.global_batch_size=35"),
        (["ffn.structure=blokdense"], "ffn.structure=blockdense ffn.nblocks=4"),
    ],
)
def test_a_suggestion_brings_what_else_it_needs(overrides: list[str], suggestion: str) -> None:
    assert any(suggestion in problem.suggestion for problem in problems(QUICKSTART, *overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.hidden_size=1000000000000"],
        ["model.num_layers=1000000000"],
        ["model.vocab_size=1e15"],
        ["model.vocab_size=1" + "0" * 5000],
        ["model.hidden_size=16777216", "model.num_layers=65536"],
        ["training.seq_length=16777216", "training.micro_batch_size=16777216", "training.global_batch_size=16777216"],
        ["ffn.structure=blockdense", "ffn.nblocks=16777213", "model.ffn_hidden_size=16777212"],
        ["model.num_attention_heads=16777213", "model.hidden_size=9699690"],
        ["parallel.tp=16777213", "training.seq_length=16777216"],
        ["reliability.collective_seconds=1e300"],
    ],
)
def test_sizes_that_no_machine_holds_are_one_message_at_once(overrides: list[str]) -> None:
    begun = time.process_time()
    found = problems(QUICKSTART, *overrides)
    assert found and time.process_time() - begun < 2.0
    assert all(len(str(problem)) < 600 for problem in found)


def test_a_key_that_takes_truth_or_a_word_is_one_problem_in_the_words_of_yaml() -> None:
    [problem] = problems(QUICKSTART, "training.activation_checkpointing=selectve")
    assert problem.found == "'selectve': input should be false, true or 'selective'"
    assert problem.suggestion == "training.activation_checkpointing=selective"
    for value in ("true", "false", "selective"):
        assert not problems(QUICKSTART, f"training.activation_checkpointing={value}")
