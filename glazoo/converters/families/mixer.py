"""What the metaplastic forward passes of all blocks share: masks, convolution, state in the cache,
and the scan itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from glazoo.api import attention
from glazoo.converters.gate import ImportanceGate
from glazoo.layers.plasticity import observed_precision
from glazoo.spec import Spec
from glazoo.state import State

__all__ = [
    "ConvolvedMixer",
    "MetaplasticMixer",
    "Observation",
    "masked",
    "pack_state",
    "refuse_packed",
    "unpack_state",
    "wide_dtype",
]


def pack_state(state: State) -> Float[Tensor, "N HV K W"]:
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


def unpack_state(packed: Float[Tensor, "N HV K W"], value: int, *, shared: bool) -> State:
    """Undoes `pack_state`; `shared` says that all value channels share one importance."""
    memory, importance = packed[..., :value], packed[..., value:]
    return State(memory, importance.squeeze(-1) if shared else importance)


def masked(x: Float[Tensor, "B T C"], mask: Tensor | None) -> Float[Tensor, "B T C"]:
    """Sets padded positions to zero."""
    return x if mask is None else (x * mask[:, :, None]).to(x.dtype)


def wide_dtype(x: Tensor) -> torch.dtype:
    """Gives the dtype of recurrences on a tensor: float64 stays, everything else is float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def refuse_packed(arguments: Mapping[str, Any]) -> None:
    """Refuses packed sequences, which the convolution would mix.

    Raises:
        ValueError: the arguments hold bounds of packed sequences.
    """
    if any(arguments.get(name) is not None for name in ("seq_idx", "cu_seq_lens_q")):
        raise ValueError(
            "packed sequences (seq_idx, cu_seq_lens_q) are not supported: pass a padded batch"
        )


def _full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Holds autocast off: importance adds up small numbers, and loses them in a narrow dtype."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


class Observation(NamedTuple):
    """What one call of a mixer's recurrence did."""

    layer: int
    g: Tensor
    """Log decays, [B, T, HV], [B, T, HV, K] or [HV]."""
    b: Tensor
    """Importance gate, [B, T, HV] or [B, T, HV, V]."""
    prior: Float[Tensor, " HV"]
    state: State
    """After the last token."""


class MetaplasticMixer(nn.Module):
    """Base of the mixers' metaplastic forms.

    A subclass gives `forward`. It is mixed into the source's class by `mixer.__class__ = ...`:
    every parameter, buffer and hook of the instance stays where it is.
    """

    metaplastic: ImportanceGate
    metaplastic_spec: Spec
    metaplastic_impl: str
    source_module: str
    observer: Callable[[Observation], None] | None = None
    """Called after every scan, for measurements."""

    # What the source's class gives.
    layer_idx: int

    def attached(self) -> None:
        """Called once, when the mixer has its gate and spec."""

    def _scan(
        self,
        q: Float[Tensor, "B T H K"],
        k: Float[Tensor, "B T H K"],
        v: Float[Tensor, "B T HV V"],
        *,
        hidden: Float[Tensor, "B T D"],
        write: Float[Tensor, "B T HV"],
        packed: Float[Tensor, "N HV K W"] | None,
        keep: bool,
        **operands: Any,
    ) -> tuple[Float[Tensor, "B T HV V"], Float[Tensor, "N HV K W"] | None]:
        """Runs the recurrence.

        Args:
            q: queries.
            k: keys.
            v: values.
            hidden: what the importance gate reads.
            write: the write gate beta, which the importance gate multiplies, or its precision.
            packed: state of the cache, or None.
            keep: whether to give the state after the last token.
            operands: further operands of `glazoo.attention`.

        Returns:
            The output and the packed state.
        """
        b, prior = self.metaplastic(hidden, observed_precision(self.metaplastic_spec, write, k))
        initial = None
        if packed is not None:
            initial = unpack_state(packed, v.shape[-1], shared=self.metaplastic.gate == "head")
        with _full_precision(v.device):
            out = attention(
                self.metaplastic_spec,
                q,
                k,
                v,
                b=b,
                prior=prior,
                initial_state=initial,
                output_final_state=keep or self.observer is not None,
                impl=self.metaplastic_impl,
                **operands,
            )
        state = out.final_state
        if self.observer is not None:
            assert state is not None
            self.observer(Observation(self.layer_idx, operands["g"], b, prior, state))
        return out.output, pack_state(state) if keep and state is not None else None


class ConvolvedMixer(MetaplasticMixer):
    """A mixer with a causal convolution behind its projections and a cache of linear attention
    layers."""

    conv1d: nn.Conv1d
    conv_kernel_size: int
    activation: str

    def _cached(self, cache: Any | None) -> Tensor | None:
        if cache is None:
            return None
        packed: Tensor | None = cache.get_recurrent_state(self.layer_idx)
        return packed

    def _convolve(
        self, mixed: Float[Tensor, "B T C"], cache: Any | None, **kwargs: Any
    ) -> Float[Tensor, "B T C"]:
        """Runs the source's own causal convolution and activation."""
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
