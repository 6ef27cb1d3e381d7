"""The experiment on conversions: its rows, and what its tables say of known numbers."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from glazoo import load
from glazoo.compare.model import shape_for
from glazoo.compare.store import Store
from glazoo.compare.workers import Failed

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "conversion.py"
spec = importlib.util.spec_from_file_location("conversion_experiment", PATH)
assert spec is not None
assert spec.loader is not None
experiment: Any = importlib.util.module_from_spec(spec)
# Its rows are pickled by name.
sys.modules["conversion_experiment"] = experiment
spec.loader.exec_module(experiment)


def one(**changes: Any) -> Any:
    made = experiment.Experiment(
        {"records": experiment.TASKS["records"]}, ("mamba2",), 2, False, "auto", "cpu"
    )
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize("source", ["mamba2", "gated_deltanet", "kda"])
def test_every_form_meets_a_source_of_at_least_its_state(source: str) -> None:
    setting = experiment.TASKS["records"]
    rows = {line.label: line for line in experiment.lines(load(source), setting)}
    assert set(rows) == {
        "trained on",
        *experiment.FORMS,
        "per key (gates alone)",
        "full (gates alone)",
        "bytes of full",
        "bytes of per synapse",
    }
    for form in ("full", "per synapse"):
        model = setting.model.model_copy(update={"key_size": rows[f"bytes of {form}"].keys})
        wanted = shape_for(experiment.converted(load(source), form), setting.model).state_bytes
        below = model.model_copy(update={"key_size": model.key_size - 1})
        assert shape_for(load(source), model).state_bytes >= wanted
        assert shape_for(load(source), below).state_bytes < wanted


def test_rows_of_a_seed_go_on_from_one_source_with_the_same_data() -> None:
    runs = list(one().wanted({}))
    assert {r.seed for r in runs} == {0, 1}
    on = [r for r in runs if r.before is not None and r.seed == 0]
    assert len({r.key for r in on}) == len(on) == 12
    same = [r for r in on if r.model == on[0].model]
    assert len({r.before.key for r in same}) == 1
    assert len({(r.training.model_dump_json(), r.rate) for r in on}) == 1
    # A device and an engine change rounding only: a run may go on elsewhere.
    assert [r.key for r in one(device="cuda", impl="triton").wanted({})] == [r.key for r in runs]


def test_what_was_run_keeps_its_key() -> None:
    known = {row["key"] for row in experiment.read_rows(experiment.RESULTS)}
    forms = {"before", "trained on", *experiment.FORMS}
    runs = [r for r in one(seeds=1).wanted({}) if r.label.partition(", ")[2] in forms]
    assert len(runs) > len(experiment.FORMS)
    assert {r.key for r in runs} <= known


def test_gates_alone_are_trained(tmp_path: Path) -> None:
    runs = {r.label: r for r in one(seeds=1).wanted({})}
    run = runs["records: mamba2, per key (gates alone)"]
    source = experiment.new(run.before)
    file = experiment.file_of(run.before, tmp_path)
    file.parent.mkdir()
    torch.save(source.state_dict(), file)
    learns = {n for n, p in experiment.start(run, tmp_path).named_parameters() if p.requires_grad}
    assert {n.rpartition(".")[2] for n in learns} == {"b_down", "b_up", "b_scale", "ip_log"}
    assert all(".metaplastic." in n for n in learns)


def test_rates_come_from_the_seed_that_is_not_reported() -> None:
    chooser = one(select=True)
    line = next(x for _, x in chooser.of("records") if x.label == "per key")
    runs = {c: chooser.row("records", "mamba2", line, c, 1000) for c in line.candidates}
    assert chooser.choice("records", "mamba2", line, {}) is None
    results = {
        run.key: {"loss": loss, "diverged": False}
        for run, loss in zip(runs.values(), (0.3, 0.2, 0.4), strict=True)
    }
    assert chooser.choice("records", "mamba2", line, results) == line.candidates[1]
    # A form that is not tried, and a task that has the rates of another.
    like = next(x for _, x in chooser.of("records") if x.label == "rotated")
    static = one(select=True, settings={"static": experiment.TASKS["static"]})
    assert static.choice("static", "mamba2", like, results) == line.candidates[1]
    assert {r.label for r in static.wanted({}) if r.seed == 1000 and r.before is not None} == {
        f"records: mamba2, {x.label}" for x in experiment.RATED
    }
    results[runs[line.candidates[1]].key]["diverged"] = True
    assert chooser.choice("records", "mamba2", line, results) == line.candidates[0]


def test_a_source_without_full_precision_has_rates_of_the_rest() -> None:
    runs = list(one(select=True, sources=("longhorn",), seeds=1).wanted({}))
    forms = [r.label.partition(", ")[2] for r in runs if r.seed == 1000 and r.before is not None]
    assert {*forms} == {"trained on", "per key"}


def row(line: str, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
    common = {"selection": False, "state_bytes": 8, "key": f"{line} {seed}", "before": "x"}
    curve = [{"step": 8, "accuracy": accuracy / 2}, {"step": 16, "accuracy": accuracy}]
    common |= {"label": f"records: gla, {line}", "seed": seed, "curve": curve}
    return common | {"accuracy": accuracy} | more


def test_differences_are_by_seed() -> None:
    rows = [row("trained on", s, a) for s, a in enumerate((0.2, 0.6))]
    rows += [row("full", s, a, state_bytes=12) for s, a in enumerate((0.3, 0.7))]
    rows += [row("full", 1000, 0.0, selection=True), row("per key", 1, 0.7, state_bytes=9)]
    text = experiment.tasks_text(rows)
    assert "| trained on | 8 | 40.0 \u00b1 254.1 |  |" in text
    # A tenth more on both seeds, which are four tenths apart.
    assert "| full | 12 | **+10.0 \u00b1 0.0** | 16 |" in text
    assert "| per key | 9 | +10.0 (1) | 16 |" in text


def test_rare_words_by_occurrence() -> None:
    first, later = experiment._occurrences(b"a zebras known zebras", frozenset({b"known"}))
    assert first == [4, 5, 6, 7]
    assert later == [17, 18, 19, 20]


def runs_of(task: str, *found: tuple[float, float, float]) -> list[Any]:
    """Runs by room, use and gain."""
    return [experiment.Tried(task, "mamba2", 0, "full", *x) for x in found]


@pytest.mark.parametrize(
    ("values", "pays", "expected"),
    [
        ([0.0, 1.0, 4.0, 5.0], [False, False, True, True], 2.5),
        ([0.0, 1.0, 4.0, 5.0], [False, True, False, True], 0.0),
        ([0.0, 1.0], [True, True], -0.5),
        ([0.0, 1.0], [False, False], 1.5),
    ],
)
def test_the_threshold_with_the_fewest_errors(
    values: list[float], pays: list[bool], expected: float
) -> None:
    runs = runs_of("a", *((v, 0.0, 0.5 * p) for v, p in zip(values, pays, strict=True)))
    (at,) = experiment.thresholds(runs, ["room"])
    said = [experiment.said(r, ["room"], [at]) for r in runs]
    known = [experiment.said(r, ["room"], [expected]) for r in runs]
    assert sum(a is not b for a, b in zip(said, pays, strict=True)) == sum(
        a is not b for a, b in zip(known, pays, strict=True)
    )
    if values[-1] == 5.0 and not pays[1]:
        assert at == expected


def test_two_thresholds_say_what_neither_does() -> None:
    runs = runs_of("a", (0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1.0, 1.0, 0.5))
    at = experiment.thresholds(runs, experiment.MEASURES)
    assert [experiment.said(r, experiment.MEASURES, at) for r in runs] == [False] * 3 + [True]
    assert at == (0.5, 0.5)


def test_the_steps_after_which_a_row_is_as_good_as_the_source_at_its_end() -> None:
    def curve(*accuracies: float) -> list[dict[str, float]]:
        return [{"step": 16 * n, "accuracy": a} for n, a in enumerate(accuracies, 1)]

    base = curve(0.5, 0.9, 0.8)
    assert experiment.passing(curve(0.7, 0.8, 0.95), base) == 32
    assert experiment.passing(curve(0.7, 0.79), base) == float("inf")


def test_thresholds_come_from_other_sources_than_they_are_tried_on() -> None:
    a = runs_of("a", (0.0, 0.0, 0.0), (1.0, 0.0, 0.5))
    same = [*a, *runs_of("b", (0.1, 0.0, 0.0), (0.9, 0.0, 0.5))]
    assert experiment.right(same, ["room"]) == {"a": 2, "b": 2}
    # Of b the opposite holds: what is right of a is wrong of both.
    opposite = [*a, *runs_of("b", (0.9, 0.0, 0.0), (0.1, 0.0, 0.5))]
    assert experiment.right(opposite, ["room"])["b"] == 0


def test_what_is_advised_is_shown_beside_what_it_gained(tmp_path: Path) -> None:
    rows = [row("before", 0, 0.4), row("trained on", 0, 0.5)]
    rows += [row("per key", 0, 0.8, state_bytes=9), row("full", 0, 0.9, state_bytes=12)]
    rows += [row("isotropic", 0, 0.5, state_bytes=9)]
    falls = {"0.1": [-0.02, -0.025, -0.03, -0.025]}
    found = {
        "label": "records: gla, before",
        "seed": 0,
        "shares": {
            "source": [0.5, 0.5],
            "isotropic": [0.5, 0.51],
            "per key": [0.7, 0.71],
            "full": [0.8, 0.81],
        },
        "opened": {"isotropic": falls, "per key": falls, "full": falls},
    }
    (tmp_path / "predictions.jsonl").write_text(json.dumps(found) + "\n")
    assert "| records | gla | full | +40.0 | full | +40.0 |" in experiment.advice_text(
        rows, tmp_path
    )
    found["shares"]["full"] = [0.72, 0.73]
    (tmp_path / "predictions.jsonl").write_text(json.dumps(found) + "\n")
    lines = experiment.advice_text(rows, tmp_path)
    assert "| records | gla | per key | +30.0 | full | +40.0 |" in lines
    at = {
        r.form: (round(r.room, 3), round(r.use, 3), round(r.gain, 3))
        for r in experiment.tried(rows, tmp_path)
    }
    assert at["per key"] == (0.205, 0.025, 0.3)


def test_runs_that_fail_do_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def run_all(runs: list[Any], *, pool: Any, **_: Any) -> Iterator[Any]:
        pool.close()
        for run in runs:
            tried.append(run.seed)
            yield Failed(run, "as asked", again=False)

    monkeypatch.setattr(experiment, "run_all", run_all)
    arguments = ["run", "records", "--sources", "mamba2", "--only", "trained on", "--seeds", "3"]
    folders = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    result = CliRunner().invoke(
        experiment.app, [*arguments, *folders, "--jobs", "1", "--no-select"]
    )
    assert tried == [0, 1, 2]
    assert result.exit_code == 1
    assert "3 runs failed: repeat the command" in result.stdout


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny: dict[str, Any] = {"steps": 1, "batch": 2, "eval_examples": 16}
    setting = experiment.TASKS["records"]
    setting = dataclasses.replace(
        setting,
        training=setting.training.model_copy(update=tiny),
        tuning=setting.tuning.model_copy(update=tiny),
    )
    monkeypatch.setitem(experiment.TASKS, "records", setting)
    small = one(settings={"records": setting}, seeds=1)
    done = {}
    for run in small.wanted({}):
        if run.key not in done:
            done[run.key] = experiment.work(run, folder=tmp_path)
    for run in small.wanted({}):
        result = done[run.key]
        assert not result["diverged"]
        if run.before is None or run.spec == run.before.spec or run.opened:
            continue
        # Converted, and calibrated, but not trained: the source.
        source = done[run.before.key]["accuracy"]
        assert result["at_first"]["accuracy"] == pytest.approx(source, abs=1e-6)
    with Store(tmp_path / "rows", {"format": 1}) as store:
        for result in done.values():
            store.add(result)
    assert len(experiment.read_rows(tmp_path / "rows")) == len(done)
    assert json.dumps(done)
    experiment.predict(jobs=1, seeds=2, out=tmp_path / "rows", weights=tmp_path)
    experiment.report(out=tmp_path / "rows")
    text = (tmp_path / "rows" / "report.md").read_text()
    assert "| bytes of full | 3,072 |" in text
    assert (tmp_path / "rows" / "gain.png").stat().st_size > 1000
