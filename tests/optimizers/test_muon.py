"""Muon on one process: its config, Newton-Schulz against an SVD, a step against the formula, and the plan of owners."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs import tiny_config
from megastruct.config.checks import cross_field_problems
from megastruct.config.schema import Config
from megastruct.engine.optimizer import build_optimizer
from megastruct.models.gpt import GPT
from megastruct.models.guidance import Guidance
from megastruct.optimizers import OPTIMIZERS, Precision
from megastruct.optimizers.coefficients import COEFFICIENTS, Polynomial
from megastruct.optimizers.newton_schulz import newton_schulz, working_dtype
from megastruct.optimizers.ownership import Matrix, Ownership
from megastruct.planning.cost import training_flops_per_token
from megastruct.planning.memory import optimizer_bytes
from megastruct.planning.ownership import round_bytes, stage_ownership
from megastruct.planning.plan import make_plan
from megastruct.planning.stages import pipeline_stages

MUON: dict[str, Any] = {"kind": "muon", "learning_rate": 1e-2}
RECORD = OPTIMIZERS["muon"]


def config_with(**sections: Any) -> Config:
    return tiny_config(**{**sections, "optimizer": {**MUON, **sections.get("optimizer", {})}})


# -- Newton-Schulz
def with_singular_values(shape: tuple[int, ...], smallest: float) -> Tensor:
    """A float64 matrix [..., m, n] whose singular values fall from 1 to `smallest` geometrically."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(0, math.log10(smallest), u.shape[-1], dtype=torch.float64)
    return u * values @ v


def by_svd(matrix: Tensor, polynomials: Sequence[Polynomial]) -> Tensor:
    """The same polynomials of the singular values, in float64."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for polynomial in polynomials:
        s = sum(c * s**power for c, power in zip(polynomial, (1, 3, 5), strict=True))
    return u * s.unsqueeze(-2) @ v


SHAPES = [(8, 8), (5, 40), (40, 5), (3, 24, 7), (2, 3, 6, 16), (64, 48), (1, 9), (9, 1)]
QUINTIC = COEFFICIENTS["quintic"].of_steps(5)
# name -> (steps, error of an entry in fp32, in bf16, what singular values above 1/100 and above 1/1000 come out as)
EXACTNESS = {
    "quintic": (5, 2e-5, 0.2, (0.68, 1.14), (0.47, 1.21)),
    "polar_express": (5, 2e-5, 0.4, (0.87, 1.13), (0.84, 1.13)),
    "converging": (8, 1e-5, 0.1, (0.99, 1.01), (0.25, 1.01)),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_newton_schulz_against_an_svd(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The largest difference of an entry, against the polynomials of the singular values in float64."""
    steps, in_fp32, in_bf16, *_ = EXACTNESS[name]
    polynomials, matrix = COEFFICIENTS[name].of_steps(steps), with_singular_values(shape, 1e-3)
    found = newton_schulz(matrix.float(), polynomials, dtype)
    assert found.dtype == dtype and found.shape == shape
    bound = in_fp32 if dtype == torch.float32 else in_bf16
    assert (found.double() - by_svd(matrix, polynomials)).abs().max() <= bound


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_newton_schulz_orthogonalises(name: str, shape: tuple[int, ...]) -> None:
    """Singular values from 1 to 1/100, and to 1/1000, of the norm come out near 1."""
    steps, _, _, (low, high), _ = EXACTNESS[name]
    polynomials, matrix = COEFFICIENTS[name].of_steps(steps), with_singular_values(shape, 1.0)
    norm = torch.linalg.matrix_norm(matrix, keepdim=True)
    steep = with_singular_values(shape, 0.05) if min(shape[-2:]) <= 8 else matrix / norm
    for each in (matrix, steep, 1e-6 * matrix, 1e6 * matrix):
        values = torch.linalg.svdvals(newton_schulz(each.float(), polynomials, torch.float32).double())
        assert values.min() >= low and values.max() <= high
    assert not newton_schulz(torch.zeros(shape), polynomials, torch.float32).any()


RANGES = [(name, steps, *ranges) for name, (steps, _, _, *ranges) in EXACTNESS.items()]
RANGES += [("polar_express", 8, (0.9999, 1.0001), (0.9999, 1.0001)), ("quintic", 16, (0.68, 1.14), (0.68, 1.14))]


@pytest.mark.parametrize(("name", "steps", "above_1_100", "above_1_1000"), RANGES)
def test_what_singular_values_become(name: str, steps: int, above_1_100: Any, above_1_1000: Any) -> None:
    """All of them, not only those of some matrices: the polynomials on 100,000 numbers."""
    for smallest, (low, high) in ((1e-2, above_1_100), (1e-3, above_1_1000)):
        values = torch.logspace(math.log10(smallest), 0, 100_000, dtype=torch.float64)
        for a, b, c in COEFFICIENTS[name].of_steps(steps):
            values = a * values + b * values**3 + c * values**5
        assert values.min() >= low and values.max() <= high


def test_polynomials_by_step() -> None:
    """Polar Express has another one in each of eight steps, and then repeats the last; the margin is in the first."""
    polynomials = COEFFICIENTS["polar_express"].of_steps(10)
    assert len(set(polynomials)) == 8 and polynomials[7:] == [(1.875, -1.25, 0.375)] * 3
    assert polynomials[0][0] == pytest.approx(8.28721201814563 / 1.01**2)
    assert polynomials[1][2] == pytest.approx(0.5448431082926601 / 1.01**5)
    assert QUINTIC == [(3.4445, -4.7750, 2.0315)] * 5


@pytest.mark.parametrize(
    ("device_type", "precision", "wanted"),
    [
        ("cuda", "bf16", torch.bfloat16),
        ("cuda", "fp32", torch.float32),
        ("cpu", "bf16", torch.float32),
        ("cpu", "fp32", torch.float32),
    ],
)
def test_newton_schulz_works_in_the_precision_of_the_run(
    monkeypatch: Any, device_type: str, precision: Precision, wanted: torch.dtype
) -> None:
    """The record passes it on: what a step asks for. Newton-Schulz itself runs on any device in both."""
    assert working_dtype(device_type, precision) == wanted
    asked: list[torch.dtype] = []

    def recording(matrices: Tensor, polynomials: Sequence[Polynomial], dtype: torch.dtype) -> Tensor:
        asked.append(dtype)
        return newton_schulz(matrices, polynomials, dtype)

    monkeypatch.setattr("megastruct.optimizers.newton_schulz.newton_schulz", recording)
    parameter = nn.Parameter(torch.ones(3, 2))
    parameter.grad = torch.ones(3, 2)
    groups = [{"params": [parameter], "name": "matrices", "lr": 0.1, "weight_decay": 0.0}]
    RECORD.build(groups, RECORD.settings({}), device_type, precision).step()
    assert asked == [wanted]


def test_matrices_of_a_batch_do_not_touch_each_other() -> None:
    batch = (
        torch.randn(4, 2, 6, 10, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1e-4, 1, 50, 1e3])[:, None, None, None]
    )
    apart = [[newton_schulz(block, QUINTIC, torch.float32) for block in matrix] for matrix in batch]
    torch.testing.assert_close(
        newton_schulz(batch, QUINTIC, torch.float32), torch.stack([torch.stack(a) for a in apart])
    )


# -- the optimizer
def test_roles_and_groups() -> None:
    """q, k and v are matrices of their own; guides, embedding, norms and biases are AdamW's, at its learning rate."""
    config = config_with(guided={"schedule": "fixedstep", "levels": 2}, optimizer={"adamw_learning_rate_scale": 0.25})
    model = GPT(config, guidance=Guidance(config, 1, 0, 1))
    optimizer = build_optimizer(model, config, "cpu")
    names = {p: name for name, p in model.named_parameters()}
    groups = {group["name"]: {names[p] for p in group["params"]} for group in optimizer.param_groups}
    assert groups["vocabulary"] == {"embedding.weight"}
    assert groups["guides"] == {name for name in names.values() if "_guide" in name}
    assert groups["vectors"] == {name for p, name in names.items() if p.ndim == 1}
    assert {f"blocks.0.attention.{name}.weight" for name in ("query", "key", "value", "out")} <= groups["matrices"]
    scales = {group["name"]: (group["lr_scale"], group["weight_decay"]) for group in optimizer.param_groups}
    assert scales == {"matrices": (1, 0.1), "vocabulary": (0.25, 0.1), "guides": (0.25, 0.1), "vectors": (0.25, 0.0)}


@pytest.mark.parametrize(("nesterov", "coefficients"), [(True, "quintic"), (False, "quintic"), (True, "polar_express")])
def test_steps_by_the_formula(nesterov: bool, coefficients: str) -> None:
    """Of a matrix, of a factor in blocks, and of a vector, over three steps."""
    shapes = {"matrix": (6, 4), "blocks": (3, 2, 5), "vector": (7,)}
    generator = torch.Generator().manual_seed(1)
    start = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    parameters = {name: nn.Parameter(tensor.clone()) for name, tensor in start.items()}
    keys: dict[str, Any] = {"nesterov": nesterov, "momentum": 0.8, "update_scale": 0.3}
    settings = RECORD.settings({**keys, "newton_schulz_coefficients": coefficients})
    polynomials = COEFFICIENTS[coefficients].of_steps(5)
    common: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.5}
    optimizer = RECORD.build(
        [
            {"params": [parameters["matrix"], parameters["blocks"]], "name": "matrices", **common},
            {"params": [parameters["vector"]], "name": "vectors", **common},
        ],
        settings,
        "cpu",
        "fp32",
    )
    adamw = torch.optim.AdamW([vector := nn.Parameter(start["vector"].clone())], betas=(0.9, 0.95), **common)
    velocity = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for _ in range(3):
        gradients = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for name, gradient in gradients.items():
            parameters[name].grad = gradient.clone()
        vector.grad = gradients["vector"].clone()
        optimizer.step()
        adamw.step()
        for name in ("matrix", "blocks"):
            velocity[name] = 0.8 * velocity[name] + gradients[name]
            direction = gradients[name] + 0.8 * velocity[name] if nesterov else velocity[name]
            update = 0.3 * math.sqrt(max(shapes[name][-2:])) * by_svd(direction.double(), polynomials)
            start[name] = (1 - 0.1 * 0.5) * start[name] - 0.1 * update
            torch.testing.assert_close(parameters[name].detach().double(), start[name].double(), atol=1e-5, rtol=0)
        assert torch.equal(parameters["vector"], vector)


def test_hooks_of_a_step_run_once() -> None:
    config = config_with()
    optimizer = build_optimizer(GPT(config), config, "cpu")
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step()
    assert calls == ["before", "after"]


def test_deepspeed_takes_it_for_an_optimizer_that_it_does_not_know() -> None:
    """By a class of its own, by words in the name of a class, or by marks on parameters, it would run its own Muon."""
    config = config_with()
    model = GPT(config)
    optimizer = build_optimizer(model, config, "cpu")
    assert all("muon" not in base.__name__.lower() for base in type(optimizer).__mro__)
    assert not any(hasattr(p, "use_muon") for p in model.parameters())
    assert not any("use_muon" in group for group in optimizer.param_groups)


@pytest.mark.parametrize(
    ("optimizer", "where"),
    [
        ({"momentum": 1.0}, "optimizer.momentum"),
        ({"newton_schulz_steps": 0}, "optimizer.newton_schulz_steps"),
        ({"nesterov": 1}, "optimizer.nesterov"),
        ({"newton_schulz_coefficients": "quintics"}, "optimizer.newton_schulz_coefficients"),
        ({"newton_schulz_coefficients": 3.4445}, "optimizer.newton_schulz_coefficients"),
        ({"vector_beta2": 1.0}, "optimizer.vector_beta2"),
        ({"adamw_learning_rate_scale": 0.0}, "optimizer.adamw_learning_rate_scale"),
    ],
)
def test_bad_keys_are_refused(optimizer: dict[str, Any], where: str) -> None:
    assert [problem.where for problem in cross_field_problems(config_with(optimizer=optimizer))] == [where]


# -- the plan
def layouts() -> list[tuple[Config, int]]:
    return [
        (config_with(parallel={"zero_stage": zero, "tp": tp}, ffn=ffn), dp)
        for zero in (0, 1, 3)
        for tp in (1, 2, 4)
        for dp in (1, 2, 5)
        for ffn in ({}, {"structure": "blockdense", "nblocks": 2})
    ]


def test_every_value_comes_from_one_rank() -> None:
    """The sources of a matrix have each of its values once; work is shared out within what one matrix allows."""
    for config, dp in layouts():
        plan = stage_ownership(config, pipeline_stages(config)[0], dp)
        assert plan is not None and plan.num_ranks == dp * config.parallel.tp
        for matrix, sources in zip(plan.matrices, plan.sources, strict=True):
            values = [(rank % plan.tp_size, *matrix.held[rank]) for rank in sources]
            parts = {tensor_rank for tensor_rank, _, _ in values}
            assert len(parts) == (plan.tp_size if matrix.is_cut else 1)
            for part in parts:
                covered = [v for t, start, number in values if t == part for v in range(start, start + number)]
                assert sorted(covered) == list(range(matrix.num_values // len(parts)))
        work = plan.flops()
        assert sum(work) == sum(matrix.flops for matrix in plan.matrices)
        assert max(work) <= max(1.1 * sum(work) / len(work), 2 * max(m.flops for m in plan.matrices))


def test_owners_are_near_unless_that_is_too_much_work() -> None:
    def matrix(flops: int, *held: int) -> Matrix:
        return Matrix((4, 4), flops, tuple((0, number) for number in held), is_cut=False)

    assert Ownership.of([matrix(10, 0, 16), matrix(10, 16, 0)], 1).owners == (1, 0)
    crowded = Ownership.of([matrix(10, 0, 16) for _ in range(4)], 1)
    assert sorted(crowded.owners) == [0, 0, 1, 1]
    assert crowded.sent_values() == [2 * 16, 2 * 16]  # updates of rank 0's matrices; rank 1's fragments of them


@pytest.mark.parametrize("limit", [1, 100, 300, 10_000])
def test_rounds_keep_to_the_limit(limit: int) -> None:
    for config, dp in layouts():
        plan = stage_ownership(config, pipeline_stages(config)[0], dp)
        assert plan is not None
        indices = range(len(plan.matrices))
        rounds = plan.rounds(indices, limit)
        assert sorted(index for each in rounds for index in each) == list(indices)
        most = max([limit, *(max(plan.handled_values([index]).values()) for index in indices)])
        assert all(max(plan.handled_values(each).values()) <= most for each in rounds)
        if limit == 10_000:
            assert all(len({plan.owners[index] for index in each}) > 1 for each in rounds[:1]) or plan.num_ranks == 1


def test_flops_are_planned_and_are_no_model_flops() -> None:
    """By hand: 5 steps of 4 m m n + 2 m m m for 16 square matrices of 16, and the FFNs of 48 wide."""
    config = config_with()
    square, dense = 5 * (4 * 16**3 + 2 * 16**3), 5 * (4 * 16 * 16 * 48 + 2 * 16**3)
    factors = [5 * (4 * 8 * 8 * n + 2 * 8**3) for n in (16, 48)]
    plan = make_plan(config)
    assert plan["optimizer_flops_per_step"] == 16 * square + 2 * dense + 3 * 2 * sum(factors)
    adamw = make_plan(tiny_config())
    assert adamw["optimizer_flops_per_step"] == 0 and plan["training_flops"] == adamw["training_flops"]
    assert training_flops_per_token(config) == training_flops_per_token(tiny_config())


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_state_is_no_more_than_adamws(zero_stage: int) -> None:
    """One moment of matrices: 4 bytes less for each of them, and of their share with ZeRO."""
    muon, adamw = (c(parallel={"zero_stage": zero_stage}) for c in (config_with, tiny_config))
    [stage] = pipeline_stages(muon)
    saved = optimizer_bytes(adamw, stage.parameters_by_role, 4) - optimizer_bytes(muon, stage.parameters_by_role, 4)
    matrices = stage.parameters_by_role["matrix"]
    assert saved == 4 * (matrices // 4 if zero_stage else matrices)
    assert round_bytes(adamw, stage, 4) == 0


# -- learning rates by width
@pytest.mark.parametrize(("fan_out", "fan_in"), [(64, 64), (256, 64), (64, 256), (4, 512)])
def test_base_width_makes_updates_change_outputs_alike(fan_out: int, fan_in: int) -> None:
    """The update's spectral norm over sqrt(d_out / d_in) is that of a square matrix of the base width."""

    def relative_norm(m: int, n: int) -> float:
        scale = RECORD.learning_rate_scale("matrix", m, n, 128)
        assert scale is not None
        return scale * math.sqrt(max(m, n)) / math.sqrt(m / n)

    assert relative_norm(fan_out, fan_in) == pytest.approx(relative_norm(128, 128))
    assert RECORD.learning_rate_scale("guide", fan_out, fan_in, 128) == 128 / fan_in
