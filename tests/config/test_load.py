"""Reading configs: includes, overrides, and every mistake at once with its path and a way out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import tiny_config
from megastruct.config import load_config
from megastruct.config.checks import cross_field_problems
from megastruct.config.compare import changes_of_the_run
from megastruct.config.load import dump_config
from megastruct.errors import Problem, UserError
from megastruct.structures import STRUCTURES

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
QUICKSTART = CONFIGS / "run" / "quickstart.yaml"


def problems(path: Path, *overrides: str) -> dict[str, str]:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return {problem.where: str(problem) for problem in caught.value.problems}


@pytest.mark.parametrize("path", sorted((CONFIGS / "run").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_run_config_parses(path: Path) -> None:
    assert load_config(path).run.name


def test_resolved_config_reads_back(tmp_path: Path) -> None:
    config = load_config(QUICKSTART, ["training.num_steps=7"])
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml") == config


def test_include_order_and_overrides(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("training: {num_steps: 5}\noptimizer: {learning_rate: 6e-4}\n")
    (tmp_path / "run.yaml").write_text(f"include: [{QUICKSTART}, base.yaml]\noptimizer: {{beta2: 0.95}}\n")
    config = load_config(tmp_path / "run.yaml", ["model.num_layers=6", "parallel.dp=2"])
    assert config.training.num_steps == 5
    assert config.optimizer.learning_rate == 6e-4
    assert config.optimizer.beta2 == 0.95
    assert config.model.num_layers == 6
    # dp=3 does not divide the batch of 32: named with a value that works
    assert "training.global_batch_size" in problems(tmp_path / "run.yaml", "parallel.dp=3")


def test_all_problems_come_at_once() -> None:
    found = problems(
        QUICKSTART,
        "model.hiden_size=64",
        "model.num_layers=twelve",
        "optimiser.learning_rate=1",
        "model.num_attention_heads=5",
        "ffn.rank=4096",
    )
    assert "model.hidden_size" in found["model.hiden_size"]
    assert "'twelve'" in found["model.num_layers"]
    assert "optimizer" in found["optimiser"]


def test_cross_field_problems_beside_unknown_keys() -> None:
    found = problems(QUICKSTART, "model.hiden_size=64", "model.num_attention_heads=5", "ffn.rank=4096")
    assert {"model.hiden_size", "model.num_attention_heads", "ffn.rank"} == set(found)
    assert "does not divide" in found["model.num_attention_heads"]
    assert "ffn.rank=64" in found["ffn.rank"]


@pytest.mark.parametrize(
    ("overrides", "where", "suggestion"),
    [
        (["training.num_tokens=100"], "training.num_steps, training.num_tokens", "exactly one"),
        (["parallel.zero_stage=2"], "parallel.zero_stage", "parallel.zero_stage=1"),
        (
            ["parallel.pp=1", "parallel.zero_stage=3", "training.activation_checkpointing=selective"],
            "training.activation_checkpointing",
            "training.activation_checkpointing=true",
        ),
        (["parallel.zero_stage=0", "training.precision=bf16"], "parallel.zero_stage", "parallel.zero_stage=1"),
        (["parallel.pp=5"], "parallel.pp", "parallel.pp=4"),
        (["training.global_batch_size=30"], "training.global_batch_size", "training.global_batch_size=32"),
        (["evaluation.num_samples=65"], "evaluation.num_samples", "evaluation.num_samples=72"),
        (["model.num_key_value_heads=3"], "model.num_key_value_heads", "model.num_key_value_heads=2"),
        (["model.head_dim=7"], "model.head_dim", "model.head_dim=8"),
        (
            ["training.document_attention=sepparate"],
            "training.document_attention",
            "try: training.document_attention=sep",
        ),
        (["guided.schedule=fixflop"], "guided.schedule", "try: guided.schedule=fixedflop"),
        (["training.precision=xyz"], "training.precision", "try: training.precision=bf16"),
        (["ffn.structure=dense"], "ffn.rank", "no ffn.rank"),
        (["ffn.rank=null"], "ffn.rank", "ffn.rank=32"),
        (["ffn.nblocks=2"], "ffn.nblocks", "no ffn.nblocks"),
        (["ffn.structure=blockdense"], "ffn.nblocks", "ffn.nblocks=4"),
        (["ffn.structure=blockdense", "ffn.nblocks=2", "ffn.rank=null"], "ffn.rank", "ffn.rank=32"),
        (["ffn.structure=blockdense", "ffn.nblocks=8", "ffn.rank=30"], "ffn.rank", "ffn.rank=32"),
        (["ffn.structure=blockdense", "ffn.nblocks=3"], "ffn.nblocks", "ffn.nblocks=2"),
        (["ffn.structure=blockdense", "ffn.nblocks=2", "ffn.rank=129"], "ffn.rank", "ffn.rank=64"),
        (["ffn.structure=blockshuffle", "ffn.rank=null"], "ffn.nblocks", "ffn.nblocks=4"),
        (["ffn.structure=blockshuffle", "ffn.nblocks=4"], "ffn.rank", "no ffn.rank"),
        (["ffn.structure=blockshuffle", "ffn.rank=null", "ffn.nblocks=48"], "ffn.nblocks", "ffn.nblocks=32"),
        (["reliability.spike_factor=0.5"], "reliability.spike_factor", "reliability.spike_factor=2"),
        (
            ["reliability.spike_factor=2.0", "checkpoint.interval_steps=0"],
            "checkpoint.interval_steps",
            "checkpoint.interval_steps=500",
        ),
        (["nonsense"], "nonsense", "section.key=value"),
        (["parallel.zero_stage=4"], "parallel.zero_stage", "less than or equal to 3"),
        (["run.name=../elsewhere"], "run.name", "match pattern"),
        (["training.document_attention=none"], "training.document_attention", "'crossed' or 'separate'"),
        (["training.document_atention=separate"], "training.document_atention", "training.document_attention"),
    ],
)
def test_impossible_values_name_the_key_and_a_way_out(overrides: list[str], where: str, suggestion: str) -> None:
    found = problems(QUICKSTART, *overrides)
    assert set(found) == {where}
    assert suggestion in found[where]


def test_suggestions_of_checks_work() -> None:
    for bad, fix in [
        ("parallel.pp=5", "parallel.pp=4"),
        ("model.num_key_value_heads=3", "model.num_key_value_heads=2"),
        ("evaluation.num_samples=65", "evaluation.num_samples=72"),
        ("model.num_attention_heads=5", "model.num_attention_heads=4"),
    ]:
        assert any(fix in text for text in problems(QUICKSTART, bad).values())
        load_config(QUICKSTART, [fix])


@settings(max_examples=200, deadline=None)
@given(
    structure=st.sampled_from(sorted(STRUCTURES)),
    rank=st.none() | st.integers(1, 40),
    nblocks=st.none() | st.integers(1, 40),
    hidden_size=st.sampled_from([8, 12, 16, 30]),
    ffn_hidden_size=st.sampled_from([6, 16, 36, 45]),
)
def test_suggestions_for_the_ffn_work_together(
    structure: str, rank: int | None, nblocks: int | None, hidden_size: int, ffn_hidden_size: int
) -> None:
    model = {"hidden_size": hidden_size, "ffn_hidden_size": ffn_hidden_size, "num_attention_heads": 1, "head_dim": 8}
    ffn: dict[str, object] = {"structure": structure, "rank": rank, "nblocks": nblocks}
    for problem in cross_field_problems(tiny_config(model=model, ffn=ffn)):
        key, value = re.findall(r"ffn\.(\w+)=(\w+)", problem.suggestion)[-1]
        assert problem.where == f"ffn.{key}"
        ffn[key] = None if value == "null" else int(value)
    config = tiny_config(model=model, ffn=ffn)
    assert cross_field_problems(config) == []
    assert set(config.ffn.sizes) == {key for key in ("rank", "nblocks") if ffn[key] is not None}


def test_sizes_and_structures_that_there_are_not() -> None:
    found = problems(QUICKSTART, "ffn.structure=lowrnk", "ffn.rnak=32", "model.hiden_size=4")
    assert "try: ffn.structure=lowrank" in found["ffn.structure"]
    found = problems(QUICKSTART, "ffn.rnak=32", "ffn.rank=null")
    assert found["ffn.rnak"].endswith("\n    try: ffn.rank") and "ffn.rank=32" in found["ffn.rank"]
    assert "greater than or equal to 1" in problems(QUICKSTART, "ffn.rank=0")["ffn.rank"]


def test_missing_file_names_a_close_one() -> None:
    found = problems(CONFIGS / "run" / "quikstart.yaml")
    assert str(QUICKSTART) in next(iter(found.values()))


def test_configs_of_the_package_are_found_by_their_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the caller has none of that name; another file can include them."""
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/run/quickstart.yaml") == load_config(QUICKSTART)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.yaml").write_text("include: configs/run/quickstart.yaml\nrun: {name: mine}\n")
    assert load_config("mine/run.yaml") == load_config(QUICKSTART, ["run.name=mine"])
    assert "try: configs/run/quickstart.yaml" in problems(Path("configs/run/quikstart.yaml")).popitem()[1]
    (tmp_path / "configs" / "run").mkdir(parents=True)
    (tmp_path / "configs" / "run" / "quikstart2.yaml").touch()
    assert "try: configs/run/quikstart2.yaml" in problems(Path("configs/run/quikstart.yaml")).popitem()[1]
    (tmp_path / "configs" / "run" / "quickstart.yaml").write_text(f"include: {QUICKSTART}\nrun: {{name: ours}}\n")
    assert load_config("configs/run/quickstart.yaml").run.name == "ours"


@pytest.mark.parametrize(
    "text", ["model: [", "just words", "a: 1\na: 2\n", "x: !!python/object/apply:os.system ['true']\n"]
)
def test_broken_yaml(tmp_path: Path, text: str) -> None:
    (tmp_path / "broken.yaml").write_text(text)
    assert str(tmp_path / "broken.yaml") in next(iter(problems(tmp_path / "broken.yaml")))


def test_include_ring(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("include: b.yaml\n")
    (tmp_path / "b.yaml").write_text("include: a.yaml\n")
    assert "includes itself" in next(iter(problems(tmp_path / "a.yaml").values()))


def test_what_may_change_when_a_run_goes_on() -> None:
    base = load_config(QUICKSTART)
    moved = load_config(QUICKSTART, ["parallel.pp=4", "logging.interval_steps=1", "training.micro_batch_size=4"])
    assert changes_of_the_run(base, moved) == []
    other = load_config(QUICKSTART, ["optimizer.learning_rate=1e-4", "run.seed=5"])
    assert {path for path, _, _ in changes_of_the_run(base, other)} == {"optimizer.learning_rate", "run.seed"}
    separate = load_config(QUICKSTART, ["training.document_attention=separate"])
    assert changes_of_the_run(base, separate) == [("training.document_attention", "crossed", "separate")]


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("reliability.spike_factor=-1", "reliability.spike_factor=0.0"),
        ("training.micro_batch_size=0", "training.micro_batch_size=1"),
        ("schedule.warmup_fraction=2", "schedule.warmup_fraction=0.1"),
        ("logging.progress_bar=7", "logging.progress_bar=true"),
    ],
)
def test_a_value_out_of_range_has_a_suggestion_that_works(override: str, suggestion: str) -> None:
    run = Path(__file__).resolve().parents[2] / "configs" / "run" / "s_lowrank_32.yaml"
    with pytest.raises(UserError) as raised:
        load_config(run, [override])
    [problem] = raised.value.problems
    assert problem.suggestion == suggestion
    load_config(run, [suggestion])


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.num_attention_heads=6", "parallel.tp=4", "parallel.pp=1"],
        ["model.num_attention_heads=5", "parallel.tp=2", "parallel.pp=1"],
        ["ffn.structure=blockdense", "ffn.rank=32", "ffn.nblocks=3", "parallel.tp=4", "parallel.pp=1"],
        ["ffn.structure=blockshuffle", "ffn.rank=null", "ffn.nblocks=5", "parallel.tp=4", "parallel.pp=1"],
    ],
)
def test_suggestions_fit_the_ranks_too(overrides: list[str]) -> None:
    """What is suggested for heads and blocks is not refused a second time."""
    found = problems_of(overrides)
    assert found
    followed = [*overrides, *(problem.suggestion.split(",")[0] for problem in found)]
    assert problems_of(followed) == []


def problems_of(overrides: list[str]) -> list[Problem]:
    try:
        load_config(QUICKSTART, overrides)
    except UserError as error:
        return list(error.problems)
    return []
