"""Attention inside of documents: a packed row is what its documents are, each alone."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import flex_attention

from configs import tiny_config
from marks import always
from megastruct.config.schema import Config
from megastruct.layers.rotary import Rotary, rotate
from megastruct.models.documents import block_mask, dense_mask, document_ids
from megastruct.models.gpt import GPT
from megastruct.models.guidance import Guidance
from megastruct.planning.cost import training_flops_per_token
from megastruct.planning.memory import activation_bytes, block_activation_bytes
from megastruct.planning.stages import pipeline_stages
from megastruct.planning.traffic import pipeline_bytes
from saved import saved_bytes

EOD = 2
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "llama": {"model": {"norm": "rmsnorm", "activation": "swiglu", "bias": False, "tie_embeddings": False}},
    "gqa_narrow_attention": {"model": {"num_key_value_heads": 2, "head_dim": 6}},
    "one_key_value_head": {"model": {"num_key_value_heads": 1}},
    "recomputed": {"training": {"activation_checkpointing": True}},
    "recomputed in part": {"training": {"activation_checkpointing": "selective"}},
    "guided": {"guided": {"schedule": "fixedstep", "levels": 4}},
}
# Every row has 16 tokens: cut at both ends, documents of one token (the end alone), one document, an end at the end.
LENGTHS = [[5, 1, 1, 9], [16], [1, 15], [7, 9]]
UNFINISHED = {0, 3}  # rows whose last document goes on in the next row


def packed_rows() -> Tensor:
    """ids int64 [4, 16]: documents of LENGTHS that end with EOD, and nowhere else have it."""
    ids = torch.randint(EOD + 1, 64, (4, 16), generator=torch.Generator().manual_seed(3))
    for row, lengths in enumerate(LENGTHS):
        ends = torch.tensor(lengths).cumsum(0) - 1
        ids[row, ends[:-1] if row in UNFINISHED else ends] = EOD
    return ids


def documents_of(ids: Tensor) -> list[tuple[int, int, int]]:
    """(row, start, end) of every document."""
    found = []
    for row, lengths in enumerate(LENGTHS):
        ends = torch.tensor(lengths).cumsum(0).tolist()
        found += [(row, end - length, end) for length, end in zip(lengths, ends, strict=True)]
    assert found[-1][2] == ids.shape[1]
    return found


def build(config: Config, eod_id: int | None) -> GPT:
    guidance = Guidance(config, 1, 0, 1) if config.guided.schedule != "off" else None
    if guidance:
        guidance.start_evaluation(0.25)  # the guides take all tokens
    return GPT(config, guidance=guidance, eod_id=eod_id).double()


def gradients(model: GPT) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_document_ids_by_hand() -> None:
    ids = torch.tensor([[7, 7, 2, 8, 2, 2, 9, 9], [2, 5, 5, 5, 5, 5, 5, 2], [5, 5, 5, 5, 5, 5, 5, 5]])
    wanted = [[0, 0, 0, 1, 1, 2, 3, 3], [0, 1, 1, 1, 1, 1, 1, 1], [0] * 8]
    found = document_ids(ids, EOD)
    assert found.tolist() == wanted and found.dtype == torch.int32


def test_mask_by_hand() -> None:
    mask = dense_mask(torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]], dtype=torch.int32), torch.bfloat16)
    assert mask.shape == (2, 1, 4, 4) and mask.dtype == torch.bfloat16
    seen = [[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]], torch.ones(4, 4).tril().tolist()]
    assert torch.equal(mask.exp()[:, 0], torch.tensor(seen).bfloat16())


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=8), min_size=1, max_size=3),
    block=st.sampled_from([4, 8]),
    s=st.integers(2, 40),
)
def test_mask_in_blocks_is_the_dense_one(lengths: list[list[int]], block: int, s: int) -> None:
    """Block by block of scores: left out where the dense mask sees nothing, unmasked only where it sees all; and
    attention with it, as the kernel's reference computes it."""
    rows = [[i for i, length in enumerate(row) for _ in range(length)] for row in lengths]
    documents = torch.tensor([(row + [len(row)] * s)[:s] for row in rows], dtype=torch.int32)
    mask, dense = block_mask(documents, block), dense_mask(documents, torch.float64)
    n = -(-s // block)
    seen = torch.nn.functional.pad((dense == 0)[:, 0], (0, n * block - s) * 2)
    seen = seen.view(-1, n, block, n, block).transpose(2, 3).flatten(3)  # [b, n, n, block^2]
    assert torch.equal(mask.to_dense()[:, 0].bool(), seen.any(-1))
    assert mask.full_kv_num_blocks is not None
    assert torch.equal(mask.full_kv_num_blocks[:, 0].long(), seen.all(-1).sum(-1))

    q, k, v = torch.randn(3, len(rows), 2, s, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    found = flex_attention(q, k, v, block_mask=mask)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_a_packed_row_is_its_documents_each_alone(variant: str) -> None:
    """Logits and every gradient, in float64; positions of the packed ones go on, those of the others start at 0.

    Rotary computes in float32 by design, so that is where the bound comes from.
    """
    config = tiny_config(**VARIANTS[variant])
    packed, alone, crossed = build(config, EOD), build(config, None), build(config, None)
    ids = packed_rows()
    weights = torch.randn(16, 4, 64, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    logits = packed(ids)  # [s, b, v]
    (logits * weights).sum().backward()
    outputs = torch.empty_like(logits)
    for row, start, end in documents_of(ids):
        own = alone(ids[row : row + 1, start:end])
        (own * weights[start:end, row : row + 1]).sum().backward()  # gradients add up
        outputs[start:end, row] = own[:, 0].detach()
    torch.testing.assert_close(logits, outputs, rtol=2e-5, atol=2e-6)
    wanted = gradients(alone)
    assert set(gradients(packed)) == set(wanted) == {name for name, _ in packed.named_parameters()}
    for name, gradient in gradients(packed).items():
        bound = 1e-5 * float(wanted[name].abs().max())
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=bound, msg=lambda text, n=name: f"{n}: {text}")

    (crossed(ids) * weights).sum().backward()  # the comparison can fail
    far = {name: (g - wanted[name]).abs().max() / wanted[name].abs().max() for name, g in gradients(crossed).items()}
    assert all(difference > 1e-2 for name, difference in far.items() if name.endswith(("query.weight", "out.weight")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_crosses_a_border_not_even_rounding(dtype: torch.dtype) -> None:
    model = GPT(tiny_config(model={"num_key_value_heads": 2}), eod_id=EOD).to(dtype)
    ids = packed_rows()
    changed = ids.clone()
    changed[0, :5] = torch.tensor([60, 61, 62, 63, EOD])  # the first document of the first row
    difference = (model(ids) - model(changed)).abs().amax(-1)  # [s, b]
    assert (difference[:5, 0] > 0).all()
    difference[:5, 0] = 0
    assert torch.equal(difference, torch.zeros_like(difference))
    model.tied = False  # gradients of the words as inputs alone
    model(ids)[7:, 0].float().square().sum().backward()
    used = model.embedding.weight.grad.abs().amax(-1) > 0
    assert set(used.nonzero().flatten().tolist()) == set(ids[0, 7:].tolist())


def test_a_prompt_is_a_document_of_its_own() -> None:
    """A model that generates needs no end-of-document id: text alone makes the logits that it made in its row."""
    config = tiny_config()
    trained, served = build(config, EOD), build(config, None)
    prompt = torch.tensor([[11, 12, 13]])
    row = torch.cat((torch.tensor([[40, 41, EOD]]), prompt), 1)
    torch.testing.assert_close(trained(row)[3:], served(prompt), rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(trained(prompt), served(prompt), rtol=0, atol=1e-12)


def test_rotary_scores_know_no_place_but_the_distance() -> None:
    """So that positions need not start again in every document: the scores of a document are those of any other place
    in the row, within the rounding of the tables (float32, exact to 2^-24)."""
    generator = torch.Generator().manual_seed(5)
    q, k = torch.randn(2, 24, 1, 1, 64, generator=generator)  # [s, b, heads, dh]
    cos, sin = Rotary(64, 10_000.0).tables(4096, torch.device("cpu"))

    def scores(start: int) -> Tensor:
        turned = [rotate(x, cos[start : start + 24], sin[start : start + 24])[:, 0, 0].double() for x in (q, k)]
        return turned[0] @ turned[1].T

    scale = float(q.norm(dim=-1).max() * k.norm(dim=-1).max())
    for start in (1, 24, 1000, 4072):
        assert float((scores(start) - scores(0)).abs().max()) <= 4 * 2**-24 * scale
    shifted = rotate(q, cos[1:25], sin[1:25])[:, 0, 0] @ rotate(k, cos[:24], sin[:24])[:, 0, 0].T
    assert float((shifted.double() - scores(0)).abs().max()) > 1e-2 * scale  # another distance is seen


def test_other_borders_compile_nothing_new() -> None:
    torch._dynamo.reset()
    config = tiny_config(model={"num_layers": 3, "num_key_value_heads": 2})
    model = GPT(config, eod_id=EOD)
    model(torch.zeros(4, 16, dtype=torch.int64))  # makes the rotary tables, as the engine does before it compiles
    compiled = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    for block in compiled.blocks.values():
        block.compile(backend=counter)
    for step in range(8):
        ids = torch.randint(0, 3 + 20 * step, (4, 16), generator=torch.Generator().manual_seed(step)) % 64
        outputs = [each(ids) for each in (model, compiled)]
        for output in outputs:
            output.square().mean().backward()
        torch.testing.assert_close(*outputs)
    assert counter.frame_count == 2  # a dense block and a structured one
    for (name, eager), fast in zip(model.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(eager.grad, fast.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("compiled", "kv_heads", "recompute"),
    always(itertools.product([False, True], [4, 2], [False, True]), [(False, 4, False), (True, 2, True)]),
)
def test_a_model_with_the_mask_in_blocks(
    monkeypatch: pytest.MonkeyPatch, compiled: bool, kv_heads: int, recompute: bool
) -> None:
    """Logits and gradients are those of the dense mask, and other borders compile nothing new.

    By FlexAttention's reference, whose backward PyTorch keeps from CPUs; test_document_kernel.py has the kernel.
    """
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    monkeypatch.setattr("megastruct.models.attention._compiled_flex_attention", lambda: flex_attention)
    torch._dynamo.reset()
    training = {"activation_checkpointing": recompute, "seq_length": 16}
    config = tiny_config(model={"num_key_value_heads": kv_heads, "hidden_size": 64, "head_dim": 16}, training=training)
    dense = GPT(config, eod_id=EOD)
    dense(torch.zeros(4, 16, dtype=torch.int64))  # makes the rotary tables
    in_blocks = copy.deepcopy(dense)
    counter = CompileCounterWithBackend("aot_eager")
    for block in in_blocks.blocks.values() if compiled else ():
        block.compile(backend=counter)
    for step in range(4):
        ids = torch.randint(0, 3 + 20 * step, (4, 16), generator=torch.Generator().manual_seed(step)) % 64
        wanted = dense(ids)
        with monkeypatch.context() as patch:
            patch.setattr("megastruct.models.walk.attention_mask", lambda documents, *_: block_mask(documents, 8))
            found = in_blocks(ids)
        torch.testing.assert_close(found, wanted)
        for output in (wanted, found):
            output.square().mean().backward()
    assert counter.frame_count == (2 if compiled else 0)  # a dense block and a structured one
    for (name, one), other in zip(dense.named_parameters(), in_blocks.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=lambda text, name=name: f"{name}: {text}")


def with_documents(value: str, **sections: Any) -> Config:
    sections["training"] = {**sections.get("training", {}), "document_attention": value}
    return tiny_config(**sections)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_autograd_saves_is_planned(kv_heads: int, precision: str) -> None:
    """Two blocks keep one mask between them, in the model's precision."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    sections = {"model": {"num_key_value_heads": kv_heads}, "training": {"precision": precision}}
    config = with_documents("separate", **sections)
    blocks = [GPT(config).to(dtype).blocks.get_submodule(name) for name in "01"]
    documents = document_ids(packed_rows()[:2, :8], EOD)

    def run() -> Tensor:
        mask = dense_mask(documents, dtype)
        return blocks[1](blocks[0](x + 0, mask=mask), mask=mask)

    x = torch.randn(8, 2, 16, dtype=dtype, requires_grad=True)  # [s, b, h]
    planned = 16 * sum(block_activation_bytes(config, config.ffn.of_block(index)) for index in (0, 1))
    mask_bytes = 2 * 8 * 8 * dtype.itemsize
    found = saved_bytes(run, [p for block in blocks for p in block.parameters()])
    assert found == pytest.approx(planned + mask_bytes, rel=0.02)

    copies = 2 * (4 - kv_heads) * 4 * dtype.itemsize  # of keys and values, per token and block
    for recompute, copied_blocks in ((False, 4), (True, 1)):
        sections["training"]["activation_checkpointing"] = recompute
        both = [with_documents(value, **sections) for value in ("separate", "crossed")]
        separate, crossed = (activation_bytes(config, pipeline_stages(config)[0], 1) for config in both)
        assert separate - crossed == mask_bytes + 16 * copied_blocks * copies


def test_plan_of_flops_and_traffic() -> None:
    crossed, separate = (with_documents(value, parallel={"pp": 2}) for value in ("crossed", "separate"))
    assert training_flops_per_token(separate) == training_flops_per_token(crossed)  # the whole square is computed
    before, after = (pipeline_bytes(config, pipeline_stages(config)[0], 1) for config in (crossed, separate))
    assert after["activations"] - before["activations"] == 4 * 16 * 8  # int32 per token of a step
    assert after["gradients"] == before["gradients"]
