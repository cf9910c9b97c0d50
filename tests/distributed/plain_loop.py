"""The reference for optimizers on every layout: a loop over parameters in one process.

It has neither DeepSpeed nor the package's optimizers; Newton-Schulz is in float64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megastruct.config.schema import Config
from megastruct.models.gpt import GPT
from megastruct.models.loss import make_loss
from megastruct.optimizers.coefficients import COEFFICIENTS
from megastruct.parallel.groups import TensorGroup
from megastruct.parallel.topology import Topology
from runs import batches, learning_rate

STEPS = 20


def plain_newton_schulz(matrix: Tensor, coefficients: str) -> Tensor:
    x = matrix.double() / matrix.double().norm()
    for a, b, c in COEFFICIENTS[coefficients].of_steps(5):
        square = x @ x.T
        x = a * x + b * square @ x + c * square @ square @ x
    return x


def is_vocabulary(name: str) -> bool:
    return "embedding" in name or "head" in name


class Rules:
    """How each parameter is stepped, from the keys of the config."""

    def __init__(self, config: Config) -> None:
        self.keys, self.base = config.optimizer, config.model.base_width
        self.muon = config.optimizer.kind == "muon"
        self.settings = config.optimizer.settings

    def is_orthogonalized(self, name: str, shape: torch.Size) -> bool:
        return self.muon and len(shape) > 1 and not is_vocabulary(name)

    def width_scale(self, name: str, shape: torch.Size) -> float:
        if not self.base or len(shape) < 2 or is_vocabulary(name):
            return 1.0
        *_, m, n = shape
        return math.sqrt(self.base / n * min(1.0, m / n)) if self.muon else self.base / n

    def factor_scale(self, name: str) -> float:
        is_factor = ".mlp." in name and not name.endswith((".weight", ".bias"))
        return self.keys.factor_learning_rate_scale if is_factor else 1.0

    def decay(self, name: str, shape: torch.Size) -> float:
        """What the learning rate of the schedule is multiplied by."""
        own = self.keys.vocabulary_weight_decay if is_vocabulary(name) else None
        decay = self.keys.weight_decay if own is None else own
        return decay * self.factor_scale(name) if len(shape) > 1 else 0.0

    def betas(self, name: str, shape: torch.Size) -> tuple[float, float]:
        own = self.settings["vocabulary_beta2"] if is_vocabulary(name) else None
        own = self.settings["vector_beta2"] if len(shape) < 2 else own
        return self.settings["beta1"], self.settings["beta2"] if own is None else own


def plain_run(config: Config) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """(loss, gradient norm) of every step and the last weights, of one process without DeepSpeed."""
    torch.set_num_threads(1)
    rules, training = Rules(config), config.training
    model = GPT(config)
    if training.precision == "bf16":
        model.to(torch.bfloat16)
    named = dict(model.named_parameters())
    masters = {name: torch.nn.Parameter(p.detach().float().clone()) for name, p in named.items()}
    matrices = [name for name, p in named.items() if rules.is_orthogonalized(name, p.shape)]
    others = [name for name in named if name not in matrices]
    groups: list[dict[str, Any]] = [
        {"params": [masters[name]], "betas": rules.betas(name, named[name].shape)} for name in others
    ]
    adamw = torch.optim.AdamW(groups, eps=1e-5)
    velocity = {name: torch.zeros_like(masters[name]) for name in matrices}
    loss_of, stream = make_loss(config, TensorGroup()), batches(config, Topology(1, 1))
    count, results = training.global_batch_size // training.micro_batch_size, []
    for step in range(STEPS):
        total, sums = 0.0, {name: torch.zeros_like(p) for name, p in masters.items()}
        for batch in (next(stream) for _ in range(count)):
            loss = loss_of(model(batch.ids), batch.labels)
            (loss / count).backward()
            total += float(loss.detach()) / count
            for name, p in named.items():
                assert p.grad is not None
                sums[name] += p.grad.float()
                p.grad = None
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in sums.values()))
        results.append((total, norm))
        clip = min(1.0, config.optimizer.gradient_clipping / (norm + 1e-6))
        rate = learning_rate(step)
        for group, name in zip(adamw.param_groups, others, strict=True):
            shape = named[name].shape
            group["lr"] = rate * rules.width_scale(name, shape) * rules.factor_scale(name)
            group["weight_decay"] = rate * rules.decay(name, shape) / group["lr"]
            masters[name].grad = clip * sums[name]
        adamw.step()
        with torch.no_grad():
            for name in matrices:
                velocity[name] = 0.95 * velocity[name] + clip * sums[name]
                direction = clip * sums[name] + 0.95 * velocity[name]
                *_, m, n = direction.shape
                coefficients = rules.settings["newton_schulz_coefficients"]
                blocks = [plain_newton_schulz(block, coefficients) for block in direction.view(-1, m, n)]
                update = 0.2 * math.sqrt(max(m, n)) * torch.stack(blocks).view(direction.shape).float()
                scale = rules.width_scale(name, direction.shape) * rules.factor_scale(name)
                masters[name].mul_(1 - rate * rules.decay(name, direction.shape)).sub_(rate * scale * update)
            for name, p in named.items():
                p.copy_(masters[name])
    return results, {name: p.detach().float() for name, p in named.items()}
