"""The polynomials of Newton-Schulz, by the names that a config gives them. Loads no torch.

All are odd, a x + b x^3 + c x^5, and are applied to the singular values of a matrix whose Frobenius norm is 1.
"""

from __future__ import annotations

from dataclasses import dataclass

Polynomial = tuple[float, float, float]  # a, b, c


@dataclass(frozen=True)
class Coefficients:
    """One polynomial after the other; the last one is repeated.

    `margin`: the first step divides the matrix by it, so that rounding does not lift a singular value above 1.
    """

    polynomials: tuple[Polynomial, ...]
    margin: float = 1.0

    def of_steps(self, steps: int) -> list[Polynomial]:
        """The polynomials of that many steps."""
        last = self.polynomials[-1]
        first, *others = (self.polynomials + (last,) * steps)[:steps]
        return [_scaled(first, self.margin), *others]


def _scaled(polynomial: Polynomial, divisor: float) -> Polynomial:
    """The polynomial of x / divisor."""
    a, b, c = polynomial
    return a / divisor, b / divisor**3, c / divisor**5


# Each is optimal for the interval that the one before leaves of [1e-3, 1], and is scaled for values up to 1.01.
_OPTIMAL = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)

COEFFICIENTS = {
    # Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon): raises small values fast, to about 1.
    "quintic": Coefficients(((3.4445, -4.7750, 2.0315),)),
    # Amsel et al. 2025 (arXiv 2505.16932): another polynomial in every step, the last one repeated.
    "polar_express": Coefficients((*(_scaled(each, 1.01) for each in _OPTIMAL), (1.875, -1.25, 0.375)), margin=1.01),
    # Jordan et al. 2024, too: goes to 1 exactly, but raises small values by no more than 2 in a step.
    "converging": Coefficients(((2.0, -1.5, 0.5),)),
}
