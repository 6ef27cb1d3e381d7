"""Layers of flash-linear-attention, restated: their attributes, their parameters' names, and their
arithmetic, one token after the other."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN = 32


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


def delta(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, write: Tensor | None = None
) -> Tensor:
    """S = Diag(exp g) S ; S = S + w beta (v - S^T k)^T ; y = S^T q / sqrt(K), with w = k."""
    write = k if write is None else write
    state = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1])
    out = []
    for t in range(q.shape[1]):
        state = g[:, t].exp()[..., None] * state
        error = v[:, t] - (state * k[:, t, ..., None]).sum(2)
        state = state + write[:, t, ..., None] * (beta[:, t, :, None] * error)[:, :, None]
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
    options: tuple[str, ...] = ()
    """What a configuration sets."""

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


class Comba(GatedDeltaNet):
    allow_neg_eigval = False
    use_output_gate = use_inner_decay = use_output_correction = True

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.ones(self.num_heads))
        self.D = nn.Parameter(torch.ones(self.num_heads))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        q, k, v = heads(q, self.head_k_dim), heads(k, self.head_k_dim), heads(v, self.head_v_dim)
        p = k * torch.sigmoid(self.decay)[:, None]
        q = q - self.D[:, None] * p
        group = self.num_v_heads // self.num_heads
        q, k, p = (l2(y).repeat_interleave(group, 2) for y in (q, k, p))
        beta = self.b_proj(x).sigmoid()
        a = torch.exp(-self.A_log.exp() * F.softplus(self.a_proj(x) + self.dt_bias))
        state = q.new_zeros(x.shape[0], self.num_v_heads, self.head_k_dim, self.head_v_dim)
        out = []
        for t in range(x.shape[1]):
            # What is predicted is the state before it forgets.
            error = v[:, t] - (state * p[:, t, ..., None]).sum(2)
            change = k[:, t, ..., None] * (beta[:, t, :, None] * error)[:, :, None]
            state = a[:, t, :, None, None] * state + change
            out.append((q[:, t, ..., None] * state).sum(2) * self.head_k_dim**-0.5)
        o = rms(torch.stack(out, 1), self.o_norm.weight, self.eps)
        o = o * torch.sigmoid(heads(self.g_proj(x), self.head_v_dim))
        y: Tensor = self.o_proj(o.flatten(2))
        return y


class GatedDeltaProduct(GatedDeltaNet):
    use_output_gate = use_forget_gate = True
    num_householder = 2

    def __init__(self) -> None:
        super().__init__()
        n, keys = self.num_householder, self.num_heads * self.head_k_dim
        width = self.num_v_heads * self.head_v_dim
        self.projections(keys, n * keys, n * width, conv=True)
        self.b_proj = linear(HIDDEN, n * self.num_v_heads)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        n, group = self.num_householder, self.num_v_heads // self.num_heads
        beta = 2 * self.b_proj(x).sigmoid()
        g = torch.zeros_like(beta)
        # It forgets before the first write of a token.
        g[..., : self.num_v_heads] = -self.A_log.exp() * F.softplus(self.a_proj(x) + self.dt_bias)
        k, v, beta, g = (y.unflatten(-1, (n, -1)).flatten(1, 2) for y in (k, v, beta, g))
        q = heads(q, self.head_k_dim, group).repeat_interleave(n, 1)
        k, v = heads(k, self.head_k_dim, group), heads(v, self.head_v_dim)
        o = delta(l2(q), l2(k), v, beta, g[..., None].expand_as(k))[:, n - 1 :: n]
        o = rms(o, self.o_norm.weight, self.eps)
        o = o * F.silu(heads(self.g_proj(x), self.head_v_dim))
        y: Tensor = self.o_proj(o.flatten(2))
        return y


def preconditioned(mixer: Any, k: Tensor, b: Tensor, z: Tensor) -> Tensor:
    """k x^-softsign(log(P + eps) - c), P = exp(-exp(A) softplus(z)) P + b k^2."""
    a = torch.exp(-mixer.A_log_atk.exp() * F.softplus(z + mixer.dt_bias_atk))
    seen, out = torch.zeros_like(k[:, 0]), []
    for t in range(k.shape[1]):
        seen = a[:, t, :, None] * seen + b[:, t, :, None] * k[:, t].square()
        power = F.softsign(torch.log(seen + mixer.squash_eps) - mixer.log_atk_scale[:, None])
        out.append(k[:, t] * mixer.squash_x**-power)
    return torch.stack(out, 1)


class PrecondGatedDeltaNet(GatedDeltaNet):
    num_heads, squash_x, squash_eps = 4, 1.7, 1e-3

    def __init__(self) -> None:
        super().__init__()
        self.a_atk_proj = linear(HIDDEN, self.num_heads)
        self.b_atk_proj = linear(HIDDEN, self.num_heads)
        for name in ("log_atk_scale", "A_log_atk", "dt_bias_atk"):
            setattr(self, name, nn.Parameter(torch.zeros(self.num_heads)))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        q, k = l2(heads(q, self.head_k_dim)), l2(heads(k, self.head_k_dim))
        v, beta = heads(v, self.head_v_dim), 2 * self.b_proj(x).sigmoid()
        g = -self.A_log.exp() * F.softplus(self.a_proj(x) + self.dt_bias)
        write = preconditioned(self, k, self.b_atk_proj(x).sigmoid(), self.a_atk_proj(x))
        o = delta(q, k, v, beta, g[..., None].expand_as(q), write)
        o = rms(o, self.o_norm.weight, self.eps)
        o = o * F.silu(heads(self.g_proj(x), self.head_v_dim))
        y: Tensor = self.o_proj(o.flatten(2))
        return y


class PrecondKda(Kda):
    squash_x_val, squash_x, squash_eps = 1.7, 1.7, 1e-3

    def __init__(self) -> None:
        super().__init__()
        self.a_proj = linear(HIDDEN, self.num_heads)
        self.b_atk_proj = linear(HIDDEN, self.num_heads)
        for name in ("log_atk_scale", "A_log_atk", "dt_bias_atk"):
            setattr(self, name, nn.Parameter(torch.zeros(self.num_heads)))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        q, k = l2(heads(q, self.head_k_dim)), l2(heads(k, self.head_k_dim))
        v, beta = heads(v, self.head_v_dim), self.b_proj(x).sigmoid()
        z = heads(self.f_proj(x) + self.dt_bias, self.head_k_dim)
        g = -self.A_log.exp()[:, None] * F.softplus(z)
        write = preconditioned(self, k, self.b_atk_proj(x).sigmoid(), self.a_proj(x))
        o = rms(delta(q, k, v, beta, g, write), self.o_norm.weight, self.eps)
        o = o * torch.sigmoid(heads(self.g_proj(x), self.head_v_dim))
        y: Tensor = self.o_proj(o.flatten(2))
        return y


class LightNet(Mixer):
    head_f_dim, head_i_dim, gate_low_rank_dim = 4, HIDDEN // 4, 5

    def __init__(self) -> None:
        super().__init__()
        self.projections(16, 16, HIDDEN, conv=False)
        self.g_proj = nn.Sequential(linear(HIDDEN, 5), linear(5, HIDDEN))
        self.g_norm, self.o_proj = Norm(HIDDEN, self.eps), linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        q, k = heads(F.silu(q), self.head_f_dim), heads(k, self.head_f_dim)
        v = heads(v, self.head_i_dim)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        # What a slot holds is a softmax over the tokens so far.
        score = k[:, None].expand(-1, x.shape[1], -1, -1, -1)
        share = score.masked_fill(later[None, :, :, None, None], -torch.inf).softmax(2)
        o = torch.einsum("bthk,btshk,bshv->bthv", q, share, v) * self.head_f_dim**-0.5
        # The package's layer does not pass its epsilon on.
        o = rms(o.flatten(2), self.g_norm.weight, 1e-6) * F.silu(self.g_proj(x))
        y: Tensor = self.o_proj(o)
        return y


class MesaNet(Mixer):
    head_dim, head_v_dim, lambda_lower_bound = 4, 4, 0.4
    use_output_gate = True
    max_cg_step_training = max_cg_step_decoding = 30

    def __init__(self) -> None:
        super().__init__()
        self.projections(16, 16, 16, conv=True)
        del self.v_conv1d
        self.a_proj, self.b_proj = linear(HIDDEN, 4, bias=True), linear(HIDDEN, 4, bias=True)
        self.lambda_params = nn.Parameter(torch.ones(16))
        self.g_proj, self.o_proj = linear(HIDDEN, 16), linear(16, HIDDEN)
        self.o_norm = Norm(4, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q_conv1d(self.q_proj(x)), self.k_conv1d(self.k_proj(x))
        q, k, v = l2(heads(q, 4)), l2(heads(k, 4)), heads(self.v_proj(x), 4)
        a, beta = self.a_proj(x).sigmoid(), self.b_proj(x).sigmoid()
        ridge = torch.diag_embed(F.softplus(self.lambda_params).view(4, 4) + 0.4)
        keys = values = torch.zeros(x.shape[0], 4, 4, 4, dtype=x.dtype)
        out = []
        for t in range(x.shape[1]):
            weighted = (beta[:, t, :, None] * k[:, t])[..., None]
            keys = a[:, t, :, None, None] * keys + weighted * k[:, t, :, None]
            values = a[:, t, :, None, None] * values + weighted * v[:, t, :, None]
            solved = torch.linalg.solve(keys + ridge, q[:, t, ..., None])
            out.append((solved * values).sum(2))
        o = rms(torch.stack(out, 1), self.o_norm.weight, self.eps) * F.silu(
            heads(self.g_proj(x), 4)
        )
        y: Tensor = self.o_proj(o.flatten(2))
        return y


class Kdn(Mixer):
    """What both Kalman Delta Networks share; their gains below."""

    head_dim, conv_size = 4, 3
    omega_min, r_min = 0.0, 0.02
    info_scale: float | None = None
    options = ("info_scale", "r_min")

    def __init__(self) -> None:
        super().__init__()
        keys, width = self.num_heads * self.head_k_dim, self.num_v_heads * self.head_v_dim
        low, gates = self.head_v_dim, self.num_v_heads * self.head_k_dim
        self.projections(keys, keys, width, conv=True)
        self.f_proj = nn.Sequential(linear(HIDDEN, low), linear(low, gates))
        self.A_log = nn.Parameter(torch.zeros(self.num_v_heads))
        self.dt_bias = nn.Parameter(torch.zeros(gates))
        self.initial_precision_param = nn.Parameter(torch.zeros(self.num_v_heads))
        self.g_proj = nn.Sequential(linear(HIDDEN, low), linear(low, width, bias=True))
        self.o_norm, self.o_proj = Norm(self.head_v_dim, self.eps), linear(width, HIDDEN)

    def noises(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is left to softplus: of the process, and of the observation."""
        raise NotImplementedError

    def gain(self, c: Tensor, k: Tensor, a: Tensor, w: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gain [B, H, K] and the next precision, of the precision c."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        group = self.num_v_heads // self.num_heads
        q, k = l2(heads(q, self.head_k_dim, group)), l2(heads(k, self.head_k_dim, group))
        v = heads(v, self.head_v_dim)
        z = heads(self.f_proj(x) + self.dt_bias, self.head_k_dim)
        a = (-self.A_log.exp()[:, None] * F.softplus(z)).exp()
        w, r = (F.softplus(noise) for noise in self.noises(x))
        c = (0.1 + F.softplus(self.initial_precision_param)).expand(x.shape[0], -1)
        state = x.new_zeros(*c.shape, self.head_k_dim, self.head_v_dim)
        out = []
        for t in range(x.shape[1]):
            gain, c = self.gain(c, k[:, t], a[:, t], self.omega_min + w[:, t], self.r_min + r[:, t])
            state = a[:, t, :, :, None] * state
            error = v[:, t] - (state * k[:, t, ..., None]).sum(2)
            state = state + gain[..., None] * error[:, :, None]
            out.append((q[:, t, ..., None] * state).sum(2) * self.head_k_dim**-0.5)
        o = rms(torch.stack(out, 1), self.o_norm.weight, self.eps)
        o = o * torch.sigmoid(heads(self.g_proj(x), self.head_v_dim))
        y: Tensor = self.o_proj(o.flatten(2))
        return y


class IsoKdn(Kdn):
    num_heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.omega_proj, self.r_proj = linear(HIDDEN, 4), linear(HIDDEN, 4)
        self.omega_bias = nn.Parameter(torch.zeros(4))
        self.r_bias = nn.Parameter(torch.zeros(4))

    def noises(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.omega_proj(x) + self.omega_bias, self.r_proj(x) + self.r_bias

    def gain(self, c: Tensor, k: Tensor, a: Tensor, w: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        # As the package's loop over tokens has it; its kernels take the length of keys as 1.
        size = k.shape[-1]
        length, scale = k.square().sum(-1), self.info_scale or size
        p = a.square().mean(-1) / c + w
        return (p / (r + p * length))[..., None] * k, 1 / p + scale * length / (size * r)


class DiagKdn(Kdn):
    def __init__(self) -> None:
        super().__init__()
        keys = self.num_heads * self.head_k_dim
        self.omega_proj = nn.Sequential(linear(HIDDEN, 6), linear(6, keys, bias=True))
        self.r_proj = linear(HIDDEN, self.num_heads, bias=True)

    def noises(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return heads(self.omega_proj(x), self.head_k_dim), self.r_proj(x)

    def gain(self, c: Tensor, k: Tensor, a: Tensor, w: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        p = a.square() / (c if c.ndim == 3 else c[..., None]) + w
        r, scale = r[..., None], self.info_scale or k.shape[-1]
        gain = p * k / (r + (p * k.square()).sum(-1, keepdim=True))
        return gain, 1 / p + scale * k.square() / r


def chebyshev(h: Tensor, q: Tensor, share: float, steps: int) -> Tensor:
    """The iteration for (h + share |h|) x = q, a spectrum from share |h| to that and |h|."""
    norm = torch.linalg.matrix_norm(h)[..., None]
    ridge, size = share * norm, 2 / (2 * share * norm + norm)
    quarter = (norm * size / 4).square()
    before, x, w = torch.zeros_like(q), size * q, 2 * torch.ones_like(size)
    for _ in range(steps):
        w = 1 / (1 - quarter * w)
        left = (h @ x[..., None])[..., 0] + ridge * x - q
        before, x = x, w * (x - size * left) + (1 - w) * before
    return x


class Gka(Mixer):
    head_dim, conv_size = 4, 3
    num_heads = 2
    num_v_heads: int | None = 4  # type: ignore[assignment]
    num_kv_heads: int | None = None  # type: ignore[assignment]
    use_beta_gate = use_alpha_connection = use_v_conv = True
    use_forgetting_gate = use_forgetting_gate_kk = gla_rescale = True
    ridge_ratio, num_iter = 0.05, 30
    options = (
        *("num_heads", "num_v_heads", "num_kv_heads", "use_beta_gate", "use_alpha_connection"),
        *("use_v_conv", "use_forgetting_gate", "gla_rescale", "ridge_ratio", "use_gate"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.num_k_heads = self.num_kv_heads or self.num_heads
        self.num_v_heads = self.num_kv_heads or self.num_v_heads or self.num_heads
        self.num_expanded_heads = n = max(self.num_heads, self.num_v_heads)
        sizes = self.num_heads * 4, self.num_k_heads * 4, self.num_v_heads * 6
        self.projections(*sizes, conv=True)
        if not self.use_v_conv:
            del self.v_conv1d
        if self.use_beta_gate:
            self.b_proj = linear(HIDDEN, n, bias=True)
        if self.use_alpha_connection:
            self.alpha_proj = linear(HIDDEN, n, bias=True)
        if self.use_forgetting_gate:
            self.a_proj = linear(HIDDEN, n)
            self.A_log, self.dt_bias = (nn.Parameter(torch.zeros(n)) for _ in range(2))
        if self.use_gate:
            self.g_proj = linear(HIDDEN, n * 6)
        self.o_norm, self.o_proj = Norm(6, self.eps), linear(n * 6, HIDDEN)

    def solved(self, h: Tensor, q: Tensor) -> Tensor:
        share = self.ridge_ratio * torch.linalg.matrix_norm(h)[..., None, None]
        eye = torch.eye(4, dtype=h.dtype)
        x: Tensor = torch.linalg.solve(h + share * eye, q[..., None])[..., 0]
        return x

    def forward(self, x: Tensor) -> Tensor:
        n, v = self.num_expanded_heads, self.v_proj(x)
        v = self.v_conv1d(v) if self.use_v_conv else v
        q, k = self.q_conv1d(self.q_proj(x)), self.k_conv1d(self.k_proj(x))
        q, k, v = (heads(y, size, n * size // y.shape[-1]) for y, size in ((q, 4), (k, 4), (v, 6)))
        q, k = l2(q), l2(k)
        if self.use_beta_gate:
            beta = self.b_proj(x).sigmoid()[..., None] + 1e-6
            k, v = beta * k, beta * v
        a = x.new_ones(*x.shape[:2], n)
        if self.use_forgetting_gate:
            a = (-self.A_log.exp() * F.softplus(self.a_proj(x) + self.dt_bias)).exp()
        h, u = x.new_zeros(x.shape[0], n, 4, 4), x.new_zeros(x.shape[0], n, 4, 6)
        out = []
        for t in range(x.shape[1]):
            h = a[:, t, :, None, None] * h + k[:, t, :, :, None] * k[:, t, :, None]
            u = a[:, t, :, None, None] * u + k[:, t, :, :, None] * v[:, t, :, None]
            z = self.solved(h, q[:, t])
            if self.use_alpha_connection:
                alpha = self.alpha_proj(x[:, t]).sigmoid()[..., None]
                z = q[:, t] + alpha * (z - q[:, t])
            out.append((z[..., None] * u).sum(2) * (0.5 if self.gla_rescale else 1.0))
        o = rms(torch.stack(out, 1), self.o_norm.weight, self.eps)
        if self.use_gate:
            o = o * F.silu(heads(self.g_proj(x), 6))
        y: Tensor = self.o_proj(o.flatten(2))
        return y


class Gdn2(Kda):
    """An erase gate per key channel and a write gate per value channel."""

    allow_neg_eigval = True

    def __init__(self) -> None:
        super().__init__()
        keys, width = self.num_heads * self.head_k_dim, self.num_heads * self.head_v_dim
        self.b_proj, self.w_proj = linear(HIDDEN, keys), linear(HIDDEN, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        q, k = l2(heads(q, self.head_k_dim)), l2(heads(k, self.head_k_dim))
        erase = 2 * heads(self.b_proj(x).sigmoid(), self.head_k_dim) * k
        v = heads(self.w_proj(x).sigmoid() * v, self.head_v_dim)
        z = heads(self.f_proj(x) + self.dt_bias, self.head_k_dim)
        decay = torch.exp(-self.A_log.exp()[:, None] * F.softplus(z))
        state = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1])
        out = []
        for t in range(x.shape[1]):
            state = decay[:, t, ..., None] * state
            error = v[:, t] - (state * erase[:, t, ..., None]).sum(2)
            state = state + k[:, t, ..., None] * error[:, :, None]
            out.append((q[:, t, ..., None] * state).sum(2) * q.shape[-1] ** -0.5)
        o = rms(torch.stack(out, 1), self.o_norm.weight, self.eps)
        o = o * torch.sigmoid(heads(self.g_proj(x), self.head_v_dim))
        y: Tensor = self.o_proj(o.flatten(2))
        return y


class Rodimus(Mixer):
    d_inner, mem_size, input_gate_low_rank = 2 * HIDDEN, 6, 3
    norm_eps, conv_size, use_short_conv, block_type = 1e-4, 3, True, "rodimus"

    def __init__(self) -> None:
        super().__init__()
        inner, keys = self.d_inner, self.mem_size
        self.gate_proj, self.up_proj = linear(HIDDEN, inner), linear(HIDDEN, inner)
        self.activation_norm = Norm(inner, self.norm_eps)
        self.down_proj = linear(inner, HIDDEN)
        self.short_conv = ShortConvolution(inner, self.conv_size)
        self.short_conv.bias = nn.Parameter(torch.zeros(inner))
        self.residual_weight = nn.Parameter(torch.ones(inner))
        self.q_proj, self.k_proj = linear(inner, keys), linear(inner, keys)
        self.g_gate_proj, self.tau_gate_proj = (linear(inner, keys, bias=True) for _ in range(2))
        low = self.input_gate_low_rank
        self.i_gate_proj = nn.Sequential(linear(inner, low), linear(low, inner, bias=True))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.up_proj(x)
        taps = self.short_conv.weight[:, 0]
        padded = F.pad(inner, (0, 0, taps.shape[1] - 1, 0)).unfold(1, taps.shape[1], 1)
        mixed = F.silu((padded * taps).sum(-1) + self.short_conv.bias)
        gate, tau = F.softplus(self.g_gate_proj(mixed)), self.tau_gate_proj(mixed).sigmoid()
        q, k = self.q_proj(mixed), F.normalize(self.k_proj(mixed), dim=-1) * gate**tau
        v = self.i_gate_proj(inner).sigmoid() * inner
        o = additive(q[:, :, None], k[:, :, None], v[:, :, None], (-gate * tau)[:, :, None])[
            :, :, 0
        ]
        o = o + mixed * self.residual_weight
        o = rms(o * F.silu(self.gate_proj(x)), self.activation_norm.weight, self.norm_eps)
        y: Tensor = self.down_proj(o)
        return y


class Mamba3(Mixer):
    ssm_state_size, head_dim, n_groups, rope_fraction, A_floor = 8, 16, 2, 0.5, 1e-3
    is_mimo = is_outproj_norm = use_bias = False
    norm_eps = 1e-5

    def __init__(self) -> None:
        super().__init__()
        keys, inner, n = self.n_groups * self.ssm_state_size, 2 * HIDDEN, self.num_heads
        self.in_proj = linear(HIDDEN, 2 * inner + 2 * keys + 3 * n + 2)
        self.dt_bias, self.D = (nn.Parameter(torch.ones(n)) for _ in range(2))
        size = self.ssm_state_size
        self.B_bias, self.C_bias = (nn.Parameter(torch.ones(n, 1, size)) for _ in range(2))
        self.B_norm, self.C_norm = Norm(size, self.norm_eps), Norm(size, self.norm_eps)
        self.out_proj = linear(inner, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        n, size = self.num_heads, self.ssm_state_size
        keys, inner = self.n_groups * size, 2 * HIDDEN
        z, v, b, c, dt, a, trap, angle = self.in_proj(x).split(
            [inner, inner, keys, keys, n, n, n, 2], -1
        )
        step = F.softplus(dt + self.dt_bias)
        decay = torch.exp(-F.softplus(a).clamp(min=self.A_floor) * step)
        turn = (torch.pi * torch.tanh(angle)[:, :, None] * step[..., None]).cumsum(1)
        qk = []
        for y, norm, bias in ((c, self.C_norm, self.C_bias), (b, self.B_norm, self.B_bias)):
            y = rms(heads(y, size), norm.weight, self.norm_eps)
            y = y.repeat_interleave(n // self.n_groups, 2) + bias[:, 0]
            # Neighbouring channels are the two parts of a number.
            pairs = torch.view_as_complex(y[..., :4].unflatten(-1, (2, 2)).contiguous())
            turned = torch.view_as_real(pairs * torch.exp(1j * turn)).flatten(-2)
            qk.append(torch.cat([turned, y[..., 4:]], -1))
        q, k = qk
        v, lam = heads(v, self.head_dim), trap.sigmoid()
        state = q.new_zeros(*q.shape[:1], *q.shape[2:], self.head_dim)
        before, out = torch.zeros_like(state), []
        for t in range(x.shape[1]):
            f, d, share = (y[:, t, :, None, None] for y in (decay, step, lam))
            now = k[:, t, ..., None] * v[:, t, :, None]
            state = f * state + f * (1 - share) * d * before + share * d * now
            before = now
            out.append((q[:, t, ..., None] * state).sum(2))
        o = torch.stack(out, 1) + self.D[:, None] * v
        y: Tensor = self.out_proj(o.flatten(2) * F.silu(z))
        return y


def metaplastic(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, prior: Tensor) -> Tensor:
    """M = a M + v k^T ; I = a I + (1 - a) I0 + b (x) k^2 ; y = (M / I) q, from I = I0."""
    total = prior[:, None, None].expand(*q.shape[:1], q.shape[2], v.shape[-1], q.shape[-1])
    sums, out = torch.zeros_like(total), []
    for t in range(q.shape[1]):
        a = g[:, t].exp()[..., None, None]
        sums = a * sums + v[:, t, ..., None] * k[:, t, :, None]
        total = a * total + (1 - a) * prior[:, None, None]
        total = total + b[:, t, ..., None] * k[:, t, :, None] ** 2
        out.append((sums / total * q[:, t, :, None]).sum(-1))
    return torch.stack(out, 1)


class Palimpsa(Mixer):
    """Of the paper's authors."""

    num_heads, num_v_heads, beta_step_rank = 4, 4, 5
    use_residual = metaplasticity = True

    def __init__(self) -> None:
        super().__init__()
        n, width = self.num_heads, self.num_v_heads * self.head_v_dim
        self.projections(n * self.head_k_dim, n * self.head_k_dim, width, conv=True)
        self.b_rank_proj = linear(HIDDEN, self.beta_step_rank)
        self.b_proj = linear(self.beta_step_rank, width)
        self.bs_proj, self.dt_proj = linear(HIDDEN, n), linear(HIDDEN, n)
        for name in ("b_scale", "Ip_log", "A_log", "dt_bias", "D"):
            setattr(self, name, nn.Parameter(torch.zeros(n)))
        self.g_proj, self.o_proj = linear(HIDDEN, width), linear(width, HIDDEN)
        self.o_norm = Norm(self.head_v_dim, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        q, k = (F.normalize(heads(y, self.head_k_dim), dim=-1) for y in (q, k))
        v, gate = heads(v, self.head_v_dim), self.bs_proj(x).sigmoid()[..., None]
        b = heads(self.b_proj(self.b_rank_proj(x)), self.head_v_dim).sigmoid()
        b = b * F.softplus(self.b_scale)[:, None] * gate
        g = -self.A_log.exp() * F.softplus(self.dt_proj(x) + self.dt_bias)
        o = metaplastic(q * self.head_k_dim**-0.5, k, gate * v, g, b, self.Ip_log.exp())
        o = rms(o + self.D[:, None] * v, self.o_norm.weight, self.eps)
        y: Tensor = self.o_proj((o * F.silu(heads(self.g_proj(x), self.head_v_dim))).flatten(2))
        return y


class MetaMamba2(Mixer):
    """Of the paper's authors."""

    ssm_state_size, head_dim, n_groups, conv_kernel_size, beta_step_rank = 8, 16, 2, 3, 5
    norm_eps, use_bias, metaplasticity, activation, rms_norm = 1e-4, False, True, "silu", True
    time_step_limit = (0.0, float("inf"))

    def __init__(self) -> None:
        super().__init__()
        keys, inner, n = self.n_groups * self.ssm_state_size, 2 * HIDDEN, self.num_heads
        self.in_proj = linear(HIDDEN, 2 * inner + 2 * keys + n)
        self.conv1d = ShortConvolution(inner + 2 * keys, self.conv_kernel_size)
        for name in ("b_scale", "Ip_log", "A_log", "dt_bias", "D"):
            setattr(self, name, nn.Parameter(torch.zeros(n)))
        self.norm, self.out_proj = Norm(inner, self.norm_eps), linear(inner, HIDDEN)
        self.b_rank_proj = linear(HIDDEN, self.beta_step_rank)
        self.b_proj = linear(self.beta_step_rank, inner)

    use_conv_bias = False

    def forward(self, x: Tensor) -> Tensor:
        keys, inner, group = self.n_groups * self.ssm_state_size, 2 * HIDDEN, 2
        z, xbc, dt = self.in_proj(x).split([inner, inner + 2 * keys, self.num_heads], -1)
        v, k, q = self.conv1d(xbc).split([inner, keys, keys], -1)
        q, k = (heads(y, self.ssm_state_size, group) for y in (q, k))
        v, step = heads(v, self.head_dim), F.softplus(dt + self.dt_bias)
        b = heads(self.b_proj(self.b_rank_proj(x)), self.head_dim).sigmoid()
        b = b * F.softplus(self.b_scale)[:, None] * step[..., None]
        g = -self.A_log.exp() * step
        o = metaplastic(q, k, step[..., None] * v, g, b, self.Ip_log.exp())
        o = (o + self.D[:, None] * v).flatten(2) * F.silu(z)
        y: Tensor = self.out_proj(rms(o, self.norm.weight, self.norm_eps))
        return y
