"""The importance gate and the prior of a layer, from a spec."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from glazoo.engines import importance_gate as in_one_piece
from glazoo.layers.clamp import live_clamp
from glazoo.layers.gates import GateModule
from glazoo.layers.parts import KeepsWide, draw, fill, wide_dtype, wide_parameter
from glazoo.spec import Gate, Importance, Init, Spec, SpecError
from glazoo.state import State

__all__ = [
    "EARLIER_NAMES",
    "MAX_PRECISION",
    "PLASTICITY",
    "ImportanceGate",
    "Observation",
    "default_rank",
    "importance_gate",
    "observed_precision",
    "refused_plasticity",
    "write_sizes",
]

MAX_PRECISION = math.exp(8)
"""Largest precision that one token adds to importance: the odds of a sigmoid write gate at 8. Above
it, 1 - beta k.k has lost more than three of float32's seven digits, and a single token would fix
its channels for the rest of a context. The gain itself needs no such bound."""

PLASTICITY = "metaplastic.b_scale"
"""End of the names of plasticities, the factors of importance gates."""


def observed_precision(
    gate: Gate,
    beta: Float[Tensor, "B nT HV *V"],
    k: Float[Tensor, "B nT H K"],
) -> Float[Tensor, "B nT HV *V"]:
    """Return what an importance gate multiplies, from the write gate and the keys.

        tie = precision:  min(beta / (1 - beta k.k), e^8), and e^8 from beta k.k = 1 on
        otherwise:        beta

    With unit keys and beta = sigmoid(z) the precision is e^z, the odds.

    Args:
        gate: the importance gate of a spec.
        beta: the write gate as the recurrence takes it, in float32 or wider.
        k: keys as the recurrence takes them; value heads are a multiple of their heads.

    Returns:
        The precision, >= 0, of the write gate's shape and dtype, or the write gate itself.
    """
    if gate.tie != "precision":
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


def default_rank(hidden_size: int) -> int:
    """Return the rank of an added gate's projection: a sixteenth of the width, 128 at most."""
    return max(1, min(128, hidden_size // 16))


def importance_gate(
    gate: Gate,
    z: Float[Tensor, "B nT HV D"],
    write: Float[Tensor, "B nT HV *V"] | None,
    scale: Float[Tensor, " HV"] | None,
) -> Float[Tensor, "B nT HV *V"]:
    """Return the importance gate b >= 0 from its projection.

        b = scale [write] factor sigmoid(z)   or   scale [write] softplus(z)
        or, of a derived gate,   scale [write] factor

    Args:
        gate: the gate, of shape head or value.
        z: its projection, in float32 or wider; D is 1 for a head gate, V for a value gate; zeros
            for a derived gate.
        write: what a tied gate multiplies, from `observed_precision`; unset means 1.
        scale: the plasticity kappa >= 0 of every head; unset means 1.

    Returns:
        [B, n T, HV], or [B, n T, HV, V] for one importance per synapse.
    """
    heads = gate.shape != "value"
    # First, not last: a view as result is what FSDP2 warns of.
    z = z.squeeze(-1) if heads else z
    sigmoid = gate.parameterization == "sigmoid"
    if gate.source == "derived":
        opening = torch.full_like(z, gate.factor)
    else:
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


class ImportanceGate(KeepsWide):
    """The importance gate of one layer: what a token adds to importance, the prior, and
    importance's own decay and preconditioner.

        b_t = kappa [r_t] 2 sigmoid(z_t)   or   kappa [r_t] softplus(z_t) ;
        z_t = b_up b_down x_t + b_bias ;
        kappa = max(b_scale, 0) with a live gradient   or   softplus(b_scale) ;
        I_p = exp(ip_log)   or   softplus(ip_log) + floor

    as the spec says, with x_t the layer's input and r_t what `observed_precision` makes of its
    write gate: the gate itself, or the precision whose rate it is. In the gate that
    `metaplasticize` adds, `b_up` and `ip_log` start at zero, so that b_t = kappa r_t and I_p = 1:
    kappa = 0 is the source, kappa = 1 the full metaplastic form.

    The factors are bare parameters rather than linear layers, so that quantisers and adapters that
    collect linear layers leave them alone. Every parameter is float32 or wider whatever the model
    is cast to; the two small products run in the input's dtype.

    Args:
        spec: the importance of a spec.
        in_features: channels of the layer's input, D.
        heads: value heads, HV.
        keys: key channels per head, K, as the recurrence sees them.
        values: value channels per head, V.
        key_heads: key heads, H. Default: HV.
        steps: writes per token, n.
        plasticity: start of b_scale. Default: the spec's.
        seed: seed of the start of b_down, which then depends on it and on `layer` alone. Default:
            torch's generator.
        layer: index of the layer in its model.

    Raises:
        SpecError: the spec asks for a gate that does not exist.

    Reference: arXiv:2602.09075, importance gate; the clamp at zero and the zero start of `b_up` are
    this project's.
    """

    def __init__(
        self,
        spec: Importance,
        *,
        in_features: int,
        heads: int,
        keys: int,
        values: int,
        key_heads: int | None = None,
        steps: int = 1,
        plasticity: float | None = None,
        seed: int | None = None,
        layer: int = 0,
    ) -> None:
        super().__init__()
        self.spec, self.heads, self.values, self.steps = spec, heads, values, steps
        self.plasticity = spec.scale.init if plasticity is None else float(plasticity)
        self.seed, self.layer = seed, layer
        gate = spec.gate
        made = gate.shape != "none" and gate.source != "derived"
        if made and gate.parameterization not in ("sigmoid", "softplus"):
            raise SpecError(
                f"importance.gate.parameterization: got {gate.parameterization!r}, accepted are "
                "'sigmoid' and 'softplus'"
            )
        self.b_down: nn.Parameter | None = None
        self.b_up: nn.Parameter | None = None
        self.b_bias: nn.Parameter | None = None
        self.b_scale: nn.Parameter | None = None
        if gate.shape != "none":
            width = steps * heads * (values if gate.shape == "value" else 1)
            if gate.source == "data":
                rank = values if gate.rank == "head" else gate.rank
                self.b_down = wide_parameter(rank, in_features) if rank is not None else None
                self.b_up = wide_parameter(width, in_features if rank is None else rank)
            if gate.bias or gate.source == "static":
                self.b_bias = wide_parameter(width)
            if spec.scale.parameterization != "none":
                self.b_scale = wide_parameter(heads)
        shape = {"none": None, "key": (heads, keys)}.get(spec.prior.shape, (heads,))
        self.ip_log = (
            None if shape is None else wide_parameter(*shape, trainable=spec.prior.trainable)
        )
        self.center = wide_parameter(heads) if spec.preconditioner is not None else None
        own = spec.own_decay
        self.own_decay = (
            None if own is None else GateModule(own, in_features, steps * heads, None, None)
        )
        self.noise: GateModule | None = None
        if spec.noise.shape != "none":
            rank = values if spec.noise.rank == "head" else spec.noise.rank
            size = keys if spec.noise.shape == "key" else None
            self.noise = GateModule(spec.noise, in_features, heads, size, rank)
        self.axes: nn.Parameter | None = None
        self.turn: nn.Parameter | None = None
        if spec.basis == "rotated":
            square = (key_heads or heads, keys, keys)
            self.axes = wide_parameter(*square, trainable=False)
            self.turn = wide_parameter(*square)
        self._turned: tuple[Tensor, Tensor, Tensor] | None = None
        self.reset_parameters()

    @property
    def added(self) -> bool:
        """Whether the gate was added to a source, which kappa = 0 and I_p = 1 are."""
        return self.b_scale is not None and self.spec.scale.parameterization == "clamp"

    def reset_parameters(self) -> None:
        """Sets the module's own parameters to their starts; those that a checkpoint filled stay."""
        for name, p in self.named_parameters(recurse=False):
            if not p.is_meta:
                fill(p, self.start(name))

    def start(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the start of one of the module's own parameters, on the CPU; a constant in the
        given dtype, what is drawn in float32."""
        spec, shape = self.spec, tuple(self.get_parameter(name).shape)
        if name in ("b_down", "b_up"):
            init = spec.gate.weight_init if name == "b_up" else None
            if init is not None and init.distribution != "default":
                return draw(init, *shape)
            generator = None
            if self.seed is not None:
                generator = torch.Generator()
                generator.manual_seed((self.seed * 1_000_003 + self.layer) % 2**63)
            # Named dtype and device: models are built under a meta device and a default dtype of
            # their own.
            u = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
            return (2 * u - 1) / math.sqrt(shape[1])
        if name == "b_bias":
            return draw(spec.gate.bias_init or Init(), *shape)
        if name == "axes":
            return torch.eye(shape[1], dtype=torch.float32, device="cpu").repeat(shape[0], 1, 1)
        value = 0.0 if name == "turn" else self.plasticity
        if name == "ip_log":
            exp = spec.prior.parameterization == "exp"
            at = spec.prior.init
            value = math.log(at) if exp else math.log(math.expm1(at - spec.prior.floor))
        elif name == "center":
            assert spec.preconditioner is not None
            value = spec.preconditioner.center_init
        return torch.full(shape, value, dtype=dtype, device="cpu")

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        write: Float[Tensor, "B nT HV *V"] | None,
        k: Float[Tensor, "B nT H K"] | None = None,
        *,
        impl: str = "auto",
    ) -> dict[str, Tensor]:
        """Return the operands of the recurrence that concern importance, those that the spec has.

        Args:
            x: [B, T, D], the layer's input.
            write: the write gate, [B, n T, HV] or [B, n T, HV, V], float32 or wider; unset means 1.
            k: keys as the recurrence takes them, [B, n T, H, K], with which a write gate becomes
                the precision that it observes with; unset: `write` is multiplied as it is.
            impl: the engine of the recurrence; `compiled`, also as `auto`, has the gate of a token
                of decoding in one piece.

        Returns:
            `b` >= 0, [B, n T, HV], or [B, n T, HV, V] for one importance per synapse; `prior` > 0,
            [HV] or [HV, K]; `center`, [HV]; `g_importance` <= 0, [B, n T, HV]; `noise` > 0,
            [B, T, HV] or [B, T, HV, K]; `basis`, [H, K, K]. In one call: between calls, an
            offloading hook takes the parameters away.
        """
        self.refuse_narrow()
        dtype = wide_dtype(x if write is None else write)
        operands: dict[str, Tensor] = {}
        if self.spec.gate.shape != "none":
            operands["b"] = self._gate(x, write, k, dtype, impl)
        if (prior := self.prior(dtype)) is not None:
            operands["prior"] = prior
        if self.center is not None:
            operands["center"] = self.center
        if self.own_decay is not None:
            g = self.own_decay(x).value
            operands["g_importance"] = g.unflatten(2, (self.steps, self.heads)).flatten(1, 2)
        if self.noise is not None:
            operands["noise"] = self.noise(x).value
        if self.turn is not None:
            operands["basis"] = self.basis()
        return operands

    def _gate(
        self, x: Tensor, write: Tensor | None, k: Tensor | None, dtype: torch.dtype, impl: str
    ) -> Tensor:
        if self.steps == 1:
            parameters = self.b_down, self.b_up, self.b_bias, self.b_scale
            b = in_one_piece(impl, self.spec, x, write, k, parameters, MAX_PRECISION)
            if b is not None:
                return b
        z = self._projected(x, dtype).unflatten(-1, (self.steps, self.heads, -1)).flatten(1, 2)
        gate = self.spec.gate
        seen = write if write is None or k is None else observed_precision(gate, write, k)
        return importance_gate(gate, z, seen, self.kappa())

    def basis(self) -> Float[Tensor, "H K K"]:
        """Return the orthogonal matrices whose columns are the axes of importance: those at the
        start times the Cayley transform (1 + A)^-1 (1 - A) of A = turn - turn^T."""
        assert self.axes is not None
        assert self.turn is not None
        # The axes at the start are no parameter, even where all of a model is trained.
        axes = self.axes.detach()
        learns = torch.is_grad_enabled() and self.turn.requires_grad
        if learns or torch.compiler.is_compiling():
            return self._basis(axes, self.turn)
        # By value: what averages weights or swaps them writes to `.data`, which no version counts.
        kept = self._turned
        same = (
            kept is not None
            and kept[0].device == axes.device
            and kept[0].dtype == axes.dtype
            and torch.equal(kept[0], axes)
            and torch.equal(kept[1], self.turn)
        )
        if kept is None or not same:
            with torch.no_grad():
                turn = self.turn.detach()
                kept = axes.clone(), turn.clone(), self._basis(axes, turn)
            self._turned = kept
        return kept[2]

    @staticmethod
    def _basis(axes: Tensor, turn: Tensor) -> Tensor:
        skew = turn - turn.mT
        one = torch.eye(turn.shape[-1], dtype=turn.dtype, device=turn.device)
        turned: Tensor = axes @ torch.linalg.solve(one + skew, one - skew)
        return turned

    def _projected(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if self.spec.gate.source == "derived":
            count = (
                self.heads * self.steps * (self.values if self.spec.gate.shape == "value" else 1)
            )
            return x.new_zeros((*x.shape[:2], count), dtype=dtype)
        if self.b_up is None:
            assert self.b_bias is not None
            return self.b_bias.to(dtype).expand(*x.shape[:2], -1)
        low = x if self.b_down is None else F.linear(x, self.b_down.to(x.dtype))
        z = F.linear(low, self.b_up.to(x.dtype)).to(dtype)
        return z if self.b_bias is None else z + self.b_bias.to(dtype)

    def kappa(self) -> Float[Tensor, "HV"] | None:
        """Return the plasticity kappa >= 0 of every head; None where the spec has none."""
        if self.b_scale is None:
            return None
        clamped = self.spec.scale.parameterization == "clamp"
        return live_clamp(self.b_scale) if clamped else F.softplus(self.b_scale)

    def prior(self, dtype: torch.dtype) -> Float[Tensor, "HV *K"] | None:
        """Return the prior importance I_p > 0, [HV] or [HV, K]; None where the spec has none."""
        if self.ip_log is None:
            return None
        if self.spec.prior.parameterization == "exp":
            return self.ip_log.to(dtype).exp()
        return F.softplus(self.ip_log.to(dtype)) + self.spec.prior.floor

    def extra_repr(self) -> str:
        gate, prior = self.spec.gate, self.spec.prior
        return f"gate={gate.shape}, rank={gate.rank}, prior={prior.shape}, heads={self.heads}"


class Observation(NamedTuple):
    """What one call of a layer's recurrence did, for measurements."""

    layer: int
    g: Tensor
    """Log decays, [B, T, HV], [B, T, HV, K] or [HV]."""
    b: Tensor
    """Importance gate, [B, T, HV] or [B, T, HV, V]."""
    prior: Float[Tensor, "HV *K"]
    state: State
    """After the last token."""
    keys: Float[Tensor, "B T H K"]
    """As the recurrence took them."""
    writes: Float[Tensor, "B T HV"]
    """|k| |beta v|, the size of what every token writes."""


def write_sizes(
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T HV V"],
    beta: Float[Tensor, "B T HV *V"] | None,
) -> Float[Tensor, "B T HV"]:
    """Return the size of what every token writes, |k| |beta v|, in float32."""
    v = v.float()
    if beta is not None:
        v = v * (beta[..., None] if beta.dim() == 3 else beta).float()
    size: Tensor = k.float().norm(dim=-1).repeat_interleave(v.shape[2] // k.shape[2], 2)
    size = size * v.norm(dim=-1)
    return size


EARLIER_NAMES = {
    "importance.down": "metaplastic.b_down",
    "importance.up": "metaplastic.b_up",
    "importance.bias": "metaplastic.b_bias",
    "importance.scale": "metaplastic.b_scale",
    "importance.prior_raw": "metaplastic.ip_log",
    "importance.center": "metaplastic.center",
    "importance.own_decay": "metaplastic.own_decay",
}
"""What the gate's parameters are now called that layers of 0.1 saved, within a layer."""
