"""The plan of `optimizers/ownership.py` for the stages of a config: which rank will own which whole matrix.

What each rank holds of a matrix follows from how DeepSpeed cuts parameters: not at all without ZeRO; with ZeRO 1 and 2
the parameters of a group one after the other, into equal parts; with ZeRO 3 every parameter by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megastruct.config.schema import Config
from megastruct.optimizers import OPTIMIZERS
from megastruct.optimizers.ownership import Matrix, Ownership
from megastruct.planning.cost import ffn_linears
from megastruct.planning.stages import Stage

ALIGNED_VALUES = 2  # DeepSpeed's nccl_start_alignment_factor: the parts of a group have a multiple of it


class PlannedMatrix(NamedTuple):
    """A matrix [..., m, n] of a stage, as a whole.

    `is_cut`: tensor-parallel ranks have different parts. `is_factor`: it is of a structured linear.
    """

    shape: tuple[int, ...]
    is_cut: bool
    is_factor: bool = False


def stage_ownership(config: Config, stage: Stage, dp_size: int) -> Ownership | None:
    """Owners of the stage's matrices; None if the optimizer needs no whole matrices, or the stage has none."""
    optimizer = OPTIMIZERS[config.optimizer.kind]
    if not optimizer.group_of("matrix").whole or not stage.blocks:
        return None
    planned = list(stage_matrices(config, stage))
    local = [math.prod(matrix.shape) // (config.parallel.tp if matrix.is_cut else 1) for matrix in planned]
    held: list[list[tuple[int, int]]] = [[] for _ in planned]
    for group in _groups(config, planned):
        for index, ranges in zip(group, _cut(config, [local[index] for index in group], dp_size), strict=True):
            held[index] = [each for each in ranges for _ in range(config.parallel.tp)]
    settings = config.optimizer.settings
    matrices = [
        Matrix(each.shape, optimizer.step_flops(each.shape, settings), tuple(ranges), each.is_cut)
        for each, ranges in zip(planned, held, strict=True)
    ]
    return Ownership.of(matrices, config.parallel.tp)


def optimizer_flops(config: Config, stage: Stage, dp_size: int) -> tuple[int, int]:
    """FLOPs of matrix products in an optimizer step: (of all ranks of the stage, of the one with most)."""
    ownership = stage_ownership(config, stage, dp_size)
    work = ownership.flops() if ownership else [0]
    return sum(work), max(work)


def whole_matrix_bytes(config: Config, stage: Stage, dp_size: int) -> int:
    """Bytes that a rank of the stage sends per step to owners and as an owner, in fp32: those of the rank with most."""
    ownership = stage_ownership(config, stage, dp_size)
    return 4 * max(ownership.sent_values()) if ownership else 0


def round_bytes(config: Config, stage: Stage, dp_size: int) -> int:
    """What an optimizer step allocates on a device for the largest of its rounds, in fp32, at most.

    First fragments travel to the owners, which have their matrices as received and as put together. They work on those
    of one shape after the other, and keep the updates. Then these travel back. A single rank only works.
    """
    ownership = stage_ownership(config, stage, dp_size)
    largest = 0
    for matrices in ownership.rounds(range(len(ownership.matrices))) if ownership else []:
        assert ownership is not None
        handled = ownership.handled_values(matrices)
        kept, owned, returned = handled["kept"], handled["owned"], handled["returned"]
        work = max(_work_values(ownership, matrices, rank) for rank in range(ownership.num_ranks))
        travel = (
            [0] if ownership.num_ranks == 1 else [kept + owned, 2 * owned, 2 * owned + returned + kept, owned + work]
        )
        largest = max([largest, 4 * work, *(4 * values for values in travel)])
    return largest


def _work_values(ownership: Ownership, matrices: list[int], rank: int) -> int:
    """Values that a rank allocates to work on its matrices of a round: updates, and for those of one shape a batch, two
    iterates and two squares of their short side."""
    batches: dict[tuple[int, ...], int] = {}
    for matrix in (ownership.matrices[index] for index in matrices if ownership.owners[index] == rank):
        batches[matrix.shape] = batches.get(matrix.shape, 0) + matrix.num_values
    done = most = 0
    for (*_, m, n), values in batches.items():
        most = max(most, done + 3 * values + 2 * (values * min(m, n) // max(m, n)))
        done += values
    return most


def _groups(config: Config, planned: Sequence[PlannedMatrix]) -> list[list[int]]:
    """The indices of the matrices by parameter group: those of equal learning rate."""
    base, optimizer = config.model.base_width, OPTIMIZERS[config.optimizer.kind]
    groups: dict[tuple[float, float], list[int]] = {}
    for index, matrix in enumerate(planned):
        *_, fan_out, fan_in = matrix.shape
        scale = optimizer.learning_rate_scale("matrix", fan_out, fan_in, base) if base else 1.0
        of_factors = config.optimizer.factor_learning_rate_scale if matrix.is_factor else 1.0
        groups.setdefault((scale or 1.0, of_factors), []).append(index)
    return list(groups.values())


def _cut(config: Config, sizes: list[int], dp_size: int) -> Iterator[list[tuple[int, int]]]:
    """(start, number) of the values that each replica has, of every parameter of a group with these sizes."""
    zero, offset = config.parallel.zero_stage, 0
    part = ALIGNED_VALUES * -(-sum(sizes) // (ALIGNED_VALUES * dp_size))
    for size in sizes:
        if zero == 3:
            part, offset = -(-size // dp_size), 0
        whole = [(0, size)] * dp_size
        yield whole if zero == 0 else [_overlap(offset, size, part * r, part * (r + 1)) for r in range(dp_size)]
        offset += size


def _overlap(offset: int, size: int, first: int, last: int) -> tuple[int, int]:
    start, stop = max(offset, first), min(offset + size, last)
    return (start - offset, stop - start) if start < stop else (0, 0)


def stage_matrices(config: Config, stage: Stage) -> Iterator[PlannedMatrix]:
    """A stage's matrices, in the order of the module's parameters."""
    model, tp = config.model, config.parallel.tp
    d, a, kv = model.hidden_size, model.attention_width, model.kv_heads * model.attention_head_dim
    for index in stage.blocks:
        kv_cut = tp > 1 and model.kv_heads % tp == 0
        yield PlannedMatrix((a, d), tp > 1)
        yield PlannedMatrix((kv, d), kv_cut)
        yield PlannedMatrix((kv, d), kv_cut)
        yield PlannedMatrix((d, a), tp > 1)
        ffn = config.ffn.of_block(index)
        for linear in ffn_linears(config, ffn):
            replicated = linear.numbers.replicated_factors(linear.form)
            for name, shape in linear.numbers.factor_shapes(linear.n, linear.m, linear.sizes).items():
                yield PlannedMatrix(shape, tp > 1 and name not in replicated, is_factor=not ffn.is_dense)
