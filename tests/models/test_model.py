"""The language model of every spec: training, saving, generation, padding, hybrids, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from layer_cases import HIDDEN, VARIANTS, VOCABULARY, config, model, tiny, tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

import glazoo
from glazoo import metaplasticize
from glazoo.layers import GatedLinearAttention, layers_of
from glazoo.models.causal_lm import GlazooConfig, GlazooForCausalLM
from glazoo.models.modeling import wide_names

GREEDY: dict[str, Any] = {
    "max_new_tokens": 5,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
}
HYBRID = ["gated_deltanet", "attention", "mamba3"]


@torch.no_grad()
def float32_error(made: GlazooForCausalLM, x: torch.Tensor) -> float:
    """Return the error of the float32 model's logits: two float64 ways must agree within it."""
    state = {k: v.clone() for k, v in made.state_dict().items()}
    exact = made(x).logits
    low = made.float()(x).logits
    made.double().load_state_dict(state)
    error = float((low.double() - exact).abs().max())
    assert 0.0 < error < 1e-2 * float(exact.abs().max())
    return error


# One of each kernel class and kind of state, and of what a layer makes for them.
QUICK = {
    "based",
    "bayesian_layer",
    "gated_deltanet",
    "gated_deltaproduct",
    "gka",
    "hgrn2",
    "kdn",
    "longhorn",
    "mamba2",
    "mamba3",
    "mesanet",
    "metaplastic_comba",
    "metaplastic_kda",
    "palimpsa",
    "precond_kda",
    "retnet",
    "rwkv7",
}


def test_the_quick_variants_have_every_kernel_class() -> None:
    def kernels(names: Any) -> set[str]:
        return {str(glazoo.lower(glazoo.load(name)).kernel) for name in names}

    assert set(VARIANTS) >= QUICK
    assert kernels(QUICK) == kernels(VARIANTS)


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x not in QUICK)) for x in VARIANTS]
)
def test_trains_saves_reloads_and_generates(name: str, tmp_path: Path) -> None:
    made = model(name).train()
    x = tokens(4, 12)
    optimizer = torch.optim.AdamW(made.parameters(), lr=5e-3)
    losses = []
    for _ in range(6):
        loss = made(x, labels=x).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]

    made.eval()
    made.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is GlazooForCausalLM
    for key, value in made.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert torch.equal(made(x).logits, again(x).logits)

    prompt = x[:2, :6]
    cached = made.generate(prompt, **GREEDY)
    assert torch.equal(cached, made.generate(prompt, use_cache=False, **GREEDY))
    beams = made.generate(prompt, num_beams=3, **GREEDY)
    assert torch.equal(beams, made.generate(prompt, num_beams=3, use_cache=False, **GREEDY))

    padded, mask = torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 9, dtype=torch.int64)
    padded[0, 3:], mask[0, 3:] = prompt[0], 1
    padded[1], mask[1] = tokens(1, 9, seed=9)[0], 1
    left = made.generate(padded, attention_mask=mask, **GREEDY)
    assert torch.equal(left[0, 3:], cached[0])


@pytest.mark.parametrize("pattern", [HYBRID, ["hgrn2", "rwkv7", "attention"]], ids=str)
@torch.no_grad()
def test_hybrid_prefill_in_pieces_padding_and_packing(pattern: list[str]) -> None:
    made, x = model(pattern).double(), tokens(2, 10)
    whole = made(x).logits
    budget = float32_error(made, x)
    cache, outputs = None, []
    for start, end in ((0, 1), (1, 3), (3, 6), (6, 10)):
        piece = made(x[:, start:end], past_key_values=cache, use_cache=True)
        cache = piece.past_key_values
        outputs.append(piece.logits)
    assert (torch.cat(outputs, 1) - whole).abs().max() < budget
    assert cache is not None
    assert cache.get_seq_length() == 10

    for real in ([*range(3, 13)], [*range(10)], [0, 1, 3, 4, 5, 8, 9, 10, 11, 12]):
        padded, mask = tokens(2, 13, seed=5), torch.zeros(2, 13, dtype=torch.int64)
        padded[:, real], mask[:, real] = x, 1
        assert (made(padded, attention_mask=mask).logits[:, real] - whole).abs().max() < budget

    packed = torch.cat([x[:1], x[1:, :4]], 1)
    bounds = torch.tensor([0, 10, 14], dtype=torch.int32)
    positions = torch.cat([torch.arange(10), torch.arange(4)])[None]
    by_bounds = made(packed, cu_seq_lens_q=bounds, position_ids=positions).logits
    by_positions = made(packed, position_ids=positions).logits
    for logits in (by_bounds, by_positions):
        assert (logits[:, :10] - whole[:1]).abs().max() < budget
        assert (logits[:, 10:] - whole[1:, :4]).abs().max() < budget


@torch.no_grad()
def test_a_padding_token_inside_a_prompt_is_as_if_it_were_not_there() -> None:
    made, prompt = model(HYBRID), tokens(1, 7)[0]
    prompt[prompt == 0] = 1
    zeros = prompt.new_zeros
    holes = torch.cat([prompt[:2], zeros(1), prompt[2:5], zeros(2), prompt[5:]])
    # `generate` takes every padding token for padding, wherever it stands.
    expected = made.generate(prompt[None], **GREEDY)[0, 7:]
    assert torch.equal(made.generate(holes[None], **GREEDY)[0, 10:], expected)
    batch = torch.stack([holes, torch.cat([zeros(3), prompt])])
    for row in made.generate(batch, **GREEDY):
        assert torch.equal(row[10:], expected)


class Calls:
    """Counts the calls of a model, and remembers how many tokens each had."""

    def __init__(self, made: GlazooForCausalLM) -> None:
        self.lengths: list[int] = []
        made.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, made: Any, args: Any, kwargs: Any) -> None:
        self.lengths.append(kwargs["input_ids"].shape[1])


@pytest.mark.parametrize("pattern", [HYBRID, ["hgrn2", "rwkv7", "attention"], "palimpsa"], ids=str)
@pytest.mark.parametrize("guide", ["prompt", "itself", "another"])
@torch.no_grad()
def test_assisted_generation_gives_the_same_tokens(pattern: Any, guide: str) -> None:
    made = model(pattern).double()
    # A prompt that repeats itself, so that looking it up proposes something.
    prompt = tokens(1, 6).repeat(1, 3)
    options = {**GREEDY, "max_new_tokens": 16}
    expected = made.generate(prompt, **options)
    help_: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if guide != "prompt":
        help_ = {"assistant_model": made if guide == "itself" else model("gla").double()}
    calls = Calls(made)
    assert torch.equal(made.generate(prompt, **help_, **options), expected)
    # Several tokens were proposed at once.
    assert any(1 < n < 18 for n in calls.lengths)


@torch.no_grad()
def test_a_recorded_cache_goes_back_over_several_calls() -> None:
    made, x = model(HYBRID).double(), tokens(2, 10)
    budget = float32_error(made, x)
    for back in (0, 1, 2, 3, 5, 6):
        cache = DynamicCache(config=made.config)
        made(x[:, :4], past_key_values=cache)
        assert not cache.is_croppable
        cache.activate_past_recording()
        made(x[:, 4:7], past_key_values=cache)
        made(x[:, 7:8], past_key_values=cache)
        made(x[:, 8:], past_key_values=cache)
        cache.crop(-back)
        assert cache.get_seq_length() == 10 - back
        more = made(torch.cat([x[:, 10 - back :], x[:, :2]], 1), past_key_values=cache).logits
        whole = made(torch.cat([x, x[:, :2]], 1)).logits[:, 10 - back :]
        assert (more - whole).abs().max() < budget
        # What was not recorded stays, and so does what was read before the last `crop`.
        with pytest.raises(ValueError, match="tokens; it goes back over tokens that were seen"):
            cache.crop(-back - 3)


@pytest.mark.parametrize("tie", [False, True])
def test_tied_embeddings_survive_saving(tie: bool, tmp_path: Path) -> None:
    made = model(HYBRID, tie_word_embeddings=tie)
    assert (made.lm_head.weight is made.model.embed_tokens.weight) is tie
    made.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tie
    x = tokens(1, 5)
    assert torch.equal(made(x).logits, again(x).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    x = tokens(2, 8)
    plain, checkpointed = model(HYBRID).train(), model(HYBRID).train()
    # transformers renames the method; both names are in the versions that we accept.
    name = "activation_checkpointing_enable"
    enable = getattr(checkpointed, name, None) or checkpointed.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    for made in (plain, checkpointed):
        made(x, labels=x).loss.backward()
    for (key, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert a.grad is not None, key
        assert b.grad is not None, key
        assert torch.equal(a.grad, b.grad), key


def test_wide_parameters_survive_half_precision(tmp_path: Path) -> None:
    made = model(["metaplastic_kda", "hgrn2", "rwkv7"])
    names = wide_names(made)
    assert "model.lower_bounds.logits" in names
    made.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    cast = made.to(torch.bfloat16)
    for some in (half, cast):
        for key, p in some.named_parameters():
            assert p.dtype == (torch.float32 if key in names else torch.bfloat16), key
    assert half(tokens(1, 6)).logits.isfinite().all()
    assert torch.equal(half(tokens(1, 6)).logits, cast(tokens(1, 6)).logits)


def test_configuration_is_self_contained(tmp_path: Path) -> None:
    own = glazoo.load("gla").model_dump()
    own["name"], own["decay"]["divisor"] = "my_gla", 8.0
    sizes = {n: tiny(glazoo.load(n)) for n in ("gla", "mamba2")} | {
        "my_gla": tiny(glazoo.load("gla"))
    }
    made = GlazooConfig(
        pattern=[own, "attention", "gla", glazoo.load("mamba2")],
        hidden_size=HIDDEN,
        num_hidden_layers=5,
        num_attention_heads=2,
        spec_sizes=sizes,
    )
    assert made.layer_specs == ["my_gla", "attention", "gla", "mamba2", "my_gla"]
    made.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, GlazooConfig)
    assert again.to_dict() == made.to_dict() | {"_name_or_path": str(tmp_path)}
    spec = again.spec(0)
    assert spec is not None
    assert spec.decay.divisor == 8.0
    assert again.spec(1) is None
    assert again.layer_types[1] == "full_attention"


def test_auto_classes_know_the_model() -> None:
    given = config("gla")
    assert type(AutoModelForCausalLM.from_config(given)) is GlazooForCausalLM
    assert AutoModel.from_config(given)(tokens(1, 3)).last_hidden_state.shape == (1, 3, HIDDEN)


@torch.no_grad()
def test_metaplastic_model_starts_as_its_source_and_survives_saving(tmp_path: Path) -> None:
    made, x = model(HYBRID).double(), tokens(2, 8)
    before = made(x).logits
    budget = float32_error(made, x)
    assert metaplasticize(made, layers=[0], gate="value", rank=2) is made
    metaplasticize(made)  # the rest
    assert made.config.layer_specs == [
        "metaplastic_gated_deltanet",
        "attention",
        "metaplastic_mamba3",
    ]
    assert (made(x).logits - before).abs().max() < budget
    made.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(again(x).logits, made(x).logits)
    assert all(m.spec.metaplastic for m in layers_of(again).values())


def test_layers_of_one_spec_may_differ_in_their_gates(tmp_path: Path) -> None:
    made = model("gla")
    metaplasticize(made, layers=[0], gate="head")
    metaplasticize(made, layers=[1, 2], gate="value")
    made.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    gates = [m.spec.importance.gate.shape for m in layers_of(again).values() if m.spec.importance]
    assert gates == ["head", "value", "value"]
    assert torch.equal(again(tokens(1, 4)).logits, made(tokens(1, 4)).logits)


def test_first_values_come_from_the_first_such_layer() -> None:
    made = model(["gla", "rwkv7"], num_hidden_layers=4)
    mixers = [made.model.layers[i].mixer for i in (1, 3)]
    assert [hasattr(m, "value_mix") for m in mixers] == [False, True]


def test_hidden_states_and_tuples() -> None:
    made, x = model(HYBRID), tokens(1, 4)
    result = made(x, output_hidden_states=True)
    assert len(result.hidden_states) == 4
    plain = made(x, return_dict=False)
    assert torch.equal(plain[0], result.logits)
    last = made.lm_head(result.hidden_states[-1][:, -1:])
    assert torch.equal(made(x, logits_to_keep=1).logits, last)
    embedded = made(inputs_embeds=made.get_input_embeddings()(x)).logits
    assert torch.equal(embedded, result.logits)


# torch's own tracer instantiates autograd functions, and torch warns of it.
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'>:DeprecationWarning")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("retnet", marks=pytest.mark.slow),
        "gated_deltaproduct",
        "metaplastic_kda",
        pytest.param("mesanet", marks=pytest.mark.slow),
    ],
)
def test_forward_and_backward_compile_in_one_graph(name: str) -> None:
    made, x = model([name, "attention"], num_hidden_layers=2).train(), tokens(2, 8)
    # The Python part of the compiler, which finds graph breaks; it needs no C++ toolchain.
    compiled = torch.compile(made, backend="eager", fullgraph=True)
    results = [f(x, labels=x, use_cache=False) for f in (made, compiled)]
    assert torch.equal(results[0].logits, results[1].logits)
    for result in results:
        result.loss.backward()
    assert all(p.grad is not None for p in made.parameters())


def test_bad_inputs_are_named() -> None:
    made, x = model(HYBRID), tokens(2, 6)
    cache = made(x, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"attention_mask: got shape \[2, 5\]"):
        made(x, attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="input_ids, inputs_embeds: exactly one"):
        made()
    other = model(["gla", "attention", "retnet"])
    with pytest.raises(ValueError, match="comes from another layer"):
        other(x[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="it has 3 layers, but the model has 2"):
        model("gla", num_hidden_layers=2)(x, past_key_values=cache)
    with pytest.raises(ValueError, match="where layer 0 needs a recurrent state"):
        made(x, past_key_values=model("attention")(x, use_cache=True).past_key_values)
    with pytest.raises(ValueError, match="needs keys and values"):
        model("attention")(x, past_key_values=model("gla")(x, use_cache=True).past_key_values)
    with pytest.raises(ValueError, match="packed sequences start fresh"):
        made(x[:1], cu_seq_lens_q=torch.tensor([0, 6]), past_key_values=cache)
    with pytest.raises(ValueError, match="cannot be cropped by -1 tokens"):
        cache.crop(1)
    with pytest.raises(ValueError, match="cannot be cropped by 1 tokens"):
        cache.crop(-1)


def test_check_finite_finds_the_layer() -> None:
    made = model("gla", check_finite=True)
    made(tokens(1, 3))
    mixer = made.model.layers[1].mixer
    assert isinstance(mixer, GatedLinearAttention)
    with torch.no_grad():
        mixer.o_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"output: layer 1 \(gla\) is not finite"):
        made(tokens(1, 3))


BAD_CONFIGS = [
    ({"pattern": []}, "pattern: got an empty list"),
    ({"pattern": [3]}, "pattern: got int"),
    ({"pattern": "gated_delta_net"}, "did you mean 'gated_deltanet'"),
    ({"pattern": [{"name": "gla"}]}, "spec 'gla': title: Field required"),
    ({"pattern": "attention", "num_attention_heads": 3}, "multiples of 2 num_attention_heads"),
    ({"pattern": "gla", "num_heads": 3, "num_key_heads": 2}, "num_heads: got 3"),
    ({"pattern": "gla", "spec_sizes": {"gla": {"heads": 2}}}, "spec_sizes: got heads"),
    ({"specs": {}, "layer_specs": ["gla"] * 3}, "which `specs` does not have"),
    ({"specs": {}, "layer_specs": ["gla"] * 2}, "got 2 layers, but num_hidden_layers is 3"),
]


@pytest.mark.parametrize(("options", "message"), BAD_CONFIGS)
def test_bad_configurations_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GlazooConfig(hidden_size=HIDDEN, num_hidden_layers=3, head_v_dim=4, **options)


def test_caches_can_be_made_ahead() -> None:
    made, x = model(HYBRID), tokens(2, 5)
    cache = DynamicCache(config=made.config)
    made(x, past_key_values=cache)
    assert cache.get_seq_length() == 5
    assert [type(c).__name__ for c in cache.layers] == [
        "RecurrentCacheLayer",
        "DynamicLayer",
        "RecurrentCacheLayer",
    ]
    cache.batch_repeat_interleave(2)
    one = made(x[:, :1].repeat_interleave(2, 0), past_key_values=cache).logits
    assert torch.equal(one[0], one[1])
    cache.reset()
    assert made.config.vocab_size == VOCABULARY
