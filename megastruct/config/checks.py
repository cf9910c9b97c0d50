"""What must hold between several keys of a config. Each check looks at one idea and yields its problems."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import gcd

from megastruct.config.schema import Config
from megastruct.errors import Problem
from megastruct.ops.cost import STRUCTURES
from megastruct.parallel.sizes import nearest_multiple, shard_problems

Check = Callable[[Config], Iterator[Problem]]


def check_attention(config: Config) -> Iterator[Problem]:
    model = config.model
    heads, d = model.num_attention_heads, model.hidden_size
    if model.head_dim is None and d % heads:
        yield Problem(
            "model.num_attention_heads",
            f"{heads} does not divide model.hidden_size = {d}",
            f"model.num_attention_heads={_nearest_divisor(d, heads)}, or set model.head_dim",
        )
    elif model.attention_head_dim % 2:
        yield Problem(
            "model.head_dim",
            f"{model.attention_head_dim} is odd; rotary embeddings turn pairs of features",
            f"model.head_dim={model.attention_head_dim + 1}",
        )
    if heads % model.kv_heads:
        yield Problem(
            "model.num_key_value_heads",
            f"{model.kv_heads} does not divide model.num_attention_heads = {heads}",
            f"model.num_key_value_heads={_nearest_divisor(heads, model.kv_heads)}",
        )


def check_ffn(config: Config) -> Iterator[Problem]:
    """The keys of the structure and no others, and sizes that divide; each suggestion agrees with the others."""
    ffn, model = config.ffn, config.model
    wanted = STRUCTURES[ffn.structure].sizes
    for key in ("rank", "nblocks"):
        if key not in wanted and getattr(ffn, key) is not None:
            others = [name for name, structure in STRUCTURES.items() if key in structure.sizes]
            yield Problem(
                f"ffn.{key}",
                f"{getattr(ffn, key)}, but ffn.structure is {ffn.structure}",
                f"ffn.structure={' or '.join(others)}, or no ffn.{key} (ffn.{key}=null)",
            )
    full_rank, common = min(model.hidden_size, model.ffn_hidden_size), gcd(model.hidden_size, model.ffn_hidden_size)
    nblocks = 1
    if "nblocks" in wanted:
        # With a rank that may stay, blocks that divide it as well.
        divided = gcd(common, ffn.rank) if "rank" in wanted and ffn.rank and ffn.rank <= full_rank else common
        nblocks = _nearest_divisor(divided, ffn.nblocks or 4)
        if ffn.nblocks is None:
            yield Problem("ffn.nblocks", f"missing, but ffn.structure is {ffn.structure}", f"ffn.nblocks={nblocks}")
        elif common % ffn.nblocks:
            sizes = f"model.hidden_size = {model.hidden_size} and model.ffn_hidden_size = {model.ffn_hidden_size}"
            yield Problem("ffn.nblocks", f"{ffn.nblocks} does not divide {sizes}", f"ffn.nblocks={nblocks}")
        else:
            nblocks = ffn.nblocks
    if "rank" in wanted:
        if ffn.rank is None:
            rank = nearest_multiple(min(model.hidden_size // 4, full_rank), nblocks)
            yield Problem("ffn.rank", f"missing, but ffn.structure is {ffn.structure}", f"ffn.rank={rank}")
        elif ffn.rank > full_rank:
            rank = nearest_multiple(max(1, full_rank // 2), nblocks)
            yield Problem("ffn.rank", f"{ffn.rank} is above the full rank {full_rank}", f"ffn.rank={rank}")
        elif ffn.rank % nblocks:
            rank = min(nearest_multiple(ffn.rank, nblocks), full_rank)
            yield Problem("ffn.rank", f"{ffn.rank} is no multiple of ffn.nblocks = {nblocks}", f"ffn.rank={rank}")


def check_length(config: Config) -> Iterator[Problem]:
    training = config.training
    if (training.num_steps is None) == (training.num_tokens is None):
        found = "both are set" if training.num_steps else "neither is set"
        yield Problem("training.num_steps, training.num_tokens", found, "set exactly one of them")


def check_batch(config: Config, dp_size: int | None = None) -> Iterator[Problem]:
    """`dp_size`: the replicas that there really are, where the config leaves it to the number of processes."""
    training, dp = config.training, dp_size or config.parallel.dp or 1
    share = training.micro_batch_size * dp
    factor = f"micro_batch_size {training.micro_batch_size}" + (f" x dp {dp}" if dp > 1 else "")
    for where, value in (
        ("training.global_batch_size", training.global_batch_size),
        ("evaluation.num_samples", config.evaluation.num_samples),
    ):
        if value % share:
            above = (value // share + 1) * share
            yield Problem(where, f"{value} is no multiple of {factor}", f"{where}={above}")


def check_parallel(config: Config) -> Iterator[Problem]:
    pp, zero, model = config.parallel.pp, config.parallel.zero_stage, config.model
    if pp > 1 and zero > 1:
        yield Problem(
            "parallel.zero_stage",
            f"{zero} with parallel.pp = {pp}; DeepSpeed's pipelines work with ZeRO 0 and 1",
            "parallel.zero_stage=1, or parallel.pp=1",
        )
    if pp > model.num_layers:
        yield Problem("parallel.pp", f"{pp} stages for {model.num_layers} blocks", f"parallel.pp={model.num_layers}")
    if config.training.precision == "bf16" and zero == 0:
        yield Problem(
            "parallel.zero_stage",
            "0 with training.precision = bf16; DeepSpeed has no fp32 gradient accumulation there",
            "parallel.zero_stage=1 (the same arithmetic; with one replica the same memory)",
        )


def check_tensor_parallel(config: Config) -> Iterator[Problem]:
    model, ffn = config.model, config.ffn
    yield from shard_problems(
        config.parallel.tp,
        seq_length=config.training.seq_length,
        vocab_size=model.vocab_size,
        num_attention_heads=model.num_attention_heads,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        structure=ffn.structure,
        rank=ffn.rank,
        nblocks=ffn.nblocks,
    )


def check_guided(config: Config) -> Iterator[Problem]:
    guided, training, tp = config.guided, config.training, config.parallel.tp
    if guided.schedule == "off":
        if guided.fraction is not None:
            found = f"{guided.fraction:g}, but guided.schedule is off"
            yield Problem("guided.fraction", found, "guided.schedule=fixedstep, or no guided.fraction")
        return
    if config.ffn.structure == "dense":
        yield Problem(
            "guided.schedule",
            f"{guided.schedule}, but ffn.structure is dense: there is nothing to guide",
            "ffn.structure=lowrank, or guided.schedule=off",
        )
    own = training.seq_length // tp
    if guided.skip == "rows" and own and own % guided.levels:
        of = f" / parallel.tp = {own}" if tp > 1 else ""
        found = f"{guided.levels} does not divide training.seq_length = {training.seq_length}{of}"
        yield Problem("guided.levels", found, f"guided.levels={_nearest_divisor(own, guided.levels)}")


def check_spikes(config: Config) -> Iterator[Problem]:
    factor = config.reliability.spike_factor
    if factor and factor <= 1:
        found = f"{factor:g}: a loss above its median would be a spike"
        yield Problem("reliability.spike_factor", found, "reliability.spike_factor=2, or 0 for off")
    if factor and not config.checkpoint.interval_steps:
        found = "0 with reliability.spike_factor: there would be nothing to go back to"
        yield Problem("checkpoint.interval_steps", found, "checkpoint.interval_steps=500")


CHECKS: tuple[Check, ...] = (
    check_attention,
    check_ffn,
    check_length,
    check_batch,
    check_parallel,
    check_tensor_parallel,
    check_guided,
    check_spikes,
)


def cross_field_problems(config: Config) -> list[Problem]:
    """All problems between the keys of a config whose single keys are right."""
    return [problem for check in CHECKS for problem in check(config)]


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [k for k in range(1, number + 1) if number % k == 0]
    return min(divisors, key=lambda k: (abs(k - wanted), k))
