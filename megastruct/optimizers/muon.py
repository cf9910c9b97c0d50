"""Muon. Source: Keller Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; its scale and weight decay are
those of Liu et al. 2025 (arXiv 2502.16982)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from megastruct.optimizers.adamw import MOMENTS, AdamW, beta2_keys
from megastruct.optimizers.coefficients import COEFFICIENTS
from megastruct.optimizers.record import Group, Key, Optimizer, Precision, Role

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Muon(Optimizer):
    """Matrices and factors, each block for itself, step by their orthogonalised momentum; AdamW steps the rest.

    W = (1 - lr weight_decay) W - lr update_scale sqrt(max(m, n)) orthogonal(g + momentum * v), v = momentum * v + g.

    Guides are AdamW's, too. An orthogonalised update has its full length however small the gradient is, so that a guide
    that is skipped, whose gradient is zero, would go on at full speed.
    """

    name = "muon"
    keys: ClassVar = {
        "momentum": Key(0.95, "Muon: decay of the momentum", at_least=0, below=1),
        "nesterov": Key(True, "Muon: look ahead by one step of the momentum"),
        "newton_schulz_steps": Key(5, "Muon: steps of the orthogonalisation", at_least=1),
        "newton_schulz_coefficients": Key(
            "quintic",
            "Muon: polynomials of the orthogonalisation, quintic, polar_express or converging",
            choices=tuple(COEFFICIENTS),
        ),
        "update_scale": Key(0.2, "Muon: root mean square of an update's entries for learning rate 1", above=0),
        "adamw_learning_rate_scale": Key(
            1.0, "AdamW's learning rate, as a multiple of `optimizer.learning_rate`", above=0
        ),
        "beta1": Key(0.9, "AdamW: decay of the first moment", at_least=0, below=1),
        **beta2_keys(0.95, "AdamW: "),
        "eps": Key(1e-8, "AdamW: added to the root of the second moment", above=0),
    }
    groups: ClassVar = (
        Group("matrices", ("matrix",), ("momentum",), whole=True),
        Group("vocabulary", ("vocabulary",), MOMENTS),
        Group("guides", ("guide",), MOMENTS),
        Group("vectors", ("vector",), MOMENTS, decays=False),
    )
    _adamw = AdamW()

    @override
    def build(
        self, groups: list[dict[str, Any]], settings: Mapping[str, Any], device_type: str, precision: Precision
    ) -> torch.optim.Optimizer:
        from megastruct.optimizers.newton_schulz import newton_schulz, working_dtype
        from megastruct.optimizers.orthogonalized import OrthogonalizedMomentum

        dtype = working_dtype(device_type, precision)
        polynomials = COEFFICIENTS[settings["newton_schulz_coefficients"]].of_steps(settings["newton_schulz_steps"])

        def orthogonalize(matrices: Tensor) -> Tensor:
            scale = settings["update_scale"] * math.sqrt(max(matrices.shape[-2:]))
            return newton_schulz(matrices, polynomials, dtype).float().mul_(scale)

        def adamw(others: list[dict[str, Any]]) -> Any:
            return self._adamw.build(others, settings, device_type, precision)

        whole = frozenset(group.name for group in self.groups if group.whole)
        return OrthogonalizedMomentum(groups, whole, orthogonalize, settings["momentum"], settings["nesterov"], adamw)

    @override
    def begin(self, group: Mapping[str, Any], tensor: Tensor, step: int) -> dict[str, Any]:
        import torch

        if any(group["name"] == own.name for own in self.groups if own.whole):
            return {"momentum": torch.zeros_like(tensor)}
        return self._adamw.begin(group, tensor, step)

    @override
    def group_options(self, role: Role, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {} if self.group_of(role).whole else self._adamw.group_options(role, settings)

    @override
    def group_learning_rate_scale(self, group: Group, settings: Mapping[str, Any]) -> float:
        return 1.0 if group.whole else float(settings["adamw_learning_rate_scale"])

    @override
    def step_flops(self, shape: Sequence[int], settings: Mapping[str, Any]) -> int:
        """Of a Newton-Schulz step on [m, n], m <= n: X X' costs 2 m m n, its square 2 m m m, the update 2 m m n."""
        *blocks, m, n = shape
        short, long = min(m, n), max(m, n)
        return math.prod(blocks) * int(settings["newton_schulz_steps"]) * (4 * short * short * long + 2 * short**3)

    @override
    def learning_rate_scale(self, role: Role, fan_out: int, fan_in: int, base_width: int) -> float:
        """For matrices sqrt(base_width / fan_in min(1, fan_out / fan_in)); for guides AdamW's rule.

        The spectral norm of an update is update_scale sqrt(max(fan_out, fan_in)) times the learning rate. So that
        outputs change as much at every width, it has to grow with sqrt(fan_out / fan_in): Yang et al. 2023 (arXiv
        2310.17813). A square matrix of the base width keeps the learning rate.
        """
        if role == "guide":
            return self._adamw.learning_rate_scale(role, fan_out, fan_in, base_width)
        return math.sqrt(base_width / fan_in * min(1.0, fan_out / fan_in))
