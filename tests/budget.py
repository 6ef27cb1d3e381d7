"""How far a computed tensor may be from the truth: a budget derived from an independent run.

The rounding error of an algorithm is that of its own operations plus what the conditioning of the
problem makes of an error in the operands. Both are measured, not guessed: the plain per-token loop
is run in float32 on operands that are perturbed by one unit of rounding each (`witnesses`). The
largest distance of such runs to the float64 truth, in units of rounding of float32, is what any
reasonable algorithm may lose; in another dtype it is that number of units of the dtype.

    budget = SPREAD * unit(computed) * (max |witness - truth| / unit(float32) + max |truth|)
             + 2 * unit(stored) * |truth|

`computed` is the dtype of the arithmetic, `stored` that of the result (a bfloat16 result of float32
arithmetic is rounded once more). SPREAD allows for another order of summation: sums of up to a few
thousand terms in another order differ by a small multiple of each other's error, and 8 is three
bits of the 24.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

SPREAD = 8


def unit(dtype: torch.dtype) -> float:
    """Unit of rounding: half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def witnesses(
    function: Callable[..., Sequence[Tensor]], operands: Sequence[Tensor | None], runs: int = 2
) -> list[list[Tensor]]:
    """Results of independent float32 runs on operands perturbed by one unit of rounding.

    Args:
        function: maps operands to a sequence of tensors; the plain formulation of the computation.
        operands: float64 tensors or None.
        runs: number of independent perturbations.

    Returns:
        For each run, the results in float64.
    """
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(runs):
        noisy: list[Any] = []
        for x in operands:
            if x is not None:
                noise = 2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1
                x = (x * (1 + noise * unit(torch.float32))).float()
            noisy.append(x)
        found.append([x.detach().double() for x in function(*noisy)])
    return found


def budget(
    truth: Tensor, computed: torch.dtype, stored: torch.dtype, witness: Sequence[Tensor]
) -> Tensor:
    """The admissible distance to truth, of truth's shape."""
    if not truth.numel():
        return truth.abs()
    lost = max((float((x - truth).abs().max()) for x in witness), default=0.0)
    units = lost / unit(torch.float32) + float(truth.abs().max())
    return SPREAD * unit(computed) * units + 2 * unit(stored) * truth.abs()


def assert_within_budget(
    actual: Tensor,
    truth: Tensor,
    dtype: torch.dtype | None = None,
    *,
    witness: Sequence[Tensor],
    name: str = "result",
) -> None:
    """Fails if actual is not finite or is farther from truth than its budget.

    Args:
        actual: what was computed.
        truth: the same in float64.
        dtype: dtype of the arithmetic; None is actual's dtype, but float32 at least.
        witness: results of `witnesses` for this tensor, one per run.
        name: what to call the tensor in the message.
    """
    if dtype is None:
        dtype = torch.promote_types(actual.dtype, torch.float32)
    assert actual.shape == truth.shape, f"{name}: shape {actual.shape}, truth {truth.shape}"
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    if not truth.numel():
        return
    distance = (actual.detach().double() - truth).abs()
    allowed = budget(truth, dtype, actual.dtype, witness)
    excess = float((distance / allowed.clamp_min(torch.finfo(torch.float64).tiny)).max())
    assert excess <= 1, (
        f"{name} is {float(distance.max()):.3g} from the truth "
        f"(largest {float(truth.abs().max()):.3g}), {excess:.3g} times its budget"
    )
