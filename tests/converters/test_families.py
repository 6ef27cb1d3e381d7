"""Every family, on the smallest real models: the conversion changes nothing, the gates work in
every path, and the source comes back."""

from __future__ import annotations

import copy
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from converters.converting import cache_of, contents, open_gates
from converters.tiny import ALL, TINY, VOCABULARY, tiny_config, tiny_model
from packaging.version import Version
from safetensors.torch import load_file, save_file

import glazoo.models  # noqa: F401 - registers the converted architectures
from glazoo import metaplasticize
from glazoo.converters import (
    ConversionError,
    convert_checkpoint,
    inspect_checkpoint,
    revert_checkpoint,
    verify_checkpoint,
    verify_models,
)
from glazoo.families import NOT_CONVERTIBLE, Family, find_family
from glazoo.families import families as all_families
from glazoo.families.calls import CALLS
from glazoo.layers import gates

# Their text models are tested under their own names; the rest adds a vision tower only.
WRAPPED = {"qwen3_5", "qwen3_5_moe", "qwen4_exp"}
# The first of each family; others of it differ in what their mixers are made of.
FIRST = {family: name for name, (family, _) in reversed(TINY.items())}.values()
# One of each other kind of call than that of qwen3_next.
EACH = ("mamba2", "kimi_linear", "minimax", "glazoo")


def in_both(name: str) -> list[Any]:
    """A model, and whether to verify it in float64, too; outside `test-all` one of each kind of
    call is."""
    each = name == "qwen3_next" or name in EACH
    cases = [pytest.param(name, True, marks=[pytest.mark.slow] * (not each))]
    if name in FIRST and name not in WRAPPED and not each:
        cases.append(pytest.param(name, False))
    return cases


RECURRENT = ("linear_attention", "hybrid", "gla", "kda")
CHECKS = ["prompt", "padded", "decoded", "continued", "greedy", "beams"]


def family_of(name: str) -> Family:
    return find_family(TINY[name][0])


def ids_and_mask(batch: int = 2, tokens: int = 21) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCABULARY, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    return ids, mask


def test_every_family_has_a_tiny_model() -> None:
    """A new transformers brings new families: each is tried here as soon as it is found."""
    assert set(all_families()) <= {family for family, _ in ALL.values()}
    assert set(all_families()).isdisjoint(NOT_CONVERTIBLE)


@pytest.mark.parametrize("name", sorted(TINY))
def test_mixers_are_found_by_what_they_call(name: str) -> None:
    family, config = family_of(name), tiny_config(name)
    model = family.build(family.architectures[0], config)
    found = family.examine(model)
    linear = [i for i, kind in enumerate(family.layer_kinds(config)) if kind in RECURRENT]
    assert sorted(found) == linear
    live = family.examine(tiny_model(name))
    assert live == found
    for mixer in found.values():
        assert model.get_submodule(mixer.path).layer_idx == mixer.layer
        assert mixer.hidden == 32
        assert mixer.heads % mixer.key_heads == 0
        assert all(CALLS[call].spec == mixer.spec for call in mixer.calls)


def test_no_family_with_a_recurrent_state_is_overlooked() -> None:
    """A new transformers brings new families: they are to be supported, or refused with a
    reason."""
    models = Path(transformers.__file__).parent / "models"
    marks = ("recurrent_state", "update_conv_state", "linear_cache", "mlstm", "rwkv_linear")
    known = {f.modeling.split(".")[2] for f in all_families().values()}
    for path in sorted(models.glob("*/modeling_*.py")):
        if not any(mark in path.read_text("utf-8") for mark in marks):
            continue
        types: set[str] = set()
        for configuration in path.parent.glob("configuration_*.py"):
            types |= set(re.findall(r'model_type = "(\w+)"', configuration.read_text("utf-8")))
        assert path.parent.name in known or types & set(NOT_CONVERTIBLE), path.parent.name


def step(model: Any, ids: torch.Tensor) -> None:
    """Trains the gates for two steps."""
    learned = [p for _, gate in gates(model) for p in gate.parameters()]
    model.requires_grad_(False)
    for p in learned:
        p.requires_grad_(True)
    optimizer = torch.optim.SGD(learned, lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in learned if p.grad is not None)
        assert any(bool(gate.b_scale.grad.any()) for _, gate in gates(model))
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "float64"), [case for name in sorted(TINY) for case in in_both(name)]
)
def test_convert_verify_train_save_reload_generate_revert(
    name: str, float64: bool, tmp_path: Path
) -> None:
    source, converted = tmp_path / "source", tmp_path / "converted"
    tiny_model(name).save_pretrained(source, max_shard_size="50KB")
    before = contents(source)
    report = convert_checkpoint(source, converted)
    family = family_of(name)
    found = family.examine(tiny_model(name))
    assert report.layers == tuple(found)
    assert not report.warnings
    exact = family.no_exact_gain(tiny_config(name), found) is None
    assert (report.gate, report.gain) == ("head", "exact" if exact else "first_order")

    verified = verify_checkpoint(
        source, converted, batch=2, tokens=21, new_tokens=5, float64=float64
    )
    assert [c.name for c in verified.checks] == CHECKS + [
        f"{c} (float64)" for c in CHECKS if float64
    ]
    failed = [c for c in verified.checks if not c.passed]
    assert not failed
    for check in verified.checks:
        if check.max_difference is not None and "float64" in check.name:
            assert check.max_difference < 1e-10
        assert ("share a defect" in check.detail) == (
            check.name.split()[0] in family.quirks.defects
        )

    model = transformers.AutoModelForCausalLM.from_pretrained(converted)
    assert type(model).__name__ == family.converted_architecture(family.architectures[0])
    ids, _ = ids_and_mask()
    step(model, ids)
    trained = tmp_path / "trained"
    model.eval().save_pretrained(trained, max_shard_size="50KB")
    again = transformers.AutoModelForCausalLM.from_pretrained(trained)
    saved, loaded = model.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(x, loaded[k]) for k, x in saved.items())
    with torch.no_grad():
        kept, logits = model(ids).logits, again(ids).logits
    # Where tensors lie in memory decides the order in which products are summed.
    assert float((logits - kept).abs().max()) <= 8 * torch.finfo().eps * float(kept.abs().max())
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    # Without a mask, tokens that happen to be the padding's would be taken for padding.
    tokens = again.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert tokens.shape == (2, 25)

    revert_checkpoint(converted, tmp_path / "back")
    assert contents(tmp_path / "back") == before
    assert contents(source) == before


FORMS: dict[str, dict[str, Any]] = {
    "head": {},
    "value": {"gate": "value"},
    "isotropic": {"precision": "isotropic"},
    "full": {"precision": "full"},
    "rotated": {"basis": "rotated"},
    "diffuse": {"forgetting": "diffuse"},
}
# Of those that are not slow: a delta rule with a decay per head has every form.
_QUICK = {"qwen3_next": tuple(FORMS)} | dict.fromkeys(EACH, ("head", "value"))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(
            name,
            form,
            marks=[pytest.mark.slow] * (name in WRAPPED or form not in _QUICK.get(name, ("head",))),
        )
        for name in sorted(TINY)
        for form in FORMS
    ],
)
def test_open_gates_agree_in_every_path(name: str, form: str) -> None:
    """Importance must survive caches, continuation, padding and reordering as the memory does."""
    family = family_of(name)
    source = tiny_model(name)
    model: Any = metaplasticize(copy.deepcopy(source), **FORMS[form])
    if form not in ("head", "value"):
        ids, _ = ids_and_mask()
        expected = source(ids).logits
        # Nothing has been counted: what is no rotation's and no filter's is equal to the last bit.
        bound = 64 * torch.finfo(torch.float32).eps * float(expected.abs().max())
        assert float((model(ids).logits - expected).abs().max()) <= bound
    open_gates(model)
    ids, mask = ids_and_mask()
    for m in (source, model):
        for mixer in family.mixers(m).values():
            for call in family.calls(mixer):
                for key, value in call.unequal.items():
                    setattr(mixer, key, value)

    def paths(m: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        full = m(ids).logits
        n = ids.shape[1] - 5

        def positions(start: int, end: int) -> dict[str, Any]:
            p = torch.arange(start, end).expand(2, -1)
            return {"position_ids": p} if family.quirks.positions else {}

        out = m(ids[:, :n], use_cache=True)
        decoded = [out.logits]
        for t in range(n, ids.shape[1]):
            cache = cache_of(out)
            out = m(ids[:, t : t + 1], **cache, use_cache=True, **positions(t, t + 1))
            decoded.append(out.logits)
        found = {"decoded": torch.cat(decoded, 1)}
        if "continued" not in family.quirks.defects:
            out = m(ids[:, :n], use_cache=True)
            cache = cache_of(out)
            rest = m(ids[:, n:], **cache, use_cache=True, **positions(n, ids.shape[1])).logits
            found["continued"] = torch.cat([out.logits, rest], 1)
        return full, found

    old_full, old = paths(source)
    full, new = paths(model)
    noise = max(float((x - old_full).abs().max()) for x in old.values())
    rounding = torch.finfo(torch.float32).eps * float(full.abs().max())
    # The gates do something, far above what is allowed for below.
    assert float((full - old_full).abs().max()) > 100 * 8 * max(noise, rounding)
    for path, logits in new.items():
        assert float((logits - full).abs().max()) <= 8 * max(noise, rounding), path
    # Padding adds nothing: a padded prompt gives what the bare prompt gives.
    padded = model(ids, attention_mask=mask).logits[1, 6:]
    bare = model(ids[1:, 6:]).logits[0]
    old_padded = source(ids, attention_mask=mask).logits[1, 6:]
    old_bare = source(ids[1:, 6:]).logits[0]
    noise = max(noise, float((old_padded - old_bare).abs().max()))
    assert float((padded - bare).abs().max()) <= 8 * max(noise, rounding)
    # Beams reorder the cache.
    if "beams" not in family.quirks.defects:
        options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
        cached = model.generate(ids, attention_mask=mask, use_cache=True, **options)
        fresh = model.generate(ids, attention_mask=mask, use_cache=False, **options)
        assert torch.equal(cached, fresh)


@pytest.mark.parametrize("name", ["bamba", "qwen3_next", "kimi_linear", "minimax"])
def test_bfloat16_models_agree_within_their_rounding(name: str) -> None:
    source = tiny_model(name).to(torch.bfloat16)
    model = metaplasticize(copy.deepcopy(source))
    report = verify_models(source, model, batch=2, tokens=21, new_tokens=4)
    assert all(c.passed for c in report.checks if c.max_difference is not None)
    wide = {p.dtype for _, gate in gates(model) for p in gate.parameters()}
    assert wide == {torch.float32}


_GAINS_QUICK = [
    ("qwen3_next", "head", "first_order"),
    ("kimi_linear", "value", "exact"),
    ("glazoo-delta", "value", "first_order"),
]


@pytest.mark.parametrize(
    ("name", "gate", "gain"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] * (case not in _GAINS_QUICK))
        for case in itertools.product(
            ["qwen3_next", "kimi_linear", "glazoo-delta"],
            ["head", "value"],
            ["first_order", "exact"],
        )
    ],
)
def test_both_gains_start_at_the_source(name: str, gate: str, gain: str, tmp_path: Path) -> None:
    source = tiny_model(name)
    source.save_pretrained(tmp_path / "s")
    convert_checkpoint(tmp_path / "s", tmp_path / "c", gain=gain, gate=gate)
    verified = verify_checkpoint(
        tmp_path / "s", tmp_path / "c", batch=2, tokens=21, new_tokens=4, float64=True
    )
    assert not [c for c in verified.checks if not c.passed]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "c").eval()
    default: Any = metaplasticize(source, gate=gate)
    for m in (model, default):
        open_gates(m)
    ids, _ = ids_and_mask()
    with torch.no_grad():
        here, there = model(ids).logits, default(ids).logits
    # Away from the source they are two models, of which exact is the default.
    assert (float((here - there).abs().max()) > 1e-3) == (gain == "first_order")


def test_the_exact_gain_is_refused_where_there_is_none() -> None:
    for name, message in (
        ("mamba2", "'mamba2' subtracts no prediction"),
        ("minimax", "'lightning' subtracts no prediction"),
        ("olmo_hybrid", "linear_allow_neg_eigval lets the write gate exceed 1"),
    ):
        with pytest.raises(ConversionError, match=f"gain: 'exact' is not possible here: {message}"):
            metaplasticize(tiny_model(name), gain="exact")
    tame = tiny_model("olmo_hybrid", linear_allow_neg_eigval=False)
    assert metaplasticize(tame, gain="exact") is tame
    with pytest.raises(ConversionError, match="gain: got 'half'"):
        metaplasticize(tiny_model("qwen3_next"), gain="half")


def test_how_far_a_conversion_may_start_from_the_source() -> None:
    message = r"got 1\.5, accepted are numbers in \[0, 1\] for 'gated_deltanet'"
    for gain in ("first_order", "exact"):
        with pytest.raises(ConversionError, match=message):
            metaplasticize(tiny_model("qwen3_next"), 1.5, gain=gain)
    model = metaplasticize(tiny_model("mamba2"), 1.5)
    assert {x for _, gate in gates(model) for x in gate.b_scale.tolist()} == {1.5}


def test_layers_of_other_kinds_are_left_alone(tmp_path: Path) -> None:
    tiny_model("nemotron_h").save_pretrained(tmp_path / "s")
    report = convert_checkpoint(tmp_path / "s", tmp_path / "c", layers=[3])
    assert report.skipped_layers == {
        0: "not asked for",
        1: "moe: no convertible mixer",
        2: "full_attention: no convertible mixer",
        4: "mlp: no convertible mixer",
    }
    # As the files spell it, not as the model does.
    assert {t.name.rpartition(".")[0] for t in report.added} == {
        "backbone.layers.3.mixer.metaplastic"
    }


def test_tensors_of_mixers_are_checked_in_the_files_own_names(tmp_path: Path) -> None:
    tiny_model("kimi_linear").save_pretrained(tmp_path / "s")
    path = tmp_path / "s" / "model.safetensors"
    good = load_file(path)
    prefix = "model.layers.2.self_attn"
    for key, value, message in (
        ("f_b_proj.weight", None, f"{prefix}.f_b_proj.weight is missing"),
        ("b_proj.weight", torch.zeros(3, 32), r"b_proj.weight has shape \[3, 32\], config.json"),
        ("q_conv1d.weight", torch.zeros(8, 1, 4), "q_conv1d.weight and its like have shapes"),
        ("extra", torch.zeros(2), f"{prefix}.extra is unknown to kimi_linear"),
    ):
        bad = dict(good)
        bad.pop(f"{prefix}.{key}", None)
        if value is not None:
            bad[f"{prefix}.{key}"] = value
        save_file(bad, path, metadata={"format": "pt"})
        with pytest.raises(ConversionError, match=message):
            inspect_checkpoint(tmp_path / "s")
    # So are those of no mixer: experts are files' tensors of their own.
    bad = {k: v for k, v in good.items() if not k.endswith("experts.1.w2.weight")}
    assert len(bad) < len(good)
    save_file(bad, path, metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"experts.1.w2.weight is missing"):
        inspect_checkpoint(tmp_path / "s")


def test_convolutions_that_were_cut_otherwise_are_accepted(tmp_path: Path) -> None:
    tiny_model("olmo_hybrid").save_pretrained(tmp_path / "s")
    path = tmp_path / "s" / "model.safetensors"
    state = load_file(path)
    for layer in (0, 2):
        names = [f"model.layers.{layer}.linear_attn.{x}_conv1d.weight" for x in "qkv"]
        parts = torch.cat([state[n] for n in names]).split([32, 32, 64])
        state |= {n: p.contiguous() for n, p in zip(names, parts, strict=True)}
    save_file(state, path, metadata={"format": "pt"})
    convert_checkpoint(tmp_path / "s", tmp_path / "c")
    assert verify_checkpoint(tmp_path / "s", tmp_path / "c", tokens=9, new_tokens=2).passed


def test_text_models_of_multimodal_files_are_found(tmp_path: Path) -> None:
    """Text models that were loaded from a multimodal checkpoint are saved under its names."""
    tiny_model("qwen3_5_text").save_pretrained(tmp_path / "s")
    path = tmp_path / "s" / "model.safetensors"
    state = load_file(path)
    renamed = {
        k.replace("model.", "model.language_model.", 1) if k.startswith("model.") else k: v
        for k, v in state.items()
    }
    save_file(renamed, path, metadata={"format": "pt"})
    report = convert_checkpoint(tmp_path / "s", tmp_path / "c")
    assert all(t.name.startswith("model.language_model.layers.") for t in report.added)
    assert verify_checkpoint(tmp_path / "s", tmp_path / "c", tokens=9, new_tokens=2).passed


@pytest.mark.parametrize("model_type", sorted(NOT_CONVERTIBLE))
def test_known_families_are_refused_with_the_reason(model_type: str) -> None:
    with pytest.raises(ConversionError) as caught:
        find_family(model_type)
    assert NOT_CONVERTIBLE[model_type] in str(caught.value)
    assert model_type in str(caught.value)
    # As the installed transformers spells it.
    models = Path(transformers.__file__).parent / "models"
    spelled = f'model_type = "{model_type}"'
    if not any(spelled in p.read_text("utf-8") for p in models.glob("*/configuration_*.py")):
        assert Version(transformers.__version__) < Version("5.24")
        pytest.skip(f"transformers {transformers.__version__} does not have it yet")


def test_families_that_the_installed_transformers_lacks_are_reported() -> None:
    with pytest.raises(
        ConversionError, match="model_type 'bamba9' is not supported: the installed"
    ):
        find_family("bamba9")
    with pytest.raises(ConversionError, match="installed transformers has no bamba9 configuration"):
        Family("bamba9").source_config()
    with pytest.raises(ConversionError, match="installed transformers has no Bamba9ForCausalLM"):
        find_family("bamba").source_model("Bamba9ForCausalLM")
