"""The published scan functions that mixers call, and how their arguments map onto operands.

A mixer is convertible if what it calls for its recurrence stands here. Adding a function is adding
an entry: the name by which mixers call it, the spec that it computes, and which of its parameters
is which operand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from glazoo.layers.parts import wide_dtype

__all__ = ["CALLS", "Call", "Recurrence", "known_calls"]


class Recurrence(NamedTuple):
    """The operands of one call, as `glazoo.attention` takes them, in the dtype of recurrences."""

    q: Tensor
    """Queries, [B, T, H, K]."""
    k: Tensor
    """Keys, [B, T, H, K]."""
    v: Tensor
    """Values, [B, T, HV, V]."""
    g: Tensor | None
    """Log decays, [B, T, HV], [B, T, HV, K] or [HV]; None without forgetting."""
    beta: Tensor | None
    """Write gate, [B, T, HV]; None where the recurrence has none."""
    scale: float
    """Factor of the queries."""
    initial: Tensor | None
    """State at the start, as `pack_state` lays it out."""
    keep: bool
    """Whether the caller wants the state after the last token."""
    cu_seqlens: Tensor | None
    """Bounds of packed sequences, [N + 1]."""
    finish: Callable[[Tensor, Tensor | None], Any]
    """Makes what the function returns from the output and the packed state."""


_Reader: TypeAlias = "Callable[[Call, Mapping[str, Any]], Recurrence]"


@dataclass(frozen=True, slots=True)
class Call:
    """One published scan function."""

    name: str
    """Name by which mixers call it, in the globals of their module."""
    spec: str
    """Name of the spec that it computes."""
    parameters: tuple[str, ...]
    """Its leading parameters, as far as mixers pass them by position."""
    read: _Reader
    """Return the operands of a call."""
    operands: Mapping[str, str] = field(default_factory=dict)
    """Operand to parameter, where the names differ."""
    unequal: Mapping[str, object] = field(default_factory=dict)
    """Attributes of mixers that act in some of their own paths only (a limit in prefill but not in
    decoding), each with the value at which they do nothing. Paths of a source can be compared with
    each other only there."""

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Recurrence:
        """Reads the operands of a call."""
        if len(args) > len(self.parameters):
            raise ValueError(
                f"{self.name} was called with {len(args)} arguments by position; known are "
                f"{', '.join(self.parameters)}"
            )
        return self.read(self, {**dict(zip(self.parameters, args, strict=False)), **kwargs})


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def _flag(found: Mapping[str, Any], *names: str) -> bool:
    return any(found.get(name) for name in names)


# What some versions of these functions can do inside, and no model's layer here asks for.
_UNKNOWN = {
    "gk", "gv", "reverse", "head_first", "normalize", "output_attentions",
    "return_intermediate_states", "cp_context",
}  # fmt: skip


def _tokens(call: Call, found: Mapping[str, Any]) -> Recurrence:
    """Read a function of whole sequences [B, T, H, D], with log decays and an activated write
    gate."""
    for name in found.keys() & _UNKNOWN:
        asked = found[name] is not None and found[name] is not False
        if asked and name not in call.operands.values():
            raise ValueError(
                f"{call.name} was called with {name}, which a converted mixer does not compute"
            )
    operands = ("q", "k", "v", "g", "beta")
    given: list[Any] = [found.get(call.operands.get(name, name)) for name in operands]
    q, k, v, g, beta = given
    dtype, wide = q.dtype, wide_dtype(q)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    if _flag(found, "use_qk_l2norm_in_kernel"):
        q, k = _unit(q), _unit(k)
    if g is not None and _flag(found, "use_gate_in_kernel"):
        g = _log_decay(found, g.to(wide))
    if (fixed := found.get("g_gamma")) is not None:
        fixed = fixed.to(wide).expand(*v.shape[:3])
        g = fixed if g is None else fixed + g
    if beta is not None and _flag(found, "use_beta_sigmoid_in_kernel"):
        beta = beta.to(wide).sigmoid() * (2 if _flag(found, "allow_neg_eigval") else 1)
    scale = found.get("scale")

    def finish(output: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return output.to(dtype), state

    return Recurrence(
        q,
        k,
        v,
        None if g is None else g.to(wide),
        None if beta is None else beta.to(wide),
        k.shape[-1] ** -0.5 if scale is None else float(scale),
        found.get("initial_state"),
        _flag(found, "output_final_state"),
        found.get("cu_seqlens"),
        finish,
    )


def _log_decay(found: Mapping[str, Any], x: Tensor) -> Tensor:
    """Return the log decays that a function makes of its argument itself: one per head, or one per
    head and key channel."""
    rate: Tensor | None = found.get("A_log")
    bias: Tensor | None = found.get("dt_bias")
    bound: float | None = found.get("lower_bound")
    if bias is not None:
        x = x + bias.to(x.dtype).view(x.shape[2:])
    if rate is not None:
        rate = rate.to(x.dtype).exp().view(-1, *[1] * (x.dim() - 3))
    if bound is not None:
        return bound * torch.sigmoid(x if rate is None else rate * x)
    if rate is None:
        raise ValueError("use_gate_in_kernel needs A_log or lower_bound")
    return -rate * F.softplus(x)


def _step_size(found: Mapping[str, Any], step: Tensor, bias: Tensor | None) -> Tensor:
    # In the dtype of the call, as the functions do it.
    if bias is not None:
        step = step + bias.to(step.dtype)
    if _flag(found, "dt_softplus"):
        step = F.softplus(step)
    limit = found.get("dt_limit")
    # Not every function has the limit: a step of decoding goes unlimited where its source's does.
    return step if limit is None else step.clamp(*limit)


def _ssd(call: Call, found: Mapping[str, Any]) -> Recurrence:
    """Read a Mamba2 scan of whole sequences: x [B, T, HV, V], dt [B, T, HV], B, C [B, T, H, K]."""
    x = found[call.operands.get("x", "x")]
    wide = wide_dtype(x)
    step = _step_size(found, found["dt"], found.get("dt_bias")).to(wide)
    keep = _flag(found, "return_final_states")
    skip, gate = found.get("D"), found.get("z")
    values = x.to(wide)

    def finish(output: Tensor, state: Tensor | None) -> Any:
        output = _skipped(output, values, skip, gate)
        return (output, state) if keep else output

    return Recurrence(
        found["C"].to(wide),
        found["B"].to(wide),
        values,
        found["A"].to(wide) * step,
        step,
        1.0,
        found.get("initial_states"),
        keep,
        found.get("cu_seqlens"),
        finish,
    )


def _ssd_step(call: Call, found: Mapping[str, Any]) -> Recurrence:
    """Read one Mamba2 step: the state is replaced in place, x and dt are [B, HV, V], B and C
    [B, H, K], and what belongs to a head is repeated over its channels."""
    x, state = found[call.operands.get("x", "x")], found["state"]
    wide, bias, skip = wide_dtype(x), found.get("dt_bias"), found.get("D")
    # Methods: indexing takes three times as long, and a token is little else.
    bias = None if bias is None else bias.select(-1, 0)
    step = _step_size(found, found["dt"].select(-1, 0), bias).to(wide).unsqueeze(1)
    values = x.to(wide).unsqueeze(1)
    gate = found.get("z")

    def finish(output: Tensor, new: Tensor | None) -> Tensor:
        assert new is not None
        state.copy_(new)
        output = _skipped(output, values, skip, None if gate is None else gate.unsqueeze(1))
        return output.squeeze(1).to(x.dtype)

    return Recurrence(
        found["C"].to(wide).unsqueeze(1),
        found["B"].to(wide).unsqueeze(1),
        values,
        found["A"].select(2, 0).select(1, 0).to(wide) * step,
        step,
        1.0,
        state,
        True,
        None,
        finish,
    )


def _skipped(output: Tensor, x: Tensor, skip: Tensor | None, gate: Tensor | None) -> Tensor:
    if skip is not None:
        # [HV] or [HV, V].
        output = output + skip.to(output.dtype).view(skip.shape[0], -1) * x
    return output if gate is None else output * F.silu(gate.to(output.dtype))


_PAIR, _FORMS = "chunk recurrent", "chunk fused_chunk fused_recurrent"
# Spec, reader, name, its forms, parameters.
_ROWS: tuple[tuple[str, _Reader, str, str, str], ...] = (
    # transformers
    ("mamba2", _ssd, "mamba2_chunk_scan", "", "hidden_states dt A B C chunk_size"),
    ("mamba2", _ssd_step, "mamba2_selective_state_update", "", "state hidden_states dt A B C D"),
    ("gated_deltanet", _tokens, "torch_*_gated_delta_rule", _PAIR, "query key value g beta"),
    ("kda", _tokens, "*_kimi_delta_attention", _PAIR, "query key value g beta"),
    # flash-linear-attention
    ("gla", _tokens, "*_gla", "chunk fused_chunk", "q k v g"),
    ("gla", _tokens, "*_gla", "fused_recurrent", "q k v gk"),
    ("simple_gla", _tokens, "*_simple_gla", f"{_FORMS} parallel", "q k v g"),
    ("retnet", _tokens, "*_retention", f"{_FORMS} parallel", "q k v"),
    ("deltanet", _tokens, "*_delta_rule", _FORMS, "q k v beta"),
    ("gated_deltanet", _tokens, "*_gated_delta_rule", "chunk", "q k v g beta"),
    ("gated_deltanet", _tokens, "*_gated_delta_rule", "fused_recurrent", "q k v g gk gv beta"),
    ("kda", _tokens, "*_kda", "chunk fused_recurrent", "q k v g beta"),
    # mamba_ssm, as flash-linear-attention calls it
    ("mamba2", _ssd, "mamba_chunk_scan_combined", "", "x dt A B C chunk_size"),
    ("mamba2", _ssd_step, "selective_state_update", "", "state x dt A B C D"),
)
_NAMED = {"q": "query", "k": "key", "v": "value", "g": "gk", "x": "hidden_states"}
_LIMIT = dict.fromkeys(("time_step_limit", "dt_limit"), (0.0, float("inf")))


def _calls() -> Iterator[Call]:
    for spec, read, name, forms, parameters in _ROWS:
        given = tuple(parameters.split())
        operands = {n: p for n, p in _NAMED.items() if n not in given and p in given}
        for form in forms.split() or [""]:
            unequal = {} if read is _tokens else _LIMIT
            yield Call(name.replace("*", form), spec, given, read, operands, unequal)


CALLS: Mapping[str, Call] = {call.name: call for call in _calls()}
"""Every known scan function by its name."""


def known_calls() -> str:
    """Return the names of all known scan functions as one text, for messages."""
    return ", ".join(CALLS)
