"""A clamp at zero that training can leave again."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["live_clamp"]


class _LiveClamp(torch.autograd.Function):
    """max(x, 0) whose gradient also passes where x <= 0, if descending along it would raise x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        (grad,) = grads
        return torch.where((x > 0) | (grad < 0), grad, torch.zeros_like(grad))


def live_clamp(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Clamps at zero from below without the dead gradient of a plain clamp.

        y = max(x, 0) ;  dL/dx = dL/dy  where x > 0 or dL/dy < 0,  else 0

    A parameter that starts at exactly zero computes exactly zero, yet the first step that asks for
    more gets it; a step that asks for less than zero is not taken.

    Args:
        x: any shape, floating point.

    Returns:
        max(x, 0), same shape and dtype.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x.clamp(min=0)
    y: Tensor = _LiveClamp.apply(x)  # type: ignore[no-untyped-call]
    return y
