"""Names of the parts of a step in a trace: forward, backward, gradient accumulation, reduction and optimizer.

They are opened around DeepSpeed's own functions while a step is traced, and only then: other steps run untouched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, OptimizerStep, ReduceGrads, ReduceTiedGrads
from torch.profiler import record_function

from megastruct.profiling.parts import ACCUMULATION_RANGE, LOSS_RANGE, OPTIMIZER_RANGE, REDUCTION_RANGE

if TYPE_CHECKING:
    from megastruct.engine.engine import Engine

_INSTRUCTIONS: dict[type, str] = {
    ForwardPass: "megastruct::forward",
    BackwardPass: "megastruct::backward",
    ReduceTiedGrads: REDUCTION_RANGE,
    ReduceGrads: REDUCTION_RANGE,
    OptimizerStep: OPTIMIZER_RANGE,
}


@contextmanager
def named_ranges(engine: Engine) -> Iterator[None]:
    """Inside, the parts of a step of the engine have their names in traces of PyTorch's profiler."""
    deepspeed = engine.deepspeed
    with ExitStack() as stack:
        stack.enter_context(_wrapped(engine.loss, "mean", LOSS_RANGE))
        if hasattr(deepspeed.optimizer, "update_hp_grads"):  # of bf16 with ZeRO 1
            stack.enter_context(_wrapped(deepspeed.optimizer, "update_hp_grads", ACCUMULATION_RANGE))
        if hasattr(deepspeed, "_INSTRUCTION_MAP"):
            stack.enter_context(_named_instructions(deepspeed))
        else:
            stack.enter_context(_wrapped(deepspeed, "step", OPTIMIZER_RANGE))
        yield


@contextmanager
def _named_instructions(deepspeed: Any) -> Iterator[None]:
    before = vars(deepspeed).get("_INSTRUCTION_MAP")
    named = {kind: _named(deepspeed._INSTRUCTION_MAP[kind], name) for kind, name in _INSTRUCTIONS.items()}
    deepspeed._INSTRUCTION_MAP = {**deepspeed._INSTRUCTION_MAP, **named}
    try:
        yield
    finally:
        if before is None:
            del deepspeed._INSTRUCTION_MAP  # which was the class's
        else:
            deepspeed._INSTRUCTION_MAP = before


@contextmanager
def _wrapped(owner: Any, attribute: str, name: str) -> Iterator[None]:
    """Inside, the function of an object opens the range `name`."""
    before = vars(owner).get(attribute)
    setattr(owner, attribute, _named(getattr(owner, attribute), name))
    try:
        yield
    finally:
        if before is None:
            delattr(owner, attribute)  # which was the class's
        else:
            setattr(owner, attribute, before)


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return inside
