"""AdamW. Source: Loshchilov and Hutter 2019 (arXiv 1711.05101); torch's, fused on CUDA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from megastruct.optimizers.record import Group, Key, Optimizer, Role

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(Optimizer):
    """Two fp32 moments of every parameter; weight decay on matrices."""

    name = "adamw"
    keys: ClassVar = {
        "beta1": Key(0.9, "decay of the first moment", at_least=0, below=1),
        "beta2": Key(0.999, "decay of the second moment", at_least=0, below=1),
        "eps": Key(1e-8, "added to the root of the second moment", above=0),
    }
    groups: ClassVar = (
        Group("matrices", ("matrix", "vocabulary"), MOMENTS),
        Group("vectors", ("vector",), MOMENTS, decays=False),
    )

    @override
    def build(
        self, groups: list[dict[str, Any]], settings: Mapping[str, Any], device_type: str
    ) -> torch.optim.Optimizer:
        import torch

        betas = (settings["beta1"], settings["beta2"])
        return torch.optim.AdamW(groups, betas=betas, eps=settings["eps"], fused=device_type == "cuda")

    @override
    def begin(self, group: Mapping[str, Any], tensor: Tensor, step: int) -> dict[str, Any]:
        import torch

        count = torch.tensor(float(step), device=tensor.device if group["fused"] else "cpu")
        return {"step": count} | {moment: torch.zeros_like(tensor) for moment in MOMENTS}

    @override
    def learning_rate_scale(self, role: Role, fan_out: int, fan_in: int, base_width: int) -> float:
        """base_width / fan_in. Adam moves every entry by the learning rate, so a product over fan_in inputs moves by
        fan_in times that.

        Source: Qiu et al. 2024 (arXiv 2406.06248), section 3.2, factor by factor; for dense matrices Yang et al. 2022
        (arXiv 2203.03466).
        """
        return base_width / fan_in
