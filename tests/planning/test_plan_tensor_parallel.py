"""What the plan says of tensor parallelism against real ranks: parameters, bytes sent, saved activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy

from configs import tiny_config
from marks import soak
from megastruct.config.schema import Config
from megastruct.engine.config import bucket_values
from megastruct.engine.engine import build_engine
from megastruct.models import recompute
from megastruct.models.gpt import GPT
from megastruct.models.guidance import Guidance
from megastruct.models.loss import make_loss
from megastruct.parallel.collectives import count_bytes
from megastruct.parallel.groups import TensorGroup
from megastruct.parallel.topology import Topology
from megastruct.planning.memory import block_activation_bytes, kept_block_bytes, memory_by_part
from megastruct.planning.stages import pipeline_stages
from megastruct.planning.traffic import pipeline_bytes, tensor_parallel_bytes
from ranks import run_ranks
from runs import batches
from saved import saved_bytes
from sharded import world

FFNS: dict[str, dict[str, Any]] = {
    "dense": {"structure": "dense", "rank": None},
    "lowrank": {},
    "blockdense": {"structure": "blockdense", "nblocks": 2},  # fewer blocks than 4 ranks
    "blockshuffle": {"structure": "blockshuffle", "nblocks": 2, "rank": None},
}
MODELS: dict[str, dict[str, Any]] = {
    "paper": {},
    "llama": {
        "norm": "rmsnorm",
        "activation": "swiglu",
        "bias": False,
        "head_dim": 6,
        "tie_embeddings": False,
        "vocab_size": 62,
    },
    "few_kv_heads": {"num_key_value_heads": 2, "vocab_size": 61},
    "qk_norm": {"num_key_value_heads": 2, "vocab_size": 61, "qk_norm": True},
}
CHECKPOINTING = (False, True, "selective")


def config_for(tp: int, ffn: str = "lowrank", model: str = "paper", pp: int = 1, **training: Any) -> Config:
    """One micro-batch a step; without pipelines ZeRO 2, which sums replicated gradients in every backward."""
    training = {"global_batch_size": 2, **training}
    parallel = {"tp": tp, "pp": pp, "zero_stage": 2 if pp == 1 else 1}
    return tiny_config(parallel=parallel, ffn=FFNS[ffn], model=MODELS[model], training=training)


def count(modules: list[nn.Module]) -> int:
    return sum(p.numel() for p in {p for module in modules for p in module.parameters()})


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("ffn", sorted(FFNS))
@pytest.mark.parametrize("model", sorted(MODELS))
def test_parameters_of_a_device(ffn: str, model: str, tp: int) -> None:
    for pp in (1, 2, 3):
        config = config_for(tp, ffn, model, pp)
        built = GPT(config, TensorGroup(None, tp, rank=0), init=False)
        for stage in pipeline_stages(config):
            layers = [built.get_submodule(layer.name) for layer in stage.layers if layer.name != "head"]
            if stage.has_head:
                layers.append(built.embedding if config.model.tie_embeddings else built.head)
            assert stage.parameters_per_device == count(layers)
            held = [
                p
                for layer in stage.layers
                if layer.name != "head"
                for p in built.get_submodule(layer.name).parameters()
            ]
            if tp > 1:
                assert stage.replicated_parameters == sum(p.numel() for p in held if not hasattr(p, "shard_spec"))
        last = GPT(config, TensorGroup(None, tp, rank=tp - 1), init=False)
        missing = (-config.model.vocab_size % tp) * (1 if config.model.tie_embeddings else 2)
        assert count([built]) - count([last]) == missing * config.model.hidden_size


def sent_by_a_micro_batch(configs: list[Config]) -> list[dict[str, int]]:
    """Bytes by operation of one forward and backward of the whole model."""
    tp, results = world(), []
    for config in configs:
        guidance = Guidance(config, tp.size, 0, 1) if config.guided.schedule != "off" else None
        model = GPT(config, tp, guidance)
        if guidance:
            guidance.start_step(0, 0.5)
        if config.training.precision == "bf16":
            model.bfloat16()
        ids = torch.randint(config.model.vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))
        with count_bytes() as sent:
            make_loss(config, tp)(model(ids), ids).backward()
        results.append({name: sum(size for each, size in sent if each == name) for name in {name for name, _ in sent}})
    return results


@pytest.mark.parametrize("tp", [2, soak(4)])
def test_bytes_sent_by_the_whole_model(tp: int) -> None:
    """Exactly, for every structure, precision and kind of model, with and without activation checkpointing."""
    cases = [
        (ffn, model, precision, checkpointing)
        for ffn in FFNS
        for model, precision in (("paper", "fp32"), ("llama", "bf16"), ("few_kv_heads", "fp32"), ("qk_norm", "bf16"))
        for checkpointing in CHECKPOINTING
    ]
    configs = [config_for(tp, f, m, precision=p, activation_checkpointing=c) for f, m, p, c in cases]
    for results in run_ranks(tp, sent_by_a_micro_batch, configs):
        for case, config, sent in zip(cases, configs, results, strict=True):
            [stage] = pipeline_stages(config)
            planned = tensor_parallel_bytes(config, stage, dp_size=1)
            assert sum(sent.values()) == sum(planned.values()), case
            loss = 2 * (tp - 1) * 3 * 4 * 16 // tp  # three fp32 for each of 16 tokens
            assert sent["all_reduce"] == planned["replicated_gradients"] + loss, case
            with_blocks = config.ffn.structure.startswith("block")
            assert ("all_to_all" in sent) == with_blocks, case


@pytest.mark.parametrize("skip", ["rows", "none"])
def test_bytes_sent_with_guides(skip: str) -> None:
    """Half of the rows in every guided forward, which is the mean; or all."""
    cases = [(ffn, checkpointing) for ffn in sorted(set(FFNS) - {"dense"}) for checkpointing in CHECKPOINTING]
    guided = {"guided": {"schedule": "fixedstep", "skip": skip, "levels": 2}}
    configs = [
        Config.model_validate({**config_for(2, ffn, activation_checkpointing=c).model_dump(), **guided})
        for ffn, c in cases
    ]
    for results in run_ranks(2, sent_by_a_micro_batch, configs):
        for case, config, sent in zip(cases, configs, results, strict=True):
            planned = tensor_parallel_bytes(config, pipeline_stages(config)[0], dp_size=1)
            assert planned["guides"] > 0 and sum(sent.values()) == sum(planned.values()), case


def test_bytes_by_purpose() -> None:
    """By hand: 4 blocks, the first one dense, 16 tokens, 8 micro-batches, 2 ranks, bf16; d = 16, R = 8, f = 48."""
    config = config_for(2, precision="bf16", global_batch_size=16)
    [stage] = pipeline_stages(config)
    passes = 8 * 2 * 16 * 2 // 2  # micro-batches, bytes, tokens, forward and backward, half to the other rank
    replicated = 9 * 2 * 16 + 4 * 2 * 16 + 3 * 2 * 8 * 16  # norms, biases of the row maps, a factor of fc1 and of fc2
    assert tensor_parallel_bytes(config, stage, dp_size=1) == {
        "attention": passes * 4 * 2 * 16,
        "ffn": passes * (2 * 16 + 3 * 2 * 8),
        "guides": 0,
        "vocabulary": passes * 2 * 16 + 8 * 3 * 4 * 16,
        "replicated_gradients": 8 * 2 * replicated,
    }
    once = Config.model_validate({**config.model_dump(), "parallel": {"tp": 2, "zero_stage": 1}})
    assert tensor_parallel_bytes(once, stage, dp_size=1)["replicated_gradients"] == 4 * replicated
    assert sum(tensor_parallel_bytes(config_for(1), pipeline_stages(config_for(1))[0], dp_size=1).values()) == 0


def sent_by_a_step(config: Config, topology: Topology) -> int:
    """Bytes that a training step of the real engine sends within the tensor-parallel group."""
    engine = build_engine(config, topology, torch.device("cpu"))
    engine.set_learning_rate(0.1)
    engine.set_alpha(0.5, 0)
    with count_bytes() as sent:
        engine.train_batch(batches(config, topology))
    return sum(size for _, size in sent)


@pytest.mark.parametrize(
    ("zero", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), soak(1, "fp32"), soak(3, "bf16")]
)
@pytest.mark.parametrize("guided", ["off", soak("fixedstep")])
def test_bytes_sent_by_a_step(zero: int, precision: str, guided: str) -> None:
    """Of four micro-batches: replicated gradients travel once where DeepSpeed keeps whole gradients."""
    config = config_for(2, "lowrank", precision=precision, global_batch_size=8)
    sections = {"parallel": {"tp": 2, "zero_stage": zero}, "guided": {"schedule": guided, "skip": "none"}}
    config = Config.model_validate({**config.model_dump(), **sections})
    planned = tensor_parallel_bytes(config, pipeline_stages(config)[0], dp_size=1)
    assert run_ranks(2, sent_by_a_step, config, Topology(1, 1, 2)) == [sum(planned.values())] * 2


@pytest.mark.parametrize("model", sorted(MODELS))
def test_stages_send_what_the_whole_model_does(model: str) -> None:
    [whole] = pipeline_stages(config_for(2, model=model))
    one_stage = Config.model_validate(
        {**config_for(2, model=model).model_dump(), "parallel": {"tp": 2, "zero_stage": 1}}
    )
    wanted = tensor_parallel_bytes(one_stage, whole, dp_size=1)
    config = config_for(2, model=model, pp=3)
    stages = pipeline_stages(config)
    sent = [tensor_parallel_bytes(config, stage, dp_size=1) for stage in stages]
    assert {purpose: sum(each[purpose] for each in sent) for purpose in wanted} == wanted
    assert pipeline_bytes(config, stages[0], dp_size=1)["activations"] == 4 * (2 * 8 // 2) * 16  # own tokens


def saved_by_a_block(configs: list[Config]) -> list[int]:
    tp, results = world(), []
    for config in configs:
        dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
        block = GPT(config, tp).to(dtype).blocks.get_submodule("1")
        x = torch.randn(8 // tp.size, 2, 16, dtype=dtype, requires_grad=True)  # [s/tp, b, h]
        results.append(saved_bytes(lambda block=block, x=x: block(x + 0), list(block.parameters())))
    return results


@pytest.mark.parametrize("tp", [2, 4])
def test_activations_of_a_block_as_autograd_saves_them(tp: int) -> None:
    cases = [(ffn, model, precision) for ffn in FFNS for model in MODELS for precision in ("fp32", "bf16")]
    configs = [config_for(tp, ffn, model, precision=precision) for ffn, model, precision in cases]
    saved = run_ranks(tp, saved_by_a_block, configs)[0]
    for case, config, found in zip(cases, configs, saved, strict=True):
        planned = 16 * block_activation_bytes(config, config.ffn.of_block(1))
        assert found == pytest.approx(planned, rel=0.02), case


def kept_by_a_block(configs: list[Config]) -> list[int]:
    """Bytes of the outputs that the policy keeps. The allocator's count would include buffers of gloo's threads."""
    tp, results, policy = world(), [], recompute._policy
    kept: dict[int, Any] = {}

    def recorded(context: Any, operator: Any, *args: Any, **kwargs: Any) -> Any:
        decision = policy(context, operator, *args, **kwargs)
        if decision is CheckpointPolicy.MUST_SAVE:
            outputs = [each for each in tree_leaves(context.op_output) if isinstance(each, torch.Tensor)]
            kept.update({each.untyped_storage().data_ptr(): each.untyped_storage() for each in outputs})
        return decision

    recompute._policy = recorded  # type: ignore[assignment]  # in this rank's process alone
    for config in configs:
        kept.clear()
        dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
        block = GPT(config, tp).to(dtype).blocks.get_submodule("1")
        x = torch.randn(8 // tp.size, 2, 16, dtype=dtype, requires_grad=True)
        block(x)
        results.append(sum(storage.nbytes() for storage in kept.values()))
    return results


@pytest.mark.parametrize("tp", [2, soak(4)])
def test_what_selective_recomputation_keeps(tp: int) -> None:
    """On 16 tokens."""
    cases = [(ffn, model, precision) for ffn in FFNS for model in MODELS for precision in ("fp32", "bf16")]
    configs = [
        config_for(tp, ffn, model, precision=precision, activation_checkpointing="selective")
        for ffn, model, precision in cases
    ]
    held = run_ranks(tp, kept_by_a_block, configs)[0]
    for case, config, found in zip(cases, configs, held, strict=True):
        assert found == pytest.approx(16 * kept_block_bytes(config, config.ffn.of_block(1)), rel=0.02), case


def engine_sizes(config: Config, topology: Topology) -> tuple[int, int, int]:
    """(this rank's stage, its parameters, values in DeepSpeed's reduction bucket)"""
    engine = build_engine(config, topology, torch.device("cpu"))
    held = sum(p.numel() for p in engine.module.parameters())
    return topology.pp_rank(dist.get_rank()), held, engine.zero_optimizer.reduce_bucket_size


def test_a_real_engine_holds_what_is_planned() -> None:
    """A pipeline of two stages over two ranks each; the bucket has room for the gradients and no more."""
    config = config_for(2, "blockdense", pp=2)
    stages = pipeline_stages(config)
    for stage, parameters, bucket in run_ranks(4, engine_sizes, config, Topology(2, 1, 2)):
        assert parameters == bucket == stages[stage].parameters_per_device
        assert memory_by_part(config, stages[stage], dp_size=1)["communication"] == 8 * bucket
    assert bucket_values(10**12) == 500_000_000
