"""Mixers of the gated delta rule, with one decay per head or per key channel: tensors and the
metaplastic forward pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from glazoo.converters.families.base import Block, TensorRule
from glazoo.converters.families.mixer import ConvolvedMixer, masked, refuse_packed, wide_dtype

__all__ = ["CHANNEL_DELTA", "FULL_GATE_CHANNEL_DELTA", "FUSED_DELTA", "JOINT_DELTA", "SPLIT_DELTA"]


class Projected(NamedTuple):
    """What a mixer projects its input to."""

    mixed: Float[Tensor, "B T C"]
    """q, k and v, side by side, before the convolution."""
    beta: Float[Tensor, "B T HV"]
    """Write gate, activated."""
    g: Tensor
    """Log decay, [B, T, HV] or [B, T, HV, K]."""
    z: Float[Tensor, "B T HV*V"]
    """Output gate before its activation."""


def _unit(x: Float[Tensor, "B T H K"]) -> Float[Tensor, "B T H K"]:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


class DeltaMixer(ConvolvedMixer):
    """Forward pass of a delta rule whose scan carries an importance state.

        I_t = a_t J_{t-1} + b_t k_t^2 + I_p ;  mu'_t = (a_t I_{t-1} / I'_t) mu_{t-1} ;
        mu_t = mu'_t + G_t (v_t - mu'_t^T k_t)^T ;  y_t = mu_t^T q_t

    with the spec's gain G, unit keys and queries, and b_t of `ImportanceGate`. Projections,
    convolution and gated norm are the source's own. States are float32, or float64 in a float64
    model.
    """

    def _sizes(self) -> tuple[int, int, int]:
        """Gives the number of key heads, key channels per head and value channels per head."""
        raise NotImplementedError

    def _project(self, hidden: Tensor) -> Projected:
        raise NotImplementedError

    def _finish(self, y: Tensor, z: Tensor) -> Tensor:
        """Applies gated norm [B, T, HV, V] and output projection."""
        raise NotImplementedError

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Runs the mixer.

        Args:
            hidden_states: [B, T, D].
            cache_params: the model's cache, or None.
            attention_mask: [B, T], 0 at padding, or None.

        Returns:
            [B, T, D].

        Raises:
            ValueError: packed sequences are passed; the convolution would mix them.
        """
        refuse_packed(kwargs)
        dtype, wide = hidden_states.dtype, wide_dtype(hidden_states)
        hidden_states = masked(hidden_states, attention_mask)
        mixed, beta, g, z = self._project(hidden_states)
        mixed = self._convolve(mixed, cache_params, **kwargs).to(wide)
        heads, key, value = self._sizes()
        q, k, v = mixed.split([heads * key, heads * key, mixed.shape[-1] - 2 * heads * key], -1)
        beta = beta.to(wide)
        y, packed = self._scan(
            _unit(q.unflatten(-1, (heads, key))),
            _unit(k.unflatten(-1, (heads, key))),
            v.unflatten(-1, (-1, value)),
            hidden=hidden_states,
            write=beta,
            packed=self._cached(cache_params),
            keep=cache_params is not None,
            g=g.to(wide),
            beta=beta,
        )
        if cache_params is not None:
            cache_params.update_recurrent_state(packed, self.layer_idx)
        return self._finish(y.to(dtype), z.unflatten(-1, (-1, value)))


class _HeadDecayMixer(DeltaMixer):
    """One decay per head."""

    # What the source's class gives.
    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int
    A_log: nn.Parameter
    dt_bias: nn.Parameter

    def _sizes(self) -> tuple[int, int, int]:
        return self.num_k_heads, self.head_k_dim, self.head_v_dim

    def _decay(self, a: Float[Tensor, "B T HV"]) -> Float[Tensor, "B T HV"]:
        wide = wide_dtype(a)
        return -self.A_log.to(wide).exp() * F.softplus(a.to(wide) + self.dt_bias)


class SplitDeltaMixer(_HeadDecayMixer):
    """q, k and v from one projection, both gates and the output gate from one each."""

    in_proj_qkv: nn.Module
    in_proj_z: nn.Module
    in_proj_b: nn.Module
    in_proj_a: nn.Module
    norm: nn.Module
    out_proj: nn.Module

    def _project(self, hidden: Tensor) -> Projected:
        return Projected(
            self.in_proj_qkv(hidden),
            self.in_proj_b(hidden).sigmoid(),
            self._decay(self.in_proj_a(hidden)),
            self.in_proj_z(hidden),
        )

    def _finish(self, y: Tensor, z: Tensor) -> Tensor:
        normed = self.norm(y.flatten(0, 2), z.flatten(0, 2)).view_as(y)
        result: Tensor = self.out_proj(normed.flatten(2))
        return result


class FusedDeltaMixer(SplitDeltaMixer):
    """All streams from one projection and both gates from another, interleaved by key head."""

    in_proj_qkvz: nn.Module
    in_proj_ba: nn.Module

    def _project(self, hidden: Tensor) -> Projected:
        q, k, v, z, b, a = self.fix_query_key_value_ordering(  # type: ignore[operator]
            self.in_proj_qkvz(hidden), self.in_proj_ba(hidden)
        )
        mixed = torch.cat([x.flatten(2) for x in (q, k, v)], dim=-1)
        return Projected(mixed, b.sigmoid(), self._decay(a), z.flatten(2))


class JointDeltaMixer(_HeadDecayMixer):
    """One projection for every stream and gate; the write gate may reach 2."""

    allow_neg_eigval: bool
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    a_proj: nn.Module
    b_proj: nn.Module
    g_proj: nn.Module
    o_norm: nn.Module
    o_proj: nn.Module

    def _project(self, hidden: Tensor) -> Projected:
        beta = self.b_proj(hidden).sigmoid()
        return Projected(
            torch.cat([self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)], dim=-1),
            2.0 * beta if self.allow_neg_eigval else beta,
            self._decay(self.a_proj(hidden)),
            self.g_proj(hidden),
        )

    def _finish(self, y: Tensor, z: Tensor) -> Tensor:
        normed = self.o_norm(y.flatten(0, 2), z.flatten(0, 2)).view_as(y)
        result: Tensor = self.o_proj(normed.flatten(2))
        return result


class ChannelDeltaMixer(DeltaMixer):
    """One decay per key channel, from a module of its own; low-rank output gate."""

    # What the source's class gives.
    num_heads: int
    head_dim: int
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    b_proj: nn.Module
    g_a_proj: nn.Module
    g_b_proj: nn.Module
    forget_gate: nn.Module
    o_norm: nn.Module
    o_proj: nn.Module

    def _sizes(self) -> tuple[int, int, int]:
        return self.num_heads, self.head_dim, self.head_dim

    def _project(self, hidden: Tensor) -> Projected:
        return Projected(
            torch.cat([self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)], dim=-1),
            self.b_proj(hidden).sigmoid(),
            self.forget_gate(hidden),
            self._output_gate(hidden),
        )

    def _output_gate(self, hidden: Tensor) -> Tensor:
        gate: Tensor = self.g_b_proj(self.g_a_proj(hidden))
        return gate

    def _finish(self, y: Tensor, z: Tensor) -> Tensor:
        result: Tensor = self.o_proj(self.o_norm(y, z).flatten(2))
        return result


class FullGateChannelDeltaMixer(ChannelDeltaMixer):
    """One decay per key channel; full-rank output gate."""

    g_proj: nn.Module

    def _output_gate(self, hidden: Tensor) -> Tensor:
        gate: Tensor = self.g_proj(hidden)
        return gate


# H is the number of value heads everywhere, G that of key heads.
_DERIVED = {
    "Q": (("G", "K"),),
    "I": (("H", "V"),),
    "C": (("2", "G", "K"), ("H", "V")),
    "Z": (("2", "G", "K"), ("2", "H", "V")),
    "B": (("2", "H"),),
}
_HEAD_DECAY = (TensorRule("A_log", ("H",)), TensorRule("dt_bias", ("H",)))
_SEPARATE = (
    TensorRule("q_proj.weight", ("Q", "D")),
    TensorRule("k_proj.weight", ("Q", "D")),
    TensorRule("v_proj.weight", ("I", "D")),
    TensorRule("q_conv1d.weight", ("Q", "1", "W")),
    TensorRule("k_conv1d.weight", ("Q", "1", "W")),
    TensorRule("v_conv1d.weight", ("I", "1", "W")),
    TensorRule("b_proj.weight", ("H", "D")),
)
_CONVOLUTIONS = ("q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight")

FUSED_DELTA = Block(
    name="fused gated delta",
    tensors=(
        TensorRule("in_proj_qkvz.weight", ("Z", "D")),
        TensorRule("in_proj_ba.weight", ("B", "D")),
        TensorRule("conv1d.weight", ("C", "1", "W")),
        *_HEAD_DECAY,
        TensorRule("norm.weight", ("V",)),
        TensorRule("out_proj.weight", ("D", "I")),
    ),
    derived=_DERIVED,
    mixin=FusedDeltaMixer,
    hooked=("conv1d",),
)
"""Gated delta rule with two interleaved projections."""

SPLIT_DELTA = Block(
    name="split gated delta",
    tensors=(
        TensorRule("in_proj_qkv.weight", ("C", "D")),
        TensorRule("in_proj_z.weight", ("I", "D")),
        TensorRule("in_proj_b.weight", ("H", "D")),
        TensorRule("in_proj_a.weight", ("H", "D")),
        TensorRule("conv1d.weight", ("C", "1", "W")),
        *_HEAD_DECAY,
        TensorRule("norm.weight", ("V",)),
        TensorRule("out_proj.weight", ("D", "I")),
    ),
    derived=_DERIVED,
    mixin=SplitDeltaMixer,
    hooked=("conv1d",),
)
"""Gated delta rule with one projection for q, k and v together."""

JOINT_DELTA = Block(
    name="gated delta",
    tensors=(
        *_SEPARATE,
        TensorRule("a_proj.weight", ("H", "D")),
        TensorRule("g_proj.weight", ("I", "D")),
        *_HEAD_DECAY,
        TensorRule("o_norm.weight", ("V",)),
        TensorRule("o_proj.weight", ("D", "I")),
    ),
    derived=_DERIVED,
    mixin=JointDeltaMixer,
    hooked=("conv1d",),
    joined=_CONVOLUTIONS,
)
"""Gated delta rule with a projection and, in files, a convolution for each stream."""

CHANNEL_DELTA = Block(
    name="channel gated delta",
    tensors=(
        *_SEPARATE,
        TensorRule("A_log", ("1", "1", "H", "1"), when="broadcast_decay_rate"),
        TensorRule("A_log", ("H",), when="flat_decay_rate"),
        TensorRule("dt_bias", ("Q",)),
        TensorRule("f_a_proj.weight", ("V", "D")),
        TensorRule("f_b_proj.weight", ("Q", "V")),
        TensorRule("g_a_proj.weight", ("V", "D")),
        TensorRule("g_b_proj.weight", ("I", "V")),
        TensorRule("o_norm.weight", ("V",)),
        TensorRule("o_proj.weight", ("D", "I")),
    ),
    derived=_DERIVED,
    mixin=ChannelDeltaMixer,
    hooked=("conv1d",),
    joined=_CONVOLUTIONS,
)
"""Delta rule with one decay per key channel and low-rank gates."""

FULL_GATE_CHANNEL_DELTA = Block(
    name="channel gated delta, full gates",
    tensors=(
        *_SEPARATE,
        TensorRule("A_log", ("H",)),
        TensorRule("dt_bias", ("Q",)),
        TensorRule("f_proj.weight", ("Q", "D")),
        TensorRule("g_proj.weight", ("I", "D")),
        TensorRule("o_norm.weight", ("V",)),
        # The files call it so; the model calls it o_proj.
        TensorRule("dense.weight", ("D", "I")),
    ),
    derived=_DERIVED,
    mixin=FullGateChannelDeltaMixer,
    hooked=("conv1d",),
    joined=_CONVOLUTIONS,
)
"""Delta rule with one decay per key channel and full-rank gates."""
