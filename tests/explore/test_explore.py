"""The page that `glazoo explore` writes, in Chromium: what it computes is the reference."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from browser import WIDTHS, Browser, complaints
from budget import assert_within_budget, witnesses
from program.written import given
from typer.testing import CliRunner

import glazoo
from glazoo import explore
from glazoo.compare.probe import Gates, mapped_size, operands
from glazoo.explore.commands import explore as command
from glazoo.spec import Spec
from glazoo.theory.instances import Instance, run
from glazoo.theory.maps import explicit

Tensor = torch.Tensor
DATA = explore.data()
FORMS: dict[str, tuple[Spec, dict[str, Any]]] = {
    f"{variant['name']}[{form['label']}]": (spec, form)
    for variant in DATA["variants"]
    for form, (label, spec) in zip(
        variant["forms"], explore._forms(glazoo.load(variant["name"])), strict=True
    )
}
# A form of every kind of step; all forms run in `make test-all`.
KINDS = (
    "linear_attention[as it is]",
    "mamba2[rotated]",
    "mamba3[metaplastic]",
    "gated_deltanet[metaplastic]",
    "gated_deltanet[full]",
    "gated_deltaproduct[as it is]",
    "kda[diffuse]",
    "kda[full]",
    "rwkv7[per synapse]",
    "rwkv6[as it is]",
    "rebased[isotropic]",
    "hgrn2[metaplastic]",
    "lightnet[as it is]",
    "mlstm[per synapse]",
    "efla[as it is]",
    "gka[as it is]",
    "precond_kda[as it is]",
    "bayesian_layer[as it is]",
    "palimpsa[as it is]",
)
CASES = [pytest.param(x, marks=[pytest.mark.slow] * (x not in KINDS)) for x in FORMS]
GATES = {
    "decay": 0.9,
    "write": 0.7,
    "importance": 3.0,
    "prior": 0.3,
    "erase": 0.8,
    "key_scale": 2.0,
}
TASK = {"pairs": 3, "overlap": 0.4, "noise": 0.5, "writes": "overwritten", "along": "anywhere"}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "explore.html"
    path.write_text(explore.page(), "utf-8")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory, page: Path) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    browser.resize(WIDTHS[0])
    browser.open(page.as_uri())
    yield browser
    browser.close()


def ask(browser: Browser, function: str, *arguments: Any) -> Any:
    """Call a function on the page; numbers that JSON lacks are JavaScript's own words."""
    given = ", ".join(json.dumps(x, default=np.ndarray.tolist) for x in arguments)
    code = f"JSON.stringify((({function})({given})))"
    found = browser.call("Runtime.evaluate", expression=code, returnByValue=True)
    assert "exceptionDetails" not in found, found["exceptionDetails"]["exception"]["description"]
    return json.loads(found["result"]["value"])


EVALUATE = """(lines, start, constants, tokens, symbols) => {
  const { Recurrence, matrix } = glazooExplore;
  const matrices = values => Object.fromEntries(Object.entries(values).map(
    ([name, rows]) => [name, matrix(rows.length, rows[0].length, Float64Array.from(rows.flat()))]));
  const plain = x => Array.from(x.d);
  const recurrence = new Recurrence(lines, matrices(constants)), outputs = [], doubts = [];
  let state = matrices(start);
  for (const [values, parts] of tokens) {
    const found = recurrence.step(state, { values: matrices(values), parts: parts.map(matrices) });
    outputs.push(plain(found.values.y_t));
    if (found.values.var_t) doubts.push(plain(found.values.var_t));
    state = Object.fromEntries(symbols.map(symbol => [symbol, found.last[symbol]]));
  }
  return { outputs, doubts, state: symbols.map(symbol => plain(state[symbol])) };
}"""


def compare(browser: Browser, spec: Spec, lines: Sequence[str], regime: str) -> None:
    """Both are float64 evaluations of one recurrence: a rounding per operation of the chain."""
    instance = Instance(B=1, T=5, H=1, G=2, K=4, V=3, regime=regime, start=True, seed=4)
    program = glazoo.lower(spec)
    ops, state = explicit(program, instance.operands(spec)), instance.state(spec)
    truth = run(
        glazoo.attention, spec, ops, impl="reference", initial_state=state,
        output_uncertainty=spec.has_variance,
    )  # fmt: skip
    start, constants, tokens = given(spec, ops, state, 1)
    symbols = [part.symbol for part in program.state]
    found = ask(browser, EVALUATE, lines, start, constants, tokens, symbols)
    pairs = [("y", found["outputs"], truth.output[0, :, 1])]
    if spec.has_variance:
        pairs.append(("var", found["doubts"], truth.uncertainty[0, :, 1]))
    for part, actual in zip(program.state, found["state"], strict=True):
        x = getattr(truth.final_state, part.name)[0]
        pairs.append((part.name, actual, x[0 if "H" in part.shape else 1]))
    for name, actual, wanted in pairs:
        scale = max(1.0, float(wanted.abs().max()))
        bound = 64 * instance.T * instance.K * np.finfo(np.float64).eps * scale
        assert np.size(actual) == wanted.numel(), name
        got = np.reshape(np.array(actual, np.float64), wanted.shape)
        np.testing.assert_allclose(got, wanted.numpy(), rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("label", CASES)
def test_what_a_browser_makes_of_a_recurrence_is_the_reference(
    browser: Browser, label: str
) -> None:
    spec, form = FORMS[label]
    for regime in ("normal", "mixed"):
        compare(browser, spec, form["recurrence"], regime)


def test_every_form_can_be_watched(browser: Browser) -> None:
    """All of them, also where what they compute is compared in `make test-all` alone."""
    odd = """(settings, gates) => {
      const { data, makeTask, explore } = glazooExplore;
      const task = makeTask(settings, data.sizes);
      return data.variants.flatMap(variant => variant.forms.filter(form => {
        const [answer] = explore(form, gates, task, data.sizes, false).reads[0];
        return !answer.output.every(Number.isFinite) || !(Math.abs(answer.alike) <= 1 + 1e-12);
      }).map(form => `${variant.name}[${form.label}]`));
    }"""
    assert ask(browser, odd, {**TASK, "pairs": 1, "seed": 1}, GATES) == []


@pytest.mark.parametrize("label", ["kda[metaplastic]", "rwkv7[per synapse]", "mamba3[as it is]"])
def test_another_recurrence_is_noticed(browser: Browser, label: str) -> None:
    spec, form = FORMS[label]
    lines = list(form["recurrence"])
    changed = 0
    for n, line in enumerate(lines):
        for old, new in ((" + ", " - "), (" - ", " + "), ("exp(", "abs(")):
            if old in line:
                changed += 1
                wrong = [*lines[:n], line.replace(old, new, 1), *lines[n + 1 :]]
                with pytest.raises(AssertionError):
                    compare(browser, spec, wrong, "normal")
    assert changed >= 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("y_t = 1 ? 2", "has no meaning from ' ?"),
        ("y_t = erf(q_t)", "nothing is named 'erf'"),
        ("y_t = (q_t", "')' is missing"),
        ("y_t = q_t)", "left over ')'"),
        ("y_t = q_t q_t", "no product of 2 x 1 and 2 x 1"),
    ],
)
def test_what_has_no_meaning_is_an_error(browser: Browser, line: str, message: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(message)):
        ask(browser, EVALUATE, [line], {}, {}, [[{"q": [[1.0], [2.0]]}, []]], [])


WHOLE = """(variant, label, settings, gates) => {
  const { data, makeTask, explore } = glazooExplore;
  const program = data.variants.find(x => x.name === variant).forms.find(x => x.label === label);
  const task = makeTask(settings, data.sizes);
  const { memory, states, reads } = explore(program, gates, task, data.sizes);
  const plain = values => Object.fromEntries(
    Object.entries(values).map(([name, x]) => [name, Array.from(x.d)]));
  const token = ({ values, parts, constants }) => ({
    values: plain(values),
    parts: parts.map(plain),
    constants: { ...plain(memory.recurrence.constants), ...plain(constants) },
  });
  const written = task.writes.map(
    w => token(memory.token(memory.mapped(task.keys[w.pair]), w.value, null)));
  const asked = [];
  const read = memory.recurrence.reads;
  memory.recurrence.reads = function* (state, tokens) {
    asked.push(...tokens.map(token));
    yield* read.call(this, state, tokens);
  };
  memory.read(states.at(-1), task.keys);
  const size = memory.sizes.K, states_ = states.map(plain);
  return { task, written, asked, size, reads: reads.at(-1), states: states_ };
}"""


def wide(x: Any) -> Tensor:
    """Numbers of the page, of which JSON writes some as whole ones."""
    return torch.tensor(x, dtype=torch.float64)


def tensors(spec: Spec, form: dict[str, Any], tokens: Any) -> dict[str, Tensor]:
    """What the page gave a program, as `glazoo.attention` takes it."""
    ops = {}
    for operand, here in zip(glazoo.lower(spec).operands, form["operands"], strict=True):
        symbol, dims = here["symbol"], operand.shapes[-1]
        if here["index"] == "":
            x = wide(tokens[0]["constants"][symbol])
            if operand.role == "basis":
                ops[operand.name] = x.view(1, *2 * [round(x.numel() ** 0.5)])
            elif dims[-1] == "HV":
                ops[operand.name] = x.view(1)
            else:
                ops[operand.name] = x.view(1, -1)
        else:
            rows = [t["values"][symbol] for t in tokens] if here["index"] == "t" else []
            rows = rows or [part[symbol] for t in tokens for part in t["parts"]]
            x = wide(rows)[None, :, None]
            ops[operand.name] = x if here["size"] else x[..., 0]
    return ops


def reference(
    spec: Spec, written: dict[str, Tensor], asked: dict[str, Tensor]
) -> tuple[dict[str, Tensor], Any]:
    """State after what is written, answers to what is asked then and their variance, in float64,
    and of each the witnesses of its budget."""
    highest = {o.name: o.high for o in glazoo.lower(spec).operands}
    parts: list[str] = []

    def of(*given: Tensor) -> list[Tensor]:
        # A perturbed operand stays in its domain.
        near = iter(given)
        first, then = ({n: next(near).clamp(max=highest[n]) for n in x} for x in (written, asked))
        state = run(glazoo.attention, spec, first, impl="reference").final_state
        found = run(
            glazoo.attention, spec, then, impl="reference", initial_state=state,
            output_uncertainty=spec.has_variance,
        )  # fmt: skip
        named = {"output": found.output} | state._asdict()
        for part, x in found.final_state._asdict().items():
            # Reading changes nothing but what was seen last.
            if x is not None and not part.startswith("lag"):
                torch.testing.assert_close(x, named[part], rtol=1e-5, atol=1e-6)
        if spec.has_variance:
            named["uncertainty"] = found.uncertainty
        named = {name: x for name, x in named.items() if x is not None}
        parts[:] = named
        return [*named.values()]

    inputs = [*written.values(), *asked.values()]
    truth = of(*inputs)
    seen = zip(*witnesses(of, inputs), strict=True)
    return dict(zip(parts, truth, strict=True)), dict(zip(parts, seen, strict=True))


@pytest.fixture
def _wide() -> Iterator[None]:
    """What `glazoo capacity` makes in the default dtype it makes in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gates_are_those_of_capacity(
    spec: Spec, form: dict[str, Any], task: Any, ops: dict[str, Tensor]
) -> None:
    """What the page gives a program is what `glazoo capacity` gives it; here a token writes one
    pair, at its last sub-token."""
    program, n, writes = glazoo.lower(spec), spec.substeps, task["writes"]
    keys = torch.zeros(1, n * len(writes), DATA["sizes"]["key"])
    values = torch.zeros(1, n * len(writes), DATA["sizes"]["value"])
    keys[0, n - 1 :: n] = torch.tensor([task["keys"][w["pair"]] for w in writes])
    values[0, n - 1 :: n] = torch.tensor([w["value"] for w in writes])
    gates = GATES | {"decay": float(np.log(GATES["decay"]))}
    imp = spec.importance
    if imp is not None and imp.prior.shape == "relative":
        gates["prior"] = imp.prior.init
    for name, x in operands(program, keys, values, None, [Gates(**gates)]).items():
        if x is None or name == "q":
            continue
        mine, theirs = ops[name], x
        if "nT" in program.operand(name).shapes[-1]:
            mine, theirs = mine[:, n - 1 :: n], theirs[:, n - 1 :: n]
        # A prior is one number there, and a vector of equal ones here.
        mine, theirs = torch.broadcast_tensors(mine, theirs)
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("_wide")
@pytest.mark.parametrize("label", CASES)
def test_what_the_page_shows_is_the_reference(browser: Browser, label: str) -> None:
    spec, form = FORMS[label]
    variant = label.partition("[")[0]
    found = ask(browser, WHOLE, variant, form["label"], {**TASK, "seed": 3}, GATES)
    program, K = glazoo.lower(spec), found["size"]
    assert mapped_size(program, DATA["sizes"]["key"]) == K
    written = tensors(spec, form, found["written"])
    gates_are_those_of_capacity(spec, form, found["task"], written)
    asked = tensors(spec, form, found["asked"])
    truth, near = reference(spec, written, asked)
    for part in program.state:
        x = wide(found["states"][-1][part.symbol]).view(truth[part.name].shape)
        assert_within_budget(x, truth[part.name], witness=near[part.name], name=part.name)
    answers = wide([x["output"] for x in found["reads"]])[None, :, None]
    assert_within_budget(answers, truth["output"], witness=near["output"], name="answers")
    if not spec.has_variance:
        assert {x["variance"] for x in found["reads"]} == {None}
        return
    # A variance is shown in units of that of a prior of one, and as the mean over value channels.
    unit = (spec.scale(K) * asked["q"][0, :, 0].norm(dim=-1)) ** 2

    def shown(x: Tensor) -> Tensor:
        return x[0].reshape(len(unit), -1).mean(-1) / unit

    variances = wide([x["variance"] for x in found["reads"]])
    seen = [shown(w) for w in near["uncertainty"]]
    assert_within_budget(variances, shown(truth["uncertainty"]), witness=seen, name="variance")


def test_presets_show_what_they_say(browser: Browser) -> None:
    shares = """() => glazooExplore.presets.map(preset => {
      glazooExplore.choose(preset);
      return [preset.title, ...glazooExplore.shares()];
    })"""
    found = ask(browser, shares)
    assert [x[0] for x in found] == [x["title"] for x in DATA["presets"]]
    for title, first, second in found:
        assert second > first + 0.1, title


def test_uncertainty_grows_with_age_where_much_is_forgotten(browser: Browser) -> None:
    (preset,) = (x for x in DATA["presets"] if x["title"] == "Strong forgetting")
    doubts = """preset => {
      const { choose, settings, compute, result } = glazooExplore;
      choose(preset);
      return Array.from({ length: 20 }, (_, seed) => {
        settings.task.seed = seed + 1;
        compute();
        return result().runs[1].reads.at(-1).map(x => x.variance);
      });
    }"""
    oldest_first = np.mean(ask(browser, doubts, preset), 0)
    assert oldest_first[0] > 2 * oldest_first[-1]
    assert (np.diff(oldest_first[::4]) < 0).all()


def test_the_page_fits_is_silent_and_asks_for_nothing(browser: Browser, page: Path) -> None:
    for width in WIDTHS:
        browser.resize(width)
        browser.open(page.as_uri())
        assert not browser.overflow(), width
        assert not list(complaints(browser))
    for n, preset in enumerate(DATA["presets"]):
        ask(browser, f"() => (glazooExplore.choose(glazooExplore.presets[{n}]), 1)")
        assert not browser.overflow(), preset["title"]
    browser.resize(WIDTHS[0])


def test_every_control_has_a_name_and_does_something(browser: Browser) -> None:
    nameless = """() => [..."input select button canvas svg".split(" ")]
      .flatMap(tag => [...document.querySelectorAll(`.gx ${tag}`)])
      .filter(x => !(x.ariaLabel || x.labels?.[0]?.textContent.trim() || x.textContent.trim()))
      .map(x => x.outerHTML)"""
    assert ask(browser, nameless) == []
    moved = """() => {
      glazooExplore.choose(glazooExplore.presets[0]);
      const shown = () => document.querySelector(".gx .seen").innerHTML;
      const unchanged = [];
      for (const input of document.querySelectorAll(".gx .box input, .gx .box select")) {
        if (input.closest(".idle")) continue;
        const before = shown(), range = input.type === "range", at = +input.value;
        if (range) input.value = at > +input.min ? at - 1 : at + 1;
        else input.value = [...input.options].map(x => x.value).find(x => x !== input.value);
        input.dispatchEvent(new Event(range ? "input" : "change"));
        if (shown() === before) unchanged.push(input.id || input.ariaLabel);
        if (range && !input.getAttribute("aria-valuetext")) unchanged.push(`unsaid ${input.id}`);
      }
      return unchanged;
    }"""
    assert ask(browser, moved) == []


def test_tokens_can_be_followed_with_the_keyboard(browser: Browser) -> None:
    ask(browser, "() => (glazooExplore.choose(glazooExplore.presets[0]), 1)")
    browser.value("document.getElementById('gx-moment').focus()")
    said = "document.querySelector('.gx .said').textContent"
    assert browser.value(said).startswith("After 6 of 6 tokens")
    for kind in ("rawKeyDown", "keyUp"):
        browser.call(
            "Input.dispatchKeyEvent", type=kind, key="ArrowLeft", code="ArrowLeft",
            windowsVirtualKeyCode=37,
        )  # fmt: skip
    assert browser.value(said).startswith("After 5 of 6 tokens")


def test_a_page_of_ones_own_spec_needs_no_variant(
    browser: Browser, page: Path, tmp_path: Path
) -> None:
    source = Path(str(glazoo.__path__[0])).parent / "specs" / "gated_deltanet.toml"
    mine = tmp_path / "mine.toml"
    text = source.read_text("utf-8").replace('"gated_deltanet"', '"mine"')
    mine.write_text(text.replace('title = "', 'title = "</script> '), "utf-8")
    own = tmp_path / "own.html"
    own.write_text(explore.page([mine]), "utf-8")
    browser.open(own.as_uri())
    assert ask(browser, "() => glazooExplore.settings.memories") == [
        ["mine", "as it is"],
        ["mine", "metaplastic"],
    ]
    assert ask(browser, "() => glazooExplore.presets") == []
    assert not list(complaints(browser))
    browser.open(page.as_uri())


def test_an_address_may_name_a_variant(browser: Browser, page: Path) -> None:
    for name, second in (("kda", ["kda", "metaplastic"]), ("palimpsa", ["based", "as it is"])):
        browser.open(f"{page.as_uri()}?memory={name}")
        memories = ask(browser, "() => glazooExplore.settings.memories")
        assert memories == [[name, "as it is"], second]
        assert browser.value("document.querySelector('.gx select').value") == name
        assert not list(complaints(browser))
    browser.open(page.as_uri())


def test_an_overwritten_pair_is_asked_for_the_value_that_it_has_then(browser: Browser) -> None:
    """A delta rule with unit keys at right angles and full steps holds the last value exactly."""
    exact = """() => {
      const { data, makeTask, explore } = glazooExplore;
      const variant = data.variants.find(x => x.name === "deltanet");
      const settings = {
        pairs: 4, overlap: 0, noise: 0, writes: "overwritten", along: "anywhere", seed: 2,
      };
      const task = makeTask(settings, data.sizes);
      task.keys = task.axes.slice(0, 4);
      const gates = { write: 1 };
      return explore(variant.forms[0], gates, task, data.sizes).reads.map((reads, t) => {
        const known = new Set(task.writes.slice(0, t).map(write => write.pair));
        return [...known].map(pair => reads[pair]);
      });
    }"""
    found = ask(browser, exact)
    assert [len(x) for x in found] == [0, 1, 2, 3, 4, 4, 4, 4, 4]
    for reads in found:
        for read in reads:
            assert read["found"]
            assert read["alike"] == pytest.approx(1, abs=1e-12)


def test_two_specs_of_one_name_are_refused(tmp_path: Path) -> None:
    source = Path(str(glazoo.__path__[0])).parent / "specs" / "kda.toml"
    mine = tmp_path / "mine.toml"
    mine.write_text(source.read_text("utf-8").replace('title = "', 'title = "My '), "utf-8")
    with pytest.raises(glazoo.SpecError, match="two different specs are named 'kda'"):
        explore.data(["kda", mine])
    assert [x["name"] for x in explore.data(["kda", "kda"])["variants"]] == ["kda"]


def test_every_variant_and_every_other_form_is_there_once() -> None:
    assert [x["name"] for x in DATA["variants"]] == list(glazoo.names())
    for variant in DATA["variants"]:
        lines = [tuple(form["recurrence"]) for form in variant["forms"]]
        assert len(set(lines)) == len(lines)
        metaplastic = glazoo.load(variant["name"]).metaplastic
        assert (len(lines) == 1) == metaplastic


def test_the_command_writes_the_page_and_says_where(tmp_path: Path) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command)
    out = tmp_path / "memories.html"
    done = CliRunner().invoke(app, ["kda", "metaplastic_gla_full", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert done.output == f"wrote {out}: open it in a browser\n"
    assert out.read_text("utf-8") == explore.page(["kda", "metaplastic_gla_full"])
    nowhere = tmp_path / "no" / "where.html"
    refused = CliRunner().invoke(app, ["kda", "--out", str(nowhere)])
    assert str(refused.exception) == (
        f"cannot write the page: {nowhere}: No such file or directory"
    )
    with pytest.raises(glazoo.SpecError, match="did you mean 'kda'"):
        explore.page(["kdaa"])
