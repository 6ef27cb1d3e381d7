"""Gates of a spec as modules: projections, formulas and their published starts."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from glazoo.layers.parts import KeepsWide, draw, fill, projection, wide_dtype, wide_parameter
from glazoo.spec import Gate, Init, SpecError

__all__ = ["GateModule", "GateValue"]

_RATED = ("softplus_exp", "bounded_sigmoid")
_STEPPED = ("softplus_exp", "softplus_product")
_TEMPERED = ("softplus_temperature", "softplus_power")


class GateValue(NamedTuple):
    """What a gate gives for every token, [B, T, heads] or [B, T, heads, size], float32 or wider."""

    value: Tensor
    """The gate; a natural logarithm for decays."""
    step: Tensor | None = None
    """The discretisation step softplus(x + dt_bias), where the formula has one."""
    tempered: tuple[Tensor, Tensor] | None = None
    """softplus(x) and sigmoid(x_tau), where the formula has a temperature."""


class GateModule(KeepsWide):
    """One gate of a spec.

    The projections take the model's dtype; `A_log`, `dt_bias` and the arithmetic are float32 or
    wider. The formulas are those of `glazoo.spec.Gate.parameterization`.

    Args:
        gate: the gate's description; its source is `data` or `static`.
        in_features: channels of what is projected.
        heads: heads that have a gate of their own.
        size: channels per head of a key- or value-shaped gate; unset for one number per head.
        rank: rank of a low-rank projection, from the description; unset for a full one.
    """

    def __init__(
        self, gate: Gate, in_features: int, heads: int, size: int | None, rank: int | None
    ) -> None:
        super().__init__()
        self.gate, self.in_features, self.heads, self.size = gate, in_features, heads, size
        kind, width = gate.parameterization, heads * (size or 1)
        self.static = gate.source == "static"
        if gate.source not in ("data", "static"):
            raise SpecError(f"a gate with source = {gate.source!r} has no parameters of its own")
        # A dt_bias is kept wide and outside of the projection, whose own bias is then not needed.
        biased = kind in (*_RATED, *_STEPPED)
        self.A_log = wide_parameter(heads) if kind in _RATED else None
        self.dt_bias = wide_parameter(width) if biased or self.static else None
        self.proj: nn.Module | None = None
        self.proj_rate: nn.Module | None = None
        self.proj_tau: nn.Module | None = None
        if not self.static:
            self.proj = projection(
                in_features,
                width,
                rank,
                activation=gate.low_rank_activation,
                bias=gate.bias and not biased,
                weight_init=gate.weight_init,
                bias_init=gate.bias_init,
            )
            if kind == "softplus_product":
                self.proj_rate = projection(in_features, width, rank)
            if kind in _TEMPERED:
                self.proj_tau = projection(in_features, width, rank, bias=gate.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the wide parameters to their start; the projections have theirs."""
        if self.A_log is not None:
            fill(self.A_log, draw(self.gate.a_init or Init(), *self.A_log.shape))
        if self.dt_bias is not None:
            fill(self.dt_bias, draw(self.gate.bias_init or Init(), *self.dt_bias.shape))

    def forward(
        self, x: Float[Tensor, "B T D"], lower_bound: Float[Tensor, "width"] | None = None
    ) -> GateValue:
        """Return the gate of every token.

        Args:
            x: [B, T, in_features], what is projected.
            lower_bound: [heads * size], in [0, 1), the l of lower_bounded_sigmoid; default 0.

        Returns:
            The gate's value, and the parts of it that other gates are tied to.
        """
        self.refuse_narrow()
        dtype = wide_dtype(x)
        if self.proj is None:
            assert self.dt_bias is not None
            z = self.dt_bias.to(dtype).expand(*x.shape[:2], -1)
        else:
            z = self.proj(x).to(dtype)
            if self.dt_bias is not None:
                z = z + self.dt_bias.to(dtype)
        z = self._split(z)
        gate = self.gate
        match gate.parameterization:
            case "log_sigmoid":
                return GateValue(F.logsigmoid(z) / (gate.divisor or 1.0))
            case "softcap_log_sigmoid":
                return GateValue(F.logsigmoid(_softcap(z, gate)))
            case "softplus_exp":
                step = F.softplus(z)
                return GateValue(-self._rate(dtype) * step, step)
            case "softplus_product":
                assert self.proj_rate is not None
                rate = F.softplus(self._split(self.proj_rate(x).to(dtype))).clamp(min=gate.floor)
                step = F.softplus(z)
                return GateValue(-rate * step, step)
            case "bounded_sigmoid":
                assert gate.bound is not None
                return GateValue(gate.bound * torch.sigmoid(self._rate(dtype) * z))
            case "lower_bounded_sigmoid":
                if lower_bound is None:
                    return GateValue(F.logsigmoid(z))
                # log(l + (1 - l) sigmoid(z)) without a logarithm of zero: the floor keeps l = 0,
                # which the first layer has exactly, from becoming -inf with an infinite gradient.
                bound = self._split(lower_bound.to(dtype).clamp(min=1e-30).log())
                return GateValue(F.logsigmoid(z) + torch.logaddexp(bound - z, torch.zeros_like(z)))
            case "negative_exp":
                return GateValue(-torch.exp(z))
            case "negative_sigmoid":
                return GateValue(-(gate.divisor or 1.0) * torch.sigmoid(z))
            case "softplus_temperature" | "softplus_power" as kind:
                assert self.proj_tau is not None
                p = F.softplus(z)
                tau = torch.sigmoid(self._split(self.proj_tau(x).to(dtype)))
                value = -p * tau if kind == "softplus_temperature" else power(p, tau)
                return GateValue(value, tempered=(p, tau))
            case "sigmoid":
                return GateValue(gate.factor * torch.sigmoid(z))
            case "sigmoid_squared":
                return GateValue(gate.factor * (gate.floor + torch.sigmoid(z)).square())
            case "softplus":
                return GateValue(F.softplus(z))
            case "reciprocal_softplus":
                return GateValue(1 / (gate.floor + F.softplus(z)))
            case "softcap_exp":
                return GateValue(torch.exp(_softcap(z, gate)))
            case "identity":
                return GateValue(z)
            case "schedule":
                raise AssertionError("schedules are fixed gates, which have no module")

    def _split(self, z: Tensor) -> Tensor:
        return z if self.size is None else z.unflatten(-1, (self.heads, self.size))

    def _rate(self, dtype: torch.dtype) -> Tensor:
        assert self.A_log is not None
        rate = self.A_log.to(dtype).exp()
        return rate if self.size is None else rate[:, None]

    def extra_repr(self) -> str:
        shape = "" if self.size is None else f", size={self.size}"
        return f"{self.gate.parameterization}, heads={self.heads}{shape}"


def _softcap(z: Tensor, gate: Gate) -> Tensor:
    assert gate.cap is not None
    return gate.cap * torch.tanh(z / gate.cap)


def power(p: Tensor, tau: Tensor) -> Tensor:
    """p ** tau for p >= 0, with finite gradients where p underflows."""
    return (tau * p.clamp(min=torch.finfo(p.dtype).tiny).log()).exp()
