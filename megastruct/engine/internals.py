"""Every internal of DeepSpeed that this project relies on, and what for. None is used in any other room than this one.

DeepSpeed's public interface trains a batch. Exact checkpoints on any layout, the end of the guided phase, tensor
parallelism with pipelines and gradient norms that are right need more. What is used was found by running it (0.19.8).
`check_internals` compares the table with the installed release, so that a change of DeepSpeed is one clear message.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import deepspeed

from megastruct.errors import Problem, UserError

SUPPORTED = "deepspeed>=0.19.8,<0.20"


@dataclass(frozen=True)
class Internal:
    """`owner`: "module:Class", or "module" for functions and attributes of parameters; `names`: what is used of it."""

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
    Internal(
        _ENGINE,
        ("global_steps", "global_samples", "micro_steps"),
        "set the counts of steps after a resume",
    ),
    Internal(
        _ENGINE,
        ("module_forward_pre_hook", "module_forward_post_hook", "destroy"),
        "give up an engine and all of its memory at the end of the guided phase",
    ),
    Internal(_ENGINE, ("get_global_grad_norm", "gradient_accumulation_steps"), "log the norm, count micro-batches"),
    Internal(_PIPELINE, ("pipe_buffers",), "free the last logits after a validation"),
    Internal(
        _PIPELINE,
        ("_INSTRUCTION_MAP",),
        "sum gradients of replicated parameters after the last backward of a step",
    ),
    Internal("deepspeed.runtime.pipe.schedule", ("ReduceTiedGrads",), "know when the last backward of a step is done"),
    Internal(
        _MODULE,
        ("_partition_layers", "_set_bounds", "_topo", "_grid", "_local_start", "parts", "forward_funcs", "global_rank"),
        "cut the pipeline by FLOPs, and run a stage's layers with what they are handed",
    ),
    Internal("deepspeed.runtime.pipe.module", ("ds_pipe_replicated",), "know the copy of a tied weight"),
    Internal(
        "deepspeed.runtime.pipe.topology:PipelineParallelGrid",
        ("get_model_parallel_group",),
        "reach the ranks of one replica, for the gradient norm",
    ),
    Internal("deepspeed.runtime.utils", ("combine_grad_norm_groups",), "make ZeRO 1's norm over stages"),
    Internal(
        _BF16,
        ("fp32_groups_flat_partition", "update_lp_params", "_lazy_init_hp_params_optimizer_state", "_hp_grad"),
        "read and write masters and optimizer state in bf16 with ZeRO 1, and sum its fp32 gradients",
    ),
    Internal(
        _ZERO12,
        (
            "single_partition_of_fp32_groups",
            "update_lp_params",
            "_lazy_init_hp_params_optimizer_state",
            "_hp_optimizer_states_linked",
        ),
        "read and write masters and optimizer state with ZeRO 1 and 2",
    ),
    Internal(
        _ZERO12,
        ("params_in_partition", "averaged_gradients", "get_grad_norm_direct", "scaled_global_norm"),
        "make ZeRO 1's norm over stages with different numbers of parameter groups",
    ),
    Internal(
        "deepspeed.utils.mixed_precision_linkage",
        ("_hp_mapping",),
        "find a parameter's fragment of the flat partitions",
    ),
    Internal(
        "deepspeed.utils.tensor_fragment",
        ("hp_fragment", "optim_fragment", "lp_fragment_address"),
        "read a parameter's fragment: master, optimizer state, where it starts",
    ),
    Internal(
        _ZERO3,
        (
            "fp32_partitioned_groups_flat",
            "fp16_partitioned_groups_flat",
            "sub_group_to_group_id",
            "_partition_all_parameters",
            "_unflatten_partitioned_parameters",
        ),
        "read and write masters and optimizer state with ZeRO 3",
    ),
    Internal(
        "deepspeed.runtime.zero.partition_parameters",
        ("ds_tensor", "ds_numel", "ds_shape", "GatheredParameters"),
        "know a parameter's whole shape and own part with ZeRO 3",
    ),
    Internal(
        "deepspeed.utils.tensor_fragment",
        ("safe_get_local_fp32_param", "safe_get_local_optimizer_state"),
        "read a parameter's own part with ZeRO 3",
    ),
    Internal("deepspeed.ops", ("__compatible_ops__",), "leave out an operator that is compiled at every start on CPUs"),
)


def missing_internals() -> list[str]:
    """A line for everything in the table that the installed DeepSpeed does not have."""
    return [
        f"DeepSpeed {deepspeed.__version__} has no {name} in {internal.owner}, used to {internal.purpose}"
        for internal in INTERNALS
        for name in internal.names
        if not _has(internal.owner, name)
    ]


@cache
def check_internals() -> None:
    """Raises UserError if the installed DeepSpeed lacks anything in the table."""
    if missing := missing_internals():
        problems = [Problem("deepspeed", line, f"pip install '{SUPPORTED}'") for line in missing]
        raise UserError(problems, "this release of DeepSpeed does not fit", on_all_ranks=True)


def _has(owner: str, name: str) -> bool:
    """Whether the class or module has the name; attributes of instances and parameters are looked for in the source."""
    module_name, _, class_name = owner.partition(":")
    try:
        found = import_module(module_name)
        if class_name:
            found = getattr(found, class_name)
        if hasattr(found, name):
            return True
        sources = [inspect.getsource(each) for each in getattr(found, "__mro__", [found]) if each is not object]
    except (ImportError, AttributeError, OSError, TypeError):
        return False
    return any(f".{name}" in source or f'"{name}"' in source or f"'{name}'" in source for source in sources)
