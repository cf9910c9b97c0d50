"""Taking global tensors apart and putting them together; which sizes divide. No ranks needed."""

from __future__ import annotations

import pytest
import torch

from configs import tiny_config
from megastruct.config.checks import cross_field_problems
from megastruct.errors import Problem
from megastruct.parallel.shards import Cut, ShardSpec
from megastruct.parallel.sizes import nearest_multiple
from megastruct.structures.block_sharding import row_spec
from megastruct.structures.sizes import nearest_nblocks


@pytest.mark.parametrize(
    ("spec", "shape", "chunked_dim"),
    [
        (ShardSpec.along(0, 4), (8, 3), 0),
        (ShardSpec.along(1, 3), (4, 6, 2), 1),
        (ShardSpec.along(0, 4), (13, 3), 0),  # 4, 4, 4, 1
        (ShardSpec.along(0, 1), (5,), None),
        (ShardSpec((Cut(0, 2), Cut(2, 3))), (4, 5, 6), None),
        (ShardSpec((Cut(2, 2), Cut(0, 2))), (4, 5, 6), None),
        (ShardSpec((Cut(0, 1), Cut(2, 4))), (1, 5, 8), 2),
    ],
)
def test_shards_are_disjoint_and_complete(spec: ShardSpec, shape: tuple[int, ...], chunked_dim: int | None) -> None:
    full = torch.arange(torch.Size(shape).numel()).view(shape)
    shards = [spec.shard(full, rank) for rank in range(spec.num_ranks)]
    assert sorted(value for shard in shards for value in shard.flatten().tolist()) == full.flatten().tolist()
    assert torch.equal(spec.unshard(shards), full)
    assert [tuple(shard.shape) for shard in shards] == [spec.local_shape(shape, rank) for rank in range(len(shards))]
    if chunked_dim is not None:
        assert all(torch.equal(a, b) for a, b in zip(shards, full.chunk(len(shards), chunked_dim), strict=True))
    for rank, shard in enumerate(shards):
        [box] = spec.boxes(shape, rank)
        index = tuple(slice(o, o + size) for o, size in zip(box.global_offsets, box.sizes, strict=True))
        assert torch.equal(full[index], shard)


def test_shards_that_do_not_fit_are_refused() -> None:
    spec = ShardSpec.along(0, 3)
    with pytest.raises(ValueError, match="2 shards for 3 ranks"):
        spec.unshard([torch.zeros(2)] * 2)
    with pytest.raises(ValueError, match=r"shard 0 is \[1\], not \[2\]"):
        spec.unshard([torch.zeros(1), torch.zeros(2), torch.zeros(2)])


@pytest.mark.parametrize(("nblocks", "tp_size"), [(4, 1), (4, 2), (4, 4), (2, 4), (1, 4), (3, 6)])
def test_rows_of_blocks_act_on_contiguous_inputs(nblocks: int, tp_size: int) -> None:
    """Rank t's part of v is what multiplies inputs [t * N/tp, (t+1) * N/tp)."""
    n = 24
    inputs = torch.arange(n).view(nblocks, 1, n // nblocks).expand(nblocks, 5, -1)  # v that holds its input's number
    for rank in range(tp_size):
        share = row_spec(nblocks, tp_size).shard(inputs, rank)
        assert share[:, 0].flatten().tolist() == list(range(rank * n // tp_size, (rank + 1) * n // tp_size))


FITTING = {
    "seq_length": 64,
    "vocab_size": 1000,
    "num_attention_heads": 8,
    "hidden_size": 64,
    "ffn_hidden_size": 256,
}


@pytest.mark.parametrize(
    ("tp_size", "changes", "wanted"),
    [
        (1, {"seq_length": 7, "vocab_size": 3, "ffn_hidden_size": 9}, []),
        (4, {}, []),
        (4, {"structure": "blockdense", "nblocks": 2, "rank": 32}, []),
        (2, {"structure": "blockshuffle", "nblocks": 4}, []),
        (3, {"num_attention_heads": 9, "ffn_hidden_size": 258}, [("training.seq_length", "training.seq_length=63")]),
        (4, {"num_attention_heads": 6}, [("model.num_attention_heads", "model.num_attention_heads=4")]),
        (4, {"num_attention_heads": 1}, [("model.num_attention_heads", "model.num_attention_heads=4")]),
        (4, {"ffn_hidden_size": 255}, [("model.ffn_hidden_size", "model.ffn_hidden_size=256")]),
        (4, {"vocab_size": 9}, [("model.vocab_size", "model.vocab_size=8")]),
        (4, {"vocab_size": 13}, []),
        (4, {"structure": "blockdense", "nblocks": 3, "rank": 32}, [("ffn.nblocks", "ffn.nblocks=2")]),
        (
            8,
            {"structure": "blockshuffle", "nblocks": 4, "ffn_hidden_size": 264},
            [("model.ffn_hidden_size", "model.ffn_hidden_size=256")],
        ),
    ],
)
def test_shard_problems(tp_size: int, changes: dict[str, object], wanted: list[tuple[str, str]]) -> None:
    problems = problems_of(tp_size, {**FITTING, **changes})
    assert [(problem.where, problem.suggestion) for problem in problems] == wanted
    for problem in problems:  # the suggestion works
        where, _, value = problem.suggestion.partition("=")
        assert not problems_of(tp_size, {**FITTING, **changes, where.split(".")[1]: int(value)})


def problems_of(tp_size: int, sizes: dict[str, object]) -> list[Problem]:
    """Of a config with these sizes."""
    ffn = {key: sizes[key] for key in ("structure", "nblocks", "rank") if key in sizes}
    seq_length = sizes["seq_length"]
    model = {key: value for key, value in sizes.items() if key not in ffn and key != "seq_length"}
    config = tiny_config(
        model={**model, "head_dim": 2},
        ffn={"structure": "dense", "rank": None, **ffn},
        training={"seq_length": seq_length},
        parallel={"tp": tp_size},
    )
    return cross_field_problems(config)


def test_nearest() -> None:
    assert [nearest_multiple(value, 4) for value in (1, 3, 5, 6, 7, 8)] == [4, 4, 4, 4, 8, 8]
    assert nearest_nblocks(3, 8, [64, 256]) == 2
    assert nearest_nblocks(7, 4, [64, 256]) == 8
    assert nearest_nblocks(5, 4, [6, 9]) == 1
