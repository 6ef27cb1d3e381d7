"""Importing checkpoints of flash-linear-attention: whole models against their published arithmetic.

Folders are written in that package's format: its configuration's fields, its tensors' names and
layouts. What they compute is restated here, one token after the other, in float64.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
import typer
from converters import fla_mixers
from converters.converting import contents
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from glazoo.converters import (
    ConversionError,
    convert_checkpoint,
    import_original,
    inspect_checkpoint,
    verify_checkpoint,
)
from glazoo.converters.commands import convert
from glazoo.converters.examine import measure_use
from glazoo.models import GlazooForCausalLM

VOCABULARY, HIDDEN, LAYERS = 61, 32, 3
TOKENS, EPS = 13, 1e-4

Weights = dict[str, Tensor]
Config = dict[str, Any]


def l2(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def rms(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def heads(x: Tensor, size: int, group: int = 1) -> Tensor:
    return x.unflatten(-1, (-1, size)).repeat_interleave(group, 2)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    taps = weight.shape[-1]
    y = torch.zeros_like(x) if bias is None else bias.expand_as(x).clone()
    for t in range(x.shape[1]):
        for j in range(min(t + 1, taps)):
            y[:, t] += x[:, t - j] * weight[:, 0, taps - 1 - j]
    return y


def additive(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, scale: float) -> Tensor:
    """S = Diag(decay) S + k v^T ; y = scale S^T q."""
    state = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1])
    out = []
    for t in range(q.shape[1]):
        state = decay[:, t, ..., None] * state + k[:, t, ..., None] * v[:, t, :, None]
        out.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(out, 1)


def delta(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """S = Diag(decay) S ; S = S + beta k (v - S^T k)^T ; y = S^T q / sqrt(K)."""
    state = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1])
    out = []
    for t in range(q.shape[1]):
        state = decay[:, t, ..., None] * state
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + k[:, t, ..., None] * (beta[:, t, :, None] * error)[:, :, None]
        out.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * q.shape[-1] ** -0.5)
    return torch.stack(out, 1)


def rotary(x: Tensor, base: float = 10000.0) -> Tensor:
    size = x.shape[-1]
    # The package keeps its frequencies in float32.
    frequency = base ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None, None] * frequency.to(x.dtype)
    a, b = x.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def mapped(name: str | None, x: Tensor) -> Tensor:
    known: dict[str | None, Callable[[Tensor], Tensor]] = {
        None: lambda y: y,
        "identity": lambda y: y,
        "relu": F.relu,
        "silu": F.silu,
        "swish": F.silu,
        "elu": lambda y: F.elu(y) + 1,
    }
    return known[name](x)


def streams(c: Config, w: Weights, x: Tensor, default: bool, q: str | None, v: str | None) -> Any:
    """Projects and convolves; `q` and `v` are the activations behind."""
    out = []
    for s, activation in (("q", q), ("k", q), ("v", v)):
        y = x @ w[f"{s}_proj.weight"].T
        if c.get("use_short_conv", default):
            y = conv(y, w[f"{s}_conv1d.weight"])
        out.append(mapped(activation, y))
    return out


def gated_output(c: Config, w: Weights, x: Tensor, o: Tensor) -> Tensor:
    """Norm, swish gate, projection, whatever the norm's module is called."""
    norm = "g_norm.weight" if "g_norm.weight" in w else "g_norm_swish_gate.weight"
    o = rms(o, w[norm])
    if c.get("use_output_gate", True):
        o = o * F.silu(heads(x @ w["g_proj.weight"].T, o.shape[-1]))
    return o.flatten(2) @ w["o_proj.weight"].T


def mamba2(c: Config, w: Weights, x: Tensor, **_: Any) -> Tensor:
    inner, keys = 2 * HIDDEN, c["n_groups"] * c["state_size"]
    n = inner // c["head_dim"]
    z, xbc, dt = (x @ w["in_proj.weight"].T).split([inner, inner + 2 * keys, n], -1)
    xbc = F.silu(conv(xbc, w["conv1d.weight"], w.get("conv1d.bias")))
    v, k, q = xbc.split([inner, keys, keys], -1)
    step = F.softplus(dt + w["dt_bias"])
    decay = torch.exp(-w["A_log"].exp() * step)[..., None]
    group = n // c["n_groups"]
    k, q = (heads(y, c["state_size"], group) for y in (k, q))
    v = heads(v, c["head_dim"])
    y = additive(q, k, step[..., None] * v, decay.expand_as(q), 1.0) + w["D"][:, None] * v
    y = y.flatten(2) * F.silu(z)
    y = rms(y.unflatten(-1, (c["n_groups"], -1)), torch.ones(())).flatten(2) * w["norm.weight"]
    return y @ w["out_proj.weight"].T


def gla(c: Config, w: Weights, x: Tensor, **_: Any) -> Tensor:
    n, shared = c["num_heads"], c.get("num_kv_heads") or c["num_heads"]
    dk, dv, group = 16 // n, 32 // n, n // shared
    q, k, v = streams(c, w, x, False, *(("silu",) * 2 if c.get("use_short_conv") else (None,) * 2))
    q, k = mapped(c.get("feature_map"), q), mapped(c.get("feature_map"), k)
    g = x @ w["gk_proj.0.weight"].T @ w["gk_proj.1.weight"].T + w["gk_proj.1.bias"]
    g = F.logsigmoid(g) / 16
    if c.get("clamp_min") is not None:
        g = g.clamp(min=c["clamp_min"])
    q, k, v, g = heads(q, dk), heads(k, dk, group), heads(v, dv, group), heads(g, dk, group)
    return gated_output(c, w, x, additive(q, k, v, g.exp(), dk**-0.5))


def retnet(c: Config, w: Weights, x: Tensor, **_: Any) -> Tensor:
    n, shared = c["num_heads"], c.get("num_kv_heads") or c["num_heads"]
    dk, dv, group = 32 // n, 64 // n, n // shared
    q, k, v = streams({}, w, x, False, c.get("feature_map"), None)
    q, k, v = rotary(heads(q, dk)), rotary(heads(k, dk)), heads(v, dv, group)
    k = k.repeat_interleave(group, 2)
    decay = (1 - 2 ** (-5 - torch.arange(n, dtype=x.dtype)))[:, None].expand_as(q)
    return gated_output(c, w, x, additive(q, k, v, decay, dk**-0.5))


def linear_attn(c: Config, w: Weights, x: Tensor, **_: Any) -> Tensor:
    n, shared = c["num_heads"], c.get("num_kv_heads") or c["num_heads"]
    d, group = 32 // n, n // shared
    q, k, v = streams({}, w, x, False, None, None)
    q, k, v = heads(q, d), heads(k, d, group), heads(v, d, group)
    kind = c.get("feature_map", "elementwise_product")

    def feature(s: str, y: Tensor) -> Tensor:
        if kind != "elementwise_product":
            return mapped(kind, y)
        s = "q" if f"feature_map_{s}.layer1.weight" not in w else s
        a, b = (
            y @ w[f"feature_map_{s}.layer{i}.weight"].T + w[f"feature_map_{s}.layer{i}.bias"]
            for i in (1, 2)
        )
        return a * b

    q, k = feature("q", q), feature("k", k)
    o = additive(q, k, v, torch.ones_like(q), d**-0.5)
    if c.get("norm_feature_map"):
        o = o / ((q * d**-0.5 * k.cumsum(1)).sum(-1, keepdim=True) + 1e-10)
    return rms(o, w["norm.weight"]).flatten(2) @ w["o_proj.weight"].T


def hgrn2(c: Config, w: Weights, x: Tensor, *, bound: Tensor | None, **_: Any) -> Tensor:
    ratio = c.get("expand_ratio") or HIDDEN // c["num_heads"]
    f = torch.sigmoid(x @ w["f_proj.weight"].T)
    if bound is not None:
        f = bound + (1 - bound) * f
    f, q = heads(f, ratio), heads(F.silu(x @ w["q_proj.weight"].T), ratio)
    v = heads(x @ w["i_proj.weight"].T, HIDDEN // (HIDDEN // ratio))
    o = additive(q, 1 - f, v, f, ratio**-0.5).flatten(2)
    # The package's layer does not pass its epsilon on.
    return rms(o, w["g_norm.weight"], 1e-5) @ w["o_proj.weight"].T


def beta_of(c: Config, w: Weights, x: Tensor, n: int) -> Tensor:
    if not c.get("use_beta", True):
        return x.new_ones(*x.shape[:2], n)
    return (2 if c.get("allow_neg_eigval") else 1) * torch.sigmoid(x @ w["b_proj.weight"].T)


def delta_net(c: Config, w: Weights, x: Tensor, **_: Any) -> Tensor:
    n = c["num_heads"]
    d = 32 // n
    q, k, v = streams(c, w, x, True, c.get("qk_activation", "silu"), "silu")
    q, k, v = heads(q, d), heads(k, d), heads(v, d)
    if c.get("qk_norm", "l2") == "l2":
        q, k = l2(q), l2(k)
    else:
        q, k = (y / y.abs().sum(-1, keepdim=True) for y in (q, k))
    o = rms(delta(q, k, v, torch.ones_like(q), beta_of(c, w, x, n)), w["o_norm.weight"])
    if c.get("use_gate"):
        o = o * F.silu(heads(x @ w["g_proj.weight"].T, d))
    return o.flatten(2) @ w["o_proj.weight"].T


def gated_deltanet(c: Config, w: Weights, x: Tensor, **_: Any) -> Tensor:
    n = c.get("num_v_heads") or c["num_heads"]
    group, dk, dv = n // c["num_heads"], 8, 16
    q, k, v = streams(c, w, x, True, "silu", "silu")
    q, k, v = l2(heads(q, dk, group)), l2(heads(k, dk, group)), heads(v, dv)
    decay = torch.exp(-w["A_log"].exp() * F.softplus(x @ w["a_proj.weight"].T + w["dt_bias"]))
    o = delta(q, k, v, decay[..., None].expand_as(q), beta_of(c, w, x, n))
    o = rms(o, w["o_norm.weight"])
    if c.get("use_gate", True):
        gate = heads(x @ w["g_proj.weight"].T, dv)
        swish = c.get("output_gate_activation", "swish") != "sigmoid"
        o = o * (F.silu(gate) if swish else torch.sigmoid(gate))
    return o.flatten(2) @ w["o_proj.weight"].T


def kda(c: Config, w: Weights, x: Tensor, **_: Any) -> Tensor:
    n = c.get("num_v_heads") or c["num_heads"]
    group, d = n // c["num_heads"], 8
    q, k, v = streams(c, w, x, True, "silu", "silu")
    q, k, v = l2(heads(q, d, group)), l2(heads(k, d, group)), heads(v, d)
    z = heads(x @ w["f_proj.0.weight"].T @ w["f_proj.1.weight"].T + w["dt_bias"], d)
    rate = w["A_log"].exp()[:, None]
    low = c.get("lower_bound")
    g = -rate * F.softplus(z) if low is None else low * torch.sigmoid(rate * z)
    o = rms(delta(q, k, v, g.exp(), beta_of(c, w, x, n)), w["o_norm.weight"])
    gate = x @ w["g_proj.0.weight"].T @ w["g_proj.1.weight"].T + w["g_proj.1.bias"]
    return (o * torch.sigmoid(heads(gate, d))).flatten(2) @ w["o_proj.weight"].T


def softmax(c: Config, w: Weights, x: Tensor) -> Tensor:
    n, shared = c["attn"]["num_heads"], c["attn"].get("num_kv_heads") or c["attn"]["num_heads"]
    d, group = HIDDEN // n, n // shared
    base = c["attn"].get("rope_theta", 10000.0)
    q, k, v = (heads(x @ w[f"{s}_proj.weight"].T, d) for s in "qkv")
    q, k = rotary(q, base), rotary(k, base).repeat_interleave(group, 2)
    score = torch.einsum("bthd,bshd->bhts", q, k) * d**-0.5
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    share = score.masked_fill(later, -torch.inf).softmax(-1)
    o = torch.einsum("bhts,bshd->bthd", share, v.repeat_interleave(group, 2))
    return o.flatten(2) @ w["o_proj.weight"].T


FORWARD: dict[str, Callable[..., Tensor]] = {
    "mamba2": mamba2,
    "gla": gla,
    "retnet": retnet,
    "linear_attn": linear_attn,
    "hgrn2": hgrn2,
    "delta_net": delta_net,
    "gated_deltanet": gated_deltanet,
    "kda": kda,
}


RESTATED: dict[str, type[fla_mixers.Mixer]] = {
    "comba": fla_mixers.Comba,
    "gated_deltaproduct": fla_mixers.GatedDeltaProduct,
    "precond_gated_deltanet": fla_mixers.PrecondGatedDeltaNet,
    "precond_kda": fla_mixers.PrecondKda,
    "lightnet": fla_mixers.LightNet,
    "mesa_net": fla_mixers.MesaNet,
    "gdn2": fla_mixers.Gdn2,
    "iso_kdn": fla_mixers.IsoKdn,
    "diag_kdn": fla_mixers.DiagKdn,
    "gka": fla_mixers.Gka,
    "rodimus": fla_mixers.Rodimus,
    "mamba3": fla_mixers.Mamba3,
    "palimpsa": fla_mixers.Palimpsa,
    "metamamba2": fla_mixers.MetaMamba2,
}
BACKBONE = ("mamba2", "mamba3", "metamamba2")


def restated(c: Config) -> fla_mixers.Mixer:
    base = RESTATED[c["model_type"]]
    return type(base.__name__, (base,), {k: c[k] for k in base.options if k in c})()


def mix(c: Config, w: Weights, x: Tensor, bound: Tensor | None) -> Tensor:
    if (kind := c["model_type"]) in FORWARD:
        return FORWARD[kind](c, w, x, bound=bound)
    mixer = restated(c).double()
    mixer.load_state_dict(w)
    y: Tensor = mixer(x)
    return y


def under(w: Weights, prefix: str) -> Weights:
    return {k.removeprefix(prefix): x for k, x in w.items() if k.startswith(prefix)}


def forward(c: Config, w: Weights, ids: Tensor) -> Tensor:
    """The whole model: embedding, blocks, last norm, head."""
    old, plain = c["model_type"] in BACKBONE, c["model_type"] == "rodimus"
    body = "backbone" if old else "model"
    x = w[f"{body}.embeddings.weight"][ids]
    bounds = None
    if f"{body}.lower_bounds" in w:
        share = w[f"{body}.lower_bounds"].softmax(0)
        bounds = share.cumsum(0) - share[0]
    for i in range(LAYERS):
        block = under(w, f"{body}.layers.{i}.")
        mixer = under(block, "mixer." if old or plain else "attn.")
        norm = "norm" if old else "mixer_norm" if plain else "attn_norm"
        y = rms(x, block[f"{norm}.weight"], c["norm_eps"])
        if c.get("attn") and i in c["attn"]["layers"]:
            x = x + softmax(c, mixer, y)
        else:
            bound = None if bounds is None else bounds[i]
            x = x + mix(c, mixer, y, bound)
        if not (old or plain):
            y = rms(x, block["mlp_norm.weight"])
            y = F.silu(y @ block["mlp.gate_proj.weight"].T) * (y @ block["mlp.up_proj.weight"].T)
            x = x + y @ block["mlp.down_proj.weight"].T
    x = rms(x, w[f"{body}.norm_f.weight" if old else f"{body}.norm.weight"], c["norm_eps"])
    tied = c["tie_word_embeddings"]
    return x @ w[f"{body}.embeddings.weight" if tied else "lm_head.weight"].T


def mixer_shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one mixer's tensors, as that package has them."""
    kind, n = c["model_type"], c.get("num_heads", 0)
    if kind in RESTATED:
        return {name: tuple(x.shape) for name, x in restated(c).state_dict().items()}
    taps = 4
    if kind == "mamba2":
        inner, keys = 2 * HIDDEN, c["n_groups"] * c["state_size"]
        n = inner // c["head_dim"]
        shapes: dict[str, tuple[int, ...]] = {
            "in_proj.weight": (2 * inner + 2 * keys + n, HIDDEN),
            "conv1d.weight": (inner + 2 * keys, 1, taps),
            "dt_bias": (n,),
            "A_log": (n,),
            "D": (n,),
            "norm.weight": (inner,),
            "out_proj.weight": (HIDDEN, inner),
        }
        if c.get("use_conv_bias", True):
            shapes["conv1d.bias"] = (inner + 2 * keys,)
        return shapes
    if kind == "hgrn2":
        names = ("q_proj", "f_proj", "i_proj", "o_proj")
        shapes = {f"{name}.weight": (HIDDEN, HIDDEN) for name in names}
        return shapes | {"g_norm.weight": (HIDDEN,)}
    keys, values = {
        "gla": (16, 32),
        "retnet": (32, 64),
        "linear_attn": (32, 32),
        "delta_net": (32, 32),
        "gated_deltanet": (8 * n, 16 * (c.get("num_v_heads") or n)),
        "kda": (8 * n, 8 * (c.get("num_v_heads") or n)),
    }[kind]
    group = n // (c.get("num_kv_heads") or n)
    widths = {"q": keys, "k": keys // group, "v": values // group}
    shapes = {f"{s}_proj.weight": (width, HIDDEN) for s, width in widths.items()}
    shapes["o_proj.weight"] = (HIDDEN, values)
    used = c.get("use_short_conv", kind in ("delta_net", "gated_deltanet", "kda"))
    if used and kind != "retnet":
        shapes |= {f"{s}_conv1d.weight": (width, 1, taps) for s, width in widths.items()}
    if kind in ("gla", "retnet"):
        gated = c.get("use_output_gate", True)
        fused = gated and c.get("fuse_norm", True)
        shapes["g_norm_swish_gate.weight" if fused else "g_norm.weight"] = (values // n,)
        if gated:
            shapes["g_proj.weight"] = (values, HIDDEN)
    if kind == "gla":
        shapes |= {"gk_proj.0.weight": (16, HIDDEN), "gk_proj.1.weight": (keys // group, 16)}
        shapes["gk_proj.1.bias"] = (keys // group,)
    if kind == "linear_attn":
        shapes["norm.weight"] = (values // n,)
        if c.get("feature_map", "elementwise_product") == "elementwise_product":
            for s in ("q",) if c.get("tie_feature_map_qk") else ("q", "k"):
                for i in (1, 2):
                    shapes[f"feature_map_{s}.layer{i}.weight"] = (keys // n, keys // n)
                    shapes[f"feature_map_{s}.layer{i}.bias"] = (keys // n,)
    if kind in ("delta_net", "gated_deltanet", "kda"):
        n = c.get("num_v_heads") or n
        shapes["o_norm.weight"] = (values // n,)
        if c.get("use_beta", True):
            shapes["b_proj.weight"] = (n, HIDDEN)
        if kind != "kda" and c.get("use_gate", kind == "gated_deltanet"):
            shapes["g_proj.weight"] = (values, HIDDEN)
    if kind == "gated_deltanet":
        shapes |= {"a_proj.weight": (n, HIDDEN), "A_log": (n,), "dt_bias": (n,)}
    if kind == "kda":
        shapes |= {
            "f_proj.0.weight": (8, HIDDEN),
            "f_proj.1.weight": (8 * n, 8),
            "A_log": (n,),
            "dt_bias": (8 * n,),
            "g_proj.0.weight": (8, HIDDEN),
            "g_proj.1.weight": (values, 8),
            "g_proj.1.bias": (values,),
        }
    return shapes


def model_shapes(c: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    old, plain = c["model_type"] in BACKBONE, c["model_type"] == "rodimus"
    body = "backbone" if old else "model"
    yield f"{body}.embeddings.weight", (VOCABULARY, HIDDEN)
    yield f"{body}.norm_f.weight" if old else f"{body}.norm.weight", (HIDDEN,)
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", (VOCABULARY, HIDDEN)
    if c["model_type"] == "hgrn2" and c.get("use_lower_bound", True):
        yield f"{body}.lower_bounds", (LAYERS, HIDDEN)
    for i in range(LAYERS):
        here = f"{body}.layers.{i}"
        shapes, name = mixer_shapes(c), "mixer" if old or plain else "attn"
        if c.get("attn") and i in c["attn"]["layers"]:
            n = c["attn"]["num_heads"]
            shared = HIDDEN // n * (c["attn"].get("num_kv_heads") or n)
            widths = {"q": HIDDEN, "k": shared, "v": shared, "o": HIDDEN}
            shapes = {f"{s}_proj.weight": (width, HIDDEN) for s, width in widths.items()}
        for key, shape in shapes.items():
            yield f"{here}.{name}.{key}", shape
        if old:
            yield f"{here}.norm.weight", (HIDDEN,)
            continue
        if plain:
            yield f"{here}.mixer_norm.weight", (HIDDEN,)
            continue
        width = c.get("intermediate_size") or 256
        yield f"{here}.attn_norm.weight", (HIDDEN,)
        yield f"{here}.mlp_norm.weight", (HIDDEN,)
        yield f"{here}.mlp.gate_proj.weight", (width, HIDDEN)
        yield f"{here}.mlp.up_proj.weight", (width, HIDDEN)
        yield f"{here}.mlp.down_proj.weight", (HIDDEN, width)


ARCHITECTURES = {
    "mamba2": "Mamba2ForCausalLM",
    "gla": "GLAForCausalLM",
    "retnet": "RetNetForCausalLM",
    "linear_attn": "LinearAttentionForCausalLM",
    "hgrn2": "HGRN2ForCausalLM",
    "delta_net": "DeltaNetForCausalLM",
    "gated_deltanet": "GatedDeltaNetForCausalLM",
    "kda": "KDAForCausalLM",
    "comba": "CombaForCausalLM",
    "gated_deltaproduct": "GatedDeltaProductForCausalLM",
    "precond_gated_deltanet": "PrecondGatedDeltaNetForCausalLM",
    "precond_kda": "PrecondKDAForCausalLM",
    "lightnet": "LightNetForCausalLM",
    "mesa_net": "MesaNetForCausalLM",
    "gdn2": "GDN2ForCausalLM",
    "iso_kdn": "IsoKDNForCausalLM",
    "diag_kdn": "DiagKDNForCausalLM",
    "gka": "GKAForCausalLM",
    "rodimus": "RodimusForCausalLM",
    "mamba3": "Mamba3ForCausalLM",
    "palimpsa": "PalimpsaForCausalLM",
    "metamamba2": "MetaMamba2ForCausalLM",
}
_STATES: Config = {"head_dim": 16, "state_size": 8, "expand": 2, "n_groups": 2, "num_heads": 4}
_HEADS: Config = {"num_heads": 4, "head_dim": 4, "expand_v": 1.5, "conv_size": 3}
_SIZES: dict[str, Config] = {
    "mamba2": {"head_dim": 16, "state_size": 8, "expand": 2, "conv_kernel": 4, "n_groups": 1}
    | {"num_heads": 4, "rmsnorm": True, "chunk_size": 256, "dt_limit": [0.0, float("inf")]},
    "gla": {"expand_k": 0.5, "expand_v": 1.0, "num_heads": 4, "hidden_ratio": 4},
    "retnet": {"expand_k": 1.0, "expand_v": 2.0, "num_heads": 4, "hidden_ratio": 2},
    "linear_attn": {"num_heads": 4, "feature_map": "elementwise_product", "hidden_ratio": 4},
    "hgrn2": {"expand_ratio": 8, "num_heads": 4, "use_lower_bound": True, "hidden_ratio": 4},
    "delta_net": {"num_heads": 4, "qk_norm": "l2", "qk_activation": "silu", "hidden_ratio": 4},
    "gated_deltanet": {"num_heads": 2, "head_dim": 8, "expand_v": 2.0, "hidden_ratio": 4},
    "kda": {"num_heads": 2, "head_dim": 8, "expand_v": 1.0, "safe_gate": False},
    "comba": _HEADS | {"num_heads": 2, "num_v_heads": 4, "use_inner_decay": True},
    "gated_deltaproduct": _HEADS
    | {"num_heads": 2, "num_v_heads": 4, "num_householder": 2, "use_forget_gate": True}
    | {"allow_neg_eigval": True},
    "precond_gated_deltanet": _HEADS
    | {"squash_x": 1.7, "squash_eps": 1e-3, "allow_neg_eigval": True},
    "precond_kda": _HEADS | {"squash_x": 1.7, "squash_eps": 1e-3, "lower_bound": None},
    "lightnet": {"expand_ratio": 4, "num_heads": 4, "gate_low_rank_dim": 5},
    "mesa_net": {"num_heads": 4, "head_dim": 4, "conv_size": 3, "lambda_lower_bound": 0.4}
    | {"use_output_gate": True, "max_cg_step_training": 30},
    "iso_kdn": _HEADS | {"num_heads": 2, "num_v_heads": 4, "omega_min": 0.0, "r_min": 0.02},
    "diag_kdn": _HEADS | {"omega_min": 0.0, "r_min": 0.02, "info_scale": None},
    "gka": _HEADS | {"num_heads": 2, "num_v_heads": 4, "ridge_ratio": 0.05, "num_iter": 30},
    "gdn2": _HEADS | {"allow_neg_eigval": True, "use_gate": True},
    "rodimus": {"block_type": "rodimus", "expand_ratio": 6, "input_gate_low_rank": "auto"}
    | {"conv_size": 3, "hidden_ratio": 4 / 3, "ska_attn": None, "intermediate_size": 40},
    "mamba3": _STATES | {"A_floor": 1e-3, "rope_fraction": 0.5, "norm_eps": 1e-5, "is_mimo": False},
    "palimpsa": _HEADS | {"beta_step_rank": 5, "expand_k": 1, "metaplasticity": True},
    "metamamba2": _STATES
    | {"beta_step_rank": 5, "conv_kernel": 3, "use_conv_bias": False, "rms_norm": True}
    | {"metaplasticity": True, "time_step_limit": [0.0, float("inf")]},
}


def make_config(kind: str, **changes: Any) -> Config:
    """A configuration with every field that decides; `...` takes a field out."""
    common = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCABULARY,
        "norm_eps": EPS,
        "bos_token_id": None,
        "eos_token_id": None,
        "fuse_norm": True,
        "fuse_cross_entropy": True,
        "use_cache": True,
        "tie_word_embeddings": False,
        "transformers_version": "4.53.0",
    }
    if kind not in BACKBONE:
        common |= {"hidden_act": "swish", "attn": None, "attn_mode": "chunk"}
        common |= {"intermediate_size": None, "max_position_embeddings": 2048}
    return {k: x for k, x in (common | _SIZES[kind] | changes).items() if x is not ...}


def make_weights(c: Config, seed: int = 0) -> Weights:
    """Random tensors, none where it would start."""
    generator = torch.Generator().manual_seed(seed)
    out: Weights = {}
    for key, shape in model_shapes(c):
        x = torch.randn(shape, dtype=torch.float64, generator=generator)
        if len(shape) == 2 and "embeddings" not in key and "lower_bounds" not in key:
            x = x * 2 / shape[1] ** 0.5
        elif key.endswith(("norm.weight", "norm_f.weight")):
            x = 1 + 0.3 * x
        out[key] = x
    return out


def write(folder: Path, c: Config, w: Weights) -> Path:
    """Writes a folder as `save_pretrained` of that package does."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(c))
    save_file(w, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


CASES: dict[str, tuple[str, Config]] = {
    **{kind: (kind, {}) for kind in (*FORWARD, *RESTATED)},
    "mamba2-groups": ("mamba2", {"n_groups": 2, "use_conv_bias": False}),
    "mamba2-older": (
        "mamba2",
        {"dt_limit": ..., "time_step_limit": [0.0, float("inf")], "rms_norm": True},
    ),
    "mamba2-newer": ("mamba2", {"dt_limit": [0.0, {"__float__": "Infinity"}]}),
    "gla-shared-heads": ("gla", {"num_kv_heads": 2, "tie_word_embeddings": True}),
    "gla-convolution": ("gla", {"use_short_conv": True, "feature_map": "relu"}),
    "gla-clamped": ("gla", {"clamp_min": -0.05, "use_output_gate": False}),
    "gla-apart": ("gla", {"fuse_norm": False, "feature_map": "swish"}),
    "retnet-shared-heads": ("retnet", {"num_kv_heads": 2, "feature_map": "relu"}),
    "retnet-apart": ("retnet", {"fuse_norm": False}),
    "retnet-ungated": ("retnet", {"use_output_gate": False, "intermediate_size": 40}),
    "linear_attn-tied": ("linear_attn", {"tie_feature_map_qk": True}),
    "linear_attn-elu": (
        "linear_attn",
        {"feature_map": "elu", "num_kv_heads": 2, "norm_feature_map": True},
    ),
    "linear_attn-identity": ("linear_attn", {"feature_map": "identity"}),
    "hgrn2-no-bound": ("hgrn2", {"use_lower_bound": False}),
    "hgrn2-by-heads": ("hgrn2", {"expand_ratio": None, "num_heads": 2}),
    "delta_net-gate": ("delta_net", {"use_gate": True, "allow_neg_eigval": True}),
    "delta_net-plain": (
        "delta_net",
        {"use_short_conv": False, "use_beta": False, "allow_neg_eigval": None},
    ),
    "delta_net-elu": ("delta_net", {"qk_activation": "elu", "qk_norm": "sum"}),
    "delta_net-identity": ("delta_net", {"qk_activation": "identity", "use_short_conv": False}),
    "gated_deltanet-shared-keys": (
        "gated_deltanet",
        {"num_v_heads": 4, "allow_neg_eigval": True, "output_gate_activation": "sigmoid"},
    ),
    "gated_deltanet-plain": ("gated_deltanet", {"use_short_conv": False, "use_gate": False}),
    "kda-bounded": ("kda", {"safe_gate": True, "lower_bound": -5.0, "num_v_heads": 4}),
    "kda-plain": ("kda", {"use_short_conv": False, "allow_neg_eigval": True}),
    "iso_kdn-scaled": ("iso_kdn", {"info_scale": 2.5, "r_min": 0.3}),
    "diag_kdn-scaled": ("diag_kdn", {"info_scale": 2.5, "r_min": 0.3}),
    "gka-shared-heads": ("gka", {"num_heads": 4, "num_v_heads": None, "num_kv_heads": 2}),
    "gka-plain": (
        "gka",
        {"use_beta_gate": False, "use_alpha_connection": False, "use_forgetting_gate": False}
        | {"use_v_conv": False, "gla_rescale": False, "use_gate": False},
    ),
    "gla-hybrid": ("gla", {"attn": {"layers": [1], "num_heads": 2, "num_kv_heads": 1}}),
    "gated_deltanet-hybrid": (
        "gated_deltanet",
        {"attn": {"layers": [2], "num_heads": 4, "rope_theta": 500.0, "window_size": None}},
    ),
}


def prompts() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCABULARY, (2, TOKENS), generator=generator)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_the_import_computes_what_the_package_computes(name: str, tmp_path: Path) -> None:
    kind, changes = CASES[name]
    c = make_config(kind, **changes)
    w = make_weights(c)
    src = write(tmp_path / "s", c, w)
    before = contents(src)
    import_original(src, tmp_path / "i")
    assert contents(src) == before
    model, info = GlazooForCausalLM.from_pretrained(
        tmp_path / "i", dtype=torch.float64, output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = forward(c, w, prompts())
    got = model(prompts()).logits
    assert got.dtype == torch.float64
    # A wrong option would show: the logits are far from constant.
    assert expected.std() > 0.1
    assert (got - expected).abs().max() < 1e-10


# A sum with a decay, a delta rule, one with a decay per key, and one whose spec is the file's own.
_QUICK = ("mamba2", "delta_net", "kda", "comba")


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[pytest.mark.slow] * (kind not in _QUICK))
        for kind in (*FORWARD, "comba")
    ],
)
def test_convert_verify_save_reload_generate(kind: str, tmp_path: Path) -> None:
    c = make_config(kind)
    w = make_weights(c)
    import_original(write(tmp_path / "s", c, w), tmp_path / "i")
    report = convert_checkpoint(tmp_path / "i", tmp_path / "m")
    assert report.layers == tuple(range(LAYERS))
    assert not report.warnings
    verified = verify_checkpoint(
        tmp_path / "i", tmp_path / "m", batch=2, tokens=9, new_tokens=3, float64=True
    )
    assert not [check for check in verified.checks if not check.passed]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float64)
    assert type(model) is GlazooForCausalLM
    expected = forward(c, w, prompts())
    with torch.no_grad():
        assert (model(prompts()).logits - expected).abs().max() < 1e-10
        for name, p in model.named_parameters():
            if name.endswith("metaplastic.b_scale"):
                p.fill_(0.7)
        moved = model(prompts()).logits
    used = measure_use(model, prompts())
    assert [u.layer for u in used] == list(range(LAYERS))
    # Above what it is without any write.
    assert all(x > 1 for u in used for x in u.importance)
    # Importance does something, and survives a file.
    assert (moved - expected).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", dtype=torch.float64
    )
    kept = again.state_dict()
    assert all(torch.equal(x, kept[name]) for name, x in model.state_dict().items())
    with torch.no_grad():
        assert (again(prompts()).logits - moved).abs().max() < 1e-10
    mask = torch.ones_like(prompts())
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    tokens = again.generate(prompts(), attention_mask=mask, **options)
    assert tokens.shape == (2, TOKENS + 3)


def test_the_iteration_of_gka_stops_near_the_solution() -> None:
    torch.manual_seed(0)
    mixer, x = fla_mixers.Gka(), torch.randn(50, 6, 4, dtype=torch.float64)
    mixer.ridge_ratio = 0.02
    h, q = x.mT @ x, l2(torch.randn(50, 4, dtype=torch.float64))
    exact = mixer.solved(h, q)
    error = fla_mixers.chebyshev(h, q, 0.02, 30) - exact
    # One over the 31st Chebyshev polynomial where it is outside of the spectrum.
    bound = 1 / math.cosh(31 * math.acosh(1.04))
    assert bound < 3.3e-4
    assert bool((error.norm(dim=-1) <= bound * exact.norm(dim=-1)).all())


REFUSED: dict[str, tuple[str, Config, str]] = {
    "window": (
        "gla",
        {"attn": {"layers": [1], "num_heads": 2, "window_size": 64}},
        r"attn.window_size is 64, accepted is None",
    ),
    "bias": (
        "gla",
        {"attn": {"layers": [1], "num_heads": 2, "qkv_bias": True}},
        r"attn.qkv_bias is True, accepted is False",
    ),
    "two kinds of attention": (
        "kda",
        {"attn": [{"layers": [1], "num_heads": 2}, {"layers": [2], "num_heads": 4}]},
        "attn is .*, accepted is one kind of attention",
    ),
    "bounds beside attention": (
        "hgrn2",
        {"attn": {"layers": [1], "num_heads": 2}},
        "attn is .*, accepted with use_lower_bound is None",
    ),
    "two rotary bases": (
        "retnet",
        {"attn": {"layers": [1], "num_heads": 2, "rope_theta": 500.0}},
        r"attn.rope_theta is 500.0, accepted is 10000.0",
    ),
    "layers beyond": (
        "gla",
        {"attn": {"layers": [7], "num_heads": 2}},
        r"attn.layers has \[7\], the model has 3",
    ),
    "feed-forward activation": ("gla", {"hidden_act": "powlu"}, "hidden_act is 'powlu'"),
    "residual attention": ("kda", {"attnres_block_size": 4}, "attnres_block_size is 4, accepted"),
    "norm without weight": (
        "gla",
        {"elementwise_affine": False},
        "elementwise_affine is False, accepted is True",
    ),
    "feature map": (
        "linear_attn",
        {"feature_map": "hedgehog"},
        "feature_map is 'hedgehog', accepted are 'elementwise_product'",
    ),
    "key norm": ("linear_attn", {"norm_k": True}, "norm_k is True, accepted is False"),
    "gla feature map": (
        "gla",
        {"feature_map": "gelu"},
        "feature_map is 'gelu', accepted are",
    ),
    "signed sums": ("delta_net", {"qk_norm": "sum"}, "qk_norm is 'sum' with qk_activation"),
    "convolved decay": ("hgrn2", {"use_short_conv": True}, "use_short_conv is True"),
    "step limit": ("mamba2", {"dt_limit": [0.0, 0.1]}, r"dt_limit is \[0.0, 0.1\], accepted"),
    "projection bias": ("mamba2", {"use_bias": True}, "use_bias is True, accepted is False"),
    "norm before gate": ("mamba2", {"norm_before_gate": True}, "norm_before_gate is True"),
    "heads": ("gla", {"num_heads": 5}, "expand_k gives 16 channels, accepted are multiples of"),
    "value heads": ("kda", {"num_v_heads": 3}, "num_heads: got 3, accepted are multiples"),
    "unknown number": ("gla", {"rope_size": 0}, "rope_size is 0, and what it asks for is un"),
    "unknown field": ("gla", {"use_rope": True}, "use_rope is True, and what it asks for is un"),
    "architecture": ("gla", {"architectures": ["GLAModel"]}, r"architectures is \['GLAModel'\]"),
    "damage": ("gla", {"num_heads": "four"}, "config.json is damaged: "),
    "log-linear": (
        "mamba2",
        {"model_type": "log_linear_mamba2", "architectures": ["LogLinearMamba2ForCausalLM"]},
        "'log_linear_mamba2' of flash-linear-attention cannot be imported: it has a memory for",
    ),
    "wide output": ("mamba3", {"is_mimo": True}, "is_mimo is True, accepted is False"),
    "shared-key attention": ("rodimus", {"block_type": ...}, "is 'rodimus_plus', accepted is"),
    "no metaplasticity": ("palimpsa", {"metaplasticity": False}, "is False, accepted is True"),
    "correction": ("comba", {"use_output_correction": False}, "is False, accepted is True"),
    "solver": ("mesa_net", {"max_cg_step_training": 5}, "training is 5, accepted is 30"),
    "process noise": ("iso_kdn", {"omega_min": 0.1}, "omega_min is 0.1, accepted is 0.0"),
    "shared keys": ("diag_kdn", {"num_v_heads": 8}, "num_v_heads is 8, accepted is 4"),
    "two decays": ("gka", {"use_forgetting_gate_kk": False}, "_kk is False, accepted is True"),
    "iterations": ("gka", {"num_iter": 5}, "num_iter is 5, accepted is 30"),
    "quantised": ("gla", {"quantization_config": {"bits": 4}}, "is quantised; import"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_model_here_has_is_refused_by_name(name: str, tmp_path: Path) -> None:
    kind, changes, message = REFUSED[name]
    src = write(tmp_path / "s", make_config(kind, **changes), make_weights(make_config(kind)))
    with pytest.raises(ConversionError, match=message):
        import_original(src, tmp_path / "i")
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize(
    ("kind", "key", "value", "message"),
    [
        ("gla", "model.layers.1.attn.gk_proj.1.bias", None, "{key} is missing"),
        ("gla", "model.layers.1.attn.g_proj.weight", None, "{key} is missing"),
        ("gla", "model.layers.1.attn.g_norm.weight", (8,), "{key} is a second tensor"),
        ("gla", "model.layers.2.mlp.up_proj.weight", None, "mlp.up_proj.weight is missing"),
        ("gla", "model.embeddings.weight", None, "model.embed_tokens.weight is missing"),
        ("gla", "lm_head.weight", None, "lm_head.weight is missing"),
        ("gla", "model.layers.0.attn.q_conv1d.weight", (16, 1, 4), "{key} goes to our q_conv"),
        ("gla", "model.layers.0.attn.rotary.inv_freq", (8,), "no place for {key}"),
        ("gla", "model.layers.3.attn_norm.weight", (32,), "{key} has no place in the model"),
        ("gla", "model.layers.0.attn_res_proj.weight", (1, 32), "{key} has no place"),
        ("gla", "model.layers.0.attn.q_proj.weight", (32, 32), r"{key} has shape \[32, 32\]"),
        ("gla", "model.norm.weight", (31,), r"model.norm.weight has shape \[31\]"),
        ("hgrn2", "model.lower_bounds", (2, 32), r"lower_bounds.logits has shape \[2, 32\]"),
        ("hgrn2", "model.lower_bounds", None, "lower_bounds.logits is missing"),
        ("mamba2", "backbone.layers.0.mixer.in_proj.bias", (9,), "no place for {key}"),
        ("mamba2", "backbone.layers.2.mixer.D", None, "{key} is missing"),
        ("kda", "model.layers.0.attn.A_log", (1, 1, 2, 1), r"{key} has shape \[1, 1, 2, 1\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    kind: str, key: str, value: tuple[int, ...] | None, message: str, tmp_path: Path
) -> None:
    c = make_config(kind)
    w = make_weights(c)
    if value is None:
        del w[key]
    else:
        w[key] = torch.zeros(value, dtype=torch.float64)
    src = write(tmp_path / "s", c, w)
    with pytest.raises(ConversionError, match=message.format(key=key)):
        import_original(src, tmp_path / "i")
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_dtype_and_shards_are_kept(tmp_path: Path) -> None:
    c = make_config("gla", dtype="bfloat16")
    w = {k: x.to(torch.bfloat16) for k, x in make_weights(c).items()}
    src = write(tmp_path / "s", c, w)
    (src / "model.safetensors").unlink()
    names = {k: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, k in enumerate(w)}
    for file in set(names.values()):
        save_file({k: w[k] for k in w if names[k] == file}, src / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": names}
    (src / "model.safetensors.index.json").write_text(json.dumps(index))
    import_original(src, tmp_path / "i")
    stored = load_file(tmp_path / "i" / "model.safetensors")
    assert {x.dtype for x in stored.values()} == {torch.bfloat16}
    model = GlazooForCausalLM.from_pretrained(tmp_path / "i", dtype="auto")
    assert model.dtype == torch.bfloat16
    (src / names["lm_head.weight"]).unlink()
    with pytest.raises(ConversionError, match="the shard is missing"):
        import_original(src, tmp_path / "j")


@torch.no_grad()
def test_older_files_with_both_factors_of_the_mlp_in_one(tmp_path: Path) -> None:
    c = make_config("gla", hidden_ratio=2)
    w = make_weights(c)
    old = dict(w)
    for i in range(LAYERS):
        up, gate = (f"model.layers.{i}.mlp.{s}_proj.weight" for s in ("up", "gate"))
        old[gate] = torch.cat([w[gate], old.pop(up)])
    import_original(write(tmp_path / "s", c, old), tmp_path / "i")
    model = GlazooForCausalLM.from_pretrained(tmp_path / "i", dtype=torch.float64)
    assert (model(prompts()).logits - forward(c, w, prompts())).abs().max() < 1e-10


@torch.no_grad()
def test_pickles_with_shared_tensors(tmp_path: Path) -> None:
    c = make_config("linear_attn", tie_feature_map_qk=True)
    w = make_weights(c)
    src = write(tmp_path / "s", c, w)
    (src / "model.safetensors").unlink()
    shared = {k.replace("map_q", "map_k"): x for k, x in w.items()}
    torch.save(w | shared, src / "pytorch_model.bin")
    import_original(src, tmp_path / "i")
    model = GlazooForCausalLM.from_pretrained(tmp_path / "i", dtype=torch.float64)
    assert (model(prompts()).logits - forward(c, w, prompts())).abs().max() < 1e-10


def test_tied_embeddings_that_differ_are_refused(tmp_path: Path) -> None:
    c = make_config("gla")
    w = make_weights(c)
    src = write(tmp_path / "s", c | {"tie_word_embeddings": True}, w)
    with pytest.raises(ConversionError, match=r"ties the embeddings, but lm_head.weight and"):
        import_original(src, tmp_path / "i")
    w["lm_head.weight"] = w["model.embeddings.weight"].clone()
    write(src, c | {"tie_word_embeddings": True}, w)
    import_original(src, tmp_path / "i")
    assert "lm_head.weight" not in load_file(tmp_path / "i" / "model.safetensors")


def test_models_of_transformers_with_the_same_name_are_not_taken_for_the_packages(
    tmp_path: Path,
) -> None:
    config = transformers.Mamba2Config(
        hidden_size=32, num_heads=4, head_dim=16, state_size=8, num_hidden_layers=1, vocab_size=61
    )
    transformers.Mamba2ForCausalLM(config).save_pretrained(tmp_path / "s")
    assert inspect_checkpoint(tmp_path / "s").layers == (0,)
    with pytest.raises(ConversionError, match="not of flash-linear-attention"):
        import_original(tmp_path / "s", tmp_path / "i")
    theirs = write(tmp_path / "t", c := make_config("mamba2"), make_weights(c))
    with pytest.raises(ConversionError, match="of flash-linear-attention: import it first"):
        inspect_checkpoint(theirs)


def test_command(tmp_path: Path) -> None:
    c = make_config("gated_deltanet")
    src = write(tmp_path / "s", c, make_weights(c))
    (src / "generation_config.json").write_text('{"max_new_tokens": 3}')
    app = typer.Typer()
    app.command()(convert)
    runner = CliRunner()
    result = runner.invoke(app, [str(src), str(tmp_path / "i"), "--import"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "i" / "generation_config.json").is_file()
    result = runner.invoke(app, [str(tmp_path / "i"), str(tmp_path / "m"), "--verify"])
    assert result.exit_code == 0, result.output
