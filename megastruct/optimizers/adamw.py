"""AdamW. Source: Loshchilov and Hutter 2019 (arXiv 1711.05101); torch's, fused on CUDA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from megastruct.optimizers.record import Group, Key, Optimizer, Precision, Role

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


def beta2_keys(default: float, prefix: str = "") -> dict[str, Key]:
    """The decay of the second moment, and that of two roles of parameters, which have the general one where it is None.

    `prefix` stands before the descriptions.
    """
    return {
        "beta2": Key(default, f"{prefix}decay of the second moment", at_least=0, below=1),
        "vocabulary_beta2": Key(
            None, f"{prefix}beta2 of embedding and output head. Left out: beta2", at_least=0, below=1
        ),
        "vector_beta2": Key(None, f"{prefix}beta2 of norms and biases. Left out: beta2", at_least=0, below=1),
    }


class AdamW(Optimizer):
    """Two fp32 moments of every parameter; weight decay on matrices."""

    name = "adamw"
    keys: ClassVar = {
        "beta1": Key(0.9, "decay of the first moment", at_least=0, below=1),
        **beta2_keys(0.999),
        "eps": Key(1e-8, "added to the root of the second moment", above=0),
    }
    groups: ClassVar = (
        Group("matrices", ("matrix", "vocabulary"), MOMENTS),
        Group("vectors", ("vector",), MOMENTS, decays=False),
    )

    @override
    def build(
        self, groups: list[dict[str, Any]], settings: Mapping[str, Any], device_type: str, precision: Precision
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
    def group_options(self, role: Role, settings: Mapping[str, Any]) -> dict[str, Any]:
        own = settings.get(f"{role}_beta2")
        return {"betas": (settings["beta1"], settings["beta2"] if own is None else own)}

    @override
    def learning_rate_scale(self, role: Role, fan_out: int, fan_in: int, base_width: int) -> float:
        """base_width / fan_in. Adam moves every entry by the learning rate, so a product over fan_in inputs moves by
        fan_in times that.

        Source: Qiu et al. 2024 (arXiv 2406.06248), section 3.2, factor by factor; for dense matrices Yang et al. 2022
        (arXiv 2203.03466).
        """
        return base_width / fan_in
