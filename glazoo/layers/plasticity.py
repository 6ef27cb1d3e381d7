"""The importance gate and the prior of a layer, from a spec."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from glazoo.layers.clamp import live_clamp
from glazoo.layers.gates import GateModule
from glazoo.layers.parts import KeepsWide, draw, fill, wide_dtype, wide_parameter
from glazoo.spec import Gate, Importance, Init, Spec, SpecError

__all__ = [
    "MAX_PRECISION",
    "PLASTICITIES",
    "ImportanceModule",
    "importance_gate",
    "observed_precision",
    "refused_plasticity",
]

MAX_PRECISION = math.exp(8)
"""Largest precision that one token adds to importance: the odds of a sigmoid write gate at 8. Above
it, 1 - beta k.k has lost more than three of float32's seven digits, and a single token would fix
its channels for the rest of a context. The gain itself needs no such bound."""

PLASTICITIES = ("importance.scale", "metaplastic.b_scale")
"""Ends of the names of plasticities, the factors of importance gates: of a layer's here, and of a
converted mixer's."""


def observed_precision(
    spec: Spec,
    beta: Float[Tensor, "B nT HV *V"],
    k: Float[Tensor, "B nT H K"],
) -> Float[Tensor, "B nT HV *V"]:
    """Gives what the importance gate of a spec multiplies, from the write gate and the keys.

        importance.gate.tie = precision:  min(beta / (1 - beta k.k), e^8), and e^8 from
                                          beta k.k = 1 on
        otherwise:                        beta

    With unit keys and beta = sigmoid(z) the precision is e^z, the odds.

    Args:
        spec: the metaplastic spec.
        beta: the write gate as the recurrence takes it, in float32 or wider.
        k: keys as the recurrence takes them; value heads are a multiple of their heads.

    Returns:
        The precision, >= 0, of the write gate's shape and dtype, or the write gate itself.
    """
    if spec.importance is None or spec.importance.gate.tie != "precision":
        return beta
    square = k.to(beta.dtype).square().sum(-1).repeat_interleave(beta.shape[2] // k.shape[2], 2)
    rest = 1 - beta * (square if beta.ndim == 3 else square[..., None])
    known = rest * MAX_PRECISION > beta
    # No division by what is not used: its gradient would be nan.
    return torch.where(known, beta / rest.where(known, rest.new_ones(())), MAX_PRECISION)


def refused_plasticity(spec: Spec, plasticity: object) -> str | None:
    """Says why a number is no plasticity to start from, or gives None if it is one.

    A rule that subtracts its prediction observes with the precision of its write gate, kappa = 1,
    at most. The write of a Hebbian rule is no precision, and kappa is the unit between the two.

    Args:
        spec: a spec, or its metaplastic form.
        plasticity: kappa.

    Returns:
        The reason, for a message, or None.
    """
    most = math.inf if spec.hebbian else 1.0
    if (
        isinstance(plasticity, int | float)
        and math.isfinite(plasticity)
        and 0 <= plasticity <= most
    ):
        return None
    accepted = "numbers from 0 on" if spec.hebbian else f"numbers in [0, 1] for {spec.name!r}"
    return f"plasticity: got {plasticity!r}, accepted are {accepted}"


def importance_gate(
    gate: Gate,
    z: Float[Tensor, "B nT HV D"],
    write: Float[Tensor, "B nT HV *V"] | None,
    scale: Float[Tensor, " HV"] | None,
) -> Float[Tensor, "B nT HV *V"]:
    """Gives the importance gate b >= 0 from its projection.

        b = scale [write] factor sigmoid(z)   or   scale [write] softplus(z)

    Args:
        gate: the gate, of shape head or value.
        z: its projection, in float32 or wider; D is 1 for a head gate, V for a value gate.
        write: what a tied gate multiplies, from `observed_precision`; unset means 1.
        scale: the plasticity kappa >= 0 of every head; unset means 1.

    Returns:
        [B, n T, HV], or [B, n T, HV, V] for one importance per synapse.
    """
    heads = gate.shape != "value"
    # First, not last: a view as result is what FSDP2 warns of.
    z = z.squeeze(-1) if heads else z
    sigmoid = gate.parameterization == "sigmoid"
    opening = gate.factor * torch.sigmoid(z) if sigmoid else F.softplus(z)
    if gate.tie in ("write", "precision") and write is not None:
        if heads:
            # A write gate per value channel has no head-shaped counterpart but its mean.
            opening = opening * (write if write.ndim == 3 else write.mean(-1))
        else:
            opening = opening * (write[..., None] if write.ndim == 3 else write)
    if scale is not None:
        scale = scale.to(z.dtype)
        opening = opening * (scale if heads else scale[:, None])
    return opening


class ImportanceModule(KeepsWide):
    """Importance of one layer: its gate, scale, prior, own decay and preconditioner's center.

        b_t = scale [write_t] gate(x_t) ;   I_p = exp(prior)  or  softplus(prior) + floor

    Every parameter here is float32 or wider whatever the layer is cast to, the projection
    included; the projection's two small products run in the input's dtype.

    Args:
        spec: the importance of a spec.
        in_features: channels of the layer's input.
        heads: value heads.
        keys: key channels per head, as the recurrence sees them.
        values: value channels per head.
        steps: writes per token that are projected.
        rank: rank of the gate's projection; unset for a full one.

    Reference: arXiv:2602.09075.
    """

    def __init__(
        self,
        spec: Importance,
        *,
        in_features: int,
        heads: int,
        keys: int,
        values: int,
        steps: int,
        rank: int | None,
    ) -> None:
        super().__init__()
        self.spec, self.heads, self.values, self.steps = spec, heads, values, steps
        gate = spec.gate
        if gate.shape != "none" and gate.parameterization not in ("sigmoid", "softplus"):
            raise SpecError(
                f"importance.gate.parameterization: got {gate.parameterization!r}, accepted are "
                "'sigmoid' and 'softplus'"
            )
        self.down: nn.Parameter | None = None
        self.up: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        self.scale: nn.Parameter | None = None
        if gate.shape != "none":
            width = steps * heads * (values if gate.shape == "value" else 1)
            if gate.source == "data":
                self.down = wide_parameter(rank, in_features) if rank is not None else None
                self.up = wide_parameter(width, in_features if rank is None else rank)
            if gate.bias or gate.source == "static":
                self.bias = wide_parameter(width)
            if spec.scale.parameterization != "none":
                self.scale = wide_parameter(heads)
        shape = {"none": None, "head": (heads,), "key": (heads, keys)}[spec.prior.shape]
        self.prior_raw = (
            None if shape is None else wide_parameter(*shape, trainable=spec.prior.trainable)
        )
        self.center = wide_parameter(heads) if spec.preconditioner is not None else None
        own = spec.own_decay
        self.own_decay = (
            None if own is None else GateModule(own, in_features, steps * heads, None, None)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the module's own parameters to their starts."""
        spec = self.spec
        for p in (self.down, self.up):
            if p is not None:
                fill(p, (2 * torch.rand(p.shape, device="cpu") - 1) / math.sqrt(p.shape[1]))
        init = spec.gate.weight_init
        if self.up is not None and init is not None and init.distribution != "default":
            fill(self.up, draw(init, *self.up.shape))
        if self.bias is not None:
            fill(self.bias, draw(spec.gate.bias_init or Init(), *self.bias.shape))
        if self.scale is not None:
            fill(self.scale, spec.scale.init)
        if self.prior_raw is not None:
            start = spec.prior.init
            if spec.prior.parameterization == "exp":
                fill(self.prior_raw, math.log(start))
            else:
                fill(self.prior_raw, math.log(math.expm1(start - spec.prior.floor)))
        if self.center is not None and spec.preconditioner is not None:
            fill(self.center, spec.preconditioner.center_init)

    def forward(
        self, x: Float[Tensor, "B T D"], write: Float[Tensor, "B nT HV *V"] | None
    ) -> Float[Tensor, "B nT HV *V"]:
        """Gives the importance gate b >= 0 of every write.

        Args:
            x: [B, T, D], the layer's input.
            write: what the gate multiplies, from `observed_precision`, [B, n T, HV] or
                [B, n T, HV, V]; unset means 1.

        Returns:
            [B, n T, HV], or [B, n T, HV, V] for one importance per synapse.
        """
        self.refuse_narrow()
        gate = self.spec.gate
        dtype = wide_dtype(x)
        if self.up is None:
            assert self.bias is not None
            z = self.bias.to(dtype).expand(*x.shape[:2], -1)
        else:
            low = x if self.down is None else F.linear(x, self.down.to(x.dtype))
            z = F.linear(low, self.up.to(x.dtype)).to(dtype)
            if self.bias is not None:
                z = z + self.bias.to(dtype)
        scale = None
        if self.scale is not None:
            clamped = self.spec.scale.parameterization == "clamp"
            scale = live_clamp(self.scale) if clamped else F.softplus(self.scale)
        z = z.unflatten(-1, (self.steps, self.heads, -1)).flatten(1, 2)
        return importance_gate(gate, z, write, scale)

    def prior(self, dtype: torch.dtype) -> Float[Tensor, "HV *K"] | None:
        """Gives the prior importance I_p > 0, [HV] or [HV, K]; None where the spec has none."""
        self.refuse_narrow()
        if self.prior_raw is None:
            return None
        if self.spec.prior.parameterization == "exp":
            return self.prior_raw.to(dtype).exp()
        return F.softplus(self.prior_raw.to(dtype)) + self.spec.prior.floor

    def extra_repr(self) -> str:
        gate = self.spec.gate
        return f"gate={gate.shape}, prior={self.spec.prior.shape}, heads={self.heads}"
