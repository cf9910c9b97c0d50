"""The one maker of DeepSpeed's config dict."""

from __future__ import annotations

from typing import Any

from megastruct.config.schema import Config
from megastruct.planning.memory import bucket_values


def deepspeed_config(config: Config, dp_size: int, num_parameters: int) -> dict[str, Any]:
    """The dict for `deepspeed.initialize`, for `dp_size` replicas and a device with `num_parameters` of them.

    bf16 keeps fp32 gradients, also on the wire: with bf16 sums a pipeline's losses drift from one process's.
    The optimizer is handed to DeepSpeed as an object; the learning rate is set by our loop.
    """
    training, zero_stage = config.training, config.parallel.zero_stage
    values: dict[str, Any] = {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.global_batch_size // (training.micro_batch_size * dp_size),
        "zero_optimization": {"stage": zero_stage, "reduce_bucket_size": bucket_values(num_parameters)},
        "zero_allow_untested_optimizer": True,
        # In fp32 without ZeRO, DeepSpeed's norm leaves out later stages: engine/norms.py clips there.
        "gradient_clipping": config.optimizer.gradient_clipping if zero_stage else 0.0,
        "steps_per_print": 2**62,
        # Between stages every tensor-parallel rank sends its own part of the sequence, whole.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    }
    if training.precision == "bf16":
        values["bf16"] = {"enabled": True, "check_grad_overflow": True}  # else ZeRO 2 makes a step that is not finite
        values["data_types"] = {"grad_accum_dtype": "fp32"}
        values["communication_data_type"] = "fp32"
    return values
