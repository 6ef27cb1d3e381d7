"""Every spec's layer: chunked prefill, padding, packing, dtypes, gradients, metaplastic form."""

from __future__ import annotations

import math

import pytest
import torch
from layer_cases import (
    HIDDEN,
    VARIANTS,
    distance,
    extras,
    float32_error,
    inputs,
    layer,
    segment,
    sizes,
)

import glazoo
from glazoo import metaplasticize
from glazoo.layers import GatedLinearAttention, set_plasticity
from glazoo.layers.parts import KeepsWide
from glazoo.spec import Spec, SpecError

FROZEN = [name for name in glazoo.names() if not glazoo.load(name).metaplastic]


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_prefill_in_pieces_equals_one_pass(name: str) -> None:
    made, x = layer(name), inputs(2, 9)
    given = extras(made, 2, 9)
    whole = made(x, output_state=True, **given)
    state, outputs = None, []
    for start, end in ((0, 1), (1, 3), (3, 6), (6, 9)):
        piece = made(x[:, start:end], state=state, output_state=True, **segment(given, start, end))
        state = piece.state
        outputs.append(piece.output)
    budget = float32_error(made, x, given)
    assert (torch.cat(outputs, 1) - whole.output).abs().max() < budget
    assert distance(state, whole.state) < 1e3 * budget  # states are sums over tokens and keys
    assert state is not None
    assert {k: tuple(v.shape) for k, v in state.items()} == made.state_shapes(2)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_padding_changes_nothing(name: str) -> None:
    made, x = layer(name), inputs(3, 7)
    given = extras(made, 3, 7)
    alone = made(x, output_state=True, **given)
    # Padded on the left, on the right, and everywhere.
    rows = ((0, [*range(3, 10)]), (1, [*range(7)]), (2, [1, 2, 4, 5, 6, 8, 9]))
    padded, mask = inputs(3, 10, seed=5), torch.zeros(3, 10, dtype=torch.int64)
    padded_given = extras(made, 3, 10)
    for row, real in rows:
        padded[row, real], mask[row, real] = x[row], 1
        if "first_values" in given:
            padded_given["first_values"][row, real] = given["first_values"][row]
    result = made(padded, mask, output_state=True, **padded_given)
    budget = float32_error(made, x, given)
    for row, real in rows:
        assert (result.output[row, real] - alone.output[row]).abs().max() < budget
    # The state is what it was at the last real token: padding does not even forget.
    assert distance(result.state, alone.state) < budget
    assert result.output.isfinite().all()
    if result.first_values is not None:
        for row, real in rows:
            found = result.first_values[row, real]
            assert (found - alone.first_values[row]).abs().max() < budget


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(name: str) -> None:
    made, x = layer(name), inputs(1, 11)
    given = extras(made, 1, 11)
    bounds = torch.tensor([0, 6, 6, 11])  # the second sequence is empty
    packed = made(x, cu_seqlens=bounds, **given).output
    budget = float32_error(made, x, given)
    for start, end in ((0, 6), (6, 11)):
        alone = made(x[:, start:end], **segment(given, start, end)).output
        assert (packed[:, start:end] - alone).abs().max() < budget


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_learns(name: str) -> None:
    made, x = layer(name), inputs(2, 6)
    given = extras(made, 2, 6)
    (made(x, **given).output * inputs(2, 6, seed=7)).sum().backward()
    for key, p in made.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, key
            assert p.grad.isfinite().all(), key
            # What a factor of zeros multiplies learns once that has learned.
            outer = dict(made.named_parameters()).get(key.replace(".down.", ".up."), p)
            assert p.grad.abs().max() > 0 or not outer.any(), key


@pytest.mark.parametrize("name", VARIANTS)
def test_gates_and_state_stay_wide_in_bfloat16(name: str) -> None:
    made = layer(name).float().to(torch.bfloat16)
    narrow = {torch.bfloat16}
    for module in made.modules():
        own = dict(module.named_parameters(recurse=False))
        expected = {torch.float32} if isinstance(module, KeepsWide) else narrow
        assert {p.dtype for p in own.values()} <= expected
    x = inputs(2, 5).to(torch.bfloat16)
    given = {k: v.to(torch.bfloat16) for k, v in extras(made, 2, 5).items()}
    result = made(x, output_state=True, **given)
    assert result.output.dtype == torch.bfloat16
    assert result.output.isfinite().all()
    assert result.state is not None
    for part in glazoo.lower(made.spec).state:
        assert result.state[part.name].dtype == torch.float32


@pytest.mark.parametrize("name", FROZEN)
@torch.no_grad()
def test_metaplastic_form_starts_as_its_source(name: str) -> None:
    made, x = layer(name), inputs(2, 8)
    given = extras(made, 2, 8)
    before = made(x, **given).output
    budget = float32_error(made, x, given)
    assert metaplasticize(made, rank=2) is made
    assert made.spec.name == f"metaplastic_{name}"
    assert (made(x, **given).output - before).abs().max() < budget
    set_plasticity(made, 0.5)
    assert (made(x, **given).output - before).abs().max() > budget


def test_plasticity_is_alive_at_zero() -> None:
    made, x = metaplasticize(layer("gated_deltanet"), rank=2), inputs(2, 8)
    assert made.metaplastic is not None
    assert made.metaplastic.b_scale is not None
    scale = made.metaplastic.b_scale
    ((made(x).output - inputs(2, 8, seed=3)) ** 2).sum().backward()
    assert scale.grad is not None
    # Heads whose loss falls with importance leave zero; the others are not pushed below it.
    assert (scale.grad <= 0).all()
    assert (scale.grad < 0).any()
    torch.optim.SGD([scale], lr=1e-3).step()
    assert torch.equal(scale, -1e-3 * scale.grad)


@pytest.mark.parametrize("gate", ["head", "value"])
def test_shape_of_the_importance_gate_can_be_chosen(gate: str) -> None:
    made = metaplasticize(layer("gla"), gate=gate, plasticity=1.0)  # type: ignore[arg-type]
    shape = made(inputs(2, 3), output_state=True).state["importance"].shape
    n = made.sizes
    expected = (2, n.heads, n.key) + ((n.value,) if gate == "value" else ())
    assert tuple(shape) == expected


def test_metaplasticize_refuses() -> None:
    with pytest.raises(SpecError, match="metaplastic already"):
        metaplasticize(layer("palimpsa"))
    with pytest.raises(ValueError, match="got Linear, expected a layer of any spec, or a model"):
        metaplasticize(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="plasticity: belongs to modules, and 'gla' is a spec"):
        metaplasticize(glazoo.load("gla"), plasticity=1.0)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="x: got str, accepted are a Spec"):
        metaplasticize("gla")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"got 1\.5, accepted are numbers in \[0, 1\]"):
        metaplasticize(layer("kda"), plasticity=1.5)
    with pytest.raises(ValueError, match=r"got -0\.5, accepted are numbers from 0 on"):
        metaplasticize(layer("gla"), plasticity=-0.5)
    with pytest.raises(ValueError, match=r"layers: got \[7\]"):
        metaplasticize(layer("gla"), layers=[7])
    with pytest.raises(SpecError, match="no layer was made metaplastic"):
        set_plasticity(layer("palimpsa"), 0.0)


def test_published_sizes_follow_from_the_hidden_size() -> None:
    # The defaults of the published layers: heads, key and value channels at their width.
    expected = {
        "mamba2": (2048, 64, 1, 128, 64),
        "gated_deltanet": (2048, 6, 6, 256, 512),
        "gla": (1024, 4, 4, 128, 256),
        "retnet": (1024, 8, 8, 128, 256),
        "rodimus": (1024, 1, 1, 64, 2048),
    }
    for name, (hidden, heads, key_heads, key, value) in expected.items():
        with torch.device("meta"):
            made = GatedLinearAttention(name, hidden)
        assert made.sizes == (hidden, heads, key_heads, key, value), name


def test_published_starts() -> None:
    torch.manual_seed(0)
    mamba = GatedLinearAttention("mamba2", 64, num_heads=64, head_k_dim=4, head_v_dim=2)
    assert mamba.decay.A_log is not None
    assert mamba.decay.dt_bias is not None
    rate = mamba.decay.A_log.exp()
    assert 1 <= rate.min() < rate.max() <= 16.001
    step = torch.nn.functional.softplus(mamba.decay.dt_bias)
    assert 0.00099 < step.min() < step.max() < 0.1001
    assert torch.equal(mamba.skip, torch.ones(64))
    mlstm = GatedLinearAttention("mlstm", 64, num_heads=4)
    assert mlstm.write.proj is not None
    assert torch.equal(mlstm.write.proj.bias, torch.full((4,), -10.0))
    assert mlstm.decay.proj is not None
    assert torch.allclose(mlstm.decay.proj.bias, torch.linspace(3, 6, 4))
    assert not mlstm.decay.proj.weight.any()
    mesa = GatedLinearAttention("mesanet", 64, num_heads=2, head_k_dim=4, head_v_dim=4)
    assert mesa.metaplastic is not None
    prior = mesa.metaplastic.prior(torch.float32)
    assert prior is not None
    assert torch.allclose(prior, torch.ones(2, 4))
    palimpsa = GatedLinearAttention("palimpsa", 64, num_heads=2, head_k_dim=4, head_v_dim=4)
    assert palimpsa.metaplastic is not None
    assert palimpsa.metaplastic.ip_log is not None
    assert not palimpsa.metaplastic.ip_log.requires_grad


def test_lower_bound_holds() -> None:
    made, x = layer("hgrn2"), inputs(1, 5)
    bound = torch.full((made.width,), 0.9, dtype=torch.float64)
    g = made.decay(x * 100, bound).value
    assert g.min() >= math.log(0.9) - 1e-12
    # A bound of zero is no bound, with a finite gradient.
    zero = torch.zeros(made.width, dtype=torch.float64, requires_grad=True)
    free = made.decay(x, zero).value
    assert torch.allclose(free, made.decay(x).value, rtol=0, atol=1e-12)
    free.sum().backward()
    assert zero.grad is not None
    assert zero.grad.isfinite().all()


def test_uncertainty_is_given() -> None:
    made, x = layer("palimpsa"), inputs(2, 5)
    result = made(x, output_uncertainty=True)
    assert result.uncertainty is not None
    assert result.uncertainty.shape == (2, 5, made.sizes.heads, made.sizes.value)
    assert (result.uncertainty > 0).all()


BAD_SIZES = [
    ({"num_heads": 3, "num_key_heads": 2}, "num_heads: got 3, accepted are multiples"),
    ({"num_heads": 0}, "num_heads: got 0"),
    ({"head_k_dim": 1.5}, "head_k_dim: got 1.5"),
    ({"num_heads": None, "head_v_dim": 7}, "hidden_size: 1.5 x 16 = 24"),
]


@pytest.mark.parametrize(("options", "message"), BAD_SIZES)
def test_sizes_that_do_not_divide(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GatedLinearAttention("gated_deltanet", HIDDEN, **options)


def test_one_head_variants_have_one() -> None:
    with pytest.raises(ValueError, match="has one head"):
        GatedLinearAttention("rodimus", HIDDEN, num_heads=2)
    with pytest.raises(ValueError, match="as many key heads as heads"):
        GatedLinearAttention("mlstm", HIDDEN, num_heads=2, num_key_heads=1)
    with pytest.raises(ValueError, match="even numbers"):
        GatedLinearAttention("retnet", HIDDEN, num_heads=2, head_k_dim=3)


def test_bad_calls() -> None:
    made, x = layer("gated_deltanet"), inputs(2, 5)
    state = made(x, output_state=True).state
    with pytest.raises(ValueError, match=r"attention_mask: got shape \[2, 4\]"):
        made(x, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"hidden_states: got shape \[2, 5, 8\]"):
        made(x[..., :8])
    with pytest.raises(ValueError, match="packed sequences start fresh"):
        made(x[:1], cu_seqlens=torch.tensor([0, 5]), output_state=True)
    with pytest.raises(ValueError, match="comes from another layer"):
        layer("retnet")(x, state=state)
    with pytest.raises(ValueError, match="comes from another layer or batch"):
        made(x[:1], state=state)
    with pytest.raises(ValueError, match=r"memory has shape \[2, 4, 4, 6\]"):
        layer("gated_deltanet", head_v_dim=12)(x, state=state)


def test_check_finite_names_the_layer() -> None:
    made, x = layer("gla", check_finite=True), inputs(1, 4)
    made(x)
    x[0, 2, 3] = torch.inf
    with pytest.raises(ValueError, match=r"the input of layer 1 \(gla\) is not finite"):
        made(x)


IMPOSSIBLE = [
    ("mamba3", {"decay": {"shape": "none"}, "write": {"shape": "none"}}, "discretisation step"),
    ("retnet", {"layer": {"skip": "branch"}}, "needs layer.local.at"),
    ("comba", {"layer": {"erase_key": "none"}}, "erase.key = free and layer.erase_key"),
    ("qdelta", {"layer": {"erase_mix": {"shape": "none"}}}, "query_added and a head-shaped"),
    (
        "qdelta",
        {"layer": {"erase_mix": {"shape": "head", "input": "shift"}}},
        "layer.erase_mix.input = shift",
    ),
    ("gka", {"read": {"mix": {"shape": "head", "input": "branch"}}}, "read.mix.input = branch"),
    ("gla", {"decay": {"input": "shift"}}, "needs layer.local.kind = token_shift"),
]


@pytest.mark.parametrize(("name", "change", "message"), IMPOSSIBLE)
def test_specs_without_a_layer(name: str, change: dict[str, dict[str, str]], message: str) -> None:
    data = glazoo.load(name).model_dump()
    for part, values in change.items():
        fresh = values.get("shape") == "none"
        data[part] = values if fresh else data[part] | values
    with pytest.raises(SpecError, match=message):
        GatedLinearAttention(Spec.model_validate(data), HIDDEN, **sizes(glazoo.load(name)))
