"""Every sharded linear on real ranks against the unsharded layer: weights bit for bit, output and all gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megastruct.layers.norm import LayerNorm, RMSNorm
from megastruct.parallel.groups import TensorGroup
from megastruct.structures import STRUCTURES
from megastruct.structures.blockdense.layers import BlockDenseColumnLinear, BlockDenseRowLinear
from megastruct.structures.blockshuffle.layers import BlockShuffleColumnLinear, BlockShuffleRowLinear
from megastruct.structures.dense.layers import ColumnParallelLinear, ReplicatedLinear
from megastruct.structures.lowrank.layers import LowRankRowLinear
from ranks import run_ranks
from sharded import BATCH, SEQUENCE, Part, assemble, check_against, draw, own, run_part, world

RANK = 12
TP_SIZES = (1, 2, 3, 4)

Case = tuple[str, dict[str, int]]


def width(tp_size: int) -> int:
    """The outer width d; the inner one is 2d. Blocks x ranks divide both, for all blocks in `cases`."""
    return 36 if tp_size == 3 else 32


def cases(tp_size: int) -> list[Case]:
    """Fewer blocks than ranks, as many, and more."""
    nblocks = (1, 3, 6) if tp_size == 3 else (1, 2, 4)
    blocks: list[Case] = []
    for b in nblocks:
        blocks += [("blockdense", {"nblocks": b, "rank": RANK}), ("blockshuffle", {"nblocks": b})]
    return [("dense", {}), ("lowrank", {"rank": RANK}), *blocks]


def initialised(layer: nn.Module) -> nn.Module:
    """The layer's own first weights, in float64, and a bias that is not zero."""
    layer.init_weights((1, "weights", "layer"))  # type: ignore[operator]
    layer.double()
    bias = draw(10_000, seed=3)
    for name, p in layer.named_parameters():
        if name.endswith("bias"):
            spec, shape = getattr(p, "shard_spec", None), getattr(p, "global_shape", p.shape)
            full = bias[: shape[0]]
            p.data.copy_(full if spec is None else spec.shard(full, layer.tp.rank))
    return layer


def linear_part(form: str, case: Case, n: int, m: int, bias: bool) -> Part:
    tp = world()
    structure, sizes = case
    layer = initialised(getattr(STRUCTURES[structure].layers, form)(n, m, **sizes, tp=tp, bias=bias))
    in_dim, out_dim = (0, -1) if form == "column" else (-1, 0)
    x, g = draw(SEQUENCE, BATCH, n, seed=1), draw(SEQUENCE, BATCH, m, seed=2)
    return run_part(layer, own(x, tp, in_dim), own(g, tp, out_dim))


class DenseEquivalent(nn.Module):
    """The unsharded layer computed through its dense matrix, by no operator that the sharded one uses."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, p in layer.named_parameters():
            self.register_parameter(name, p)
        self.weight_of: Callable[[], Tensor] = layer.to_dense

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight_of().T
        return y + self.bias if hasattr(self, "bias") else y


def linear_reference(case: Case, n: int, m: int, bias: bool) -> Part:
    layer = initialised(STRUCTURES[case[0]].layers.linear(n, m, **case[1], bias=bias))
    return run_part(DenseEquivalent(layer), draw(SEQUENCE, BATCH, n, seed=1), draw(SEQUENCE, BATCH, m, seed=2))


def all_linears(tp_size: int) -> list[tuple[str, Case, int, int, bool]]:
    d = width(tp_size)
    return [
        (form, case, n, m, bias)
        for form in ("column", "row")
        for case in cases(tp_size)
        for n, m, bias in ((d, 2 * d, True), (2 * d, d, False))
    ]


def linear_parts(arguments: list[tuple[str, Case, int, int, bool]]) -> list[Part]:
    return [linear_part(*each) for each in arguments]


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_linears(tp_size: int) -> None:
    linears = all_linears(tp_size)
    results = run_ranks(tp_size, linear_parts, linears)
    for i, (form, case, n, m, bias) in enumerate(linears):
        parts: list[Part] = [result[i] for result in results]
        in_dim, out_dim = (0, -1) if form == "column" else (-1, 0)
        try:
            check_against(parts, linear_reference(case, n, m, bias), out_dim, in_dim)
            check_marks(parts, form, case, tp_size)
            check_bytes(parts, form, case, n, m, tp_size)
        except AssertionError as error:
            raise AssertionError(f"{form} {case} {n} -> {m}: {error}") from error


def check_marks(parts: list[Part], form: str, case: Case, tp_size: int) -> None:
    sharded = {name for name, marks in parts[0].marks.items() if marks}
    if tp_size == 1:
        assert not sharded
    elif form == "column":
        assert sharded == {"u" if "u" in parts[0].marks else "weight"} | ({"bias"} & parts[0].marks.keys())
    else:
        assert sharded == {"v" if "v" in parts[0].marks else "weight"}


def check_bytes(parts: list[Part], form: str, case: Case, n: int, m: int, tp_size: int) -> None:
    """The forward sends what `LinearMap` says, the backward that and the gradients of the replicated weights."""
    linear = STRUCTURES[case[0]].linear_map(form, n, m, case[1])
    operation, values = linear.exchange(tp_size).collective, linear.exchange(tp_size).width
    bias = m if form == "row" and "bias" in parts[0].parameters else 0
    adjoint = {"all_gather": "reduce_scatter", "reduce_scatter": "all_gather"}.get(operation, operation)
    for part in parts:
        if tp_size == 1:
            assert part.forward_bytes == part.backward_bytes == []
            continue
        sent = 8 * SEQUENCE * BATCH * values * (tp_size - 1) // tp_size
        assert part.forward_bytes == [(operation, sent)]
        assert [each for each in part.backward_bytes if each[0] != "all_reduce"] == [(adjoint, sent)]
        replicated = sum(p.numel() for name, p in part.parameters.items() if not part.marks[name])
        assert replicated == linear.replicated_weights + bias
        reduced = sum(count for name, count in part.backward_bytes if name == "all_reduce")
        assert reduced == pytest.approx(2 * 8 * replicated * (tp_size - 1) / tp_size, abs=2)


class Branch(nn.Module):
    """x + fc2(gelu(fc1(norm x))): what a transformer block does with its FFN."""

    def __init__(self, norm: nn.Module, fc1: nn.Module, fc2: nn.Module) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = norm.double(), fc1, fc2

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x)), approximate="tanh"))


def branch(case: Case, d: int, tp: TensorGroup | None) -> Branch:
    layers, sizes = STRUCTURES[case[0]].layers, case[1]
    if tp is None:
        fc1, fc2 = (layers.linear(*widths, **sizes) for widths in ((d, 2 * d), (2 * d, d)))
        return Branch(LayerNorm(d), DenseEquivalent(initialised(fc1)), DenseEquivalent(initialised(fc2)))
    fc1, fc2 = layers.column(d, 2 * d, **sizes, tp=tp), layers.row(2 * d, d, **sizes, tp=tp)
    return Branch(LayerNorm(d, tp=tp), initialised(fc1), initialised(fc2))


def branch_parts(tp_size: int) -> list[Part]:
    tp = world()
    d = width(tp_size)
    x, g = own(draw(SEQUENCE, BATCH, d, seed=1), tp, 0), own(draw(SEQUENCE, BATCH, d, seed=2), tp, 0)
    return [run_part(branch(case, d, tp), x, g) for case in cases(tp_size)]


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_a_whole_ffn(tp_size: int) -> None:
    d = width(tp_size)
    results = run_ranks(tp_size, branch_parts, tp_size)
    for i, case in enumerate(cases(tp_size)):
        reference = run_part(branch(case, d, None), draw(SEQUENCE, BATCH, d, seed=1), draw(SEQUENCE, BATCH, d, seed=2))
        check_against([result[i] for result in results], reference, 0, 0)


def other_parts() -> dict[str, Part]:
    """A norm whose statistics are in float32, and a replicated linear of which ranks use other outputs."""
    tp, d = world(), 32
    x, g = draw(SEQUENCE, BATCH, d, seed=1), draw(SEQUENCE, BATCH, d, seed=2)
    norm = RMSNorm(d, tp=tp).double()
    replicated = initialised(ReplicatedLinear(d, d, tp))
    mine = torch.zeros(d, dtype=torch.float64)
    mine.chunk(tp.size)[tp.rank].fill_(1)
    gathered = ColumnParallelLinear(d, d, tp, gather_input=False)
    return {
        "norm": run_part(norm, own(x, tp, 0), own(g, tp, 0)),
        "replicated": run_part(replicated, x, g * mine),
        "gathered": run_part(initialised(gathered), x, own(g, tp, -1)),
    }


def test_norm_replicated_and_gathered_input() -> None:
    results = run_ranks(4, other_parts)
    d = 32
    x, g = draw(SEQUENCE, BATCH, d, seed=1), draw(SEQUENCE, BATCH, d, seed=2)
    check_against([part["norm"] for part in results], run_part(RMSNorm(d).double(), x, g), 0, 0, bound=1e-6)
    reference = linear_reference(("dense", {}), d, d, True)
    for part in results:  # every rank has the whole output, and its share of the input's gradient
        torch.testing.assert_close(part["replicated"].output, reference.output, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(part["gathered"].output.shape, torch.Size((SEQUENCE, BATCH, d // 4)))
        assert part["gathered"].forward_bytes == part["gathered"].backward_bytes == []
    for name in ("replicated", "gathered"):
        total = sum(part[name].input_gradient for part in results)
        torch.testing.assert_close(total, reference.input_gradient, rtol=1e-12, atol=1e-12)
        for weight, gradient in reference.gradients.items():
            if name == "replicated":
                found = results[0][name].gradients[weight]
                assert all(torch.equal(part[name].gradients[weight], found) for part in results)
            else:
                found = torch.cat([part[name].gradients[weight] for part in results])
            torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-12)


COMPILED: list[Case] = [
    ("lowrank", {"rank": RANK}),
    ("blockdense", {"nblocks": 2, "rank": RANK}),
    ("blockshuffle", {"nblocks": 1}),  # fewer blocks than ranks
]


def bf16_and_compiled() -> list[tuple[Part, Part, Part]]:
    """(eager, compiled, in bf16) of every case; compiled to the graphs of forward and backward, not to machine code."""
    tp, d = world(), 32
    x, g = own(draw(SEQUENCE, BATCH, d, seed=1), tp, 0), own(draw(SEQUENCE, BATCH, d, seed=2), tp, 0)
    results = []
    for case in COMPILED:
        module = branch(case, d, tp)
        eager = run_part(module, x, g)
        module.zero_grad()
        module.compile(backend="aot_eager", fullgraph=True)
        compiled = run_part(module, x, g)
        results.append((eager, compiled, run_part(branch(case, d, tp).bfloat16(), x.bfloat16(), g.bfloat16())))
    return results


def test_bf16_and_compiled() -> None:
    """Compiled without a graph break, the collectives are the same; bf16 stays bf16, and near."""
    results = run_ranks(2, bf16_and_compiled)
    for i in range(len(COMPILED)):
        eager, compiled, low = zip(*(result[i] for result in results), strict=True)
        check_against(list(compiled), joined(eager), 0, 0)
        assert all(a.forward_bytes == b.forward_bytes for a, b in zip(compiled, eager, strict=True))
        assert all(sorted(a.backward_bytes) == sorted(b.backward_bytes) for a, b in zip(compiled, eager, strict=True))
        whole = joined(low)  # replicated gradients are equal on the ranks in bf16 too
        for name, gradient in joined(eager).gradients.items():
            assert whole.gradients[name].dtype == torch.bfloat16
            distance = (whole.gradients[name].double() - gradient).norm() / gradient.norm()
            assert 0 < distance < 0.03, name
        assert whole.output.dtype == whole.input_gradient.dtype == torch.bfloat16


def joined(parts: tuple[Part, ...]) -> Part:
    """The whole of what the ranks have."""
    parameters, gradients = (
        {name: assemble(list(parts), name, what) for name in parts[0].parameters}
        for what in ("parameters", "gradients")
    )
    output, input_gradient = (
        torch.cat([getattr(part, what) for part in parts]) for what in ("output", "input_gradient")
    )
    return Part(output, input_gradient, parameters, gradients, {})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partial(ColumnParallelLinear, 8, 10), "10 is not divisible by tp = 4\n    try: out_features=8"),
        (partial(LowRankRowLinear, 10, 8, rank=4), "in_features: 10 is not divisible by tp = 4"),
        (
            partial(BlockDenseRowLinear, 24, 6, nblocks=3, rank=6),
            "3 blocks over tp = 4 ranks: neither divides",
        ),
        (
            partial(BlockShuffleColumnLinear, 8, 8, nblocks=4),
            "8 is not divisible by nblocks x tp = 4 x 4",
        ),
        (
            partial(BlockShuffleRowLinear, 9, 8, nblocks=2),
            "2 does not divide out_features = 8 and in_features",
        ),
        (partial(BlockDenseColumnLinear, 8, 8, nblocks=2, rank=3), "rank: 3 is not a multiple of nblocks = 2"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(tp=TensorGroup(None, 4, 0))
