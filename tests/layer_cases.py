"""Small layers and models of every spec, for the tests of layers and models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import glazoo
from glazoo.layers import GatedLinearAttention, LayerState
from glazoo.models.causal_lm import GlazooConfig, GlazooForCausalLM
from glazoo.spec import Spec

# One counterpart per kernel class and per part of a layer that a metaplastic gate meets: tied
# write gates, keys tied to the decay, several steps, lags, erase and removal gates, grouped heads.
METAPLASTIC = tuple(
    f"metaplastic_{name}"
    for name in (
        "comba",
        "gated_deltaproduct",
        "gdn2",
        "gla",
        "hgrn2",
        "kda",
        "longhorn",
        "mamba2",
        "mamba3",
        "mlstm",
        "retnet",
        "rwkv6",
        "rwkv7",
    )
)
VARIANTS = (*glazoo.names(), *METAPLASTIC)

HIDDEN = 16
VOCABULARY = 40


def sizes(spec: Spec) -> dict[str, Any]:
    """Return tiny head counts that exercise the spec's way of sharing heads."""
    sharing = spec.layer.heads.sharing
    return {
        "num_heads": 1 if sharing == "one" else 4,
        "num_key_heads": None if sharing in ("one", "all") else 2,
        "head_k_dim": 4,
        "head_v_dim": 24 if sharing == "one" else 6,
    }


def layer(name: str, *, seed: int = 0, **options: Any) -> GatedLinearAttention:
    """Return a float64 layer, not the first of its model, with every importance gate open."""
    spec = glazoo.load(name)
    torch.manual_seed(seed)
    # Engines have tests of their own: what the layer adds is tested on the definition.
    given: dict[str, Any] = {"first": False, "impl": "reference"} | sizes(spec) | options
    made = GatedLinearAttention(spec, HIDDEN, layer_idx=1, num_layers=3, **given)
    if made.metaplastic is not None and made.metaplastic.b_scale is not None:
        torch.nn.init.constant_(made.metaplastic.b_scale, 0.5)
        assert made.metaplastic.b_up is not None
        torch.nn.init.normal_(made.metaplastic.b_up)
    return made.double()


def inputs(batch: int, tokens: int, *, seed: int = 1) -> Tensor:
    """Return a float64 input [batch, tokens, HIDDEN]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, HIDDEN, generator=generator, dtype=torch.float64)


def extras(made: GatedLinearAttention, batch: int, tokens: int, *, seed: int = 2) -> dict[str, Any]:
    """Return what earlier layers of a model would give this one."""
    generator = torch.Generator().manual_seed(seed)
    given: dict[str, Any] = {}
    if made.needs_lower_bound:
        bound = torch.rand(made.width, generator=generator, dtype=torch.float64)
        given["lower_bound"] = bound / 2
    if made.shares_values:
        shape = (batch, tokens, made.sizes.heads, made.sizes.value)
        given["first_values"] = torch.randn(shape, generator=generator, dtype=torch.float64)
    return given


def segment(given: dict[str, Any], start: int, end: int) -> dict[str, Any]:
    """Cuts what `extras` gave to the tokens start to end - 1."""
    return {k: v[:, start:end] if k == "first_values" else v for k, v in given.items()}


def float32_error(made: GatedLinearAttention, x: Tensor, given: dict[str, Any]) -> float:
    """Return the error that the same call has in float32: two float64 ways must agree within it."""
    exact = made(x, **given).output
    state = {k: v.clone() for k, v in made.state_dict().items()}
    low = made.float()(x.float(), **{k: v.float() for k, v in given.items()}).output
    made.double().load_state_dict(state)
    error = float((low.double() - exact).abs().max())
    assert 0.0 < error < 1e-2 * float(exact.abs().max())
    return error


def distance(a: LayerState | None, b: LayerState | None) -> float:
    """Return the largest difference between two states of the same kind."""
    assert a is not None
    assert b is not None
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def config(pattern: Any, **options: Any) -> GlazooConfig:
    """Return the configuration of a three-layer model with tiny heads for every spec in it."""
    names = [pattern] if isinstance(pattern, str) else pattern
    specs = {name: glazoo.load(name) for name in names if name != "attention"}
    given: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 3,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "spec_sizes": {name: tiny(spec) for name, spec in specs.items()},
    }
    return GlazooConfig(pattern=pattern, **(given | options))


def tiny(spec: Spec) -> dict[str, int]:
    """Return the head counts of `sizes` that are set."""
    return {name: n for name, n in sizes(spec).items() if n is not None}


def model(pattern: Any, *, seed: int = 0, **options: Any) -> GlazooForCausalLM:
    """Return a small model in evaluation mode."""
    torch.manual_seed(seed)
    return GlazooForCausalLM(config(pattern, **options)).eval()


def tokens(batch: int, length: int, *, seed: int = 3) -> Tensor:
    """Return token ids in 1 .. VOCABULARY - 1, [batch, length]; 0 is left for padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)
