"""Checkpoints of flash-linear-attention as models of `glazoo.models`.

A configuration is read into the attributes that the package's mixers have, so that one map
(`glazoo.converters.exchange`) says for both, live mixers and files, what a mixer is here and where
its tensors go.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from glazoo.converters.errors import ConversionError
from glazoo.converters.exchange.maps import KINDS
from glazoo.converters.exchange.transfer import spec_of, translated

__all__ = ["read_fla"]

# What trains, times or stores a model, or chooses between equal kernels. Dropout is not among it:
# none of these models has any.
_IGNORED = frozenset(
    [
        "_name_or_path",
        "architectures",
        "attn_mode",
        "bos_token_id",
        "chunk_size",
        "chunk_size_feed_forward",
        "conv_init",
        "dt_init_floor",
        "dt_max",
        "dt_min",
        "dtype",
        "eos_token_id",
        "fuse_cross_entropy",
        "fuse_linear_cross_entropy",
        "fuse_norm",
        "fuse_swiglu",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "max_position_embeddings",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "rescale_prenorm_residual",
        "residual_in_fp32",
        "return_dict",
        "time_step_floor",
        "time_step_max",
        "time_step_min",
        "time_step_rank",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "use_l2warp",
        "A_init_range",
    ]
)


EMBEDDINGS = "model.embed_tokens.weight"
_GATE, _UP = "mlp.gate_proj.weight", "mlp.up_proj.weight"
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


class _Fields:
    """A configuration that keeps track of what was read."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = dict(raw)
        self.read = set(_IGNORED)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return self.raw.get(name, default)

    def need(self, name: str, *accepted: Any) -> None:
        """Refuses another value; the first accepted one is the default."""
        value = self.get(name, accepted[0])
        value = tuple(value) if isinstance(value, list) else value
        if value not in accepted:
            choices = " and ".join(repr(x) for x in accepted)
            raise ConversionError(f"config.json: {name} is {value!r}, accepted is {choices}")

    def check_all_read(self) -> None:
        for name, value in self.raw.items():
            # What is off asks for nothing.
            if name not in self.read and value is not None and value is not False:
                raise ConversionError(
                    f"config.json: {name} is {value!r}, and what it asks for is unknown; accepted "
                    "are the fields of flash-linear-attention's own configuration"
                )

    def split(self, name: str, total: float, parts: int) -> int:
        """Gives a head's share of `total` channels."""
        size = round(total)
        if abs(size - total) > 1e-6 or parts < 1 or size % parts:
            raise ConversionError(
                f"config.json: {name} gives {total:g} channels, accepted are multiples of the "
                f"{parts} heads"
            )
        return size // parts


def _eps(c: _Fields, default: float = 1e-6) -> SimpleNamespace:
    return SimpleNamespace(eps=float(c.get("norm_eps", default)))


def _expanded(c: _Fields, keys: float, values: float, heads: int) -> dict[str, Any]:
    """Reads the sizes of mixers whose widths are multiples of the hidden size."""
    hidden, n = int(c.get("hidden_size", 2048)), int(c.get("num_heads", heads))
    shared = c.get("num_kv_heads")
    return {
        "hidden_size": hidden,
        "num_heads": n,
        "num_kv_heads": n if shared is None else int(shared),
        "head_k_dim": c.split("expand_k", hidden * float(c.get("expand_k", keys)), n),
        "head_v_dim": c.split("expand_v", hidden * float(c.get("expand_v", values)), n),
    }


def _grouped(c: _Fields, values: float, size: int, heads: int) -> dict[str, Any]:
    """Reads the sizes of mixers with more value than key heads."""
    n, head = int(c.get("num_heads", heads)), int(c.get("head_dim", size))
    more = c.get("num_v_heads")
    return {
        "hidden_size": int(c.get("hidden_size", 2048)),
        "num_heads": n,
        "num_v_heads": n if more is None else int(more),
        "head_k_dim": head,
        "head_v_dim": c.split("expand_v", head * float(c.get("expand_v", values)), 1),
        "allow_neg_eigval": bool(c.get("allow_neg_eigval", False)),
        "o_norm": _eps(c),
    }


def _convolution(c: _Fields, default: bool) -> dict[str, Any]:
    used = bool(c.get("use_short_conv", default))
    if used:
        c.need("share_conv_kernel", False)
    else:
        c.get("share_conv_kernel")
    return {
        "use_short_conv": used,
        "conv_size": int(c.get("conv_size", 4)),
        "conv_bias": False,
    }


def _norm_and_gate(c: _Fields) -> dict[str, Any]:
    gated = bool(c.get("use_output_gate", True))
    return {
        "use_output_gate": gated,
        "fuse_norm_and_gate": gated and bool(c.get("fuse_norm", True)),
        "gate_fn": "swish",
        "g_norm": _eps(c),
        "g_norm_swish_gate": _eps(c),
    }


def _mamba2(c: _Fields) -> dict[str, Any]:
    hidden, head = int(c.get("hidden_size", 2048)), int(c.get("head_dim", 64))
    heads = c.split("expand", hidden * float(c.get("expand", 2)) / head, 1)
    c.need("num_heads", heads, None)
    for name in ("dt_limit", "time_step_limit"):
        c.need(name, (0.0, float("inf")))
    for name in ("rmsnorm", "rms_norm"):
        c.need(name, True)
    for name in ("D_has_hdim", "norm_before_gate", "use_bias"):
        c.need(name, False)
    return {
        "hidden_size": hidden,
        "num_heads": heads,
        "head_dim": head,
        "ssm_state_size": int(c.get("state_size", 128)),
        "n_groups": int(c.get("n_groups", 1)),
        "conv_kernel_size": int(c.get("conv_kernel", 4)),
        "use_conv_bias": bool(c.get("use_conv_bias", True)),
        "activation": c.get("hidden_act", "silu"),
        "dt_limit": (0.0, float("inf")),
        "norm_eps": float(c.get("norm_eps", c.get("layer_norm_epsilon", 1e-5))),
        "rmsnorm": True,
    }


def _gla(c: _Fields) -> dict[str, Any]:
    # The layer has no other values for these than its own.
    c.need("gate_logit_normalizer", 16)
    c.need("gate_low_rank_dim", 16)
    c.need("use_gk", True)
    c.need("use_gv", False)
    return {
        **_expanded(c, 0.5, 1.0, 4),
        **_convolution(c, False),
        **_norm_and_gate(c),
        "feature_map_fn": c.get("feature_map"),
        "clamp_min": c.get("clamp_min"),
        "gate_logit_normalizer": 16,
        "gk_proj": [SimpleNamespace(out_features=16)],
    }


def _retnet(c: _Fields) -> dict[str, Any]:
    return {
        **_expanded(c, 1.0, 2.0, 8),
        **_convolution(c, False),
        **_norm_and_gate(c),
        "feature_map_fn": c.get("feature_map"),
    }


def _linear_attn(c: _Fields) -> dict[str, Any]:
    feature = c.get("feature_map", "elementwise_product")
    return {
        **_expanded(c, 1.0, 1.0, 4),
        "feature_map_q": feature,
        "feature_map_k": feature,
        "norm_q": bool(c.get("norm_q", False)),
        "norm_k": bool(c.get("norm_k", False)),
        "do_feature_map_norm": bool(c.get("norm_feature_map", False)),
        "norm": _eps(c),
    }


def _hgrn2(c: _Fields) -> dict[str, Any]:
    hidden, heads, ratio = (
        int(c.get("hidden_size", 2048)),
        c.get("num_heads"),
        c.get("expand_ratio", 128),
    )
    if ratio is None:
        if heads is None:
            raise ConversionError("config.json: one of expand_ratio and num_heads is needed")
        ratio = hidden // int(heads)
    heads = hidden // int(ratio)
    return {
        **_convolution(c, False),
        "hidden_size": hidden,
        "num_heads": heads,
        "head_f_dim": int(ratio),
        "head_i_dim": c.split("hidden_size", hidden, heads),
        "use_lower_bound": bool(c.get("use_lower_bound", True)),
    }


def _delta_net(c: _Fields) -> dict[str, Any]:
    # The package's model has the field, and its layer an output norm in any case.
    c.get("use_output_norm")
    sizes = _expanded(c, 1.0, 1.0, 16)
    return {
        **sizes,
        **_convolution(c, True),
        "num_v_heads": sizes["num_heads"],
        "use_gate": bool(c.get("use_gate", False)),
        "use_beta": bool(c.get("use_beta", True)),
        "allow_neg_eigval": bool(c.get("allow_neg_eigval", False)),
        "qk_activation": c.get("qk_activation", "silu"),
        "qk_norm": c.get("qk_norm", "l2"),
        "o_norm": _eps(c),
    }


def _gated_deltanet(c: _Fields) -> dict[str, Any]:
    attributes = {**_grouped(c, 2.0, 256, 6), **_convolution(c, True)}
    c.need("use_mamba_gate", True)
    attributes["use_gate"] = bool(c.get("use_gate", True))
    attributes["o_norm"].activation = c.get("output_gate_activation", "swish")
    return attributes


def _kda(c: _Fields) -> dict[str, Any]:
    # Says which kernel may be used; the limit itself says what is computed.
    c.get("safe_gate")
    bound = c.get("lower_bound")
    return {**_grouped(c, 1.0, 128, 16), **_convolution(c, True), "lower_bound": bound}


@dataclass(frozen=True, slots=True)
class _Model:
    """One of the package's models."""

    architecture: str
    kind: str
    """Name of the map of its mixer."""
    attributes: Callable[[_Fields], dict[str, Any]]
    """Reads a configuration into the attributes of its mixer."""
    body: str = "model"
    """Name of the model without its head, in files."""
    norm: str = "norm"
    """Name of the last norm."""
    block: tuple[tuple[str, str], ...] = (
        ("attn_norm.weight", "mixer_norm.weight"),
        ("mlp_norm.weight", "mlp_norm.weight"),
        (_GATE, _GATE),
        (_UP, _UP),
        ("mlp.down_proj.weight", "mlp.down_proj.weight"),
    )
    """Tensors of a block beside its mixer, theirs and ours."""
    mixer: str = "attn"
    """Name of a block's mixer."""
    layers: int = 24
    """Default of num_hidden_layers."""
    ratio: int = 4
    """Default of hidden_ratio."""


_MODELS: dict[str, _Model] = {
    "mamba2": _Model(
        "Mamba2ForCausalLM",
        "fla.mamba2",
        _mamba2,
        body="backbone",
        norm="norm_f",
        block=(("norm.weight", "mixer_norm.weight"),),
        mixer="mixer",
        layers=48,
    ),
    "gla": _Model("GLAForCausalLM", "fla.gla", _gla),
    "retnet": _Model("RetNetForCausalLM", "fla.retnet", _retnet, ratio=2),
    "linear_attn": _Model("LinearAttentionForCausalLM", "fla.linear_attn", _linear_attn),
    "hgrn2": _Model("HGRN2ForCausalLM", "fla.hgrn2", _hgrn2),
    "delta_net": _Model("DeltaNetForCausalLM", "fla.delta_net", _delta_net),
    "gated_deltanet": _Model(
        "GatedDeltaNetForCausalLM", "fla.gated_deltanet", _gated_deltanet, layers=21
    ),
    "kda": _Model("KDAForCausalLM", "fla.kda", _kda),
}


def _feed_forward(c: _Fields, hidden: int, default: int) -> int:
    c.need("hidden_act", "swish", "silu")
    size, ratio = c.get("intermediate_size"), c.get("hidden_ratio", default)
    if size is not None:
        return int(size)
    # Two thirds of the ratio, which is 4 if unset, rounded up to a multiple of 256.
    return -(-int(hidden * (4 if ratio is None else ratio) * 2 / 3) // 256) * 256


def _attention_layers(c: _Fields) -> tuple[frozenset[int], dict[str, Any]]:
    """Reads which layers are softmax attention; gives them and our fields for them."""
    given = c.get("attn")
    entries = [] if given is None else given if isinstance(given, list) else [given]
    found: set[int] = set()
    kinds: list[dict[str, Any]] = []
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ConversionError(f"config.json: attn is {given!r}, accepted are objects")
        name = "attn" if isinstance(given, dict) else f"attn[{i}]"
        a = _Fields({f"{name}.{key}": value for key, value in entry.items()})
        a.need(f"{name}.qkv_bias", False, None)
        a.need(f"{name}.window_size", None)
        heads = int(a.get(f"{name}.num_heads"))
        shared = a.get(f"{name}.num_kv_heads")
        base = a.get(f"{name}.rope_theta", 10000.0)
        found |= {int(layer) for layer in a.get(f"{name}.layers")}
        a.check_all_read()
        kinds.append(
            {
                "num_attention_heads": heads,
                "num_key_value_heads": heads if shared is None else int(shared),
                "rope_theta": float(base),
            }
        )
    if any(kind != kinds[0] for kind in kinds):
        raise ConversionError(f"config.json: attn is {given!r}, accepted is one kind of attention")
    return frozenset(found), kinds[0] if found else {}


def _configuration(raw: Mapping[str, Any], described: _Model) -> tuple[Any, bool]:
    """Gives our configuration, and whether both feature maps are one in the files."""
    from glazoo.models import GlazooConfig
    from glazoo.models.configuration import ATTENTION

    names = raw.get("architectures") or [described.architecture]
    if names != [described.architecture]:
        raise ConversionError(
            f"config.json: architectures is {names!r}, accepted for model_type "
            f"{raw['model_type']!r} is {[described.architecture]!r}"
        )
    c = _Fields(raw)
    attributes = described.attributes(c)
    m = KINDS[described.kind]
    # Messages name the class, as they do for a live mixer.
    read = m.options(type(m.cls, (SimpleNamespace,), {})(**attributes))
    spec = spec_of(m, read)
    hidden = int(attributes["hidden_size"])
    width, softmax, own = 0, frozenset[int](), dict[str, Any]()
    if len(described.block) > 1:
        width = _feed_forward(c, hidden, described.ratio)
        softmax, own = _attention_layers(c)
    c.need("attnres_block_size", None)
    c.need("elementwise_affine", True)
    if softmax and own["rope_theta"] != 10000.0 and spec.layer.q.rotation == "static":
        raise ConversionError(
            f"config.json: attn.rope_theta is {own['rope_theta']!r}, accepted is 10000.0, that of "
            "the other layers"
        )
    if softmax and spec.decay.parameterization == "lower_bounded_sigmoid":
        raise ConversionError(
            f"config.json: attn is {raw['attn']!r}, accepted with use_lower_bound is None"
        )
    tied = bool(c.get("tie_feature_map_qk", False))
    layers = int(c.get("num_hidden_layers", described.layers))
    if strangers := sorted(softmax - set(range(layers))):
        raise ConversionError(f"config.json: attn.layers has {strangers}, the model has {layers}")
    fields: dict[str, Any] = {name: raw[name] for name in _TOKENS if name in raw}
    if (dtype := raw.get("dtype", raw.get("torch_dtype"))) is not None:
        fields["dtype"] = dtype
    config = GlazooConfig(
        pattern=[ATTENTION if i in softmax else spec for i in range(layers)],
        vocab_size=int(c.get("vocab_size", 32000)),
        num_hidden_layers=layers,
        intermediate_size=width,
        norm_eps=float(attributes["norm_eps"] if width == 0 else c.get("norm_eps", 1e-6)),
        initializer_range=float(raw.get("initializer_range", 0.02)),
        tie_word_embeddings=bool(c.get("tie_word_embeddings", False)),
        architectures=["GlazooForCausalLM"],
        **(fields | read.sizes | own),
    )
    c.check_all_read()
    return config, tied


def _global_names(described: _Model) -> dict[str, str]:
    body = described.body
    names = {
        f"{body}.embeddings.weight": EMBEDDINGS,
        f"{body}.{described.norm}.weight": "model.norm.weight",
        f"{body}.lower_bounds": "model.lower_bounds.logits",
        "lm_head.weight": "lm_head.weight",
    }
    if described.body == "backbone":
        names[f"{body}.embedding.weight"] = EMBEDDINGS
    return names


def _renamed(
    state: Mapping[str, Tensor], described: _Model, config: Any, *, tied: bool
) -> Iterator[tuple[str, str, Tensor]]:
    """Gives every tensor of the files with its name there and ours."""
    from glazoo.layers import GatedLinearAttention
    from glazoo.models import GlazooForCausalLM

    with torch.device("meta"):
        model = GlazooForCausalLM(config)
    wholes, blocks = _global_names(described), dict(described.block)
    mixers: dict[int, dict[str, Tensor]] = {i: {} for i in range(config.num_hidden_layers)}
    layer_name = re.compile(rf"{described.body}\.layers\.(\d+)\.(.+)")
    prefix = f"{described.mixer}."
    for key, value in state.items():
        match = layer_name.fullmatch(key)
        index, rest = (int(match[1]), match[2]) if match else (-1, "")
        if key in wholes:
            yield key, wholes[key], value
        elif index in mixers and rest == _GATE and value.shape[0] == 2 * config.intermediate_size:
            # Older files hold both factors in one.
            for name, part in zip((_GATE, _UP), value.chunk(2), strict=True):
                yield key, f"model.layers.{index}.{name}", part
        elif index in mixers and rest in blocks:
            yield key, f"model.layers.{index}.{blocks[rest]}", value
        elif index in mixers and rest.startswith(prefix):
            mixers[index][rest.removeprefix(prefix)] = value
        else:
            raise ConversionError(f"{key} has no place in the model that config.json describes")
    for index, found in mixers.items():
        where = f"{described.body}.layers.{index}.{prefix}"
        mixer = model.model.layers[index].mixer
        if tied:
            # Shared tensors may be stored once.
            found |= {
                name.replace("map_q", "map_k"): x.clone()
                for name, x in found.items()
                if name.replace("map_q", "map_k") not in found
            }
        if isinstance(mixer, GatedLinearAttention):
            found = translated(mixer, found, described.kind, where=where)
        for name, value in found.items():
            yield f"{where}{name}", f"model.layers.{index}.mixer.{name}", value


def read_fla(
    raw: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[Any, dict[str, Tensor], str]:
    """Translates a checkpoint of flash-linear-attention.

    Args:
        raw: its config.json.
        state: its tensors, of any dtype.

    Returns:
        A `GlazooConfig`, the tensors of a `GlazooForCausalLM` in the dtypes that they came in, and
        the name of the table of embeddings.

    Raises:
        ConversionError: the configuration asks for what no model here has, or a tensor of either
            side has no place on the other or a wrong shape.
    """
    described = _MODELS[raw["model_type"]]
    config, tied = _configuration(raw, described)
    found: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for key, name, value in _renamed(state, described, config, tied=tied):
        if name in found:
            raise ConversionError(f"{key} and {origin[name]} are one tensor in two versions")
        found[name], origin[name] = value, key
    return config, found, EMBEDDINGS
