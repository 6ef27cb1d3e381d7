"""Weights of other packages' mixers in our layers: same outputs, exact round trips, no lost key."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glazoo.converters import exchange
from glazoo.converters.errors import ConversionError
from glazoo.layers import GatedLinearAttention

HIDDEN = 32


def transformers_mixer(kind: str) -> nn.Module:
    """Gives a small mixer of transformers with random weights everywhere."""
    # Importable, flash-linear-attention would replace the torch functions by GPU kernels.
    assert "fla" not in sys.modules
    from transformers import Mamba2Config, Qwen3NextConfig
    from transformers.models.kimi_linear import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    common: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": 1,
        "vocab_size": 10,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    linear = {"layer_types": ["linear_attention"]}
    heads = {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 6,
    }
    torch.manual_seed(0)
    mixer: nn.Module
    if kind == "transformers.mamba2":
        sizes = {"num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 2}
        mixer = Mamba2Mixer(Mamba2Config(**common, **sizes), 0)
    elif kind == "transformers.qwen3_next":
        mixer = Qwen3NextGatedDeltaNet(Qwen3NextConfig(**common, **heads, **linear), 0)
    elif kind == "transformers.qwen3_5":
        mixer = Qwen3_5GatedDeltaNet(Qwen3_5TextConfig(**common, **heads, **linear), 0)
    else:
        sizes = {"linear_head_dim": 4, "linear_num_heads": 3}
        mixer = KimiLinearDeltaAttention(KimiLinearConfig(**common, **sizes, **linear), 0)
    return scramble(mixer).eval()


def scramble(mixer: nn.Module) -> nn.Module:
    """Sets every vector and convolution to random numbers, so that none is where it started."""
    with torch.no_grad():
        for p in mixer.parameters():
            if p.ndim != 2:
                p.normal_()
    return mixer


def l2(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def heads(x: Tensor, size: int, repeat: int = 1) -> Tensor:
    return x.unflatten(-1, (-1, size)).repeat_interleave(repeat, 2)


def additive(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """S = Diag(exp g) S + k v^T ; y = S^T q / sqrt(K), one token after the other."""
    state = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1])
    out = []
    for t in range(q.shape[1]):
        state = g[:, t].exp()[..., None] * state + k[:, t, ..., None] * v[:, t, :, None]
        out.append((q[:, t, ..., None] * state).sum(2) * q.shape[-1] ** -0.5)
    return torch.stack(out, 1)


def delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    """S = Diag(exp g) S ; S = S + beta k (v - S^T k)^T ; y = S^T q / sqrt(K)."""
    state = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1])
    out = []
    for t in range(q.shape[1]):
        state = g[:, t].exp()[..., None] * state
        error = v[:, t] - (state * k[:, t, ..., None]).sum(2)
        state = state + k[:, t, ..., None] * (beta[:, t, :, None] * error)[:, :, None]
        out.append((q[:, t, ..., None] * state).sum(2) * q.shape[-1] ** -0.5)
    return torch.stack(out, 1)


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps


class ShortConvolution(nn.Module):
    def __init__(self, size: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, 1, taps) / taps)

    def forward(self, x: Tensor) -> Tensor:
        taps = self.weight.shape[-1]
        padded = F.pad(x, (0, 0, taps - 1, 0))
        y = sum(padded[:, j : j + x.shape[1]] * self.weight[:, 0, j] for j in range(taps))
        assert isinstance(y, Tensor)
        return F.silu(y)


def linear(i: int, o: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(i, o, bias=bias)


class Mixer(nn.Module):
    """A layer of flash-linear-attention, restated: its attributes, parameter names, arithmetic."""

    head_k_dim, head_v_dim, eps = 4, 6, 1e-4
    num_heads, num_v_heads, num_kv_heads = 4, 4, 4
    use_short_conv, conv_size, conv_bias = False, 3, False
    allow_neg_eigval, use_gate, use_beta = False, True, True
    hidden_size, layer_idx = HIDDEN, 1

    def projections(self, q: int, k: int, v: int, *, conv: bool) -> None:
        self.q_proj, self.k_proj = linear(HIDDEN, q), linear(HIDDEN, k)
        self.v_proj = linear(HIDDEN, v)
        if conv:
            self.use_short_conv = True
            self.q_conv1d = ShortConvolution(q, self.conv_size)
            self.k_conv1d = ShortConvolution(k, self.conv_size)
            self.v_conv1d = ShortConvolution(v, self.conv_size)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.use_short_conv:
            q, k, v = self.q_conv1d(q), self.k_conv1d(k), self.v_conv1d(v)
        return q, k, v


class Gla(Mixer):
    num_kv_heads = 2
    feature_map_fn = clamp_min = None
    use_output_gate = fuse_norm_and_gate = True
    gate_logit_normalizer = 8
    convolved = False

    def __init__(self) -> None:
        super().__init__()
        keys, values = self.num_kv_heads * self.head_k_dim, self.num_kv_heads * self.head_v_dim
        self.projections(self.num_heads * self.head_k_dim, keys, values, conv=self.convolved)
        width = self.num_heads * self.head_v_dim
        self.g_proj, self.o_proj = linear(HIDDEN, width), linear(width, HIDDEN)
        self.gk_proj = nn.Sequential(linear(HIDDEN, 5), linear(5, keys, bias=True))
        self.g_norm_swish_gate = Norm(self.head_v_dim, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        group = self.num_heads // self.num_kv_heads
        q, k = heads(q, self.head_k_dim), heads(k, self.head_k_dim, group)
        v = heads(v, self.head_v_dim, group)
        g = heads(F.logsigmoid(self.gk_proj(x)) / 8, self.head_k_dim, group)
        o = rms(additive(q, k, v, g), self.g_norm_swish_gate.weight, self.eps)
        o = o * F.silu(heads(self.g_proj(x), self.head_v_dim))
        y: Tensor = self.o_proj(o.flatten(2))
        return y


class ConvolvedGla(Gla):
    convolved = True


class Retention(Mixer):
    num_kv_heads = 2
    feature_map_fn = None
    use_output_gate = fuse_norm_and_gate = True

    def __init__(self) -> None:
        super().__init__()
        keys, values = self.num_kv_heads * self.head_k_dim, self.num_kv_heads * self.head_v_dim
        self.projections(self.num_heads * self.head_k_dim, keys, values, conv=False)
        width = self.num_heads * self.head_v_dim
        self.g_proj, self.o_proj = linear(HIDDEN, width), linear(width, HIDDEN)
        self.g_norm_swish_gate = Norm(self.head_v_dim, self.eps)

    def rotary(self, x: Tensor) -> Tensor:
        d = x.shape[-1]
        frequency = 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float32) / d)
        angle = torch.arange(x.shape[1])[:, None, None] * frequency
        a, b = x.chunk(2, -1)
        cos, sin = angle.to(x.dtype).cos(), angle.to(x.dtype).sin()
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        group = self.num_heads // self.num_kv_heads
        q = self.rotary(heads(q, self.head_k_dim))
        k = self.rotary(heads(k, self.head_k_dim)).repeat_interleave(group, 2)
        v = heads(v, self.head_v_dim, group)
        head = torch.arange(self.num_heads, dtype=x.dtype)
        g = torch.log(1 - 2 ** (-5 - head))[:, None].expand_as(q)
        o = rms(additive(q, k, v, g), self.g_norm_swish_gate.weight, self.eps)
        o = o * F.silu(heads(self.g_proj(x), self.head_v_dim))
        y: Tensor = self.o_proj(o.flatten(2))
        return y


class DeltaNet(Mixer):
    qk_activation, qk_norm = "silu", "l2"
    gated = False

    def __init__(self) -> None:
        super().__init__()
        self.use_gate = self.gated
        keys, width = self.num_heads * self.head_k_dim, self.num_heads * self.head_v_dim
        self.projections(keys, keys, width, conv=True)
        self.b_proj, self.o_proj = linear(HIDDEN, self.num_heads), linear(width, HIDDEN)
        if self.gated:
            self.g_proj = linear(HIDDEN, width)
        self.o_norm = Norm(self.head_v_dim, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        q, k = l2(heads(q, self.head_k_dim)), l2(heads(k, self.head_k_dim))
        v, beta = heads(v, self.head_v_dim), self.b_proj(x).sigmoid()
        o = rms(delta(q, k, v, beta, torch.zeros_like(q)), self.o_norm.weight, self.eps)
        if self.gated:
            o = o * F.silu(heads(self.g_proj(x), self.head_v_dim))
        y: Tensor = self.o_proj(o.flatten(2))
        return y


class GatedOutputDeltaNet(DeltaNet):
    gated = True


class GatedDeltaNet(Mixer):
    num_heads, allow_neg_eigval = 2, True

    def __init__(self) -> None:
        super().__init__()
        keys, width = self.num_heads * self.head_k_dim, self.num_v_heads * self.head_v_dim
        self.projections(keys, keys, width, conv=True)
        self.a_proj = linear(HIDDEN, self.num_v_heads)
        self.b_proj = linear(HIDDEN, self.num_v_heads)
        self.A_log = nn.Parameter(torch.zeros(self.num_v_heads))
        self.dt_bias = nn.Parameter(torch.zeros(self.num_v_heads))
        self.g_proj, self.o_proj = linear(HIDDEN, width), linear(width, HIDDEN)
        self.o_norm = Norm(self.head_v_dim, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        group = self.num_v_heads // self.num_heads
        q, k = l2(heads(q, self.head_k_dim, group)), l2(heads(k, self.head_k_dim, group))
        v, beta = heads(v, self.head_v_dim), 2 * self.b_proj(x).sigmoid()
        g = -self.A_log.exp() * F.softplus(self.a_proj(x) + self.dt_bias)
        o = delta(q, k, v, beta, g[..., None].expand_as(q))
        o = rms(o, self.o_norm.weight, self.eps)
        o = o * F.silu(heads(self.g_proj(x), self.head_v_dim))
        y: Tensor = self.o_proj(o.flatten(2))
        return y


class Kda(Mixer):
    lower_bound: float | None = None

    def __init__(self) -> None:
        super().__init__()
        keys, width = self.num_heads * self.head_k_dim, self.num_heads * self.head_v_dim
        self.projections(keys, keys, width, conv=True)
        low = self.head_v_dim
        self.f_proj = nn.Sequential(linear(HIDDEN, low), linear(low, keys))
        self.b_proj = linear(HIDDEN, self.num_heads)
        self.A_log = nn.Parameter(torch.zeros(self.num_heads))
        self.dt_bias = nn.Parameter(torch.zeros(keys))
        self.g_proj = nn.Sequential(linear(HIDDEN, low), linear(low, width, bias=True))
        self.o_norm, self.o_proj = Norm(self.head_v_dim, self.eps), linear(width, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        q, k = l2(heads(q, self.head_k_dim)), l2(heads(k, self.head_k_dim))
        v, beta = heads(v, self.head_v_dim), self.b_proj(x).sigmoid()
        z = heads(self.f_proj(x) + self.dt_bias, self.head_k_dim)
        rate = self.A_log.exp()[:, None]
        if self.lower_bound is None:
            g = -rate * F.softplus(z)
        else:
            g = self.lower_bound * torch.sigmoid(rate * z)
        o = rms(delta(q, k, v, beta, g), self.o_norm.weight, self.eps)
        o = o * torch.sigmoid(heads(self.g_proj(x), self.head_v_dim))
        y: Tensor = self.o_proj(o.flatten(2))
        return y


class SafeKda(Kda):
    lower_bound = -5.0


class HadamardFeatureMap(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer1, self.layer2 = linear(size, size, bias=True), linear(size, size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer1(x) * self.layer2(x)
        return y


class LinearAttention(Mixer):
    num_kv_heads = 2
    norm_q = norm_k = do_feature_map_norm = False

    def __init__(self) -> None:
        super().__init__()
        keys, values = self.num_kv_heads * self.head_k_dim, self.num_kv_heads * self.head_v_dim
        self.projections(self.num_heads * self.head_k_dim, keys, values, conv=False)
        self.feature_map_q, self.feature_map_k = self.maps()
        self.norm = Norm(self.head_v_dim, self.eps)
        self.o_proj = linear(self.num_heads * self.head_v_dim, HIDDEN)

    def maps(self) -> tuple[nn.Module, nn.Module]:
        return HadamardFeatureMap(self.head_k_dim), HadamardFeatureMap(self.head_k_dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        group = self.num_heads // self.num_kv_heads
        q = self.feature_map_q(heads(q, self.head_k_dim))
        k = self.feature_map_k(heads(k, self.head_k_dim, group))
        v = heads(v, self.head_v_dim, group)
        o = rms(additive(q, k, v, torch.zeros_like(q)), self.norm.weight, self.eps)
        y: Tensor = self.o_proj(o.flatten(2))
        return y


class ReluLinearAttention(LinearAttention):
    def maps(self) -> tuple[nn.Module, nn.Module]:
        return nn.ReLU(), nn.ReLU()


class Hgrn2(Mixer):
    head_f_dim, head_i_dim = 4, HIDDEN // 4

    def __init__(self) -> None:
        super().__init__()
        keys = self.num_heads * self.head_f_dim
        self.q_proj, self.f_proj = linear(HIDDEN, keys), linear(HIDDEN, keys)
        self.i_proj, self.o_proj = linear(HIDDEN, HIDDEN), linear(HIDDEN, HIDDEN)
        self.g_norm = Norm(HIDDEN, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        f = heads(torch.sigmoid(self.f_proj(x)), self.head_f_dim)
        q = heads(F.silu(self.q_proj(x)), self.head_f_dim)
        o = additive(q, 1 - f, heads(self.i_proj(x), self.head_i_dim), f.log())
        # The package's layer does not pass its epsilon on.
        y: Tensor = self.o_proj(rms(o.flatten(2), self.g_norm.weight, 1e-5))
        return y


FLA: dict[str, tuple[str, Callable[[], Mixer]]] = {
    "gla": ("fla.gla", Gla),
    "retnet": ("fla.retnet", Retention),
    "gla_convolution": ("fla.gla", ConvolvedGla),
    "linear_attn": ("fla.linear_attn", LinearAttention),
    "linear_attn_relu": ("fla.linear_attn", ReluLinearAttention),
    "delta_net": ("fla.delta_net", DeltaNet),
    "delta_net_gate": ("fla.delta_net", GatedOutputDeltaNet),
    "gated_deltanet": ("fla.gated_deltanet", GatedDeltaNet),
    "kda": ("fla.kda", Kda),
    "kda_safe": ("fla.kda", SafeKda),
    "hgrn2": ("fla.hgrn2", Hgrn2),
}
TRANSFORMERS = [kind for kind in exchange.KINDS if kind.startswith("transformers.")]


def fla_mixer(name: str) -> Mixer:
    torch.manual_seed(0)
    mixer = FLA[name][1]()
    scramble(mixer)
    return mixer


def test_every_map_is_tested() -> None:
    tested = {kind for kind, _ in FLA.values()} | set(TRANSFORMERS) | {"fla.mamba2"}
    assert tested == set(exchange.KINDS)


def rounding(mixer: nn.Module, tokens: int, y: Tensor) -> float:
    """Gives how far two float32 evaluations may be apart: half an ulp per term of every sum."""
    terms = sum(p.shape[-1] for p in mixer.parameters()) + tokens
    return terms * torch.finfo(torch.float32).eps / 2 * float(y.abs().max())


@pytest.mark.parametrize("kind", TRANSFORMERS)
@torch.no_grad()
def test_transformers_mixers_give_the_same_outputs(kind: str) -> None:
    mixer = transformers_mixer(kind)
    assert exchange.kind_of(mixer) == kind
    layer = exchange.from_mixer(mixer, impl="reference")
    torch.manual_seed(1)
    x = torch.randn(2, 11, HIDDEN)
    theirs = mixer(x)
    budget = rounding(mixer, 11, theirs)
    assert (layer(x).output - theirs).abs().max() < budget
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[0, :4] = 0
    padded = mixer(x, attention_mask=mask)
    ours = layer(x, mask).output
    assert (ours[0, 4:] - padded[0, 4:]).abs().max() < budget
    assert (ours[1] - padded[1]).abs().max() < budget


@pytest.mark.parametrize("name", FLA)
@torch.no_grad()
def test_fla_mixers_give_the_same_outputs(name: str) -> None:
    mixer = fla_mixer(name)
    torch.manual_seed(1)
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    low = mixer(x.float())
    exact = mixer.double()(x)
    layer = exchange.from_mixer(mixer, kind=FLA[name][0], impl="reference")
    # Both in float64: nearer to each other than the same mixer in float32 is to itself.
    assert (layer(x).output - exact).abs().max() < (low - exact).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*FLA, *TRANSFORMERS])
def test_round_trip_is_exact(name: str, dtype: torch.dtype) -> None:
    mixer = transformers_mixer(name) if name in TRANSFORMERS else fla_mixer(name)
    kind = name if name in TRANSFORMERS else FLA[name][0]
    mixer.to(dtype)
    state = exchange.dump(exchange.from_mixer(mixer, kind=kind), kind)
    theirs = mixer.state_dict()
    assert state.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(state[key].to(dtype), value), key
    mixer.load_state_dict(state)


def test_both_mamba2_maps_are_one() -> None:
    mixer = transformers_mixer("transformers.mamba2")
    a = exchange.from_mixer(mixer, kind="transformers.mamba2").state_dict()
    b = exchange.from_mixer(mixer, kind="fla.mamba2").state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_nothing_is_dropped() -> None:
    mixer = fla_mixer("gla")
    layer = exchange.from_mixer(mixer, kind="fla.gla")
    state = mixer.state_dict()
    with pytest.raises(ConversionError, match=r"no place for in_proj\.bias"):
        exchange.load(layer, state | {"in_proj.bias": torch.zeros(1)}, "fla.gla")
    less = {k: v for k, v in state.items() if k != "q_proj.weight"}
    with pytest.raises(ConversionError, match=r"q_proj\.weight is missing"):
        exchange.load(layer, less, "fla.gla")
    with pytest.raises(ConversionError, match=r"o_proj\.weight has shape \[32, 12\]"):
        exchange.load(layer, state | {"o_proj.weight": torch.zeros(32, 12)}, "fla.gla")
    with pytest.raises(ConversionError, match=r"no place for our decay\.proj\.down\.weight"):
        exchange.dump(layer, "fla.retnet")
    gated = exchange.from_mixer(fla_mixer("delta_net_gate"), kind="fla.delta_net")
    with pytest.raises(ConversionError, match=r"g_proj\.weight is missing"):
        exchange.load(gated, fla_mixer("delta_net").state_dict(), "fla.delta_net")


def test_unknown_mixers_and_options_are_refused() -> None:
    with pytest.raises(ConversionError, match="mixer: got torch"):
        exchange.from_mixer(nn.Linear(2, 2))
    with pytest.raises(ConversionError, match=r"kind: got 'fla\.rwkv5'"):
        exchange.from_mixer(nn.Linear(2, 2), kind="fla.rwkv5")
    mixer: Any = transformers_mixer("transformers.mamba2")
    mixer.time_step_limit = [0.01, 0.5]
    with pytest.raises(ConversionError, match="time_step_limit: got"):
        exchange.from_mixer(mixer)
    retention: Any = fla_mixer("retnet")
    retention.use_short_conv = True
    with pytest.raises(ConversionError, match="use_short_conv: got True, accepted is False"):
        exchange.from_mixer(retention, kind="fla.retnet")


def test_converted_mixer_can_be_made_metaplastic() -> None:
    from glazoo.layers import metaplasticize

    mixer = transformers_mixer("transformers.qwen3_next")
    layer = exchange.from_mixer(mixer, impl="reference")
    x = torch.randn(1, 7, HIDDEN)
    with torch.no_grad():
        theirs = mixer(x)
        metaplasticize(layer)
        ours = layer(x).output
    assert isinstance(layer, GatedLinearAttention)
    assert (ours - theirs).abs().max() < rounding(mixer, 7, theirs)
