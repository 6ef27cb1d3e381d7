"""Converting live models: what stays, what the added gates do, and what is refused."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
import transformers
from converters.converting import cache_of, layers_of, make_config, make_model, open_gates, prompts
from packaging.version import Version
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Mamba2ForCausalLM

import glazoo.models
from glazoo import metaplasticize
from glazoo.converters import ConversionError
from glazoo.converters.float64 import clean_float64_model
from glazoo.layers import gates, set_plasticity
from glazoo.models.conversion import set_impl, source_limit

EPS = torch.finfo(torch.float32).eps


def convert(model: nn.Module, plasticity: float = 0.0, **options: Any) -> Any:
    return metaplasticize(copy.deepcopy(model), plasticity, **options)


def budget(source: Any, ids: Tensor) -> float:
    """How far float32 moves the source's own logits from those of a float64 run, doubled: the
    converted model rounds on its own."""
    with torch.no_grad():
        clean = clean_float64_model("mamba2")(copy.deepcopy(source.config)).double().eval()
        clean.load_state_dict(source.state_dict())
        exact = clean(ids).logits
        logits = source(ids).logits
    error = float((logits.double() - exact).abs().max())
    return 2 * max(error, EPS * float(logits.abs().max()))


def decode(model: Any, ids: Tensor, split: int) -> Tensor:
    """Logits of a prompt of `split` tokens, and of one token after the other behind it."""
    out = model(ids[:, :split], use_cache=True)
    parts = [out.logits]
    for t in range(split, ids.shape[1]):
        out = model(ids[:, t : t + 1], **cache_of(out), use_cache=True)
        parts.append(out.logits)
    return torch.cat(parts, 1)


VARIANTS = [
    pytest.param({"n_groups": 1}, "value", id="one-group-value"),
    pytest.param({"n_groups": 2}, "value", id="two-groups-value"),
    pytest.param({"n_groups": 2}, "head", id="two-groups-head"),
    pytest.param({"tie_word_embeddings": True, "use_bias": True}, "head", id="tied-biased-head"),
    pytest.param({"use_conv_bias": False, "time_step_limit": (0.05, 0.4)}, "value", id="limited"),
]


@torch.no_grad()
@pytest.mark.parametrize(("changes", "gate"), VARIANTS)
def test_computes_what_the_source_computes(changes: dict[str, Any], gate: str) -> None:
    source = make_model(**changes)
    model = convert(source, gate=gate)
    ids, mask = prompts()
    allowed = budget(source, ids)
    pairs = {
        "prompt": (source(ids).logits, model(ids).logits),
        "padded": [m(ids, attention_mask=mask).logits[mask.bool()] for m in (source, model)],
        "decoded": (decode(source, ids, 30), decode(model, ids, 30)),
    }
    for name, (a, b) in pairs.items():
        assert torch.isfinite(b).all(), name
        assert float((a - b).abs().max()) <= allowed, name

    caches = [cache_of(m(ids[:, :20], use_cache=True)) for m in (source, model)]
    a, b = (m(ids[:, 20:], **c).logits for m, c in zip((source, model), caches, strict=True))
    assert float((a - b).abs().max()) <= allowed


@torch.no_grad()
@pytest.mark.parametrize("gate", ["head", "value"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generates_the_same_tokens(gate: str, beams: int) -> None:
    source = make_model()
    model = convert(source, gate=gate)
    ids, mask = prompts(tokens=17)
    options = {"max_new_tokens": 10, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    a, b = (m.generate(ids, attention_mask=mask, **options) for m in (source, model))
    assert a.shape == (3, 27)
    assert torch.equal(a, b)


@torch.no_grad()
@pytest.mark.parametrize(("changes", "gate"), VARIANTS)
def test_agrees_to_ten_digits_in_float64(changes: dict[str, Any], gate: str) -> None:
    config = make_config(**changes)
    source = clean_float64_model("mamba2")(config).double().eval()
    source.load_state_dict(make_model(**changes).state_dict())
    model = convert(source, gate=gate)
    assert all(p.dtype == torch.float64 for p in model.parameters())
    ids, mask = prompts()
    a, b = (m(ids, attention_mask=mask).logits for m in (source, model))
    keep = mask.bool()
    assert float((a - b)[keep].abs().max()) <= 1e-10
    assert float((decode(source, ids, 30) - decode(model, ids, 30)).abs().max()) <= 1e-10


def by_hand(source: Any, model: Any, hidden: Tensor) -> Tensor:
    """The first mixer token by token and head by head, from the published recurrence, in
    float64."""
    mixer = source.backbone.layers[0].mixer
    gate = model.backbone.layers[0].mixer.metaplastic
    w = {name: p.detach().double() for name, p in mixer.named_parameters()}
    heads, value, keys, groups = 4, 16, 8, mixer.n_groups
    inner, width = heads * value, groups * keys
    projected = hidden @ w["in_proj.weight"].T
    z, mixed, step = projected.split([inner, inner + 2 * width, heads], -1)
    taps = w["conv1d.weight"][:, 0]
    padded = F.pad(mixed, (0, 0, taps.shape[1] - 1, 0))
    mixed = sum(padded[:, i : i + mixed.shape[1]] * taps[:, i] for i in range(taps.shape[1]))
    mixed = F.silu(mixed + w["conv1d.bias"])
    x, key, query = mixed.split([inner, width, width], -1)
    step = F.softplus(step + w["dt_bias"])
    low = hidden @ gate.b_down.detach().double().T @ gate.b_up.detach().double().T
    scale = gate.b_scale.detach().double().clamp(min=0)
    prior = gate.ip_log.detach().double().exp()
    batch, tokens = hidden.shape[:2]
    y = torch.zeros(batch, tokens, inner, dtype=torch.float64)
    for n in range(batch):
        for head in range(heads):
            group = head // (heads // groups)
            h = torch.zeros(value, keys, dtype=torch.float64)
            importance = torch.zeros(value, keys, dtype=torch.float64)
            mine = slice(head * value, (head + 1) * value)
            theirs = slice(group * keys, (group + 1) * keys)
            for t in range(tokens):
                dt = step[n, t, head]
                a = torch.exp(-torch.exp(w["A_log"][head]) * dt)
                k, v = key[n, t, theirs], x[n, t, mine]
                by_value = gate.spec.gate.shape == "value"
                z_b = low[n, t, mine] if by_value else low[n, t, head].expand(value)
                b = scale[head] * dt * 2 * torch.sigmoid(z_b)
                h = a * h + dt * torch.outer(v, k)
                importance = a * importance + torch.outer(b, k * k)
                mean = h / (importance + prior[head])
                y[n, t, mine] = mean @ query[n, t, theirs] + w["D"][head] * v
    # Before transformers 5.23 the norm was over all groups at once.
    y = (y * F.silu(z)).unflatten(-1, (-1, getattr(mixer.norm, "group_size", inner)))
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + mixer.norm.variance_epsilon)
    return w["norm.weight"] * y.flatten(-2) @ w["out_proj.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("gate", ["head", "value"])
def test_open_gates_follow_the_published_recurrence(gate: str) -> None:
    source = clean_float64_model("mamba2")(make_config()).double().eval()
    source.load_state_dict(make_model().state_dict())
    model = convert(source, gate=gate)
    open_gates(model)
    hidden = torch.randn(2, 11, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = by_hand(source, model, hidden)
    got = model.backbone.layers[0].mixer(hidden)
    assert float((got - expected).abs().max()) <= 1e-10 * float(expected.abs().max())
    assert float((got - source.backbone.layers[0].mixer(hidden)).abs().max()) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("gate", ["head", "value"])
def test_open_gates_agree_between_prompt_cache_and_beams(gate: str) -> None:
    source = clean_float64_model("mamba2")(make_config()).double().eval()
    source.load_state_dict(make_model().state_dict())
    model = convert(source, gate=gate)
    open_gates(model)
    ids, _ = prompts()
    full = model(ids).logits
    assert float((decode(model, ids, 30) - full).abs().max()) <= 1e-10
    cache = cache_of(model(ids[:, :20], use_cache=True))
    assert float((model(ids[:, 20:], **cache).logits - full[:, 20:]).abs().max()) <= 1e-10
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3, "eos_token_id": None}
    a = model.generate(ids, use_cache=True, **options)
    b = model.generate(ids, use_cache=False, **options)
    assert torch.equal(a, b)


@torch.no_grad()
@pytest.mark.parametrize("gate", ["head", "value"])
def test_padding_adds_no_importance(gate: str) -> None:
    source = clean_float64_model("mamba2")(make_config()).double().eval()
    source.load_state_dict(make_model().state_dict())
    model = convert(source, gate=gate)
    open_gates(model, kappa=3.0)
    ids, mask = prompts()
    padded = model(ids, attention_mask=mask, use_cache=True)
    for row in range(3):
        alone = model(ids[row : row + 1, 5 * row :], use_cache=True)
        # The convolution sees zeros on the left either way: the same numbers, in another order of
        # chunks.
        assert float((padded.logits[row, 5 * row :] - alone.logits[0]).abs().max()) <= 1e-10
        for a, b in zip(layers_of(padded), layers_of(alone), strict=True):
            assert torch.allclose(a.recurrent_states[0][row], b.recurrent_states[0][0], rtol=1e-10)


@torch.no_grad()
def test_the_clean_float64_copy_computes_what_the_source_computes() -> None:
    source = make_model()
    clean = clean_float64_model("mamba2")(make_config()).double().eval()
    clean.load_state_dict(source.state_dict())
    ids, _ = prompts()
    a, b = source(ids).logits, clean(ids).logits
    assert b.dtype == torch.float64
    # T products are summed per logit and layer; far above what float32 rounds, far below any other
    # model.
    assert float((a - b).abs().max()) <= 37 * 2 * EPS * float(a.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_keep_wide_states_and_gates(dtype: torch.dtype) -> None:
    source = make_model()
    narrow = copy.deepcopy(source).to(dtype)
    model = convert(source).to(dtype)
    ids, mask = prompts()
    # How far the dtype itself moves the source is what it may move the converted model.
    allowed = float(
        (narrow(ids, attention_mask=mask).logits - source(ids, attention_mask=mask).logits)
        .abs()
        .max()
    )
    out = model(ids, attention_mask=mask, use_cache=True)
    assert torch.isfinite(out.logits).all()
    assert float((out.logits - narrow(ids, attention_mask=mask).logits).abs().max()) <= allowed
    assert all(layer.recurrent_states[0].dtype == torch.float32 for layer in layers_of(out))
    assert {p.dtype for _, g in gates(model) for p in g.parameters()} == {torch.float32}
    assert model.backbone.layers[0].mixer.in_proj.weight.dtype == dtype
    assert model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (
        3,
        40,
    )


@torch.no_grad()
def test_autocast_narrows_the_projections_only() -> None:
    source = make_model()
    model = convert(source)
    ids, _ = prompts()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = source(ids).logits, model(ids, use_cache=True)
    allowed = float((a - source(ids).logits).abs().max())
    assert float((b.logits - a).abs().max()) <= allowed
    assert all(layer.recurrent_states[0].dtype == torch.float32 for layer in layers_of(b))


@torch.no_grad()
@pytest.mark.parametrize(("gate", "width"), [("value", 32), ("head", 17)])
def test_cache_holds_one_tensor_per_layer(gate: str, width: int) -> None:
    model = convert(make_model(), gate=gate)
    for layer in layers_of(model(prompts()[0], use_cache=True)):
        assert layer.recurrent_states[0].shape == (3, 4, 8, width)
        # The memory of all heads, then their importance. kappa = 0: none.
        packed = layer.recurrent_states[0].flatten(1)
        assert packed[:, : 4 * 8 * 16].any()
        assert not packed[:, 4 * 8 * 16 :].any()


@pytest.mark.parametrize("gate", ["head", "value"])
def test_training_starts_at_exactly_zero(gate: str) -> None:
    model = convert(make_model(), gate=gate).train()
    ids, _ = prompts()
    optimizer = torch.optim.SGD([p for _, g in gates(model) for p in g.parameters()], lr=1.0)
    model(ids, labels=ids).loss.backward()
    grads = torch.cat([g.b_scale.grad for _, g in gates(model)])
    # The loss wants more importance in some heads and less in others; the latter stay at zero.
    assert bool((grads <= 0).all())
    assert bool((grads < 0).any())
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    kappa = torch.cat([g.b_scale.detach() for _, g in gates(model)])
    assert torch.equal(kappa > 0, grads < 0)
    optimizer.zero_grad()
    model(ids, labels=ids).loss.backward()
    # Once a head is plastic, its projection learns too.
    for _, g in gates(model):
        moved = g.b_up.grad.unflatten(0, (4, -1)).abs().amax((1, 2)) > 0
        assert torch.equal(moved, g.b_scale > 0)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = convert(make_model(), plasticity=0.4).train()
    ids, _ = prompts(batch=2)
    model(ids, labels=ids).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert all(layer.gradient_checkpointing for layer in model.backbone.layers)
    model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, plain[name]), name


def test_conversion_keeps_parameters_ties_and_other_models() -> None:
    source = make_model(tie_word_embeddings=True)
    sibling = Mamba2ForCausalLM(source.config)
    before = dict(source.named_parameters())
    mode, config = source.training, source.config
    model: Any = metaplasticize(source)
    after = dict(model.named_parameters())
    assert model is source
    assert model.training == mode
    assert all(after[name] is p for name, p in before.items())
    assert model.lm_head.weight is model.backbone.embeddings.weight
    assert len(after) == len(before) + 2 * 4
    assert isinstance(model, Mamba2ForCausalLM)
    assert sibling.config is config
    assert sibling.config.model_type == "mamba2"
    assert isinstance(model.config, glazoo.models.MetaplasticMamba2Config)
    assert all(m.config is model.config for m in model.modules() if hasattr(m, "config"))


@torch.no_grad()
def test_some_layers_only() -> None:
    source = make_model(num_hidden_layers=3)
    model = convert(source, 1.0, layers=[2])
    kinds = [type(layer.mixer).__name__ for layer in model.backbone.layers]
    assert kinds == ["Mamba2Mixer", "Mamba2Mixer", "MetaplasticMamba2Mixer"]
    ids, _ = prompts()
    a = source(ids, output_hidden_states=True).hidden_states
    b = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(a[1], b[1])
    assert not torch.allclose(a[2], b[2])
    assert decode(model, ids, 30).shape == (3, 37, 61)


@torch.no_grad()
def test_set_plasticity() -> None:
    model = convert(make_model())
    assert set_plasticity(model, 0.5) is model
    assert all(set(gate.b_scale.tolist()) == {0.5} for _, gate in gates(model))
    with pytest.raises(ValueError, match="accepted are numbers from 0 on"):
        set_plasticity(model, -1.0)


@torch.no_grad()
def test_source_limit_holds_and_restores() -> None:
    source = make_model()
    model = convert(source)
    open_gates(model)
    ids, _ = prompts()
    moved = model(ids).logits
    with source_limit(model):
        assert float((model(ids).logits - source(ids).logits).abs().max()) <= budget(source, ids)
    assert torch.equal(model(ids).logits, moved)
    assert float((moved - source(ids).logits).abs().max()) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("gate", ["head", "value"])
def test_engines_agree(gate: str) -> None:
    source = make_model()
    model = convert(source, gate=gate)
    open_gates(model)
    ids, _ = prompts()
    chunked = set_impl(model, "chunked")(ids).logits
    reference = set_impl(model, "reference")(ids).logits
    assert float((chunked - reference).abs().max()) <= 4 * budget(source, ids)


@torch.no_grad()
@pytest.mark.parametrize("gate", ["head", "value"])
def test_saved_model_loads_through_the_auto_class(tmp_path: Path, gate: str) -> None:
    model = convert(make_model(tie_word_embeddings=True), 0.25, gate=gate)
    open_gates(model)
    model.save_pretrained(tmp_path / "one", max_shard_size="20KB")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    ids, _ = prompts()
    assert type(loaded) is type(model) is glazoo.models.MetaplasticMamba2ForCausalLM
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded.save_pretrained(tmp_path / "two")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two", dtype=torch.bfloat16)
    for (name, p), (_, q) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        narrow = ".metaplastic." not in name
        assert p.dtype == (torch.bfloat16 if narrow else torch.float32), name
        assert torch.equal(p, q.to(p.dtype)), name


@torch.no_grad()
def test_offloaded_models_compute_the_same() -> None:
    source = make_model()
    model = convert(source, plasticity=0.5)
    ids, _ = prompts()
    expected = decode(model, ids, 30)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for _, g in gates(model) for p in g.parameters())
    assert torch.equal(decode(model, ids, 30), expected)
    accelerate.cpu_offload(source, execution_device=torch.device("cpu"))
    with pytest.raises(ConversionError, match="carry hooks that replace `forward`"):
        metaplasticize(source)
    assert type(source) is Mamba2ForCausalLM


@torch.no_grad()
def test_rows_that_are_a_document_each_are_refused_or_stay_as_they_are() -> None:
    model, ids = convert(make_model()), prompts()[0]
    marks = torch.zeros(ids.shape, dtype=torch.int32)
    found = None
    # transformers' own refusal, since 5.23, where its convolution keeps nothing apart.
    with contextlib.suppress(ValueError):
        found = model.backbone(ids, seq_idx=marks).last_hidden_state
    plain = model.backbone(ids).last_hidden_state
    assert (found is None) == (Version(transformers.__version__) >= Version("5.23"))
    assert found is None or torch.equal(found, plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plasticity": -0.1}, r"plasticity: got -0.1, accepted are numbers from 0 on"),
        ({"plasticity": float("nan")}, "plasticity: got nan"),
        ({"gate": "key"}, "gate: got 'key', accepted are 'head' and 'value'"),
        ({"rank": 0}, "rank: got 0, accepted are 1 to 32"),
        ({"rank": 33}, "rank: got 33"),
        ({"layers": [0, 5]}, r"layers: \[5\] hold no convertible mixer"),
        ({"layers": []}, "layers: got none"),
    ],
)
def test_bad_options_are_refused_and_change_nothing(options: dict[str, Any], message: str) -> None:
    model = make_model()
    with pytest.raises(ConversionError, match=message) as caught:
        metaplasticize(model, **options)
    assert "\n" not in str(caught.value)
    assert type(model) is Mamba2ForCausalLM
    assert next(gates(model), None) is None


def test_models_that_cannot_be_converted_are_refused() -> None:
    with pytest.raises(ConversionError, match="got Linear, expected a layer"):
        metaplasticize(nn.Linear(2, 2))
    with pytest.raises(ConversionError, match="converted already"):
        metaplasticize(convert(make_model()))
    other = make_model()
    other.config.model_type = "gpt_neo"  # type: ignore[misc]
    with pytest.raises(
        ConversionError, match="'gpt_neo' is not supported: its layers call no scan function"
    ):
        metaplasticize(other)


def test_a_class_of_another_package_behind_the_same_name_converts_in_memory_only(
    tmp_path: Path,
) -> None:
    model = make_model()
    stranger = type("Mamba2ForCausalLM", (Mamba2ForCausalLM,), {"__module__": "fla.models.mamba2"})
    model.__class__ = stranger
    ids, mask = prompts()
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
        metaplasticize(model)
        after = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(after, before)
    assert isinstance(model, stranger)
    assert type(model.config).__name__ == "Mamba2Config"
    with pytest.raises(ConversionError, match=r"in memory, and no folder.*glazoo convert --import"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConversionError, match="converted already"):
        metaplasticize(model)
