"""Every internal of DeepSpeed that this project relies on, and what for. None is used in any other room than this one.

DeepSpeed's public interface trains a batch. Exact checkpoints on any layout, the end of the guided phase, tensor
parallelism with pipelines and gradient norms that are right need more. What is used was found by running it (0.19.8).
`check_internals` compares the table with the installed release, so that a change of DeepSpeed is one clear message.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import CodeType, ModuleType
from typing import Any

import deepspeed

from megastruct.errors import Problem, UserError

SUPPORTED = "deepspeed>=0.19.8,<0.20"


@dataclass(frozen=True)
class Internal:
    """`owner`: "module:Class", "module:function", or "module"; `names`: what is used of it. Of an attribute of objects,
    such as parameters, the owner is the code that sets or reads it. A name that is called has the arguments that are
    passed by name behind it: "eval_batch(num_micro_batches)"."""

    owner: str
    names: tuple[str, ...]
    purpose: str


_ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
_PIPELINE = "deepspeed.runtime.pipe.engine:PipelineEngine"
_MODULE = "deepspeed.runtime.pipe.module:PipelineModule"
_BF16 = "deepspeed.runtime.bf16_optimizer:BF16_Optimizer"
_ZERO12 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
_ZERO3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"

INTERNALS = (
    Internal("deepspeed.accelerator", ("get_accelerator()",), "know on which devices DeepSpeed runs"),
    Internal("deepspeed", ("init_distributed(verbose)",), "hand the process group to DeepSpeed"),
    Internal(
        "deepspeed",
        ("initialize(model, optimizer, config, mpu, dist_init_required)",),
        "wrap the module and its optimizer",
    ),
    Internal(_ENGINE, ("module", "optimizer"), "reach what an engine wraps"),
    Internal(_ENGINE, ("train()", "eval()", "backward()", "step()"), "train and evaluate without a pipeline"),
    Internal(_PIPELINE, ("train_batch()", "eval_batch(num_micro_batches)"), "train and evaluate"),
    Internal(
        _ENGINE,
        ("global_steps", "global_samples", "micro_steps"),
        "set the counts of steps after a resume",
    ),
    Internal(
        _ENGINE,
        ("module_forward_pre_hook", "module_forward_post_hook", "destroy()"),
        "give up an engine and all of its memory at the end of the guided phase",
    ),
    Internal(_ENGINE, ("get_global_grad_norm()", "gradient_accumulation_steps()"), "log the norm, count micro-batches"),
    Internal(_ENGINE, ("train_batch_size()", "set_train_batch_size(train_batch_size)"), "warm up the batch size"),
    Internal(_PIPELINE, ("pipe_buffers",), "free the last logits after a validation"),
    Internal(
        _PIPELINE,
        ("_INSTRUCTION_MAP",),
        "sum gradients of replicated parameters after the last backward of a step",
    ),
    Internal("deepspeed.runtime.pipe.schedule", ("ReduceTiedGrads",), "know when the last backward of a step is done"),
    Internal(
        "deepspeed.runtime.pipe.schedule",
        ("ForwardPass", "BackwardPass", "ReduceGrads", "OptimizerStep"),
        "name the parts of a step in traces",
    ),
    Internal(_BF16, ("update_hp_grads()",), "name the accumulation of gradients in traces"),
    Internal(
        "deepspeed.pipe",
        (
            "PipelineModule(layers, topology, loss_fn, partition_method)",
            "LayerSpec()",
            "TiedLayerSpec(forward_fn, tied_weight_attr)",
        ),
        "describe a model by its layers",
    ),
    Internal(
        _MODULE,
        (
            "_partition_layers(method)",
            "_set_bounds(start, stop)",
            "_topo",
            "_grid",
            "_local_start",
            "parts",
            "forward_funcs",
            "global_rank",
            "num_stages",
            "stage_id",
        ),
        "cut the pipeline by FLOPs, and run a stage's layers with what they are handed",
    ),
    Internal(_MODULE, ("tied_modules",), "name a tied weight alike in every layout"),
    Internal("deepspeed.runtime.pipe.module", ("ds_pipe_replicated",), "know the copy of a tied weight"),
    Internal(
        "deepspeed.runtime.utils:is_model_parallel_parameter",
        ("tensor_model_parallel",),
        "count a parameter on every tensor-parallel rank in the gradient norm",
    ),
    Internal(
        "deepspeed.runtime.pipe.topology",
        ("PipelineParallelGrid(topology)", "PipeModelDataParallelTopology(num_pp, num_mp, num_dp)"),
        "describe the process grid",
    ),
    Internal("deepspeed.runtime.pipe.topology:ProcessTopology", ("get_coord()",), "find this rank's stage"),
    Internal(
        "deepspeed.runtime.pipe.topology:PipelineParallelGrid",
        ("get_model_parallel_group()",),
        "reach the ranks of one replica, for the gradient norm",
    ),
    Internal("deepspeed.runtime.utils", ("combine_grad_norm_groups()",), "make ZeRO 1's norm over stages"),
    Internal(
        _BF16,
        (
            "fp32_groups_flat_partition",
            "update_lp_params()",
            "_lazy_init_hp_params_optimizer_state()",
            "_hp_optimizer_states_linked",
            "_hp_grad",
            "optimizer",
        ),
        "read and write masters and optimizer state in bf16 with ZeRO 1, and sum its fp32 gradients",
    ),
    Internal(
        _ZERO12,
        (
            "single_partition_of_fp32_groups",
            "update_lp_params()",
            "_lazy_init_hp_params_optimizer_state()",
            "_hp_optimizer_states_linked",
            "optimizer",
        ),
        "read and write masters and optimizer state with ZeRO 1 and 2",
    ),
    Internal(
        _ZERO12,
        ("params_in_partition", "averaged_gradients", "get_grad_norm_direct()", "scaled_global_norm()"),
        "make ZeRO 1's norm over stages with different numbers of parameter groups",
    ),
    Internal(
        "deepspeed.utils.mixed_precision_linkage",
        ("_hp_mapping",),
        "find a parameter's fragment of the flat partitions",
    ),
    Internal(
        "deepspeed.utils.tensor_fragment:tensor_fragment",
        ("hp_fragment", "optim_fragment", "lp_fragment_address"),
        "read a parameter's fragment: master, optimizer state, where it starts",
    ),
    Internal(
        _ZERO3,
        (
            "fp32_partitioned_groups_flat",
            "fp16_partitioned_groups_flat",
            "sub_group_to_group_id",
            "_partition_all_parameters()",
            "_unflatten_partitioned_parameters()",
            "optimizer",
        ),
        "read and write masters and optimizer state with ZeRO 3",
    ),
    Internal(
        "deepspeed.runtime.zero.partition_parameters",
        ("ds_tensor", "ds_numel", "ds_shape", "GatheredParameters()"),
        "know a parameter's whole shape and own part with ZeRO 3",
    ),
    Internal(
        "deepspeed.utils.tensor_fragment",
        ("safe_get_local_fp32_param()", "safe_get_local_optimizer_state()"),
        "read a parameter's own part with ZeRO 3",
    ),
    Internal("deepspeed.comm.torch", ("build_shm_op()",), "leave out an operator that is compiled at every start"),
)


def missing_internals() -> list[str]:
    """A line for everything in the table that the installed DeepSpeed does not have."""
    return [line for internal in INTERNALS for name in internal.names for line in _missing(internal, name)]


@cache
def check_internals() -> None:
    """Raises UserError if the installed DeepSpeed lacks anything in the table."""
    if missing := missing_internals():
        problems = [Problem("deepspeed", line, f"pip install '{SUPPORTED}'") for line in missing]
        raise UserError(problems, "this release of DeepSpeed does not fit")


def attribute_of(name: str) -> str:
    """A name of the table without its arguments."""
    return name.partition("(")[0]


def _missing(internal: Internal, name: str) -> Iterator[str]:
    release, used = f"DeepSpeed {deepspeed.__version__}", f"in {internal.owner}, used to {internal.purpose}"
    owner, attribute = _resolve(internal.owner), attribute_of(name)
    if owner is None or not (hasattr(owner, attribute) or attribute in _words(owner)):
        yield f"{release} has no {attribute} {used}"
    elif called := re.fullmatch(r"\w+\((.*)\)", name):
        for argument in _refused_arguments(getattr(owner, attribute, None), called[1]):
            yield f"{release} has no argument {argument} of {attribute} {used}"


def _resolve(owner: str) -> Any:
    """The module, class or function; None if it is not there."""
    module, _, name = owner.partition(":")
    try:
        found = import_module(module)
    except ImportError:
        return None
    return getattr(found, name, None) if name else found


def _refused_arguments(function: Any, arguments: str) -> list[str]:
    if not callable(function):
        return [f"({arguments})"]
    parameters = inspect.signature(function).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    names = {parameter.name for parameter in parameters}
    return [word for word in arguments.split(", ") if word and word not in names and not takes_any]


@cache
def _words(owner: Any) -> set[str]:
    """All names and strings in the code of a function, of a class and its bases, or of what a module defines.

    The attributes of objects are found so, which are set by code: the objects need not exist yet.
    """
    if isinstance(owner, ModuleType):
        own = [part for part in vars(owner).values() if getattr(part, "__module__", None) == owner.__name__]
        parts: list[Any] = [part for part in own if inspect.isfunction(part) or inspect.isclass(part)]
        return set().union(*map(_words, parts))
    if inspect.isclass(owner):
        bases = [base for base in owner.__mro__ if base.__module__.startswith("deepspeed")]
        members = [member for base in bases for member in vars(base).values()]
        functions = [getattr(member, "fget", None) or getattr(member, "__func__", member) for member in members]
        fields = {name for base in bases for name in vars(base).get("__annotations__", {})}
        return fields.union(*(_words(function) for function in functions if inspect.isfunction(function)))
    code = getattr(inspect.unwrap(owner), "__code__", None)
    return _words_of_code(code) if code else set()


def _words_of_code(code: CodeType) -> set[str]:
    words = {*code.co_names, *(constant for constant in code.co_consts if isinstance(constant, str))}
    return words.union(*(_words_of_code(inner) for inner in code.co_consts if isinstance(inner, CodeType)))
