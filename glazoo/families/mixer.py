"""What the metaplastic forms of all mixers share: the scan, and its state in the cache."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from glazoo.api import attention
from glazoo.families.calls import Recurrence
from glazoo.families.interception import once, running, twin_methods
from glazoo.families.packing import Packed
from glazoo.layers.plasticity import ImportanceGate, Observation, write_sizes
from glazoo.spec import Spec
from glazoo.state import State

__all__ = [
    "InterceptedMixer",
    "MetaplasticMixer",
    "metaplastic_class",
    "pack_state",
    "twin_class",
    "unpack_state",
]


def pack_state(state: State) -> Float[Tensor, "N HV K W"]:
    """Packs both sides of a state into one tensor, [N, HV, K, V + n]: n is V with one importance
    per synapse, K for a matrix over keys, and 1 for a vector over keys or a number.

    Caches reorder, reset and move one recurrent tensor per layer; a second one they do not all know
    about. Of each sequence the memory of all heads comes first, then the importance: of one
    sequence both lie in memory as the loops take them.
    """
    assert state.importance is not None
    memory, importance = state.memory, state.importance
    count, heads, keys, _ = memory.shape
    if importance.dim() < memory.dim():
        importance = importance.expand(count, heads, keys)
    packed = torch.cat([memory.flatten(1), importance.flatten(1)], 1)
    return packed.view(count, heads, keys, -1)


def unpack_state(packed: Float[Tensor, "N HV K W"], value: int, spec: Spec) -> State:
    """Undoes `pack_state` for the state of a spec."""
    count, heads, keys, width = packed.shape
    cells = heads * keys * value
    memory, importance = packed.flatten(1).tensor_split((cells,), 1)
    memory = memory.view(count, heads, keys, value)
    if spec.posterior.precision == "full" or spec.importance_per_synapse:
        return State(memory, importance.view(count, heads, keys, width - value))
    importance = importance.view(count, heads, keys)
    return State(
        memory, importance[..., :1] if spec.posterior.precision == "isotropic" else importance
    )


def _packed_width(spec: Spec, key: int, value: int) -> int:
    """Return the channels of a packed state."""
    if spec.posterior.precision == "full":
        return value + key
    return value + (value if spec.importance_per_synapse else 1)


def _end_to_end(x: Tensor) -> Tensor:
    return rearrange(x, "b t ... -> 1 (b t) ...")


def _full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Holds autocast off: importance adds up small numbers, and loses them in a narrow dtype."""
    kind = device.type
    if not (_autocasts(kind) and torch.is_autocast_enabled(kind)):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


_autocasts = functools.cache(torch.amp.is_autocast_available)


class MetaplasticMixer(nn.Module):
    """Base of the mixers' metaplastic forms.

        J_t = a_t J_{t-1} + b_t k_t^2 ;   I_t = J_t + I_p

    with b_t and I_p of `ImportanceGate`, and the mean of the spec's recurrence. It is mixed into
    the source's class by `mixer.__class__ = ...`: every parameter, buffer and hook of the instance
    stays where it is. States are float32, or float64 in a float64 model.
    """

    metaplastic: ImportanceGate
    metaplastic_spec: Spec
    metaplastic_impl: str
    metaplastic_apart: bool
    """Whether the layers between the mixers keep packed sequences apart."""
    observer: Callable[[Observation], None] | None = None
    """Called after every scan, for measurements."""

    # What the source's class gives.
    layer_idx: int

    def scan(
        self,
        x: Recurrence,
        hidden: Float[Tensor, "B T D"],
        mask: Tensor | None,
        packed: Packed | None,
    ) -> Any:
        """Run the recurrence of one intercepted call.

        Args:
            x: its operands.
            hidden: what the importance gate reads.
            mask: [B, T], 0 at padding, or None.
            packed: bounds of packed sequences, if the model was given any.

        Returns:
            What the intercepted function returns.
        """
        if hidden.shape[:2] != x.v.shape[:2]:
            hidden = self._without_padding(x, hidden, mask)
            mask = None
        write = x.v.new_ones(x.v.shape[:3]) if x.beta is None else x.beta
        made = self.metaplastic(hidden, write, x.k, impl=self.metaplastic_impl)
        b, prior = made.pop("b"), made["prior"]
        if mask is not None and mask.dim() == 2 and mask.shape[1] >= b.shape[1]:
            # Some sources let keys stand at padding, and set values and decays to zero.
            b = b * mask[:, -b.shape[1] :].to(b.dtype).view(*b.shape[:2], *[1] * (b.dim() - 2))
        q, k, v, cu_seqlens = x.q, x.k, x.v, x.cu_seqlens
        gates = {"g": x.g, "beta": x.beta, "b": b}
        rows = v.shape[0]
        if packed is not None:
            if x.initial is not None:
                raise ValueError("packed sequences cannot continue a cache: pass no cache")
            cu_seqlens = packed.cu_seqlens
            q, k, v = (_end_to_end(t) for t in (q, k, v))
            # A fixed decay has no tokens.
            gates = {n: t if t is None or t.dim() < 3 else _end_to_end(t) for n, t in gates.items()}
        initial = None
        if x.initial is not None:
            if x.initial.shape[-1] != _packed_width(
                self.metaplastic_spec, k.shape[-1], v.shape[-1]
            ):
                raise ValueError(
                    "the state at the start is not a converted mixer's: its cache comes from "
                    "another model, or from before the conversion"
                )
            initial = unpack_state(x.initial, v.shape[-1], self.metaplastic_spec)
        with _full_precision(v.device):
            out = attention(
                self.metaplastic_spec,
                q,
                k,
                v,
                **{name: t for name, t in gates.items() if t is not None},
                **made,
                scale=x.scale,
                cu_seqlens=cu_seqlens,
                initial_state=initial,
                output_final_state=x.keep or self.observer is not None,
                impl=self.metaplastic_impl,
            )
        state = out.final_state
        if self.observer is not None:
            assert state is not None
            g = v.new_zeros(v.shape[2]) if x.g is None else x.g
            writes = write_sizes(x.k, x.v, x.beta)
            self.observer(Observation(self.layer_idx, g, b, prior, state, x.k, writes))
        output = out.output
        if packed is not None:
            output = rearrange(output, "1 (b t) ... -> b t ...", b=rows)
        return x.finish(output, pack_state(state) if x.keep and state is not None else None)

    def _without_padding(
        self, x: Recurrence, hidden: Float[Tensor, "B T D"], mask: Tensor | None
    ) -> Float[Tensor, "1 N D"]:
        """Takes the padding out, as the source has done before its scan."""
        if mask is not None:
            taken = hidden[mask[:, -hidden.shape[1] :].bool()][None]
            bounded = x.cu_seqlens is not None or hidden.shape[0] == 1
            if taken.shape[:2] == x.v.shape[:2] and bounded:
                return taken
        raise RuntimeError(
            f"{type(self).__name__} gave its scan {tuple(x.v.shape[:2])} tokens for "
            f"{tuple(hidden.shape[:2])} of its input, which are not those without padding in "
            "sequences of their own: the importance gate would not know which token is which"
        )


class InterceptedMixer(MetaplasticMixer):
    """A mixer whose own forward pass runs with its scan replaced."""

    taken: ClassVar[tuple[str, ...]]
    """What that pass takes by position, after its input. The compiler follows no `inspect`."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the source's forward pass, with its arguments."""
        given = {**dict(zip(self.taken, args, strict=False)), **kwargs}
        with running(self, hidden_states, given.get("attention_mask")):
            return super().forward(hidden_states, *args, **kwargs)


@once
def twin_class(base: type[nn.Module]) -> type[nn.Module]:
    """Return a mixer's class with every scan that it calls replaced."""
    return type(base.__name__, (base,), {"__module__": __name__, **twin_methods(base)})


@once
def metaplastic_class(base: type[nn.Module], mixin: type[nn.Module]) -> type[nn.Module]:
    """Return the metaplastic form of a mixer's class.

    There is one only of each: pickles and `isinstance` rely on it.
    """
    name = f"Metaplastic{base.__name__}"
    inner = twin_class(base) if issubclass(mixin, InterceptedMixer) else base
    return type(
        name,
        (mixin, inner),
        {
            "__module__": "glazoo.models.metaplastic",
            "__qualname__": name,
            "__doc__": f"{base.__name__} converted to metaplastic form.",
            "taken": tuple(inspect.signature(inner.forward).parameters)[2:],
        },
    )
