"""What keys are like, what memories find of them, and the advice that follows."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from converters.tiny import tiny_model
from typer.testing import CliRunner

import glazoo.advise
import glazoo.compare.probe
import glazoo.converters.calibration
from glazoo import load as load_spec
from glazoo import metaplasticize
from glazoo.advise import (
    FORMS,
    PLASTICITIES,
    AdviceReport,
    Opening,
    Prediction,
    Written,
    _by_load,
    _opening_text,
    advise_checkpoint,
    best_opening,
    key_use,
    memory_load,
    opened,
    predict,
    recommended,
)
from glazoo.cli import app
from glazoo.converters.calibration import observed
from glazoo.errors import ConversionError
from glazoo.layers import set_plasticity
from glazoo.layers.plasticity import Observation, write_sizes
from glazoo.models import GlazooConfig, GlazooForCausalLM
from glazoo.state import State
from glazoo.stats import Interval

SIZE = 8


def one_hot(*channels: int, size: int = 4) -> torch.Tensor:
    """A context of keys of length one along channels, [1, T, 1, K]."""
    return torch.eye(size)[list(channels)][None, :, None]


def seen(
    keys: torch.Tensor, g: torch.Tensor | None = None, writes: torch.Tensor | None = None
) -> Written:
    """What a layer did, that writes the same at every token and forgets nothing."""
    contexts, tokens, heads = keys.shape[:3]
    g = torch.zeros(heads) if g is None else g
    writes = torch.ones(contexts, tokens, heads) if writes is None else writes
    none = torch.empty(0)
    return Written.of(Observation(3, g, none, none, State(none), keys, writes))


def test_keys_along_two_channels_in_all_contexts() -> None:
    use = key_use(seen(one_hot(0, 1, 0, 1).expand(4, -1, -1, -1)))
    assert use.layer == 3
    assert use.directions == pytest.approx([2.0])
    assert use.changing == pytest.approx([0.0], abs=1e-12)
    assert use.neglected == pytest.approx([0.0], abs=1e-12)
    # One, two, three and four of a kind.
    assert use.load == pytest.approx([2.5])


def test_contexts_that_share_no_direction() -> None:
    keys = torch.cat([one_hot(i, i, i, i) for i in range(4)])
    use = key_use(seen(keys))
    assert use.directions == pytest.approx([4.0])
    # Each has one direction of its own beside three that none of its keys has.
    assert use.changing == pytest.approx([0.0], abs=1e-12)
    two = torch.cat([one_hot(0, 0, 0, 1), one_hot(0, 0, 0, 1), one_hot(2, 2, 2, 3)])
    assert key_use(seen(two)).changing[0] > 0.3


def test_what_an_importance_per_key_neglects_and_axes_do_not() -> None:
    along = torch.tensor([1.0, 1.0, 0.0, 0.0]) / 2**0.5
    use = key_use(seen(along.expand(4, 6, 1, 4)))
    # k k^T has a half of its square off the diagonal.
    assert use.directions == pytest.approx([1.0])
    assert use.neglected == pytest.approx([0.5])
    assert use.neglected_rotated == pytest.approx([0.0], abs=1e-9)


KEYS = torch.ones(2, 40, 1, 2)


@pytest.mark.parametrize(
    ("g", "writes", "last"),
    [
        (None, None, 40.0),
        # Half of them are nothing.
        (None, torch.tensor([1.0, 0.0]).repeat(2, 20)[..., None], 20.0),
        (None, torch.zeros(2, 40, 1), 0.0),
        # (1 + a) / (1 - a)
        (torch.tensor([0.5]).log(), None, 3.0),
        (torch.full((2, 40, 1), 0.5).log(), None, 3.0),
        # The last write alone; along the other channel all of them.
        (torch.tensor([-math.inf, 0.0]).expand(2, 40, 1, 2), None, 20.5),
        # Two writes a token, of which the first alone decays: 2 / (1 - a^2), and so on.
        (torch.full((2, 20, 1), 0.5).log(), None, 16 / (8 / 3)),
    ],
)
def test_how_many_writes_a_memory_holds(
    g: torch.Tensor | None, writes: torch.Tensor | None, last: float
) -> None:
    found = memory_load(seen(KEYS, g, writes))
    assert found.shape == (2, 40, 1)
    # Log decays are rounded to float32.
    torch.testing.assert_close(found[:, -1].float(), torch.full((2, 1), last), rtol=1e-5, atol=0)


def test_contexts_are_joined_with_their_decays() -> None:
    # One context each, as a text is read: its one row of static decays is not its one token.
    for keys in (KEYS, KEYS[:1]):
        static = seen(keys, torch.tensor([0.5]).log())
        two = Written.joined([static, static])
        assert two.g.shape == (2 * len(keys), 40, 1, 1)
        expected = torch.full((2 * len(keys),), 3.0, dtype=torch.float64)
        torch.testing.assert_close(memory_load(two)[:, -1, 0], expected)


@pytest.mark.parametrize("size", [1e-30, 1e-16, 1e19, 1e37])
def test_the_load_does_not_depend_on_the_size_of_all_writes(size: float) -> None:
    writes = torch.full((2, 40, 1), size)
    found = memory_load(seen(KEYS, None, writes))
    expected = torch.arange(1.0, 41, dtype=torch.float64).expand(2, 40)
    torch.testing.assert_close(found[..., 0], expected)


def test_what_was_written_once_stays_one_write() -> None:
    writes = torch.zeros(2, 400, 1)
    writes[:, 3] = 1
    g = torch.full((2, 400, 1), -10.0)
    g[:, 300] = -math.inf
    found = memory_load(seen(torch.ones(2, 400, 1, 2), g, writes))[0, :, 0]
    assert found.tolist() == [0.0] * 3 + [1.0] * 297 + [0.0] * 100


@pytest.mark.parametrize("odd", ["a large first token", "a context with one write"])
def test_one_odd_token_or_context_leaves_the_keys_that_are_measured(odd: str) -> None:
    plain = recordings(3.0, 40, 40)
    writes = plain.writes.clone()
    if odd == "a large first token":
        writes[:, 0] *= 100
    else:
        writes[3, 1:] = 0
    groups = _by_load([plain._replace(writes=writes, g=torch.full_like(plain.g, -0.5))])
    # Two heads of all 40 tokens, of which a memory holds four at once.
    if odd == "a context with one write":
        assert [g.pairs for g in groups] == [4, 4]
    assert all(k.shape == (16, 40, 1, SIZE) for g in groups for k in g.keys)


def test_heads_are_measured_in_three_groups() -> None:
    keys = torch.randn(4, 64, 80, 2)
    g = torch.linspace(-2, -0.01, 80).expand(4, 64, 80)
    groups = _by_load([seen(keys, g)])
    assert [round(80 * x.share) for x in groups] == [27, 27, 26]
    assert all(len(x.keys) <= 32 for x in groups)
    assert [x.pairs for x in groups] == sorted(x.pairs for x in groups)
    for wrong in ([], [seen(keys[:1])], [seen(keys), seen(keys[..., :1])]):
        with pytest.raises(ValueError, match="accepted is one shape"):
            predict(wrong, {"source": load_spec("gla")})


@pytest.mark.parametrize("impl", ["mixer", "layer"])
def test_layers_tell_the_size_of_what_they_write(impl: str) -> None:
    if impl == "layer":
        model: Any = metaplasticize(model_of("gated_deltanet", "gated_deltaproduct"))
    else:
        model = metaplasticize(tiny_model("mamba2"))
    parts = [Written.of(x) for x in observed(model, torch.arange(40) % 7)]
    assert len(parts) > 1
    for x in parts:
        assert x.writes.shape[:2] == x.keys.shape[:2] == x.g.shape[:2]
        assert x.writes.shape[2] % x.keys.shape[2] == 0
        assert bool((x.writes > 0).all())
        assert bool((memory_load(x) > 0).all())


def test_the_size_of_a_write() -> None:
    k, v = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0, 2.0])
    k, v = k.expand(1, 2, 1, 2), v.expand(1, 2, 2, 3)
    torch.testing.assert_close(write_sizes(k, v, None), torch.full((1, 2, 2), 15.0))
    beta = torch.tensor([[[0.5, 0.0], [1.0, 2.0]]])
    torch.testing.assert_close(write_sizes(k, v, beta), 15 * beta)
    assert write_sizes(k[:, :0], v[:, :0], beta[:, :0]).shape == (1, 0, 2)
    by_value = torch.tensor([1.0, 0.0, 1.0]).expand(1, 2, 2, 3)
    torch.testing.assert_close(write_sizes(k, v, by_value), torch.full((1, 2, 2), 5 * 5**0.5))


def recordings(shared: float, tokens: int, load: int) -> Written:
    """Keys of which every context has a large part in common, another one in another context, in
    two heads that write `load` of them alone."""
    rng = np.random.default_rng(0)
    common = np.eye(SIZE)[rng.integers(0, SIZE, (16, 1, 2))] * shared
    keys = rng.standard_normal((16, tokens, 2, SIZE)) / SIZE**0.5 + common
    writes = torch.zeros(16, tokens, 2)
    writes[:, :load] = 1
    return seen(torch.from_numpy(keys), None, writes)


@pytest.mark.parametrize(
    ("shared", "load", "pays"),
    [
        (3.0, 8, True),
        (0.0, 8, False),
        # Many more than there are keys, unlike each other: no importance makes room for them.
        (0.0, 60, False),
    ],
)
def test_importance_is_predicted_to_pay_where_contexts_share(
    shared: float, load: int, pays: bool
) -> None:
    source = load_spec("mamba2")
    specs = {"source": source, "per key": metaplasticize(source)}
    told: list[tuple[str, int, int]] = []
    pairs, found = predict(
        [recordings(shared, load, load)],
        specs,
        values=16,
        seeds=6,
        told=lambda *x: told.append(x),
    )
    # The mean of 1 to `load`, of each of two groups of a head.
    assert pairs == (round((1 + load) / 2),) * 2
    assert [x[1:] for x in told] == [(n, 4) for n in range(1, 5)]
    gains = [a - b for a, b in zip(found["per key"], found["source"], strict=True)]
    assert (min(gains) > 0.05) is pays
    assert (sum(gains) / 6 < 0.05) is not pays


def test_keys_that_are_not_written_are_not_measured() -> None:
    # The same keys, and between them others that nothing is written to.
    few = recordings(3.0, 8, 8)
    keys, writes = torch.zeros(16, 16, 2, SIZE), torch.zeros(16, 16, 2)
    keys[:, ::2], writes[:, ::2] = few.keys, few.writes
    specs = {"source": load_spec("mamba2")}
    of = [
        predict([x], specs, values=8, seeds=4)[1]["source"] for x in (few, seen(keys, None, writes))
    ]
    assert of[0] == of[1]


FALLS = Opening(0.1, Interval(-0.02, -0.03, -0.01, 4), {0.1: -0.02})
RISES = Opening(0.001, Interval(0.002, -0.001, 0.005, 4), {0.001: 0.002})


def prediction(
    form: str, gain: float, half: float, state: int, opening: Opening | None = FALLS
) -> Prediction:
    gains = Interval(gain, gain - half, gain + half, 6)
    return Prediction(form, Interval(0.5, 0.4, 0.6, 6), gains, state, 1.0, 9, opening)


@pytest.mark.parametrize(
    ("gains", "advice"),
    [
        ([], None),
        ([("per key", 0.015, 0.01, 2)], None),
        ([("per key", 0.30, 0.31, 2)], None),
        ([("per key", 0.30, 0.1, 2), ("full", 0.32, 0.1, 4)], "per key"),
        ([("per key", 0.20, 0.1, 2), ("full", 0.32, 0.1, 4)], "full"),
        ([("per key", 0.30, 0.1, 2), ("rotated", 0.31, 0.1, 2)], "rotated"),
        ([("per key", 0.30, 0.1, 2, RISES)], None),
        ([("per key", 0.30, 0.1, 2, RISES), ("full", 0.20, 0.1, 4)], "full"),
        ([("per key", 0.30, 0.1, 2, Opening(0.1, Interval(-1, -1, -1, 1), {}))], None),
        ([("per key", 0.30, 0.1, 2, Opening(0.1, Interval(-2e-4, -3e-4, -1e-4, 4), {}))], None),
    ],
)
def test_the_cheapest_of_those_that_are_nearly_best_and_serve_the_loss(
    gains: list[tuple[Any, ...]], advice: str | None
) -> None:
    source = prediction("source", 0.0, 0.0, 1)
    assert recommended([source, *(prediction(*g) for g in gains)]) == advice


def test_the_plasticity_is_chosen_on_other_contexts_than_it_is_measured_on() -> None:
    # 0.1 is best on the contexts 0 and 2, and worst on 1 and 3.
    found = best_opening({0.01: [0.0, -1.0, 0.0, -3.0], 0.1: [-1.0, 2.0, -1.0, 4.0]})
    assert found.plasticity == 0.1
    assert found.change.mean == pytest.approx(3.0)
    assert found.tried == pytest.approx({0.01: -1.0, 0.1: 1.0})
    assert not found.falls


def test_a_plasticity_without_a_finite_loss_is_not_chosen() -> None:
    inf = float("inf")
    found = best_opening({0.01: [-1.0, 2.0, -1.0, 3.0], 0.1: [inf, -1.0, -9.0, -1.0]})
    assert found.plasticity == 0.01
    assert found.tried[0.1] == inf
    none = best_opening({0.01: [0.0, inf, 0.0, -3.0]})
    assert not none.falls
    assert _opening_text(none) == "+inf at 0.01"


def test_opening_is_measured_against_the_closed_gate_which_is_left(folder: Path) -> None:
    model = metaplasticize(GlazooForCausalLM.from_pretrained(folder))
    ids = torch.arange(40).view(2, 20) % 7

    def losses() -> torch.Tensor:
        logits = model(ids, use_cache=False).logits.double()
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids.roll(-1, 1).flatten(), reduction="none"
        ).view(2, 20)[:, -1]

    with torch.no_grad():
        before = losses()
        found = opened(model, losses)
        torch.testing.assert_close(losses(), before, rtol=0, atol=0)
        set_plasticity(model, 1.0)
        change = (losses() - before).tolist()
    assert tuple(found) == PLASTICITIES
    assert found[1.0] == change
    assert all(abs(x) > 0 for x in change)
    small, large = (max(map(abs, found[x])) for x in (0.001, 1.0))
    assert small < large


def model_of(*pattern: str) -> GlazooForCausalLM:
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "pattern": list(pattern),
        "vocab_size": 260,
        "hidden_size": 16,
        "num_hidden_layers": len(pattern),
        "num_heads": 2,
        "head_k_dim": 4,
        "head_v_dim": 4,
    }
    return GlazooForCausalLM(GlazooConfig(**config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("advise") / "model"
    model_of("gla", "gla").save_pretrained(made)
    return made


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A text of a few short contexts, on which every form is opened."""
    monkeypatch.setattr(glazoo.advise, "_candidates", lambda found: found[1:])
    monkeypatch.setattr(glazoo.advise, "LENGTH", 64)
    monkeypatch.setattr(glazoo.converters.calibration, "LENGTH", 64)
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(32 + (i * i + i // 7) % 60 for i in range(300)))
    return text


def test_the_command(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(32 + (i * i + i // 7) % 60 for i in range(2200)))
    arguments = ["advise", str(folder), str(text), "--tokenizer", "bytes", "--seeds", "2"]
    written = tmp_path / "advice.md"
    result = CliRunner().invoke(app, [*arguments, "--report", str(written), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["tokens"] == 2048
    # Its memories forget within some twenty tokens: the least, the middle and the most loaded.
    assert found["pairs"] == sorted(found["pairs"])
    assert 2 <= found["pairs"][0] <= found["pairs"][-1] <= 512
    assert [u["layer"] for u in found["use"]] == [0, 1]
    assert all(1 <= d <= 4 for u in found["use"] for d in u["directions"])
    forms = [p["form"] for p in found["predictions"]]
    assert forms[0] == "source"
    assert {*forms[1:], *found["impossible"]} == set(FORMS)
    state = {p["form"]: p["state_bytes"] for p in found["predictions"]}
    # Two layers of two heads: 4 x 4 numbers, 4 more per key, 1 more per head.
    assert (state["source"], state["per key"], state["isotropic"]) == (256, 320, 272)
    assert found["advice"] in {None, *forms[1:]}
    said = written.read_text()
    assert (
        "None is expected to help" in said if found["advice"] is None else found["advice"] in said
    )


def test_every_form_is_opened_that_would_find_enough(folder: Path, quick: Path) -> None:
    found = advise_checkpoint(folder, [quick], tokenizer="bytes", tokens=256, seeds=2)
    assert found.predictions[0].opening is None
    opened = {p.form: p.opening for p in found.predictions[1:]}
    assert {*opened, *found.impossible} == set(FORMS)
    assert "rotated" in opened
    for opening in opened.values():
        assert opening is not None
        assert tuple(opening.tried) == PLASTICITIES
        assert opening.change.seeds == 2
    # Axes from the keys of the text are not the keys' own.
    assert opened["rotated"] != opened["per key"]
    assert all(_opening_text(x) in found.to_markdown() for x in opened.values())


def test_layers_that_are_metaplastic_already_stay_as_they_are(
    quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "mixed"
    monkeypatch.setattr(glazoo.advise, "FORMS", {"rotated": FORMS["rotated"]})
    set_plasticity(model_of("gla", "metaplastic_gla"), 0.5).save_pretrained(made)
    found = advise_checkpoint(made, [quick], tokenizer="bytes", tokens=256, seeds=2)
    assert [u.layer for u in found.use] == [0]
    model = metaplasticize(GlazooForCausalLM.from_pretrained(made))
    own = model.get_parameter("model.layers.1.mixer.metaplastic.b_scale")
    given, seen = torch.full((2,), 0.5), []

    def losses() -> torch.Tensor:
        seen.append(own.detach().clone())
        return torch.zeros(2)

    opened(model, losses, [0])
    assert len(seen) == 1 + len(PLASTICITIES)
    assert all(torch.equal(x, given) for x in [*seen, own])


def test_numbers_that_are_not_finite_are_refused_by_name(quick: Path, tmp_path: Path) -> None:
    model = model_of("gla")
    for name, message in (
        ("lm_head.weight", "the model's loss on this text is not finite"),
        ("model.layers.0.mixer.v_proj.weight", "layer 0: its writes on this text are not finite"),
        ("model.layers.0.mixer.k_proj.weight", "layer 0: its keys on this text are not finite"),
    ):
        with torch.no_grad():
            model.get_parameter(name)[0] = float("nan")
        model.save_pretrained(tmp_path / "model")
        with pytest.raises(ConversionError, match=message):
            advise_checkpoint(tmp_path / "model", [quick], tokenizer="bytes", tokens=256, seeds=2)


def test_what_predicts_no_token_is_refused_before_it_is_read(quick: Path, tmp_path: Path) -> None:
    made = tmp_path / "model"
    tiny_model("mamba2").backbone.save_pretrained(made)
    with pytest.raises(ConversionError, match="a Mamba2Model, which predicts no next token"):
        advise_checkpoint(made, [quick], tokenizer="bytes")


def test_what_was_measured_is_printed_where_the_report_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = prediction("source", 0.0, 0.0, 1, None)
    found = AdviceReport(
        "a b", "glazoo", "gla", 4, 4, 2048, (4,), (), (source,), {}, advice=None, seconds=1.0
    )
    monkeypatch.setattr(glazoo.advise, "advise_checkpoint", lambda *_, **__: found)
    absent = tmp_path / "absent" / "advice.md"
    result = CliRunner().invoke(app, ["advise", "a b", "text", "--report", str(absent)])
    assert isinstance(result.exception, ConversionError)
    assert "None is expected to help" in result.stdout
    assert str(replace(found, advice="per key").command) == "glazoo convert 'a b' DST"


def test_a_head_that_writes_nothing_has_no_directions() -> None:
    use = key_use(seen(torch.zeros(4, 6, 1, 4), None, torch.zeros(4, 6, 1)))
    assert use.directions == (0.0,)
    assert use.load == (0.0,)
    pairs, found = predict(
        [seen(torch.zeros(4, 6, 1, 4), None, torch.zeros(4, 6, 1))],
        {"source": load_spec("gla")},
        values=4,
        seeds=2,
    )
    assert pairs == (2,)
    assert all(0 <= x <= 1 for x in found["source"])


def test_keys_are_mapped_once(quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Keys are recorded as the recurrence takes them: 4 channels make 1 + 4 + 16.
    sizes = set()

    def attention(spec: Any, q: torch.Tensor, *rest: Any, **options: Any) -> Any:
        sizes.add(q.shape[-1])
        return glazoo.attention(spec, q, *rest, **options)

    monkeypatch.setattr(glazoo.compare.probe, "attention", attention)
    monkeypatch.setattr(glazoo.advise, "FORMS", {"per key": {}})
    model_of("based").save_pretrained(tmp_path / "model")
    found = advise_checkpoint(tmp_path / "model", [quick], tokenizer="bytes", tokens=256, seeds=2)
    assert found.keys == 21
    assert sizes == {21}


def test_texts_that_are_too_short_are_refused(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("short")
    with pytest.raises(ConversionError, match=r"texts: got .* four contexts of 512"):
        advise_checkpoint(folder, [text], tokenizer="bytes")
    with pytest.raises(ConversionError, match=r"tokens: got 2047, .* four contexts of 512"):
        advise_checkpoint(folder, [text], tokenizer="bytes", tokens=2047)
