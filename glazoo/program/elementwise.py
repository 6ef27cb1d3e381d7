"""What a posterior's importance does to keys, queries and decays, with few passes over memory.

These are elementwise, so arithmetic is free and memory is not: autograd through their formulas
would keep and move several tensors of the size of all keys where one does. A compiler fuses the
formulas itself, so it is given them.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["exact_strength", "flow_strength", "forgetting", "over", "whitened"]


class _Over(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, importance: Tensor, prior: Tensor) -> Tensor:
        rate = (importance + prior).reciprocal_()
        ctx.save_for_backward(x, rate)
        return x * rate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        x, rate = ctx.saved_tensors
        dx = grads[0] * rate
        dtotal = (dx * x).mul_(rate).neg_()
        return dx, dtotal, dtotal.sum((0, 1))


def over(
    x: Float[Tensor, "B T HV K"],
    importance: Float[Tensor, "B T HV K"],
    prior: Float[Tensor, "HV K"] | Float[Tensor, "HV 1"],
) -> Float[Tensor, "B T HV K"]:
    """Divides keys or queries by the importance: x / (J + prior).

    Args:
        x: keys or queries, a head per value head.
        importance: J >= 0, above the prior.
        prior: > 0.

    Returns:
        The quotient, differentiable once in every argument.
    """
    if torch.compiler.is_compiling():
        return x / (importance + prior)
    priors = prior.expand(x.shape[2:])
    out: Tensor = _Over.apply(x, importance, priors)  # type: ignore[no-untyped-call]
    return out


class _Forgetting(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, importance: Tensor, g: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        decay = g.exp()
        old = importance + prior
        before = torch.addcmul(prior, importance, decay)
        ctx.save_for_backward(decay, old, before, prior)
        return torch.div(old, before).log_().add_(g), before

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        df, dbefore = grads
        decay, old, before, prior = ctx.saved_tensors
        through = df / before
        # d before = dbefore - df / before, where before = a J + prior
        dtotal = torch.sub(dbefore, through)
        dold = df / old
        dg_all = torch.addcmul(df, dtotal.mul(old - prior), decay)
        dg = dg_all.sum(-1, keepdim=True) if decay.shape[-1] == 1 else dg_all
        dprior = (dold + dtotal).sum((0, 1))
        return dold.addcmul_(dtotal, decay), dg, dprior


def forgetting(
    importance: Float[Tensor, "B T HV K"],
    g: Float[Tensor, "B T HV K"] | Float[Tensor, "B T HV 1"],
    prior: Float[Tensor, "HV K"] | Float[Tensor, "HV 1"],
) -> tuple[Float[Tensor, "B T HV K"], Float[Tensor, "B T HV K"]]:
    """How a mean is forgotten when its importance decays to the prior.

        I'_t = exp(g_t) J_{t-1} + prior        f_t = g_t + log((J_{t-1} + prior) / I'_t)

    Args:
        importance: J_{t-1} >= 0, above the prior, before token t.
        g: natural log of the decay, <= 0, -inf allowed.
        prior: > 0.

    Returns:
        f, the log decay of the mean (g <= f <= 0), and the importance I' that the token finds;
        differentiable once in every argument.
    """
    if torch.compiler.is_compiling():
        before = g.exp() * importance + prior
        return g + ((importance + prior) / before).log(), before
    priors = prior.expand(importance.shape[2:])
    out: tuple[Tensor, Tensor] = _Forgetting.apply(importance, g, priors)  # type: ignore[no-untyped-call]
    return out


class _Whitened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, key: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(key, before)
        wide = key.to(before.dtype)
        scaled = wide / before
        # Both sums over one array, in one order: equal to the last bit where importance is 1.
        products = wide * scaled
        found = products.sum(-1)
        return scaled, found, torch.mul(wide, wide, out=products).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        dscaled, dfound, dsquare = grads
        key, before = ctx.saved_tensors
        scaled = key / before
        through = dscaled / before
        reached = scaled * dfound.unsqueeze(-1)
        dbefore = (through + reached).mul_(scaled).neg_()
        dkey = through.add_(reached, alpha=2).addcmul_(key, dsquare.unsqueeze(-1), value=2)
        return dkey.to(key.dtype), dbefore


def whitened(
    key: Float[Tensor, "B T HV K"], before: Float[Tensor, "B T HV K"]
) -> tuple[Float[Tensor, "B T HV K"], Float[Tensor, "B T HV"], Float[Tensor, "B T HV"]]:
    """Measures keys by the importance that they find, for the exact gain.

    Args:
        key: keys, a head per value head.
        before: I' > 0, in float32 or wider.

    Returns:
        k / I', sum k^2 / I' and sum k^2, in the dtype of I'; differentiable once in both arguments.
    """
    if torch.compiler.is_compiling():
        wide = key.to(before.dtype)
        scaled = wide / before
        return scaled, (wide * scaled).sum(-1), (wide * wide).sum(-1)
    out: tuple[Tensor, Tensor, Tensor] = _Whitened.apply(key, before)  # type: ignore[no-untyped-call]
    return out


def exact_strength(
    beta: Float[Tensor, "*shape"] | None,
    found: Float[Tensor, "*shape"],
    square: Float[Tensor, "*shape"] | None,
) -> Float[Tensor, "*shape"]:
    """Return what the exact gain makes of a write gate: gain = (k / I') strength.

        a precision:  beta / (1 + beta found)
        a rate:       beta / ((m - s + beta found) / m),  s = beta square,  m = max(s, 1)

    In this order of operations the second is beta, to the last bit, where found = square. Its
    denominator is never below min(1, found / square).

    Args:
        beta: write gate, >= 0; None is 1.
        found: sum k^2 / I'.
        square: sum k^2 where the write gate is a rate, None where it is a precision.

    Returns:
        The strength, >= 0.
    """
    reached = found if beta is None else beta * found
    if square is None:
        return (1 if beta is None else beta) / (1 + reached)
    s = square if beta is None else beta * square
    most = s.clamp(min=1)
    return (1 if beta is None else beta) / ((most - s + reached) / most)


def flow_strength(
    beta: Float[Tensor, "*shape"] | None, found: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Return how far the delta rule goes in continuous time: gain = (k / I') strength.

        (1 - exp(-beta found)) / found, and beta where found = 0

    Args:
        beta: write gate, >= 0: how long it runs; None is 1.
        found: sum k^2 / I', >= 0.

    Returns:
        The strength, >= 0.
    """
    beta = torch.ones_like(found) if beta is None else beta
    still = found == 0
    # No division by zero: its gradient would be nan.
    reached = -torch.expm1(-beta * found) / found.masked_fill(still, 1)
    return torch.where(still, beta, reached)
