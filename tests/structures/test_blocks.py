"""Block-diagonal products: layouts of results and gradients, and the rules that torch has for operators."""

from __future__ import annotations

import pytest
import torch

from factors import draw
from megastruct.structures.block_product import block_product, block_product_weight_gradient, is_feature_major


@pytest.mark.parametrize(("shuffled", "feature_major"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("x_feature_major", [False, True])
def test_layouts(shuffled: bool, feature_major: bool, x_feature_major: bool) -> None:
    """The result has the layout asked for, the gradient of x that of x, whatever layout the gradient arrives in."""
    if shuffled and not x_feature_major:
        pytest.skip("a shuffled product reads feature-major")
    weight = draw(3, 4, 2, seed=0)
    dense = torch.block_diag(*weight)
    if shuffled:
        rows, columns = (torch.arange(size * 3).view(size, 3).T.flatten() for size in (4, 2))
        scattered = torch.empty_like(dense)
        scattered[rows[:, None], columns] = dense
        dense = scattered
    for gradient in (draw(5, 12, seed=1), draw(12, 5, seed=1).t(), draw(1, 12, seed=1).expand(5, 12)):
        x = (draw(6, 5, seed=2).t() if x_feature_major else draw(5, 6, seed=2)).requires_grad_()
        w = weight.clone().requires_grad_()
        y = block_product(x, w, shuffled, feature_major)
        torch.testing.assert_close(y, x @ dense.T)
        assert is_feature_major(y) == feature_major and (feature_major or y.is_contiguous())
        by_x, by_w = torch.autograd.grad(y, (x, w), gradient)
        torch.testing.assert_close(by_x, gradient @ dense)
        assert is_feature_major(by_x) == x_feature_major
        full = gradient.T @ x.detach()
        expected = full[rows[:, None], columns] if shuffled else full
        torch.testing.assert_close(torch.block_diag(*by_w), expected * torch.block_diag(*torch.ones_like(weight)))


def test_operators_keep_the_rules_of_torch() -> None:
    x, w = draw(5, 6, seed=0).requires_grad_(), draw(3, 4, 2, seed=1).requires_grad_()
    torch.library.opcheck(block_product, (x, w, False, False))
    torch.library.opcheck(block_product, (draw(2, 3, 6, seed=0).requires_grad_(), w, False, True))
    torch.library.opcheck(block_product, (draw(6, 5, seed=0).t(), w, True, True))
    torch.library.opcheck(block_product_weight_gradient, (draw(5, 12, seed=2), x.detach(), 3, False))
