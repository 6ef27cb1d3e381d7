"""Linear attention with fixed decays: tensors and the metaplastic forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glazoo.converters.families.base import Block, TensorRule
from glazoo.converters.families.mixer import MetaplasticMixer, masked, refuse_packed, wide_dtype

__all__ = ["LIGHTNING", "LightningMixer"]


class LightningMixer(MetaplasticMixer):
    """Forward pass of linear attention with fixed decays whose scan carries an importance state.

        h_t = e^-s h_{t-1} + k_t v_t^T ;  J_t = e^-s J_{t-1} + b_t k_t^2 ;
        y_t = (h_t / (J_t + I_p))^T q_t

    with the head's slope s and b_t of `ImportanceGate` with beta = 1. Projections, norm and output
    gate are the source's own. States are float32, or float64 in a float64 model.
    """

    # What the source's class gives.
    num_attention_heads: int
    head_dim: int
    act_fn: nn.Module
    qkv_proj: nn.Module
    norm: nn.Module
    output_gate: nn.Module
    out_proj: nn.Module
    slope_rate: Tensor

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Runs the mixer.

        Args:
            hidden_states: [B, T, D].
            position_embeddings: not used; linear attention sees order through its decay.
            attention_mask: [B, T], 0 at padding, or None.
            past_key_values: the model's cache, or None.

        Returns:
            [B, T, D], and the packed state or None.

        Raises:
            ValueError: packed sequences are passed.
        """
        refuse_packed(kwargs)
        dtype, wide = hidden_states.dtype, wide_dtype(hidden_states)
        heads = self.num_attention_heads
        mixed = masked(self.act_fn(self.qkv_proj(hidden_states)), attention_mask).to(wide)
        # Interleaved by head.
        q, k, v = mixed.unflatten(-1, (heads, 3, self.head_dim)).unbind(-2)
        packed = None
        if past_key_values is not None:
            packed = past_key_values.get_linear_cache(self.layer_idx)
        y, packed = self._scan(
            q,
            k,
            v,
            hidden=hidden_states,
            write=torch.ones_like(q[..., 0]),
            packed=packed,
            keep=past_key_values is not None,
            g=-self.slope_rate.to(wide).flatten(),
        )
        if past_key_values is not None:
            past_key_values.set_linear_cache(self.layer_idx, packed)
        gated = self.output_gate(hidden_states).sigmoid() * self.norm(y.to(dtype).flatten(2))
        return self.out_proj(gated), packed


def _exact_decays(mixer: Any) -> None:
    decays = mixer.decay_factors(mixer.slope_rate)
    for name, value in zip(("query_decay", "key_decay", "diagonal_decay"), decays, strict=True):
        setattr(mixer, name, value)


LIGHTNING = Block(
    name="lightning",
    tensors=(
        TensorRule("qkv_proj.weight", ("E", "D")),
        TensorRule("output_gate.weight", ("I", "D")),
        TensorRule("norm.weight", ("I",)),
        TensorRule("out_proj.weight", ("D", "I")),
        # Fixed numbers, which files hold all the same.
        TensorRule("slope_rate", ("H", "1", "1")),
        TensorRule("query_decay", ("H", "S", "1")),
        TensorRule("key_decay", ("H", "S", "1")),
        TensorRule("diagonal_decay", ("1", "H", "S", "S")),
    ),
    derived={"I": (("H", "V"),), "E": (("3", "H", "V"),)},
    mixin=LightningMixer,
    hooked=(),
    exact=_exact_decays,
)
"""Linear attention with one fixed decay per head."""
