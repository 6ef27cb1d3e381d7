"""What the mixers of other packages call their tensors, and how they lay them out.

Every map is data: one entry per tensor of theirs. A mixer's options that change what it computes
are read by its `options` function into changes of the spec; an option that no layer of ours has is
refused there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from glazoo.converters.errors import ConversionError

__all__ = ["KINDS", "Entry", "KeyMap", "Options"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of theirs, as ours stacked along their first axis."""

    theirs: str
    """Key in their mixer's state dict."""
    ours: tuple[str, ...]
    """Keys in our layer's state dict, in the order of their rows."""
    groups: str | None = None
    """Stacked within every group of rows instead of as wholes: "key_heads" interleaves the rows per
    key head."""
    shape: tuple[int, ...] | None = None
    """Their shape where it is not ours; -1 as in `reshape`."""
    beside: str | None = None
    """Key of ours without which theirs has another name, that of the next entry of the same
    tensor."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to build our layer for one of their mixers."""

    sizes: dict[str, int]
    """hidden_size, num_heads, num_key_heads, head_k_dim, head_v_dim."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Values of the spec that differ, by dotted path."""


@dataclass(frozen=True, slots=True)
class KeyMap:
    """The map of one mixer class."""

    kind: str
    """Name of the map: package and family."""
    spec: str
    """Name of our spec."""
    package: str
    """Start of the module path of their class."""
    cls: str
    """Name of their class."""
    entries: tuple[Entry, ...]
    """One entry per tensor. Tensors of entries that neither side has are left out; all others must
    be there."""
    options: Callable[[Any], Options]
    """Reads a mixer's attributes."""
    optional: tuple[str, ...] = ()
    """Keys of theirs that an option leaves out."""


def _entries(renamed: Mapping[str, str | tuple[str, ...]]) -> tuple[Entry, ...]:
    return tuple(
        Entry(theirs, (ours,) if isinstance(ours, str) else ours)
        for theirs, ours in renamed.items()
    )


def _need(mixer: Any, name: str, accepted: Any, default: Any = None) -> None:
    """Refuses an option that our layer does not have."""
    value = getattr(mixer, name, default)
    value = tuple(value) if isinstance(value, list) else value
    if value != accepted:
        raise ConversionError(
            f"{type(mixer).__name__}.{name}: got {value!r}, accepted is {accepted!r}"
        )


def _local(mixer: Any, size: str = "conv_size", bias: str = "conv_bias") -> dict[str, Any]:
    return {
        "layer.local.size": getattr(mixer, size),
        "layer.local.bias": bool(getattr(mixer, bias, False)),
    }


def _short_convolution(m: Any, *, q: str, v: str) -> dict[str, Any]:
    """Gives the changes for convolutions on q, k and v, or for none, and for the activations after
    them: `q` of q and k, and `v`."""
    used = bool(m.use_short_conv)
    shared = q if used and q == v else "none"
    changes: dict[str, Any] = {"layer.local.kind": "convolution" if used else "none"}
    changes["layer.local.activation"] = shared if used else "silu"
    for stream, activation in (("q", q), ("k", q), ("v", v)):
        changes[f"layer.{stream}.local"] = used
        changes[f"layer.{stream}.activation"] = "none" if activation == shared else activation
    return changes | (_local(m) if used else {})


def _named(mixer: Any, attribute: str, known: Mapping[str, str]) -> str:
    """Gives our name of a function that a mixer holds: itself, its class, or its name."""
    value = getattr(mixer, attribute)
    name = getattr(value, "__name__", type(value).__name__)
    if value is None or isinstance(value, str):
        name = str(value)
    if name not in known:
        raise ConversionError(
            f"{type(mixer).__name__}.{attribute}: got {name!r}, accepted are {', '.join(known)}"
        )
    return known[name]


_ACTIVATIONS = {
    "None": "none",
    "identity": "none",
    "relu": "relu",
    "ReLU": "relu",
    "elu": "elu",
    "silu": "silu",
    "swish": "silu",
    "SiLU": "silu",
}


def _eps(module: Any) -> float:
    for name in ("eps", "variance_epsilon"):
        if hasattr(module, name):
            return float(getattr(module, name))
    raise ConversionError(f"{type(module).__name__}: it has neither eps nor variance_epsilon")


def _mamba2(m: Any) -> Options:
    _need(m, "activation", "silu")
    _need(m, "time_step_limit", (0.0, math.inf), (0.0, math.inf))
    _need(m, "rms_norm", True, True)
    sizes = {
        "hidden_size": m.hidden_size,
        "num_heads": m.num_heads,
        "num_key_heads": m.n_groups,
        "head_k_dim": m.ssm_state_size,
        "head_v_dim": m.head_dim,
    }
    changes = _local(m, "conv_kernel_size", "use_conv_bias")
    return Options(sizes, changes | {"layer.output.eps": m.layer_norm_epsilon})


_MAMBA2 = (
    Entry(
        "in_proj.weight",
        ("g_proj.weight", "v_proj.weight", "k_proj.weight", "q_proj.weight", "decay.proj.weight"),
    ),
    *_entries(
        {
            "conv1d.weight": ("v_conv.weight", "k_conv.weight", "q_conv.weight"),
            "conv1d.bias": ("v_conv.bias", "k_conv.bias", "q_conv.bias"),
            "dt_bias": "decay.dt_bias",
            "A_log": "decay.A_log",
            "D": "skip",
            "norm.weight": "norm.weight",
            "out_proj.weight": "o_proj.weight",
        }
    ),
)


def _qwen3(m: Any) -> Options:
    _need(m, "activation", "silu")
    sizes = {
        "hidden_size": m.hidden_size,
        "num_heads": m.num_v_heads,
        "num_key_heads": m.num_k_heads,
        "head_k_dim": m.head_k_dim,
        "head_v_dim": m.head_v_dim,
    }
    changes = {
        "layer.local.size": m.conv_kernel_size,
        "layer.output.eps": m.layer_norm_epsilon,
    }
    return Options(sizes, changes)


_QWEN3 = _entries(
    {
        "conv1d.weight": ("q_conv.weight", "k_conv.weight", "v_conv.weight"),
        "dt_bias": "decay.dt_bias",
        "A_log": "decay.A_log",
        "norm.weight": "norm.weight",
        "out_proj.weight": "o_proj.weight",
    }
)


def _kimi(m: Any) -> Options:
    _need(m, "activation", "silu")
    sizes = {
        "hidden_size": m.hidden_size,
        "num_heads": m.num_heads,
        "num_key_heads": m.num_heads,
        "head_k_dim": m.head_dim,
        "head_v_dim": m.head_dim,
    }
    changes = {
        "layer.local.size": m.conv_kernel_size,
        "layer.output.eps": m.layer_norm_epsilon,
        "layer.output.gate_bias": False,
    }
    return Options(sizes, changes)


_QKV = {f"{s}_proj.weight": f"{s}_proj.weight" for s in "qkvo"}
_CONV = {f"{s}_conv1d.weight": f"{s}_conv.weight" for s in "qkv"} | {
    f"{s}_conv1d.bias": f"{s}_conv.bias" for s in "qkv"
}
_OWN_CONV = tuple(_CONV)


def _grouped_query(m: Any) -> dict[str, int]:
    return {
        "hidden_size": m.hidden_size,
        "num_heads": m.num_heads,
        "num_key_heads": m.num_kv_heads,
        "head_k_dim": m.head_k_dim,
        "head_v_dim": m.head_v_dim,
    }


def _grouped_value(m: Any) -> dict[str, int]:
    return {
        "hidden_size": m.hidden_size,
        "num_heads": getattr(m, "num_v_heads", m.num_heads),
        "num_key_heads": m.num_heads,
        "head_k_dim": m.head_k_dim,
        "head_v_dim": m.head_v_dim,
    }


def _norm_and_gate(m: Any) -> dict[str, Any]:
    """Gives the changes for an output norm that is one module with the gate, or is not."""
    fused = bool(m.fuse_norm_and_gate)
    gate = "none"
    if m.use_output_gate:
        gate = "silu" if fused else _named(m, "gate_fn", {"swish": "silu", "silu": "silu"})
    norm = m.g_norm_swish_gate if fused else m.g_norm
    return {"layer.output.gate": gate, "layer.output.eps": _eps(norm)}


def _fla_mamba2(m: Any) -> Options:
    _need(m, "activation", _either(m, "activation", "silu", "swish"))
    limit = "dt_limit" if hasattr(m, "dt_limit") else "time_step_limit"
    _need(m, limit, (0.0, math.inf), (0.0, math.inf))
    _need(m, "rmsnorm", True, True)
    _need(m, "norm_before_gate", False, False)
    _need(m, "D_has_hdim", False, False)
    _need(m, "use_bias", False, False)
    eps = m.norm_eps if hasattr(m, "norm_eps") else m.layer_norm_epsilon
    sizes = {
        "hidden_size": m.hidden_size,
        "num_heads": m.num_heads,
        "num_key_heads": m.n_groups,
        "head_k_dim": m.ssm_state_size,
        "head_v_dim": m.head_dim,
    }
    changes = _local(m, "conv_kernel_size", "use_conv_bias")
    return Options(sizes, changes | {"layer.output.eps": float(eps)})


def _either(mixer: Any, name: str, *accepted: Any) -> Any:
    """Gives an option's value if it is one of several that mean the same, else the first."""
    value = getattr(mixer, name)
    return value if value in accepted else accepted[0]


def _fla_gla(m: Any) -> Options:
    feature = _named(m, "feature_map_fn", _FEATURES)
    changes = {
        "decay.divisor": float(m.gate_logit_normalizer),
        "decay.rank": m.gk_proj[0].out_features,
        "decay.minimum": None if m.clamp_min is None else float(m.clamp_min),
    }
    changes |= _short_convolution(m, q=feature, v="none") | {"layer.local.activation": "silu"}
    return Options(_grouped_query(m), changes | _norm_and_gate(m))


def _fla_retnet(m: Any) -> Options:
    _need(m, "use_short_conv", False)
    feature = _named(m, "feature_map_fn", _FEATURES)
    changes = {"layer.q.activation": feature, "layer.k.activation": feature}
    return Options(_grouped_query(m), changes | _norm_and_gate(m))


_FEATURES = {name: _ACTIVATIONS[name] for name in ("None", "relu", "silu", "swish")}


def _fla_linear_attn(m: Any) -> Options:
    known = {
        "elementwise_product": ("hadamard", "none"),
        "HadamardFeatureMap": ("hadamard", "none"),
        "elu": ("none", "elu"),
        "elu_p1": ("none", "elu"),
        "relu": ("none", "relu"),
        "ReLU": ("none", "relu"),
        "identity": ("none", "none"),
        "Identity": ("none", "none"),
    }
    names = {name: name for name in known}
    _need(m, "norm_q", False, False)
    _need(m, "norm_k", False, False)
    changes: dict[str, Any] = {"layer.output.eps": _eps(m.norm)}
    for stream in "qk":
        kind = known[_named(m, f"feature_map_{stream}", names)]
        changes[f"layer.{stream}.feature_map"], changes[f"layer.{stream}.activation"] = kind
    if m.do_feature_map_norm:
        changes |= {"read.normalizer": "sum", "read.eps": 1e-10}
    return Options(_grouped_query(m), changes)


def _fla_delta_net(m: Any) -> Options:
    activation = _named(m, "qk_activation", _ACTIVATIONS)
    changes = _short_convolution(m, q=activation, v="silu")
    if m.qk_norm != "l2":
        # Sums of absolute values are sums where nothing is negative.
        if m.qk_norm != "sum" or activation not in ("relu", "elu"):
            raise ConversionError(
                f"{type(m).__name__}.qk_norm: got {m.qk_norm!r} with qk_activation = "
                f"{m.qk_activation!r}, accepted are 'l2', and 'sum' with 'relu' or 'elu'"
            )
        changes |= {"layer.q.norm": "sum", "layer.k.norm": "sum"}
    if not m.use_beta:
        _need(m, "allow_neg_eigval", False)
        changes |= {"write.shape": "none"}
    changes |= {
        "write.factor": 2.0 if m.allow_neg_eigval else 1.0,
        "layer.output.gate": "silu" if m.use_gate else "none",
        "layer.output.eps": _eps(m.o_norm),
    }
    return Options(_grouped_value(m), changes)


def _fla_gated_deltanet(m: Any) -> Options:
    gate = "none"
    if m.use_gate:
        # Named by the fused norm, and swish where it has no choice.
        norm = m.o_norm if hasattr(m.o_norm, "activation") else _Swish()
        gate = _named(norm, "activation", {"swish": "silu", "silu": "silu", "sigmoid": "sigmoid"})
    changes = {
        "write.factor": 2.0 if m.allow_neg_eigval else 1.0,
        "layer.output.gate": gate,
        "layer.output.eps": _eps(m.o_norm),
    }
    return Options(_grouped_value(m), changes | _short_convolution(m, q="silu", v="silu"))


class _Swish:
    activation = "swish"


def _fla_kda(m: Any) -> Options:
    sizes = _grouped_value(m)
    changes: dict[str, Any] = {
        "write.factor": 2.0 if m.allow_neg_eigval else 1.0,
        "layer.output.eps": _eps(m.o_norm),
    }
    bound = getattr(m, "lower_bound", None)
    if bound is not None:
        changes |= {"decay.parameterization": "bounded_sigmoid", "decay.bound": float(bound)}
    return Options(sizes, changes | _short_convolution(m, q="silu", v="silu"))


def _fla_hgrn2(m: Any) -> Options:
    _need(m, "use_short_conv", False)
    # One function of norm and projection takes the norm's weight, and an epsilon of its own.
    changes: dict[str, Any] = {"layer.output.eps": 1e-5}
    if not getattr(m, "use_lower_bound", True):
        changes |= {"decay.parameterization": "log_sigmoid", "decay.divisor": 1.0}
    sizes = {
        "hidden_size": m.hidden_size,
        "num_heads": m.num_heads,
        "num_key_heads": m.num_heads,
        "head_k_dim": m.head_f_dim,
        "head_v_dim": m.head_i_dim,
    }
    return Options(sizes, changes)


# One module with the gate, or one of its own: with the gate, or without.
_OUTPUT_NORM = (
    Entry("g_norm_swish_gate.weight", ("norm.weight",), beside="g_proj.weight"),
    Entry("g_norm.weight", ("norm.weight",)),
)
_OWN_NORM = ("g_proj.weight", *(e.theirs for e in _OUTPUT_NORM))
_HADAMARD = {
    f"feature_map_{s}.layer{i}.{part}": f"{s}_map.{side}.{part}"
    for s in "qk"
    for i, side in ((1, "left"), (2, "right"))
    for part in ("weight", "bias")
}

_ALL = (
    KeyMap(
        "transformers.mamba2",
        "mamba2",
        "transformers.models.mamba2",
        "Mamba2Mixer",
        _MAMBA2,
        _mamba2,
        optional=("conv1d.bias",),
    ),
    KeyMap(
        "transformers.qwen3_next",
        "gated_deltanet",
        "transformers.models.qwen3_next",
        "Qwen3NextGatedDeltaNet",
        (
            Entry(
                "in_proj_qkvz.weight",
                ("q_proj.weight", "k_proj.weight", "v_proj.weight", "g_proj.weight"),
                groups="key_heads",
            ),
            Entry(
                "in_proj_ba.weight",
                ("write.proj.weight", "decay.proj.weight"),
                groups="key_heads",
            ),
            *_QWEN3,
        ),
        _qwen3,
    ),
    KeyMap(
        "transformers.qwen3_5",
        "gated_deltanet",
        "transformers.models.qwen3_5.",
        "Qwen3_5GatedDeltaNet",
        (
            Entry("in_proj_qkv.weight", ("q_proj.weight", "k_proj.weight", "v_proj.weight")),
            Entry("in_proj_z.weight", ("g_proj.weight",)),
            Entry("in_proj_b.weight", ("write.proj.weight",)),
            Entry("in_proj_a.weight", ("decay.proj.weight",)),
            *_QWEN3,
        ),
        _qwen3,
    ),
    KeyMap(
        "transformers.kimi_linear",
        "kda",
        "transformers.models.kimi_linear",
        "KimiLinearDeltaAttention",
        (
            *_entries(
                _QKV
                | {
                    "forget_gate.f_a_proj.weight": "decay.proj.down.weight",
                    "forget_gate.f_b_proj.weight": "decay.proj.up.weight",
                    "forget_gate.dt_bias": "decay.dt_bias",
                    "b_proj.weight": "write.proj.weight",
                    "g_a_proj.weight": "g_proj.down.weight",
                    "g_b_proj.weight": "g_proj.up.weight",
                    "o_norm.weight": "norm.weight",
                }
            ),
            Entry("conv1d.weight", ("q_conv.weight", "k_conv.weight", "v_conv.weight")),
            Entry("forget_gate.A_log", ("decay.A_log",), shape=(1, 1, -1, 1)),
        ),
        _kimi,
    ),
    KeyMap(
        "fla.mamba2",
        "mamba2",
        "fla.layers.mamba2",
        "Mamba2",
        _MAMBA2,
        _fla_mamba2,
        optional=("conv1d.bias",),
    ),
    KeyMap(
        "fla.gla",
        "gla",
        "fla.layers.gla",
        "GatedLinearAttention",
        (
            *_entries(
                _QKV
                | _CONV
                | {
                    "g_proj.weight": "g_proj.weight",
                    "gk_proj.0.weight": "decay.proj.down.weight",
                    "gk_proj.1.weight": "decay.proj.up.weight",
                    "gk_proj.1.bias": "decay.proj.up.bias",
                }
            ),
            *_OUTPUT_NORM,
        ),
        _fla_gla,
        optional=(*_OWN_CONV, *_OWN_NORM),
    ),
    KeyMap(
        "fla.retnet",
        "retnet",
        "fla.layers.multiscale_retention",
        "MultiScaleRetention",
        (*_entries(_QKV | {"g_proj.weight": "g_proj.weight"}), *_OUTPUT_NORM),
        _fla_retnet,
        optional=_OWN_NORM,
    ),
    KeyMap(
        "fla.linear_attn",
        "linear_attention",
        "fla.layers.linear_attn",
        "LinearAttention",
        _entries(_QKV | {"norm.weight": "norm.weight"} | _HADAMARD),
        _fla_linear_attn,
        optional=tuple(_HADAMARD),
    ),
    KeyMap(
        "fla.delta_net",
        "deltanet",
        "fla.layers.delta_net",
        "DeltaNet",
        _entries(
            _QKV
            | _CONV
            | {
                "b_proj.weight": "write.proj.weight",
                "g_proj.weight": "g_proj.weight",
                "o_norm.weight": "norm.weight",
            }
        ),
        _fla_delta_net,
        optional=("g_proj.weight", "b_proj.weight", *_OWN_CONV),
    ),
    KeyMap(
        "fla.gated_deltanet",
        "gated_deltanet",
        "fla.layers.gated_deltanet",
        "GatedDeltaNet",
        _entries(
            _QKV
            | _CONV
            | {
                "a_proj.weight": "decay.proj.weight",
                "b_proj.weight": "write.proj.weight",
                "A_log": "decay.A_log",
                "dt_bias": "decay.dt_bias",
                "g_proj.weight": "g_proj.weight",
                "o_norm.weight": "norm.weight",
            }
        ),
        _fla_gated_deltanet,
        optional=("g_proj.weight", *_OWN_CONV),
    ),
    KeyMap(
        "fla.kda",
        "kda",
        "fla.layers.kda",
        "KimiDeltaAttention",
        _entries(
            _QKV
            | _CONV
            | {
                "f_proj.0.weight": "decay.proj.down.weight",
                "f_proj.1.weight": "decay.proj.up.weight",
                "A_log": "decay.A_log",
                "dt_bias": "decay.dt_bias",
                "b_proj.weight": "write.proj.weight",
                "g_proj.0.weight": "g_proj.down.weight",
                "g_proj.1.weight": "g_proj.up.weight",
                "g_proj.1.bias": "g_proj.up.bias",
                "o_norm.weight": "norm.weight",
            }
        ),
        _fla_kda,
        optional=_OWN_CONV,
    ),
    KeyMap(
        "fla.hgrn2",
        "hgrn2",
        "fla.layers.hgrn2",
        "HGRN2Attention",
        _entries(
            {
                "q_proj.weight": "q_proj.weight",
                "f_proj.weight": "decay.proj.weight",
                "i_proj.weight": "v_proj.weight",
                "g_norm.weight": "norm.weight",
                "o_proj.weight": "o_proj.weight",
            }
        ),
        _fla_hgrn2,
    ),
)

KINDS: dict[str, KeyMap] = {m.kind: m for m in _ALL}
"""Maps by kind."""
