"""Mixers of state space duality (Mamba2 and its relatives): tensors and the metaplastic forward
pass."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glazoo.api import attention
from glazoo.converters.families.base import Block, TensorRule
from glazoo.converters.gate import ImportanceGate
from glazoo.spec import Spec
from glazoo.state import State

__all__ = ["SSD", "SSDMixer", "pack_state", "unpack_state"]


def pack_state(state: State) -> Tensor:
    """Packs both sides of a state into one tensor, [N, HV, K, 2 V] or, with one importance per key,
    [N, HV, K, V + 1].

    Caches reorder, reset and move one recurrent tensor per layer; a second one they do not all know
    about.
    """
    assert state.importance is not None
    importance = state.importance
    if importance.dim() < state.memory.dim():
        importance = importance.unsqueeze(-1)
    return torch.cat([state.memory, importance], dim=-1)


def unpack_state(packed: Tensor, value: int) -> State:
    """Undoes `pack_state`."""
    memory, importance = packed[..., :value], packed[..., value:]
    return State(memory, importance.squeeze(-1) if importance.shape[-1] != value else importance)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else (x * mask[:, :, None]).to(x.dtype)


def _full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Holds autocast off: importance adds up small numbers, and loses them in a narrow dtype."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


class SSDMixer(nn.Module):
    """Forward pass of a mixer whose scan carries an importance state.

        h_t = a_t h_{t-1} + B_t (dt_t x_t)^T ;  J_t = a_t J_{t-1} + b_t B_t^2 ;
        y_t = (h_t / (J_t + I_p))^T C_t + D x_t

    with a_t = exp(-exp(A_log) dt_t) and b_t of `ImportanceGate` with beta = dt. Projections,
    convolution, skip and gated norm are the source's own. States are float32, or float64 in a
    float64 model.

    It is mixed into the source's class by `mixer.__class__ = ...`: every parameter, buffer and hook
    of the instance stays where it is.
    """

    metaplastic: ImportanceGate
    metaplastic_spec: Spec
    metaplastic_impl: str
    source_module: str

    # What the source's class gives.
    num_heads: int
    head_dim: int
    ssm_state_size: int
    n_groups: int
    intermediate_size: int
    conv_dim: int
    conv_kernel_size: int
    layer_idx: int
    activation: str
    time_step_limit: tuple[float, float]
    in_proj: nn.Module
    conv1d: nn.Conv1d
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
        if any(kwargs.get(name) is not None for name in ("seq_idx", "cu_seq_lens_q")):
            raise ValueError(
                "packed sequences (seq_idx, cu_seq_lens_q) are not supported: pass a padded batch"
            )
        batch, tokens, _ = hidden_states.shape
        dtype = hidden_states.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        packed = None
        if cache_params is not None:
            packed = cache_params.get_recurrent_state(self.layer_idx)

        hidden_states = _masked(hidden_states, attention_mask)
        z, mixed, step = self.in_proj(hidden_states).split(
            [self.intermediate_size, self.conv_dim, self.num_heads], dim=-1
        )
        # The convolution's bias would write at padded positions: mask once more behind it, keys
        # included, so that padding adds neither memory nor importance.
        mixed = _masked(self._convolve(mixed, cache_params, **kwargs), attention_mask)
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

        b, prior = self.metaplastic(hidden_states, step)
        with _full_precision(x.device):
            out = attention(
                self.metaplastic_spec,
                query.reshape(batch, tokens, self.n_groups, self.ssm_state_size),
                key.reshape(batch, tokens, self.n_groups, self.ssm_state_size),
                x,
                g=-torch.exp(self.A_log.to(wide)) * step,
                beta=step,
                b=b,
                prior=prior,
                scale=1.0,
                initial_state=None if packed is None else unpack_state(packed, self.head_dim),
                output_final_state=cache_params is not None,
                impl=self.metaplastic_impl,
            )
        if cache_params is not None:
            assert out.final_state is not None
            cache_params.update_recurrent_state(pack_state(out.final_state), self.layer_idx)
        y = out.output + self.D.to(wide)[:, None] * x
        y = self.norm(y.flatten(2), z)
        result: Tensor = self.out_proj(y.to(dtype))
        return result

    def _convolve(self, mixed: Tensor, cache: Any | None, **kwargs: Any) -> Tensor:
        """Runs the source's own causal convolution and activation, [B, T, C]."""
        # By name in the source's module: that is where it binds a fused kernel, if one is
        # installed.
        source = sys.modules[self.source_module]
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        tokens = mixed.shape[1]
        mixed = mixed.transpose(1, 2)
        state = None if cache is None else cache.get_conv_state(self.layer_idx)
        if state is not None and tokens == 1 and not cache.is_recording_past(self.layer_idx):  # type: ignore[union-attr]
            mixed = source.causal_conv1d_update(
                mixed, state, weight, bias, activation=self.activation
            )
        else:
            if cache is not None:
                mixed = cache.update_conv_state(
                    mixed, self.layer_idx, conv_kernel_size=self.conv_kernel_size
                )
            mixed = source.causal_conv1d_fn(
                mixed, weight, bias, activation=self.activation, **kwargs
            )
            mixed = mixed[:, :, -tokens:]
        return mixed.transpose(1, 2)


SSD = Block(
    name="ssd",
    tensors=(
        TensorRule("in_proj.weight", ("E", "D")),
        TensorRule("in_proj.bias", ("E",), when="projection_bias"),
        TensorRule("conv1d.weight", ("C", "1", "K")),
        TensorRule("conv1d.bias", ("C",), when="convolution_bias"),
        TensorRule("dt_bias", ("H",)),
        TensorRule("A_log", ("H",)),
        TensorRule("D", ("H",)),
        TensorRule("norm.weight", ("I",)),
        TensorRule("out_proj.weight", ("D", "I")),
        TensorRule("out_proj.bias", ("D",), when="projection_bias"),
    ),
    derived={
        "I": (("H", "P"),),
        "C": (("H", "P"), ("2", "G", "N")),
        "E": (("2", "H", "P"), ("2", "G", "N"), ("H",)),
    },
    mixin=SSDMixer,
    hooked=("conv1d",),
)
