"""Self-guided training without ranks: schedules, decisions, the guides' start, and that nothing is compiled twice."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from configs import tiny_config
from megastruct.config import load_config
from megastruct.config.schema import Config, GuidedConfig
from megastruct.models.gpt import GPT
from megastruct.models.guidance import Decision, Guidance, decide, rows
from megastruct.planning.cost import dense_equivalent, training_flops_per_token
from megastruct.planning.steps import data_step, guided_steps, total_steps
from megastruct.run.schedules import alpha, learning_rate

RUNS = Path(__file__).resolve().parents[2] / "configs" / "run"
STRUCTURES: dict[str, dict[str, Any]] = {
    "lowrank": {"structure": "lowrank", "rank": 8},
    "blockdense": {"structure": "blockdense", "rank": 8, "nblocks": 2},
    "blockshuffle": {"structure": "blockshuffle", "rank": None, "nblocks": 2},
}


def config_for(structure: str = "lowrank", **sections: Any) -> Config:
    guided = {"schedule": "fixedstep", "levels": 4, **sections.pop("guided", {})}
    return tiny_config(ffn=STRUCTURES[structure], guided=guided, **sections)


# -- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_alpha_falls_from_one_to_zero(kind: str) -> None:
    config = config_for(guided={"alpha": kind, "fraction": 0.4})  # 8 of 20 steps
    values = [alpha(config, step) for step in range(20)]
    assert values[0] == 1.0 and values[4] == pytest.approx(0.5) and values[8:] == [0.0] * 12
    assert all(a > b > 0 for a, b in itertools.pairwise(values[:8]))
    assert values[2] == pytest.approx(0.75 if kind == "linear" else 0.8535533905932737)


def test_fixedflop_reads_the_guided_part_again_and_spans_the_longer_run() -> None:
    config = config_for(guided={"schedule": "fixedflop", "fraction": 0.25})
    assert (guided_steps(config), total_steps(config)) == (5, 25)
    assert [data_step(config, step) for step in range(25)] == [*range(20), *range(5)]
    assert learning_rate(config, 24) == pytest.approx(0.1 * config.optimizer.learning_rate)
    assert learning_rate(config, 19) > learning_rate(config, 24)
    fixed = config_for(guided={"fraction": 0.25})
    assert (guided_steps(fixed), total_steps(fixed)) == (5, 20)
    assert (guided_steps(tiny_config()), total_steps(tiny_config())) == (0, 20)


@pytest.mark.parametrize("skip", ["rows", "none"])
@pytest.mark.parametrize("run", ["s_lowrank_32", "xl_lowrank_32", "l_blockdense_32"])
def test_a_fixedflop_run_costs_what_the_dense_one_does(run: str, skip: str) -> None:
    config = load_config(RUNS / f"{run}.yaml", ["guided.schedule=fixedflop", f"guided.skip={skip}"])
    share = 1.0 if skip == "none" else 0.5
    guided, rest = guided_steps(config), total_steps(config) - guided_steps(config)
    cost = guided * training_flops_per_token(config, share) + rest * training_flops_per_token(config)
    wanted = config.training.base_steps * training_flops_per_token(dense_equivalent(config))
    assert cost == pytest.approx(wanted, rel=2e-4)  # steps are whole


# -- decisions -------------------------------------------------------------------------------------------------------

DRAWS = 100_000


@pytest.mark.parametrize("skip", ["coin", "rows"])
@pytest.mark.parametrize("at", [0.037, 0.52, 0.93])
def test_the_frequency_is_alpha(skip: str, at: float) -> None:
    """Over 1e5 draws: within four standard deviations, sqrt(p (1 - p) / n) for a coin; a rounded share varies less."""
    config = GuidedConfig(schedule="fixedstep", skip=skip, levels=16)  # type: ignore[arg-type]
    shares = [decide(config, at, 1, n // 1000, n // 10 % 100, n % 10, "fc1").share for n in range(DRAWS)]
    deviation = (at * (1 - at) / DRAWS) ** 0.5 if skip == "coin" else 0.5 / 16 / DRAWS**0.5
    assert abs(sum(shares) / DRAWS - at) <= 4 * deviation
    assert set(shares) == ({0.0, 1.0} if skip == "coin" else {int(at * 16) / 16, (int(at * 16) + 1) / 16})


def test_decisions_depend_on_every_name_and_on_nothing_else() -> None:
    config = GuidedConfig(schedule="fixedstep", levels=1024)
    names: tuple[Any, ...] = (1, 7, 3, 2, "fc1")
    assert decide(config, 0.5, *names) == decide(config, 0.5, *names)
    others = [(2, 7, 3, 2, "fc1"), (1, 8, 3, 2, "fc1"), (1, 7, 4, 2, "fc1"), (1, 7, 3, 1, "fc1"), (1, 7, 3, 2, "fc2")]
    assert len({decide(config, 0.5, *other).offset for other in [names, *others]}) == 6  # type: ignore[arg-type]


def test_offsets_are_uniform() -> None:
    config = GuidedConfig(schedule="fixedstep", levels=8)
    counts = torch.bincount(torch.tensor([decide(config, 0.3, 1, n, 0, 1, "fc2").offset for n in range(8000)]))
    chi_squared = float(((counts - 1000) ** 2 / 1000).sum())
    assert len(counts) == 8 and chi_squared < 26  # 7 degrees of freedom: p = 0.0005


def test_none_takes_all_tokens_always_and_alpha_one_does_too() -> None:
    always = GuidedConfig(schedule="fixedstep", skip="none")
    assert all(decide(always, 0.01, 1, n, 0, 0, "fc1").share == 1.0 for n in range(100))
    by_rows = GuidedConfig(schedule="fixedstep")
    assert all(decide(by_rows, 1.0, 1, n, 0, 0, "fc1").share == 1.0 for n in range(100))


def test_rows_of_parts_are_those_of_the_whole() -> None:
    whole = rows(16, Decision(3, 4, 2))
    assert whole.taken.tolist() == [0, 2, 3, 4, 6, 7, 8, 10, 11, 12, 14, 15]
    assert whole.mask.nonzero().flatten().tolist() == whole.taken.tolist()
    assert whole.taken[whole.place][whole.mask.bool()].tolist() == whole.taken.tolist()
    part = rows(8, Decision(3, 4, 2))
    assert torch.equal(torch.cat([part.taken, part.taken + 8]), whole.taken)


def test_replicas_share_out_the_micro_batches_of_one() -> None:
    config = config_for(guided={"skip": "coin"})
    alone, first, second = (Guidance(config, 1, *place) for place in ((0, 1), (0, 2), (1, 2)))
    for guidance in (alone, first, second):
        guidance.start_step(3, 0.5)
    wanted = [[[c is None for c in block] for block in alone.choices()] for _ in range(8)]
    found = [[[c is None for c in block] for block in g.choices()] for _ in range(4) for g in (first, second)]
    assert found == wanted
    assert len({str(choices) for choices in wanted}) > 1
    assert all(block == [True, True] for choices in wanted for block in choices[:1]), "the first block is dense"


# -- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", sorted(STRUCTURES))
def test_at_the_start_the_output_does_not_depend_on_alpha(structure: str) -> None:
    config = config_for(structure)
    guidance = Guidance(config, 1, 0, 1)
    model = GPT(config, guidance=guidance).double()
    ids = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(1))
    plain = GPT(config).double()(ids)
    for value in (0.0, 0.25, 1.0):
        guidance.start_evaluation(value)
        # A guide is its linear's product in float32, the weights' own precision.
        torch.testing.assert_close(model(ids), plain, rtol=0, atol=1e-5 * float(plain.detach().abs().max()))
    with torch.no_grad():
        model.blocks.get_submodule("1").mlp.fc1_guide.weight.mul_(1.5)
    assert (model(ids) - plain).abs().max() > 1e-2


def gradients(config: Config, accumulate: int = 3) -> dict[str, torch.Tensor]:
    guidance = Guidance(config, 1, 0, 1)
    model = GPT(config, guidance=guidance).double()
    guidance.start_step(4, alpha(config, 4))
    losses = []
    for seed in range(accumulate):  # all forwards before the first backward, as in a pipeline
        ids = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(seed))
        losses.append(model(ids).square().mean())
    for loss in losses:
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("skip", ["rows", "coin"])
@pytest.mark.parametrize("recompute", [True, "selective"])
def test_recomputed_forwards_decide_as_the_first_ones(skip: str, recompute: bool | str) -> None:
    once = gradients(config_for(guided={"skip": skip}))
    twice = gradients(config_for(guided={"skip": skip}, training={"activation_checkpointing": recompute}))
    assert set(once) == set(dict(GPT(config_for(), guidance=Guidance(config_for(), 1, 0, 1)).named_parameters()))
    assert all(torch.equal(once[name], twice[name]) for name in once)
    other = gradients(config_for(guided={"skip": skip}, run={"seed": 77}))
    assert not torch.equal(once["blocks.1.mlp.fc1_guide.weight"], other["blocks.1.mlp.fc1_guide.weight"])


@pytest.mark.parametrize("skip", ["rows", "coin"])
def test_switching_between_choices_compiles_nothing_new(skip: str) -> None:
    torch._dynamo.reset()
    config = config_for(guided={"skip": skip, "levels": 8}, model={"num_layers": 3}, training={"seq_length": 32})
    guidance = Guidance(config, 1, 0, 1)
    model = GPT(config, guidance=guidance)
    model(torch.zeros(2, 32, dtype=torch.int64))  # makes the rotary tables, as the engine does before it compiles
    compiled = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    for block in compiled.blocks.values():
        block.compile(backend=counter)
    for step in range(10):
        for micro_batch in range(4):
            ids = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(step * 4 + micro_batch))
            outputs = []
            for each in (model, compiled):
                each.guidance.start_step(step, alpha(config, step))
                each.guidance.next_micro_batch = micro_batch
                outputs.append(each(ids))
                outputs[-1].square().mean().backward()
            torch.testing.assert_close(*outputs)
    # a dense block; of the others all tokens, some, none; or every side of two coins
    assert counter.frame_count == (4 if skip == "rows" else 5)
    for (name, eager), fast in zip(model.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(eager.grad, fast.grad, msg=lambda text, name=name: f"{name}: {text}")
