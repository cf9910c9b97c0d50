"""Checks of several config keys against each other. Each check covers one topic and yields its problems."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from math import lcm

from megastruct.config.batch_sizes import BatchRamp
from megastruct.config.data import TextChoice
from megastruct.config.schema import Config, FFNConfig
from megastruct.config.training_checks import TRAINING_CHECKS
from megastruct.errors import Problem
from megastruct.optimizers import ADAMW, OPTIMIZERS, nearest_optimizer
from megastruct.parallel.sizes import (
    divisors,
    multiple_problems,
    nearest_divisor,
    nearest_multiple,
    vocabulary_problems,
)
from megastruct.structures import STRUCTURES, known_sizes, nearest_name
from megastruct.structures.numbers import Widths

Check = Callable[[Config], Iterator[Problem]]

MAX_PARAMETERS = 10**15  # with 16 bytes each for weights and optimizer, more than the largest cluster's memory
MAX_ACTIVATIONS = 10**13  # of a micro-batch, in one tensor on one rank: 20 TB in bf16


def check_memory(config: Config) -> Iterator[Problem]:
    """Sizes that some machine can hold: at least the embedding, the attention and one tensor of activations."""
    model, training = config.model, config.training
    kv_width = model.kv_heads * model.attention_head_dim
    attention = 2 * model.hidden_size * (model.attention_width + kv_width)
    ffn = model.hidden_size * model.ffn_hidden_size if config.ffn.is_dense else 0
    parameters = model.vocab_size * model.hidden_size + model.num_layers * (attention + ffn)
    if parameters > MAX_PARAMETERS:
        found = f"about {parameters:.0e} parameters, more than any machine can hold"
        yield Problem("model.hidden_size, model.num_layers, model.vocab_size", found, "sizes as in configs/model/")
    widest = max(model.hidden_size, model.attention_width)
    values = training.micro_batch_size * training.seq_length * widest // config.parallel.tp
    if values > MAX_ACTIVATIONS:
        found = f"{training.micro_batch_size} sequences of {training.seq_length} tokens with {widest} features"
        fix = "training.micro_batch_size=1, or a shorter training.seq_length"
        yield Problem("training.micro_batch_size", f"{found} are more than any device can hold", fix)


def check_attention(config: Config) -> Iterator[Problem]:
    """Heads that divide the width and the query heads, and an even width of a head for the rotary embedding."""
    model = config.model
    heads, d = model.num_attention_heads, model.hidden_size
    if model.head_dim is None and d % heads:
        yield Problem(
            "model.num_attention_heads",
            f"{heads} does not divide model.hidden_size = {d}",
            f"model.num_attention_heads={fitting_heads(config) or nearest_divisor(d, heads)}, or set model.head_dim",
        )
    elif model.attention_head_dim % 2:
        yield Problem(
            "model.head_dim",
            f"{model.attention_head_dim} is odd, but rotary embeddings rotate pairs of features",
            f"model.head_dim={model.attention_head_dim + 1}",
        )
    if heads % model.kv_heads:
        yield Problem(
            "model.num_key_value_heads",
            f"{model.kv_heads} does not divide model.num_attention_heads = {heads}",
            f"model.num_key_value_heads={nearest_divisor(heads, model.kv_heads)}",
        )


def fitting_heads(config: Config) -> int | None:
    """The number of heads nearest to the config's that fits the width, key/value heads and ranks, if any does."""
    model, tp = config.model, config.parallel.tp
    step = lcm(tp, model.num_key_value_heads or 1)
    if model.head_dim:
        return nearest_multiple(model.num_attention_heads, step)
    most = model.hidden_size // 2  # a head has two features at least
    fitting = [heads for heads in divisors(most) if heads % step == 0] if model.hidden_size % 2 == 0 else []
    return min(fitting, key=lambda heads: abs(heads - model.num_attention_heads), default=None)


def nearest_tp(config: Config) -> int:
    """The number of tensor-parallel ranks nearest to the config's that divides the attention heads."""
    return nearest_divisor(config.model.num_attention_heads, config.parallel.tp)


def check_ffn(config: Config) -> Iterator[Problem]:
    """A known structure, exactly its own sizes, and sizes that fit the widths and the tensor-parallel ranks."""
    ffn, widths = config.ffn, ffn_widths(config)
    if ffn.structure not in STRUCTURES:
        found = f"{ffn.structure!r} is not one of {', '.join(map(repr, STRUCTURES))}"
        yield Problem("ffn.structure", found, f"ffn.structure={nearest_name(ffn.structure)}")
    sizes = STRUCTURES[ffn.structure].numbers.sizes if ffn.structure in STRUCTURES else known_sizes()
    foreign = {key: value for key, value in ffn.sizes.items() if key not in sizes}
    owners = {key: [name for name, other in STRUCTURES.items() if key in other.numbers.sizes] for key in foreign}
    known = [*FFNConfig.model_fields, *known_sizes()]
    yield from _foreign_keys("ffn", "structure", ffn.structure, foreign, owners, known)
    if ffn.structure not in STRUCTURES:
        return
    numbers = STRUCTURES[ffn.structure].numbers
    given = {key: value for key, value in ffn.sizes.items() if key in numbers.sizes}
    problems = list(numbers.size_problems(widths, given))
    yield from problems
    # Checked with the suggested sizes, so that what does not divide over the ranks is reported at the same time.
    suggested = [re.fullmatch(r"ffn\.(\w+)=(\d+)", problem.suggestion) for problem in problems]
    if not all(suggested):  # a structure may know of no size that fits
        return
    given |= {match[1]: int(match[2]) for match in suggested if match}
    faulty = {problem.where for problem in problems}
    yield from (problem for problem in numbers.shard_problems(widths, given) if problem.where not in faulty)


def ffn_widths(config: Config) -> Widths:
    """The widths that the sizes of the FFN must fit, with the names of the config's keys."""
    model = config.model
    names = ("model.hidden_size", "model.ffn_hidden_size", "parallel.tp", "ffn.")
    return Widths(model.hidden_size, model.ffn_hidden_size, config.parallel.tp, *names)


def check_length(config: Config) -> Iterator[Problem]:
    """Exactly one length of the run, in steps or in tokens."""
    training = config.training
    if (training.num_steps is None) == (training.num_tokens is None):
        found = "both are set" if training.num_steps else "neither is set"
        yield Problem("training.num_steps, training.num_tokens", found, "set exactly one of them")


def check_batch(config: Config, dp_size: int | None = None) -> Iterator[Problem]:
    """Batches that divide over the micro-batches of all replicas.

    `dp_size` is the actual number of replicas, for a config that derives it from the number of processes.
    """
    training, dp = config.training, dp_size or config.parallel.dp or 1
    share, warmup = training.micro_batch_size * dp, training.batch_size_warmup
    factor = f"micro_batch_size {training.micro_batch_size}" + (f" x dp {dp}" if dp > 1 else "")
    for where, value in (
        ("training.global_batch_size", training.global_batch_size),
        ("evaluation.num_samples", config.evaluation.num_samples),
    ):
        if value % share:
            above = (value // share + 1) * share
            yield Problem(where, f"{value} is not a multiple of {factor}", f"{where}={above}")
    where = "training.batch_size_warmup"
    if isinstance(warmup, BatchRamp):
        parts = {"start": warmup.start, "increment": warmup.increment or warmup.start}
        for key, value in parts.items():
            if value % share:
                found = f"{key} {value} is not a multiple of {factor}"
                yield Problem(where, found, f"{key}: {(value // share + 1) * share}")
        return
    for stage in warmup or ():
        if stage.batch_size % share:
            found = f"batch_size {stage.batch_size} is not a multiple of {factor}"
            yield Problem(where, found, f"batch_size: {(stage.batch_size // share + 1) * share}")


def check_evaluation(config: Config) -> Iterator[Problem]:
    """Validation at an interval needs samples, unless guides are measured there.

    Only a warning: no samples is also how validation is turned off.
    """
    interval, samples = config.evaluation.interval_steps, config.evaluation.num_samples
    if interval and not samples and config.guided.schedule == "off":
        found = f"0 with evaluation.interval_steps = {interval}: nothing would be validated"
        suggestion = f"evaluation.num_samples={config.training.global_batch_size}, or evaluation.interval_steps=0"
        yield Problem("evaluation.num_samples", found, suggestion)


def check_data(config: Config) -> Iterator[Problem]:
    """Keys that choose a part of a place of text, only with text."""
    data = config.data
    if data.kind == "text":
        return
    text_instead = "give the folder that was prepared from it, or data.kind=text"
    for key in TextChoice.model_fields:
        if any(getattr(source, key) for source in data.places):
            yield Problem(f"data.{key}", f"set with data.kind = {data.kind}, which has no such parts", text_instead)
    if any(len(source.paths) > 1 for source in data.places):
        found = f"a list of paths with data.kind = {data.kind}"
        yield Problem("data.path", found, "data.path=[{path: FOLDER, weight: 1}, ...]")


def check_parallel(config: Config) -> Iterator[Problem]:
    """Combinations of pipeline, ZeRO stage and precision that DeepSpeed supports."""
    pp, zero, model = config.parallel.pp, config.parallel.zero_stage, config.model
    if pp > 1 and zero > 1:
        yield Problem(
            "parallel.zero_stage",
            f"{zero} with parallel.pp = {pp}, but DeepSpeed's pipelines work with ZeRO 0 and 1 only",
            "parallel.zero_stage=1, or parallel.pp=1",
        )
    if pp > model.num_layers:
        yield Problem("parallel.pp", f"{pp} stages for {model.num_layers} blocks", f"parallel.pp={model.num_layers}")
    if config.training.precision == "bf16" and zero == 0:
        yield Problem(
            "parallel.zero_stage",
            "0 with training.precision = bf16, where DeepSpeed has no fp32 gradient accumulation",
            "parallel.zero_stage=1 (the same arithmetic; with one replica the same memory)",
        )
    if config.training.activation_checkpointing == "selective" and zero == 3:
        yield Problem(
            "training.activation_checkpointing",
            "selective with parallel.zero_stage = 3, where gradients would be wrong",
            "training.activation_checkpointing=true, or parallel.zero_stage=2",
        )


def check_tensor_parallel(config: Config) -> Iterator[Problem]:
    """Sizes outside the FFN that must divide over the ranks of a tensor-parallel group."""
    tp, model = config.parallel.tp, config.model
    by_tp = f"parallel.tp = {tp}"
    yield from multiple_problems("training.seq_length", config.training.seq_length, tp, by_tp)
    if model.num_attention_heads % tp:
        heads = fitting_heads(config)
        suggestion = f"model.num_attention_heads={heads}" if heads else f"parallel.tp={nearest_tp(config)}"
        found = f"{model.num_attention_heads} is not divisible by {by_tp}"
        yield Problem("model.num_attention_heads", found, suggestion)
    yield from vocabulary_problems("model.vocab_size", model.vocab_size, tp)


def check_optimizer(config: Config) -> Iterator[Problem]:
    """A known optimizer, its keys and no others, and values within their bounds."""
    optimizer, chosen = config.optimizer, OPTIMIZERS.get(config.optimizer.kind)
    if chosen is None:
        found = f"{optimizer.kind!r} is none of {', '.join(map(repr, OPTIMIZERS))}"
        yield Problem("optimizer.kind", found, f"optimizer.kind={nearest_optimizer(optimizer.kind)}")
    owners = {key: [name for name, other in OPTIMIZERS.items() if key in other.keys] for key in optimizer.settings}
    keys = chosen.keys if chosen else {key: None for key, names in owners.items() if names}
    foreign = {key: value for key, value in optimizer.settings.items() if key not in keys}
    yield from _foreign_keys(
        "optimizer", "kind", optimizer.kind, foreign, owners, [*type(optimizer).model_fields, *keys]
    )
    if chosen is None:
        return
    yield from chosen.problems("optimizer.", optimizer.settings)
    scale, last = optimizer.factor_learning_rate_scale, config.model.num_layers - 1
    if scale != 1.0 and config.ffn.of_block(last).is_dense:
        found = f"{scale:g}, but no block has a structured feed-forward network: there are no factors"
        structured = "ffn.structure=lowrank" if config.ffn.is_dense else "ffn.dense_first_block=false"
        where = "optimizer.factor_learning_rate_scale"
        yield Problem(where, found, f"{where}=1, or {structured}")
    width = config.model.base_width
    if width and chosen.learning_rate_scale("matrix", width, width, width) is None:
        found = f"{width}, but how learning rates of {chosen.name} depend on widths is not known"
        yield Problem("model.base_width", found, f"optimizer.kind={ADAMW}, or no model.base_width")


def _foreign_keys(
    section: str,
    choice: str,
    chosen: str,
    foreign: Mapping[str, object],
    owners: Mapping[str, list[str]],
    known: list[str],
) -> Iterator[Problem]:
    """Keys of a section that its choice does not have: another one's (`owners`), or nobody's."""
    for key, value in foreign.items():
        where = f"{section}.{key}"
        if others := owners.get(key):
            choices = [f"{section}.{choice}={other}" for other in others]
            suggestion = ", or ".join([*choices, f"no {where} ({where}=null)"])
            yield Problem(where, f"{value}, but {section}.{choice} is {chosen}", suggestion)
        else:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            yield Problem(where, "unknown key", f"{section}.{close[0]}" if close else f"one of {', '.join(known)}")


def check_guided(config: Config) -> Iterator[Problem]:
    """Self-guided training needs a structured FFN, and levels that divide a rank's part of the sequence."""
    guided, training, tp = config.guided, config.training, config.parallel.tp
    if guided.schedule == "off":
        if guided.fraction is not None:
            found = f"{guided.fraction:g}, but guided.schedule is off"
            yield Problem("guided.fraction", found, "guided.schedule=fixedstep, or no guided.fraction")
        return
    if config.ffn.is_dense:
        yield Problem(
            "guided.schedule",
            f"{guided.schedule}, but ffn.structure is dense: there is nothing to guide",
            "ffn.structure=lowrank, or guided.schedule=off",
        )
    own = training.seq_length // tp
    if guided.skip == "rows" and own and own % guided.levels:
        of = f" / parallel.tp = {own}" if tp > 1 else ""
        found = f"{guided.levels} does not divide training.seq_length = {training.seq_length}{of}"
        yield Problem("guided.levels", found, f"guided.levels={nearest_divisor(own, guided.levels)}")


def check_spikes(config: Config) -> Iterator[Problem]:
    """A spike factor above 1, and checkpoints to go back to."""
    factor = config.reliability.spike_factor
    if factor and factor <= 1:
        found = f"{factor:g}: every loss above the median would count as a spike"
        yield Problem("reliability.spike_factor", found, "reliability.spike_factor=2, or 0 for off")
    if factor and not config.checkpoint.interval_steps:
        found = "0 with reliability.spike_factor: there would be no checkpoint to go back to"
        yield Problem("checkpoint.interval_steps", found, "checkpoint.interval_steps=500")


CHECKS: tuple[Check, ...] = (
    check_attention,
    check_ffn,
    check_length,
    check_batch,
    *TRAINING_CHECKS,
    check_data,
    check_parallel,
    check_tensor_parallel,
    check_optimizer,
    check_guided,
    check_spikes,
)


def cross_field_problems(config: Config) -> list[Problem]:
    """All problems between keys of a config whose keys are valid one by one."""
    return list(check_memory(config)) or [problem for check in CHECKS for problem in check(config)]
