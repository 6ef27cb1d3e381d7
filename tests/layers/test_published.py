"""Layers against their published arithmetic, restated token by token from the layers' weights.

Layers whose weights can be exchanged are tested with the exchange; these are the others with an
order of operations of their own.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from layer_cases import extras, float32_error, inputs, layer
from torch import Tensor

from glazoo.layers import GatedLinearAttention


def l2(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    taps = weight.shape[-1]
    rows = []
    for t in range(x.shape[1]):
        y = torch.zeros_like(x[:, 0]) if bias is None else bias.expand_as(x[:, 0])
        for j in range(taps):
            if t - j >= 0:
                y = y + x[:, t - j] * weight[:, 0, taps - 1 - j]
        rows.append(F.silu(y))
    return torch.stack(rows, 1)


def heads(x: Tensor, size: int, group: int = 1) -> Tensor:
    return x.unflatten(-1, (-1, size)).repeat_interleave(group, 2)


def mamba_decay(w: dict[str, Tensor], x: Tensor) -> Tensor:
    z = x @ w["decay.proj.weight"].T + w["decay.dt_bias"]
    return torch.exp(-w["decay.A_log"].exp() * F.softplus(z))


def check(
    made: GatedLinearAttention, expected: Tensor, x: Tensor, given: dict[str, Tensor]
) -> None:
    budget = float32_error(made, x, given)
    assert (made(x, **given).output - expected).abs().max() < budget


@torch.no_grad()
def test_comba() -> None:
    made, x = layer("comba"), inputs(2, 6)
    for p in (made.erase_decay, made.query_correction):
        p.normal_()
    w, n = made.state_dict(), made.sizes
    q, k, v = (conv(x @ w[f"{s}_proj.weight"].T, w[f"{s}_conv.weight"]) for s in "qkv")
    q, k, v = heads(q, n.key), heads(k, n.key), heads(v, n.value)
    p = k * torch.sigmoid(w["erase_decay"])[:, None]
    q = q - w["query_correction"][:, None] * p
    q, k, p = (l2(y).repeat_interleave(n.heads // n.key_heads, 2) for y in (q, k, p))
    a, beta = mamba_decay(w, x), torch.sigmoid(x @ w["write.proj.weight"].T)
    state, out = torch.zeros(2, n.heads, n.key, n.value, dtype=x.dtype), []
    for t in range(6):
        b = beta[:, t, :, None]
        error = b * v[:, t] - b * torch.einsum("bhkv,bhk->bhv", state, p[:, t])
        state = a[:, t, :, None, None] * state + k[:, t, ..., None] * error[:, :, None]
        out.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * n.key**-0.5)
    y = rms(torch.stack(out, 1), w["norm.weight"], 1e-5)
    y = y * torch.sigmoid(heads(x @ w["g_proj.weight"].T, n.value))
    check(made, y.flatten(2) @ w["o_proj.weight"].T, x, {})


@torch.no_grad()
@pytest.mark.parametrize("name", ["qdelta", "qed"])
def test_erase_keys_that_hold_the_query(name: str) -> None:
    made, x = layer(name), inputs(2, 6)
    if name == "qdelta":
        assert torch.equal(made.erase_mix.proj.bias, torch.full((2,), -0.9).double())
        made.erase_mix.proj.bias.normal_()
    w, n = made.state_dict(), made.sizes
    q, k, v = (conv(x @ w[f"{s}_proj.weight"].T, w[f"{s}_conv.weight"]) for s in "qkv")
    q, k, v = l2(heads(q, n.key)), l2(heads(k, n.key)), heads(v, n.value)
    z = x @ w["erase_mix.proj.weight"].T + w.get("erase_mix.proj.bias", 0)
    across = q if name == "qdelta" else q - k * (k * q).sum(-1, keepdim=True)
    p = k + torch.sigmoid(z)[..., None] * across
    q, k, p = (y.repeat_interleave(n.heads // n.key_heads, 2) for y in (q, k, p))
    a, beta = mamba_decay(w, x), torch.sigmoid(x @ w["write.proj.weight"].T)
    state, out = torch.zeros(2, n.heads, n.key, n.value, dtype=x.dtype), []
    for t in range(6):
        state = a[:, t, :, None, None] * state
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, p[:, t])
        state = state + (beta[:, t, :, None] * k[:, t])[..., None] * error[:, :, None]
        out.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * n.key**-0.5)
    y = rms(torch.stack(out, 1), w["norm.weight"], 1e-5)
    y = y * F.silu(heads(x @ w["g_proj.weight"].T, n.value))
    check(made, y.flatten(2) @ w["o_proj.weight"].T, x, {})


@torch.no_grad()
def test_eda() -> None:
    made, x = layer("eda"), inputs(2, 6)
    w, n = made.state_dict(), made.sizes
    q, k, v = (conv(x @ w[f"{s}_proj.weight"].T, w[f"{s}_conv.weight"]) for s in "qkv")
    q, v = l2(heads(q, n.key)), heads(v, n.value)
    e, k = (l2(heads(y, n.key)) for y in k.chunk(2, -1))
    q, k, e = (y.repeat_interleave(n.heads // n.key_heads, 2) for y in (q, k, e))
    z = x @ w["decay.proj.down.weight"].T @ w["decay.proj.up.weight"].T + w["decay.dt_bias"]
    rate = w["decay.A_log"].exp()[:, None]
    a = torch.exp(-rate * F.softplus(heads(z, n.key)))
    erase, write = torch.sigmoid(x @ w["write.proj.weight"].T).chunk(2, -1)
    state, out = torch.zeros(2, n.heads, n.key, n.value, dtype=x.dtype), []
    for t in range(6):
        state = a[:, t, ..., None] * state
        for key, rate_, value in ((e, erase, 0 * v), (k, write, v)):
            error = value[:, t] - torch.einsum("bhkv,bhk->bhv", state, key[:, t])
            state = state + (rate_[:, t, :, None] * key[:, t])[..., None] * error[:, :, None]
        out.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * n.key**-0.5)
    y = rms(torch.stack(out, 1), w["norm.weight"], 1e-5)
    gate = x @ w["g_proj.down.weight"].T @ w["g_proj.up.weight"].T + w["g_proj.up.bias"]
    y = y * torch.sigmoid(heads(gate, n.value))
    check(made, y.flatten(2) @ w["o_proj.weight"].T, x, {})


@torch.no_grad()
def test_palimpsa() -> None:
    made, x = layer("palimpsa"), inputs(2, 6)
    assert made.metaplastic is not None
    assert made.metaplastic.b_bias is not None
    for p in (made.skip, made.metaplastic.b_bias):
        p.normal_()
    w, n = made.state_dict(), made.sizes
    q, k, v = (conv(x @ w[f"{s}_proj.weight"].T, w[f"{s}_conv.weight"]) for s in "qkv")
    q, k, v = l2(heads(q, n.key)), l2(heads(k, n.key)), heads(v, n.value)
    a, beta = mamba_decay(w, x), torch.sigmoid(x @ w["write.proj.weight"].T)
    low = x @ w["metaplastic.b_down"].T @ w["metaplastic.b_up"].T + w["metaplastic.b_bias"]
    b = beta[..., None] * torch.sigmoid(heads(low, n.value))
    b = b * F.softplus(w["metaplastic.b_scale"])[:, None]
    prior = w["metaplastic.ip_log"].exp()[:, None, None]
    shape = (2, n.heads, n.key, n.value)
    mean, total = torch.zeros(shape, dtype=x.dtype), prior.expand(shape)
    out = []
    for t in range(6):
        # The mean form: forget toward the prior, then observe.
        f = a[:, t, :, None, None]
        predicted = f * total + (1 - f) * prior
        mean = f * total / predicted * mean
        total = predicted + k[:, t, ..., None].square() * b[:, t, :, None]
        write = k[:, t, ..., None] * (beta[:, t, :, None] * v[:, t])[:, :, None]
        mean = (predicted * mean + write) / total
        out.append(torch.einsum("bhkv,bhk->bhv", mean, q[:, t]) * n.key**-0.5)
    y = torch.stack(out, 1) + w["skip"][:, None] * v
    y = rms(y, w["norm.weight"], 1e-5) * F.silu(heads(x @ w["g_proj.weight"].T, n.value))
    check(made, y.flatten(2) @ w["o_proj.weight"].T, x, {})


@torch.no_grad()
def test_rwkv7() -> None:
    made, x = layer("rwkv7"), inputs(2, 6)
    given = extras(made, 2, 6)
    for p in (made.skip, made.key_rate, made.erase_scale):
        p.normal_()
    w, n = made.state_dict(), made.sizes
    assert made.shift is not None
    delta = F.pad(x, (0, 0, 1, -1)) - x
    at = {use: x + delta * w["shift.mix"][i] for i, use in enumerate(made.shift.uses)}
    r, k, v = (at[s] @ w[f"{s}_proj.weight"].T for s in "qkv")
    low = torch.tanh(at["decay"] @ w["decay.proj.down.weight"].T)
    z = low @ w["decay.proj.up.weight"].T + w["decay.proj.up.bias"]
    decay = heads(torch.exp(-0.6065306597126334 * torch.sigmoid(z)), n.key)
    low = at["erase"] @ w["erase.proj.down.weight"].T
    a = torch.sigmoid(low @ w["erase.proj.up.weight"].T + w["erase.proj.up.bias"])
    g = torch.sigmoid(at["output"] @ w["g_proj.down.weight"].T) @ w["g_proj.up.weight"].T
    mix = at["v"] @ w["value_mix.down.weight"].T @ w["value_mix.up.weight"].T
    v = torch.lerp(v, given["first_values"].flatten(2), torch.sigmoid(mix + w["value_mix_bias"]))
    kk = unit(heads(k * w["erase_scale"].flatten(), n.key))
    k = k * (1 + (a - 1) * w["key_rate"].flatten())
    r, k, a, v = heads(r, n.key), heads(k, n.key), heads(a, n.key), heads(v, n.value)
    state, out = torch.zeros(2, n.heads, n.value, n.key, dtype=x.dtype), []
    for t in range(6):
        removed = torch.einsum("bhvk,bhk->bhv", state, kk[:, t])
        state = state * decay[:, t, :, None]
        state = state - removed[..., None] * (kk[:, t] * a[:, t])[:, :, None]
        state = state + v[:, t, ..., None] * k[:, t, :, None]
        out.append(torch.einsum("bhvk,bhk->bhv", state, r[:, t]))
    y = F.group_norm(
        torch.stack(out, 1).flatten(2).flatten(0, 1),
        n.heads,
        w["norm.weight"],
        w["norm.bias"],
        6.4e-4,
    ).view(2, 6, n.heads, n.value)
    y = y + (r * k * w["skip"]).sum(-1, keepdim=True) * v
    check(made, (y.flatten(2) * g) @ w["o_proj.weight"].T, x, given)


@torch.no_grad()
def test_rodimus() -> None:
    made, x = layer("rodimus"), inputs(2, 6)
    made.skip.normal_()
    w, n = made.state_dict(), made.sizes
    inner = x @ w["in_proj.weight"].T
    mixed = conv(inner, w["conv.weight"], w["conv.bias"])
    gate = F.softplus(mixed @ w["decay.proj.weight"].T + w["decay.proj.bias"])
    tau = torch.sigmoid(mixed @ w["decay.proj_tau.weight"].T + w["decay.proj_tau.bias"])
    q, k = mixed @ w["q_proj.weight"].T, unit(mixed @ w["k_proj.weight"].T) * gate**tau
    low = inner @ w["write.proj.down.weight"].T
    v = inner * torch.sigmoid(low @ w["write.proj.up.weight"].T + w["write.proj.up.bias"])
    state, out = torch.zeros(2, n.key, n.value, dtype=x.dtype), []
    for t in range(6):
        state = torch.exp(-gate * tau)[:, t, :, None] * state + k[:, t, :, None] * v[:, t, None]
        out.append(torch.einsum("bkv,bk->bv", state, q[:, t]) * n.key**-0.5)
    y = torch.stack(out, 1) + mixed * w["skip"]
    y = rms(y * F.silu(x @ w["g_proj.weight"].T), w["norm.weight"], 1e-5)
    check(made, y @ w["o_proj.weight"].T, x, {})


@torch.no_grad()
def test_lightnet() -> None:
    made, x = layer("lightnet"), inputs(2, 6)
    w, n = made.state_dict(), made.sizes
    q, k = heads(F.silu(x @ w["q_proj.weight"].T), n.key), heads(x @ w["k_proj.weight"].T, n.key)
    v = heads(x @ w["v_proj.weight"].T, n.value)
    # The mean of all values so far under weights e^k, per key channel.
    weight = k.exp()[..., None]
    mean = (weight * v[..., None, :]).cumsum(1) / weight.cumsum(1)
    y = torch.einsum("bthkv,bthk->bthv", mean, q) * n.key**-0.5
    low = x @ w["g_proj.down.weight"].T @ w["g_proj.up.weight"].T
    y = rms(y.flatten(2), w["norm.weight"], 1e-5) * F.silu(low)
    check(made, y @ w["o_proj.weight"].T, x, {})


@torch.no_grad()
def test_rwkv6() -> None:
    made, x = layer("rwkv6"), inputs(2, 6)
    made.bonus.normal_()
    w, n = made.state_dict(), made.sizes
    assert made.shift is not None
    delta = F.pad(x, (0, 0, 1, -1)) - x
    low = torch.tanh((x + delta * w["shift.mix_base"]) @ w["shift.down.weight"].T)
    low = low.unflatten(-1, (len(made.shift.uses), -1))
    at = {
        use: x + delta * (w["shift.mix"][i] + low[:, :, i] @ w["shift.mix_up"][i])
        for i, use in enumerate(made.shift.uses)
    }
    r, k = (heads(at[s] @ w[f"{s}_proj.weight"].T, n.key) for s in "qk")
    v = heads(at["v"] @ w["v_proj.weight"].T, n.value)
    z = torch.tanh(at["decay"] @ w["decay.proj.down.weight"].T) @ w["decay.proj.up.weight"].T
    decay = heads(torch.exp(-torch.exp(z + w["decay.proj.up.bias"])), n.key)
    state, out = torch.zeros(2, n.heads, n.key, n.value, dtype=x.dtype), []
    for t in range(6):
        write = k[:, t, ..., None] * v[:, t, :, None]
        read = state + w["bonus"][..., None] * write
        out.append(torch.einsum("bhkv,bhk->bhv", read, r[:, t]))
        state = decay[:, t, ..., None] * state + write
    y = torch.stack(out, 1).flatten(2).flatten(0, 1)
    y = F.group_norm(y, n.heads, w["norm.weight"], w["norm.bias"], 6.4e-4).view(2, 6, -1)
    y = y * F.silu(at["output"] @ w["g_proj.weight"].T)
    check(made, y @ w["o_proj.weight"].T, x, {})


@torch.no_grad()
def test_mamba3() -> None:
    made, x = layer("mamba3"), inputs(2, 6)
    w, n = made.state_dict(), made.sizes
    for key in ("q_bias", "k_bias", "skip"):
        w[key].normal_()
    group = n.heads // n.key_heads
    step = F.softplus(x @ w["decay.proj.weight"].T + w["decay.dt_bias"])
    rate = F.softplus(x @ w["decay.proj_rate.weight"].T).clamp(min=1e-4)
    trap = torch.sigmoid(x @ w["trap_proj.weight"].T)
    turn = torch.pi * torch.tanh(x @ w["angle_proj.weight"].T)[:, :, None] * step[..., None]
    angle, half = turn.cumsum(1), turn.shape[-1]
    qk = []
    for s in "qk":
        y = heads(x @ w[f"{s}_proj.weight"].T, n.key)
        y = rms(y, w[f"{s}_norm.weight"], 1e-5).repeat_interleave(group, 2) + w[f"{s}_bias"]
        z = torch.complex(y[..., :half], y[..., half : 2 * half]) * torch.exp(1j * angle)
        qk.append(torch.cat([z.real, z.imag, y[..., 2 * half :]], -1))
    q, k = qk
    v = heads(x @ w["v_proj.weight"].T, n.value)
    state, out = torch.zeros(2, n.heads, n.key, n.value, dtype=x.dtype), []
    before = torch.zeros_like(state)
    for t in range(6):
        a = torch.exp(-rate * step)[:, t, :, None, None]
        d, share = step[:, t, :, None, None], trap[:, t, :, None, None]
        now = k[:, t, ..., None] * v[:, t, :, None]
        state = a * state + a * (1 - share) * d * before + share * d * now
        before = now
        out.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    y = torch.stack(out, 1) + w["skip"][:, None] * v
    y = y.flatten(2) * F.silu(x @ w["g_proj.weight"].T)
    check(made, y @ w["o_proj.weight"].T, x, {})


@torch.no_grad()
def test_lightning_equals_minimax() -> None:
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    config = MiniMaxConfig(
        hidden_size=16,
        num_attention_heads=4,
        head_dim=6,
        num_hidden_layers=3,
        vocab_size=8,
        block_size=4,
        layer_types=["linear_attention"] * 3,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    theirs = MiniMaxLightningAttention(config, 1).eval()
    made = layer("lightning", num_heads=4, head_k_dim=6, head_v_dim=6).float()
    q, k, v = theirs.qkv_proj.weight.unflatten(0, (4, 3, 6)).unbind(1)
    theirs.norm.weight.normal_()
    made.load_state_dict(
        {
            "q_proj.weight": q.flatten(0, 1),
            "k_proj.weight": k.flatten(0, 1),
            "v_proj.weight": v.flatten(0, 1),
            "norm.weight": theirs.norm.weight,
            "g_proj.weight": theirs.output_gate.weight,
            "o_proj.weight": theirs.out_proj.weight,
        }
    )
    x = inputs(2, 11).float()
    expected = theirs(x, None, None)[0]
    # Half an ulp per term of every sum, in float32.
    terms = sum(p.shape[-1] for p in theirs.parameters()) + 11
    budget = terms * torch.finfo(torch.float32).eps / 2 * expected.abs().max()
    assert (made(x).output - expected).abs().max() < budget
