"""Linear attention with fixed decays, which its mixer computes inline: the metaplastic forward
pass."""

from __future__ import annotations

from typing import Any

from einops import rearrange
from torch import Tensor, nn

from glazoo.families.calls import Recurrence
from glazoo.families.interception import current_packing
from glazoo.families.mixer import MetaplasticMixer
from glazoo.layers.parts import wide_dtype

__all__ = ["LightningMixer", "exact_decays"]


class LightningMixer(MetaplasticMixer):
    """Forward pass of linear attention with fixed decays whose scan carries an importance state.

        h_t = e^-s h_{t-1} + k_t v_t^T ;  J_t = e^-s J_{t-1} + b_t k_t^2 ;
        y_t = (h_t / (J_t + I_p))^T q_t

    with the head's slope s and b_t of `ImportanceGate` with beta = 1. Projections, norm and output
    gate are the source's own. States are float32, or float64 in a float64 model.
    """

    spec = "lightning"

    # What the source's class gives.
    num_attention_heads: int
    head_dim: int
    act_fn: nn.Module
    qkv_proj: nn.Module
    norm: nn.Module
    output_gate: nn.Module
    out_proj: nn.Module
    slope_rate: Tensor

    @staticmethod
    def sizes(mixer: Any) -> tuple[int, int, int, int]:
        """Return value heads, key heads, key and value channels."""
        heads, size = mixer.num_attention_heads, mixer.head_dim
        return heads, heads, size, size

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Any | None = None,
        *,
        past_key_values: Any | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Run the mixer.

        Args:
            hidden_states: [B, T, D].
            position_embeddings: not used; linear attention sees order through its decay.
            attention_mask: [B, T], 0 at padding, or None.
            cache: the model's cache, or None.
            past_key_values: the same, as older versions call it.

        Returns:
            [B, T, D], and the memory after the last token, [B, H, K, V], which the model gives out
            as this layer's attention.
        """
        cache = past_key_values if cache is None else cache
        dtype, wide = hidden_states.dtype, wide_dtype(hidden_states)
        mixed = self.act_fn(self.qkv_proj(hidden_states))
        if attention_mask is not None:
            mixed = mixed * attention_mask[:, :, None].to(mixed.dtype)
        heads = self.num_attention_heads
        q, k, v = rearrange(mixed.to(wide), "b t (h qkv d) -> qkv b t h d", h=heads, qkv=3)
        recurrence = Recurrence(
            q,
            k,
            v,
            g=-self.slope_rate.to(wide).flatten(),
            beta=None,
            scale=1.0,
            initial=None if cache is None else cache.get_linear_cache(self.layer_idx),
            keep=True,
            cu_seqlens=None,
            finish=lambda output, state: (output.to(dtype), state),
        )
        y, state = self.scan(recurrence, hidden_states, attention_mask, current_packing())
        if cache is not None:
            cache.set_linear_cache(self.layer_idx, state)
        y = self.norm(rearrange(y, "b t h d -> b t (h d)"))
        gated = self.output_gate(hidden_states).sigmoid() * y
        memory = state[..., : self.head_dim]
        return self.out_proj(gated), memory


def exact_decays(mixer: Any) -> None:
    """Recompute the fixed decays of a mixer in the dtype that it has now."""
    decays = mixer.decay_factors(mixer.slope_rate)
    for name, value in zip(("query_decay", "key_decay", "diagonal_decay"), decays, strict=True):
        setattr(mixer, name, value)
