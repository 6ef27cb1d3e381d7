"""Weights of other packages' mixers in our layers: same outputs, exact round trips, no lost key."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from converters.fla_mixers import (
    HIDDEN,
    Comba,
    ConvolvedGla,
    DeltaNet,
    DiagKdn,
    GatedDeltaNet,
    GatedDeltaProduct,
    GatedOutputDeltaNet,
    Gdn2,
    Gka,
    Gla,
    Hgrn2,
    IsoKdn,
    Kda,
    LightNet,
    LinearAttention,
    MesaNet,
    MetaMamba2,
    Mixer,
    Palimpsa,
    PrecondGatedDeltaNet,
    PrecondKda,
    ReluLinearAttention,
    Retention,
    Rodimus,
    SafeKda,
)
from torch import Tensor, nn

from glazoo.converters import exchange
from glazoo.errors import ConversionError
from glazoo.layers import GatedLinearAttention


def transformers_mixer(kind: str) -> nn.Module:
    """Return a small mixer of transformers with random weights everywhere."""
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
    "comba": ("fla.comba", Comba),
    "gated_deltaproduct": ("fla.gated_deltaproduct", GatedDeltaProduct),
    "precond_gated_deltanet": ("fla.precond_gated_deltanet", PrecondGatedDeltaNet),
    "precond_kda": ("fla.precond_kda", PrecondKda),
    "lightnet": ("fla.lightnet", LightNet),
    "mesa_net": ("fla.mesa_net", MesaNet),
    "gdn2": ("fla.gdn2", Gdn2),
    "iso_kdn": ("fla.iso_kdn", IsoKdn),
    "diag_kdn": ("fla.diag_kdn", DiagKdn),
    "gka": ("fla.gka", Gka),
    "rodimus": ("fla.rodimus", Rodimus),
    "palimpsa": ("fla.palimpsa", Palimpsa),
    "metamamba2": ("fla.metamamba2", MetaMamba2),
}
TRANSFORMERS = [kind for kind in exchange.KINDS if kind.startswith("transformers.")]


def fla_mixer(name: str) -> Mixer:
    torch.manual_seed(0)
    mixer = FLA[name][1]()
    scramble(mixer)
    return mixer


def test_every_map_is_tested() -> None:
    tested = {kind for kind, _ in FLA.values()} | set(TRANSFORMERS) | {"fla.mamba2"}
    # Those in whole models: test_rwkv.py and test_fla.py.
    whole = {f"fla.rwkv{v}" for v in (6, 7)} | {"fla.mamba3"}
    whole |= {f"{form}.rwkv{v}" for form in ("pth", "bin") for v in (5, 6, 7)}
    assert tested | whole == set(exchange.KINDS)


def rounding(mixer: nn.Module, tokens: int, y: Tensor) -> float:
    """Return how far two float32 evaluations may be apart: half an ulp per term of every sum."""
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
    from glazoo import metaplasticize

    mixer = transformers_mixer("transformers.qwen3_next")
    layer = exchange.from_mixer(mixer, impl="reference")
    x = torch.randn(1, 7, HIDDEN)
    with torch.no_grad():
        theirs = mixer(x)
        metaplasticize(layer)
        ours = layer(x).output
    assert isinstance(layer, GatedLinearAttention)
    assert (ours - theirs).abs().max() < rounding(mixer, 7, theirs)
