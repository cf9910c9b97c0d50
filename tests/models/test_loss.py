"""Cross-entropy with the z term, on one process, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from configs import tiny_config
from marks import always
from megastruct.models.loss import cross_entropy, cross_entropy_and_z, make_loss
from megastruct.parallel.groups import ALONE

Z_LOSS = 0.02
BOUNDS = {torch.float32: (1e-6, 1e-6), torch.bfloat16: (1e-6, 4e-3)}  # of values; of gradients, at most 0.33 here


def inputs(dtype: torch.dtype, scale: float) -> tuple[Tensor, Tensor]:
    """Logits [s, b, v] and labels [b, s]."""
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(7, 3, 50, generator=generator)).to(dtype)
    return logits.requires_grad_(), torch.randint(50, (3, 7), generator=generator)


@pytest.mark.parametrize(
    ("way", "dtype"),
    always(
        [(way, dtype) for way in ("plain", "uncompiled", "compiled") for dtype in BOUNDS],
        [("plain", torch.float32), ("uncompiled", torch.bfloat16)],
    ),
    ids=str,
)
def test_the_value_is_cross_entropy_and_the_gradient_that_of_both_terms(way: str, dtype: torch.dtype) -> None:
    """And the z term is noted. Compiled, too, where a compiler could take z - z for a zero without a gradient."""
    noted: list[Tensor] = []
    config = tiny_config(training={"z_loss": Z_LOSS, "compile": way == "compiled"}, model={"vocab_size": 50})
    loss = make_loss(config, ALONE, noted.append)
    for scale in (1.0, 8.0):
        logits, labels = inputs(dtype, scale)
        if way == "plain":
            value, z = cross_entropy_and_z(logits, labels, Z_LOSS)
        else:
            value, z = loss(logits, labels), noted.pop()
        (3 * value).backward()
        exact = logits.detach().double().requires_grad_()
        log_sum = exact.exp().sum(-1).log()  # [s, b]
        wanted = (log_sum - exact.gather(-1, labels.t()[..., None])[..., 0]).mean()
        wanted_z = Z_LOSS * (log_sum**2).mean()
        (3 * (wanted + wanted_z)).backward()
        assert value.dtype == z.dtype == torch.float32 and not z.requires_grad
        value_bound, gradient_bound = BOUNDS[dtype]
        assert abs(float((value - wanted).detach())) <= value_bound * scale
        assert abs(float((z - wanted_z).detach())) <= value_bound * scale
        assert logits.grad is not None and exact.grad is not None and logits.grad.dtype == dtype
        assert (logits.grad - exact.grad).abs().max() <= gradient_bound
        alone = torch.autograd.grad(3 * cross_entropy(logits, labels), logits)[0]
        assert (logits.grad - alone).abs().max() > 2 * gradient_bound, "the z term has no gradient"


def test_the_value_of_the_plain_form_is_bit_for_bit_cross_entropy() -> None:
    logits, labels = inputs(torch.float32, 3.0)
    assert torch.equal(cross_entropy_and_z(logits, labels, Z_LOSS)[0], cross_entropy(logits, labels))
