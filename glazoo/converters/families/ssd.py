"""Mixers of state space duality (Mamba2 and its relatives): tensors and the metaplastic forward
pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glazoo.converters.families.base import Block, TensorRule
from glazoo.converters.families.mixer import ConvolvedMixer, masked, refuse_packed, wide_dtype

__all__ = ["SCALED_SSD", "SSD", "SSDMixer", "ScaledSSDMixer"]


class SSDMixer(ConvolvedMixer):
    """Forward pass of a mixer whose scan carries an importance state.

        h_t = a_t h_{t-1} + B_t (dt_t x_t)^T ;  J_t = a_t J_{t-1} + b_t B_t^2 ;
        y_t = (h_t / (J_t + I_p))^T C_t + D x_t

    with a_t = exp(-exp(A_log) dt_t) and b_t of `ImportanceGate` with beta = dt. Projections,
    convolution, skip and gated norm are the source's own. States are float32, or float64 in a
    float64 model.
    """

    # What the source's class gives.
    num_heads: int
    head_dim: int
    ssm_state_size: int
    n_groups: int
    intermediate_size: int
    conv_dim: int
    time_step_limit: tuple[float, float]
    in_proj: nn.Module
    norm: nn.Module
    out_proj: nn.Module
    A_log: nn.Parameter
    D: nn.Parameter
    dt_bias: nn.Parameter

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
        batch, tokens, _ = hidden_states.shape
        dtype, wide = hidden_states.dtype, wide_dtype(hidden_states)
        packed = self._cached(cache_params)

        hidden_states = masked(hidden_states, attention_mask)
        z, mixed, step = self._project(hidden_states).split(
            [self.intermediate_size, self.conv_dim, self.num_heads], dim=-1
        )
        # The convolution's bias would write at padded positions: mask once more behind it, keys
        # included, so that padding adds neither memory nor importance.
        mixed = masked(self._convolve(mixed, cache_params, **kwargs), attention_mask)
        width = self.n_groups * self.ssm_state_size
        x, key, query = (
            t.to(wide) for t in mixed.split([self.intermediate_size, width, width], dim=-1)
        )
        x = x.reshape(batch, tokens, self.num_heads, self.head_dim)

        # In the model's dtype, as the source does it.
        step = F.softplus(step + self.dt_bias.to(step.dtype))
        if packed is None or tokens > 1:
            # The source limits the step everywhere but in single-token decoding; so does this.
            step = step.clamp(*self.time_step_limit)
        step = step.to(wide)

        y, packed = self._scan(
            query.reshape(batch, tokens, self.n_groups, self.ssm_state_size),
            key.reshape(batch, tokens, self.n_groups, self.ssm_state_size),
            x,
            hidden=hidden_states,
            write=step,
            packed=packed,
            keep=cache_params is not None,
            g=-torch.exp(self.A_log.to(wide)) * step,
            beta=step,
            scale=1.0,
        )
        if cache_params is not None:
            cache_params.update_recurrent_state(packed, self.layer_idx)
        y = self._norm((y + self.D.to(wide)[:, None] * x).flatten(2), z)
        result: Tensor = self.out_proj(y.to(dtype))
        return result

    def _project(self, hidden: Tensor) -> Tensor:
        projected: Tensor = self.in_proj(hidden)
        return projected

    def _norm(self, y: Tensor, z: Tensor) -> Tensor:
        normed: Tensor = self.norm(y, z)
        return normed


class ScaledSSDMixer(SSDMixer):
    """Forward pass of a mixer with fixed multipliers around its projection and an optional norm."""

    # What the source's class gives.
    ssm_in_multiplier: float
    mup_vector: Tensor
    mamba_rms_norm: bool

    def _project(self, hidden: Tensor) -> Tensor:
        projected: Tensor = self.in_proj(hidden * self.ssm_in_multiplier) * self.mup_vector
        return projected

    def _norm(self, y: Tensor, z: Tensor) -> Tensor:
        return super()._norm(y, z) if self.mamba_rms_norm else y * F.silu(z)


_TENSORS = (
    TensorRule("in_proj.weight", ("E", "D")),
    TensorRule("in_proj.bias", ("E",), when="input_bias"),
    TensorRule("conv1d.weight", ("C", "1", "W")),
    TensorRule("conv1d.bias", ("C",), when="convolution_bias"),
    TensorRule("dt_bias", ("H",)),
    TensorRule("A_log", ("H",)),
    TensorRule("D", ("H",)),
    TensorRule("norm.weight", ("I",), when="norm"),
    TensorRule("out_proj.weight", ("D", "I")),
    TensorRule("out_proj.bias", ("D",), when="output_bias"),
)
_DERIVED = {
    "I": (("H", "V"),),
    "C": (("H", "V"), ("2", "G", "K")),
    "E": (("2", "H", "V"), ("2", "G", "K"), ("H",)),
}
_UNEQUAL = {"time_step_limit": (0.0, float("inf"))}

SSD = Block(
    name="ssd",
    tensors=_TENSORS,
    derived=_DERIVED,
    mixin=SSDMixer,
    hooked=("conv1d",),
    unequal=_UNEQUAL,
)
"""Mamba2: one projection for everything, gated norm."""

SCALED_SSD = Block(
    name="scaled ssd",
    tensors=_TENSORS,
    derived=_DERIVED,
    mixin=ScaledSSDMixer,
    hooked=("conv1d",),
    unequal=_UNEQUAL,
)
"""Mamba2 with multipliers."""
