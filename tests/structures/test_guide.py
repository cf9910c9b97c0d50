"""Guides beside structured linears on real ranks, against the formula on one process in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megastruct.models.guidance import Decision, rows
from megastruct.parallel.groups import TensorGroup
from megastruct.structures import STRUCTURES
from megastruct.structures.guide import Choice, ColumnGuide, RowGuide
from ranks import run_ranks
from sharded import Part, check_against, draw, own, run_part, world

SEQUENCE, BATCH, WIDTH = 16, 2, 32
ALPHA = 0.375  # exact in float32, in which alpha is handed in
CASES: dict[str, dict[str, int]] = {
    "lowrank": {"rank": 12},
    "blockdense": {"nblocks": 2, "rank": 12},
    "blockshuffle": {"nblocks": 2},
}
DECISIONS = {"all": Decision(1, 1), "some": Decision(3, 4, 2), "few": Decision(1, 4, 1)}


def choice(decision: Decision, tp_size: int) -> Choice:
    alpha = torch.tensor(ALPHA)
    if decision.level == decision.levels:
        return Choice(alpha, None, None)
    own_rows, whole = (rows(length, decision) for length in (SEQUENCE // tp_size, SEQUENCE))
    return Choice(alpha, own_rows, whole)


def fill(module: nn.Module) -> None:
    """Weights of which the guide is not the structured one's equivalent, and a bias."""
    for seed, (_, parameter) in enumerate(sorted(module.named_parameters())):
        spec, shape = getattr(parameter, "shard_spec", None), getattr(parameter, "global_shape", parameter.shape)
        whole = draw(*shape, seed=seed) / 3
        parameter.data = whole if spec is None else spec.shard(whole, world().rank)


class Guided(nn.Module):
    def __init__(self, form: str, structure: str, n: int, m: int, decision: Decision, tp: TensorGroup) -> None:
        super().__init__()
        guide = ColumnGuide if form == "column" else RowGuide
        self.linear = getattr(STRUCTURES[structure].layers, form)(n, m, **CASES[structure], tp=tp)
        self.guide = guide(n, m, tp=tp, bias=False)
        self.choice = choice(decision, tp.size)
        fill(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.guide(x, self.linear(x), self.linear.output_bias(), self.choice)


class Formula(nn.Module):
    """o = alpha W x + (1 - alpha) S x + b where guided, S x + b elsewhere."""

    def __init__(self, structure: str, n: int, m: int, decision: Decision) -> None:
        super().__init__()
        self.linear = STRUCTURES[structure].layers.linear(n, m, **CASES[structure])
        self.guide = nn.Linear(n, m, bias=False)
        self.decision = decision
        names = sorted(name for name, _ in self.named_parameters())
        for seed, name in enumerate(names):
            parameter = self.get_parameter(name)
            parameter.data = draw(*parameter.shape, seed=seed) / 3

    def forward(self, x: Tensor) -> Tensor:
        structured, guided = x @ self.linear.to_dense().T, x @ self.guide.weight.T
        outputs = []
        for position in range(SEQUENCE):
            is_guided = (position - self.decision.offset) % self.decision.levels < self.decision.level
            alpha = ALPHA if is_guided else 0.0
            outputs.append(alpha * guided[position] + (1 - alpha) * structured[position] + self.linear.bias)
        return torch.stack(outputs)


Arguments = tuple[str, str, int, int, Decision]


def guided_parts(arguments: list[Arguments]) -> list[Part]:
    parts = []
    for form, structure, n, m, decision in arguments:
        tp = world()
        in_dim, out_dim = (0, -1) if form == "column" else (-1, 0)
        x, g = draw(SEQUENCE, BATCH, n, seed=11), draw(SEQUENCE, BATCH, m, seed=12)
        parts.append(run_part(Guided(form, structure, n, m, decision, tp), own(x, tp, in_dim), own(g, tp, out_dim)))
    return parts


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_output_and_all_gradients(tp_size: int) -> None:
    arguments = [
        (form, structure, n, m, decision)
        for form, n, m in (("column", WIDTH, 2 * WIDTH), ("row", 2 * WIDTH, WIDTH))
        for structure in CASES
        for decision in DECISIONS.values()
    ]
    ranks = run_ranks(tp_size, guided_parts, arguments)
    for index, (form, structure, n, m, decision) in enumerate(arguments):
        x, g = draw(SEQUENCE, BATCH, n, seed=11), draw(SEQUENCE, BATCH, m, seed=12)
        reference = run_part(Formula(structure, n, m, decision), x, g)
        out_dim, in_dim = (-1, 0) if form == "column" else (0, -1)
        check_against([rank[index] for rank in ranks], reference, out_dim, in_dim)


@pytest.mark.parametrize("structure", sorted(CASES))
def test_a_skipped_guide_changes_nothing_and_has_a_gradient_of_zeros(structure: str) -> None:
    layer: Any = Guided("column", structure, WIDTH, 2 * WIDTH, DECISIONS["all"], TensorGroup())
    layer.choice = None
    x = draw(SEQUENCE, BATCH, WIDTH, seed=11)
    y = layer(x)
    assert torch.equal(y, layer.linear(x))
    y.square().sum().backward()
    assert torch.equal(layer.guide.weight.grad, torch.zeros(2 * WIDTH, WIDTH, dtype=torch.float64))


def test_only_the_guided_tokens_are_communicated() -> None:
    """At a quarter of the tokens the guide sends a quarter of what a dense linear does."""
    arguments = [
        (form, "lowrank", n, m, decision)
        for form, n, m in (("column", WIDTH, 2 * WIDTH), ("row", 2 * WIDTH, WIDTH))
        for decision in (DECISIONS["all"], DECISIONS["few"])
    ]
    parts = run_ranks(2, guided_parts, arguments)[0]
    for every, few in (parts[:2], parts[2:]):
        sent_every, sent_few = (part.forward_bytes[1][1] for part in (every, few))  # after the structured one's
        assert sent_few * 4 == sent_every > 0
