"""RWKV-5.2, 6 and 7 as published, restated token by token, and the files that hold them.

Names and layouts are those of the training code (BlinkDL/RWKV-LM); `as_fla` and `write_bin` give
those of flash-linear-attention and rwkv.cpp.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]

HIDDEN, HEADS, LAYERS, VOCABULARY, INNER = 32, 4, 3, 11, 48
RANK = {"w": 5, "a": 6, "v": 7, "g": 9, "mix": 3}


def make(version: int, seed: int = 0, *, biased: bool = False) -> Weights:
    """Random tensors of a model, float64."""
    generator = torch.Generator().manual_seed(seed)
    n, size = HIDDEN, HIDDEN // HEADS

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, dtype=torch.float64, generator=generator)

    def norm(name: str) -> Weights:
        return {f"{name}.weight": 1 + draw(n, scale=0.2), f"{name}.bias": draw(n, scale=0.2)}

    w = {"emb.weight": draw(VOCABULARY, n), "head.weight": draw(VOCABULARY, n)} | norm("ln_out")
    if biased:
        w["head.bias"] = draw(VOCABULARY)
    w |= norm("blocks.0.ln0")
    for i in range(LAYERS):
        att, ffn = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        w |= norm(f"blocks.{i}.ln1") | norm(f"blocks.{i}.ln2") | norm(f"{att}ln_x")
        for name in ("receptance", "key", "value", "output"):
            w[f"{att}{name}.weight"] = draw(n, n, scale=n**-0.5)
        if biased:
            w[f"{att}output.bias"] = draw(n)
        w[f"{ffn}key.weight"] = draw(INNER, n, scale=n**-0.5)
        w[f"{ffn}value.weight"] = draw(n, INNER, scale=INNER**-0.5)
        if version < 7:
            w[f"{att}gate.weight"] = draw(n, n, scale=n**-0.5)
            w[f"{att}time_faaaa"] = draw(HEADS, size)
            w[f"{ffn}receptance.weight"] = draw(n, n, scale=n**-0.5)
            mix = "time_mix" if version == 5 else "time_maa"
            for x in "kr":
                w[f"{ffn}{mix}_{x}"] = draw(1, 1, n)
            for x in "kvrg" if version == 5 else "xwkvrg":
                w[f"{att}{mix}_{x}"] = draw(1, 1, n)
        if version == 5:
            w[f"{att}time_decay"] = draw(HEADS, size) - 1
        elif version == 6:
            w[f"{att}time_decay"] = draw(1, 1, n) - 1
            w[f"{att}time_maa_w1"] = draw(n, 5 * RANK["mix"], scale=0.2)
            w[f"{att}time_maa_w2"] = draw(5, RANK["mix"], n, scale=0.2)
            w[f"{att}time_decay_w1"] = draw(n, RANK["w"], scale=0.2)
            w[f"{att}time_decay_w2"] = draw(RANK["w"], n, scale=0.2)
        else:
            w |= {f"{att}x_{x}": draw(1, 1, n) for x in "rwkvag"}
            for x in "wavg":
                w[f"{att}{x}1"] = draw(n, RANK[x], scale=0.3)
                w[f"{att}{x}2"] = draw(RANK[x], n, scale=0.3)
            w |= {f"{att}{x}0": draw(1, 1, n) for x in "wav"}
            w |= {f"{att}{x}": draw(1, 1, n) for x in ("k_k", "k_a")}
            w[f"{att}r_k"] = draw(HEADS, size)
            w[f"{ffn}x_k"] = draw(1, 1, n)
    return w


def forward(version: int, w: Weights, ids: list[int], eps: float = 64e-5) -> Tensor:
    """Logits of every token, one token after the other."""
    n, size = w["emb.weight"].shape[1], w["emb.weight"].shape[1] // HEADS

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (n,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    zero = w["emb.weight"].new_zeros(n)
    state = [zero.new_zeros(HEADS, size, size) for _ in range(LAYERS)]
    last = [[zero, zero] for _ in range(LAYERS)]
    out = []
    for token in ids:
        x = norm(w["emb.weight"][token], "blocks.0.ln0")
        first = zero
        for i in range(LAYERS):
            block = {k.removeprefix(f"blocks.{i}."): v for k, v in w.items()}
            xx = norm(x, f"blocks.{i}.ln1")
            mixer = {5: mix5, 6: mix6, 7: mix7}[version]
            y, state[i], first = mixer(block, xx, last[i][0] - xx, state[i], first, i, eps)
            last[i][0] = xx
            x = x + block["att.output.weight"] @ y + block.get("att.output.bias", zero)
            xx = norm(x, f"blocks.{i}.ln2")
            x = x + channels(block, xx, last[i][1])
            last[i][1] = xx
        out.append(w["head.weight"] @ norm(x, "ln_out") + w.get("head.bias", 0))
    return torch.stack(out)


def channels(w: Weights, x: Tensor, last: Tensor) -> Tensor:
    def mixed(name: str) -> Tensor:
        if f"ffn.time_mix_{name}" in w:
            m = w[f"ffn.time_mix_{name}"].flatten()
            return x * m + last * (1 - m)
        here = f"ffn.time_maa_{name}" if f"ffn.time_maa_{name}" in w else f"ffn.x_{name}"
        return x + (last - x) * w[here].flatten()

    y = w["ffn.value.weight"] @ torch.relu(w["ffn.key.weight"] @ mixed("k")) ** 2
    if "ffn.receptance.weight" in w:
        y = torch.sigmoid(w["ffn.receptance.weight"] @ mixed("r")) * y
    return y


def _split(x: Tensor) -> Tensor:
    return x.view(HEADS, -1)


def _group_norm(w: Weights, y: Tensor, eps: float) -> Tensor:
    return F.group_norm(y[None], HEADS, w["att.ln_x.weight"], w["att.ln_x.bias"], eps)[0]


def mix5(
    w: Weights, x: Tensor, delta: Tensor, state: Tensor, first: Tensor, layer: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y = r (S + u k^T v) ; S = w S + k^T v."""
    last = x + delta
    m = {s: w[f"att.time_mix_{s}"].flatten() for s in "rkvg"}
    at = {s: x * m[s] + last * (1 - m[s]) for s in "rkvg"}
    decay = torch.exp(-torch.exp(_split(w["att.time_decay"].flatten())))
    return _bonus(w, at, decay, state, first, eps)


def _bonus(
    w: Weights, at: Weights, decay: Tensor, state: Tensor, first: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    names = {"r": "receptance", "k": "key", "v": "value"}
    r, k, v = (_split(w[f"att.{names[s]}.weight"] @ at[s]) for s in "rkv")
    write = k[:, :, None] * v[:, None, :]
    y = (r[:, :, None] * (state + w["att.time_faaaa"].view(HEADS, -1, 1) * write)).sum(1)
    gate = F.silu(w["att.gate.weight"] @ at["g"])
    return _group_norm(w, y.flatten(), eps) * gate, decay[:, :, None] * state + write, first


def mix6(
    w: Weights, x: Tensor, delta: Tensor, state: Tensor, first: Tensor, layer: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As 5, with interpolation and decay of the token."""
    low = torch.tanh((x + delta * w["att.time_maa_x"].flatten()) @ w["att.time_maa_w1"])
    parts = torch.einsum("nr,nrd->nd", low.view(5, -1), w["att.time_maa_w2"])
    at = {
        s: x + delta * (w[f"att.time_maa_{s}"].flatten() + parts[i]) for i, s in enumerate("wkvrg")
    }
    z = w["att.time_decay"].flatten()
    z = z + torch.tanh(at["w"] @ w["att.time_decay_w1"]) @ w["att.time_decay_w2"]
    return _bonus(w, at, torch.exp(-torch.exp(_split(z))), state, first, eps)


def mix7(
    w: Weights, x: Tensor, delta: Tensor, state: Tensor, first: Tensor, layer: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """S = S (diag(w) - kk^T (a kk)) + v^T k ; y = r S^T."""
    at = {s: x + delta * w[f"att.x_{s}"].flatten() for s in "rwkvag"}
    r = w["att.receptance.weight"] @ at["r"]
    k, v = w["att.key.weight"] @ at["k"], w["att.value.weight"] @ at["v"]
    z = w["att.w0"].flatten() + torch.tanh(at["w"] @ w["att.w1"]) @ w["att.w2"]
    decay = _split(torch.exp(-torch.exp(-F.softplus(-z) - 0.5)))
    if layer == 0:
        first = v
    else:
        share = torch.sigmoid(w["att.v0"].flatten() + at["v"] @ w["att.v1"] @ w["att.v2"])
        v = v + (first - v) * share
    a = torch.sigmoid(w["att.a0"].flatten() + at["a"] @ w["att.a1"] @ w["att.a2"])
    g = torch.sigmoid(at["g"] @ w["att.g1"]) @ w["att.g2"]
    kk = F.normalize(_split(k * w["att.k_k"].flatten()), dim=-1)
    k = k * (1 + (a - 1) * w["att.k_a"].flatten())
    r, k, v, a = map(_split, (r, k, v, a))
    removed = torch.einsum("hvk,hk->hv", state, kk)
    state = state * decay[:, None] - removed[:, :, None] * (kk * a)[:, None]
    state = state + v[:, :, None] * k[:, None]
    y = _group_norm(w, torch.einsum("hvk,hk->hv", state, r).flatten(), eps)
    y = y + ((r * k * w["att.r_k"].view(HEADS, -1)).sum(1, keepdim=True) * v).flatten()
    return y * g, state, first


def as_fla(version: int, w: Weights) -> tuple[dict[str, object], Weights]:
    """A configuration and tensors as flash-linear-attention has them, whose group norm of RWKV-6
    has the epsilon of all norms."""
    c: dict[str, object] = {
        "model_type": f"rwkv{version}",
        "architectures": [f"RWKV{version}ForCausalLM"],
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCABULARY,
        "hidden_act": "sqrelu",
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": 1e-5,
        "fuse_norm": False,
        "attn": None,
        "attn_mode": "chunk",
    }
    if version == 6:
        c |= {"expand_k": 1.0, "expand_v": 1.0, "num_heads": HEADS, "hidden_ratio": 1.5}
        c |= {"proj_low_rank_dim": RANK["mix"], "gate_low_rank_dim": RANK["w"]}
    else:
        c |= {"head_dim": HIDDEN // HEADS, "num_heads": None, "value_dim": [HIDDEN] * LAYERS}
        c |= {"decay_low_rank_dim": None, "v_low_rank_dim": RANK["v"]}
    out = {"model.embeddings.weight": w["emb.weight"], "lm_head.weight": w["head.weight"]}
    for s in ("weight", "bias"):
        out[f"model.norm.{s}"] = w[f"ln_out.{s}"]
        out[f"model.layers.0.pre_norm.{s}"] = w[f"blocks.0.ln0.{s}"]
    for i in range(LAYERS):
        b = {k.removeprefix(f"blocks.{i}."): v for k, v in w.items() if f"blocks.{i}." in k}
        here = f"model.layers.{i}."
        for s in ("weight", "bias"):
            out[f"{here}attn_norm.{s}"] = b[f"ln1.{s}"]
            out[f"{here}ffn_norm.{s}"] = b[f"ln2.{s}"]
            out[f"{here}attn.g_norm.{s}"] = b[f"att.ln_x.{s}"]
        names = {"r": "receptance", "k": "key", "v": "value", "o": "output", "g": "gate"}
        inside = ".linear" if version == 6 else ""
        for s in "rkvg" if version == 6 else "rkv":
            out[f"{here}attn.{s}_proj{inside}.weight"] = b[f"att.{names[s]}.weight"]
        out[f"{here}attn.o_proj.weight"] = b["att.output.weight"]
        out[f"{here}ffn.value.weight"] = b["ffn.value.weight"]
        if version == 6:
            r = RANK["mix"]
            order = [("wkvrg").index(s) for s in "rwkvg"]
            low = b["att.time_maa_w1"].T.reshape(5, r, HIDDEN)[order]
            up = b["att.time_maa_w2"][order].reshape(5 * r, HIDDEN).T.contiguous()
            mine = {
                "x_proj.0.mu": b["att.time_maa_x"].flatten(),
                "x_proj.0.linear.weight": low.reshape(5 * r, HIDDEN),
                "x_proj.2.weight": up,
                "x_bias": torch.stack([b[f"att.time_maa_{s}"].flatten() for s in "rwkvg"]),
                "w_proj.linear.lora.0.weight": b["att.time_decay_w1"].T.contiguous(),
                "w_proj.linear.lora.2.weight": b["att.time_decay_w2"].T.contiguous(),
                "w_proj.linear.lora.2.bias": b["att.time_decay"].flatten(),
                "bonus": b["att.time_faaaa"],
            }
            out |= {f"{here}attn.{k}": x for k, x in mine.items()}
            for s, name in (("k", "key"), ("r", "receptance")):
                out[f"{here}ffn.{name}.mu"] = b[f"ffn.time_maa_{s}"].flatten()
                out[f"{here}ffn.{name}.linear.weight"] = b[f"ffn.{name}.weight"]
            continue
        out |= {f"{here}attn.x_{s}": b[f"att.x_{s}"] for s in "rwkvag"}
        for s in "wavg" if i else "wag":
            out[f"{here}attn.{s}_lora.lora.0.weight"] = b[f"att.{s}1"].T.contiguous()
            out[f"{here}attn.{s}_lora.lora.2.weight"] = b[f"att.{s}2"].T.contiguous()
            if s != "g":
                out[f"{here}attn.{s}_lora.lora.2.bias"] = b[f"att.{s}0"].flatten()
        out |= {f"{here}attn.{s}": b[f"att.{s}"].flatten() for s in ("k_k", "k_a")}
        out[f"{here}attn.r_k"] = b["att.r_k"]
        out[f"{here}ffn.x_k"] = b["ffn.x_k"].flatten()
        out[f"{here}ffn.key.weight"] = b["ffn.key.weight"]
    return c, out


FORMS = {"float32": 0, "float16": 1, "Q5_1": 8, "Q8_0": 9}


def quantised(form: str, x: np.ndarray) -> tuple[bytes, np.ndarray]:
    """The bytes of a form of rwkv.cpp, and what they stand for."""
    if form == "float32":
        return x.astype("<f4").tobytes(), x.astype("<f4")
    if form == "float16":
        half = x.astype("<f2")
        return half.tobytes(), half.astype("<f4")
    data, values = b"", []
    for row in x.astype("<f4").reshape(-1, 32):
        low = np.float16(0 if form == "Q8_0" else row.min())
        top = abs(row).max() / 127 if form == "Q8_0" else (row.max() - row.min()) / 31
        step = np.float16(top or 1)
        q = np.rint((row - np.float32(low)) / np.float32(step)).astype(int)
        if form == "Q8_0":
            q = q.clip(-127, 127)
            data += struct.pack("<e32b", step, *q)
        else:
            q = q.clip(0, 31)
            word = sum(((int(v) >> 4) & 1) << j for j, v in enumerate(q))
            nibbles = [int(q[j] & 15) | int(q[j + 16] & 15) << 4 for j in range(16)]
            data += struct.pack("<eeI16B", step, low, word, *nibbles)
        values.append(q * np.float32(step) + np.float32(low))
    return data, np.concatenate(values).astype("<f4").reshape(x.shape)


def write_bin(path: Path, version: int, w: Weights, form: str = "float32") -> Weights:
    """Writes what rwkv.cpp's converter and quantiser write; gives the tensors that this stands for,
    in the training code's layout."""
    swapped = ("_w1", "_w2", *(f".{s}{i}" for s in "wavg" for i in (1, 2)))
    order = {f".x_{s}": i for i, s in enumerate("rwkvag")}
    body, stands = b"", dict(w)
    for key, x in w.items():
        if ".att." in key and key[-4:] in order:
            if not key.endswith("x_r"):
                continue
            base = key[:-1]
            x, key = torch.cat([w[f"{base}{s}"] for s in "rwkvag"]), f"{base}rwkvag"
        if ".att." in key and key.endswith(swapped):
            x = x.mT
        if key.endswith("time_faaaa"):
            x = x[..., None]
        elif ".time_" in key:
            x = x.squeeze()
        if version == 5 and key.endswith("time_decay"):
            x = torch.exp(-torch.exp(x))[..., None]
        plain = x.ndim != 2 or "att.x_" in key or ".time_" in key or key.endswith("_k")
        mine = "float32" if plain or x.shape[-1] % 32 else form
        data, values = quantised(mine, x.float().numpy())
        if mine != "float32":
            value = torch.from_numpy(values).to(w[key].dtype)
            stands[key] = value.mT.contiguous() if key.endswith(swapped) else value
        name = key.encode()
        body += struct.pack("<3i", x.ndim, len(name), FORMS[mine])
        body += struct.pack(f"<{x.ndim}i", *x.shape[::-1]) + name + data
    sizes = (*w["emb.weight"].shape, LAYERS, FORMS[form])
    path.write_bytes(struct.pack("<6i", 0x67676D66, 101, *sizes) + body)
    return stands
