import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from glazoo.compare.commands.bench import bench
from glazoo.compare.commands.capacity import capacity
from glazoo.compare.commands.compare import compare
from glazoo.compare.commands.decay import decay
from glazoo.compare.errors import CompareError
from glazoo.compare.plan import PRESETS, Plan
from glazoo.compare.tasks import Task
from glazoo.compare.train import Run
from glazoo.compare.workers import Finished, Pool
from glazoo.spec import SpecError
from glazoo.zoo import load

app = typer.Typer(pretty_exceptions_enable=False)
for command in (bench, capacity, compare, decay):
    app.command()(command)


def run(*args: str) -> Any:
    result = CliRunner().invoke(app, args, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout) if "--json" in args else result.stdout


def in_this_process(
    runs: list[Run],
    *,
    pool: Pool,
    more: Callable[[dict[str, Any]], list[Run]],
    work: Callable[..., dict[str, Any]],
    **_: Any,
) -> Iterator[Finished]:
    """Stands for `run_all`, whose processes take seconds to import what this one has."""
    pool.close()
    waiting = list(runs)
    while waiting:
        run = waiting.pop(0)
        result = work(run, lambda *_: None)
        yield Finished(run, result)
        waiting.extend(more(result))


TINY = (
    "--load", "3", "--length", "12", "--vocab", "32", "--steps", "4", "--batch", "4",
    "--width", "16", "--heads", "2", "--state", "512", "--jobs", "1",
)  # fmt: skip


def test_capacity_writes_figure_and_data(tmp_path: Path) -> None:
    out = tmp_path / "capacity"
    args = ("capacity", "gla", "deltanet", "--metaplastic", "--state", "512", "--value-size", "4")
    text = run(*args, "--pairs", "4,8,16", "--seeds", "3", "--jobs", "1", "--out", str(out))
    assert "metaplastic_deltanet" in text
    assert (out / "capacity.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads((out / "capacity.json").read_text())
    assert len(data["curves"]) == 4 * 3
    assert all(c["state_bytes"] <= 512 for c in data["curves"])
    rows = (out / "capacity.csv").read_text().splitlines()
    assert len(rows) == 1 + 4 * 3 * 3
    again = run(
        *args, "--pairs", "4,8,16", "--seeds", "3", "--jobs", "1", "--out", str(out), "--json"
    )
    assert again["curves"] == data["curves"]


def test_decay_writes_theory_beside_the_measurement(tmp_path: Path) -> None:
    out = tmp_path / "decay"
    args = ("--key-size", "8", "--before", "8", "--after", "16", "--seeds", "2", "--out", str(out))
    data = run("decay", "gated_deltanet", "retnet", *args, "--json")
    assert (out / "decay.png").exists()
    first = data["curves"][0]["points"][0]
    assert first["signal"]["mean"] == pytest.approx(1.0)
    assert first["theory_signal"] == 1.0
    # A fixed schedule keeps its own decay, whatever is asked for.
    assert data["curves"][1]["gates"]["decay"] != data["curves"][0]["gates"]["decay"]


def test_the_forms_to_compare_are_chosen_by_gate_and_gain(tmp_path: Path) -> None:
    sizes = ("--state", "512", "--value-size", "4", "--pairs", "4", "--seeds", "2", "--jobs", "1")
    args = ("capacity", "gla", "kda", "--metaplastic", *sizes, "--keys", "random", "--no-plots")
    for options, labels in (
        ((), ["metaplastic_gla", "metaplastic_kda"]),
        (
            ("--gate", "value", "--gain", "first_order"),
            ["metaplastic_gla (value)", "metaplastic_kda (value, first order)"],
        ),
    ):
        data = run(*args, *options, "--out", str(tmp_path / "c"), "--json")
        found = [c["label"] for c in data["curves"]]
        assert found == ["gla", labels[0], "kda", labels[1]]


def test_bench_measures_engines_and_says_which_are_not_there(tmp_path: Path) -> None:
    args = ("--tokens", "8", "--key-size", "4", "--value-size", "4", "--seconds", "0.01")
    data = run("bench", "mamba2", "--engine", "reference", "--engine", "chunked", *args, "--json")
    assert len(data["measurements"]) == 6
    for m in data["measurements"]:
        assert m["failure"] == ""
        assert m["ms_p20"] <= m["ms_p50"] <= m["ms_p80"]
        # Against float64 of at most 8 tokens and 4 channels, in float32.
        assert m["error"] < 64 * 2.0**-23
        assert (m["saved_bytes"] > 0) == (m["mode"] == "train")
    args += ("--mode", "prefill", "--dtype", "float64")
    data = run("bench", "mamba2", "--engine", "traceable", "--engine", "fla", *args, "--json")
    traced, fla = data["measurements"]
    assert traced["failure"] == ""
    # Each engine says itself what it does not serve.
    assert fla["failure"].startswith("ValueError: impl='fla': got float64")
    run("bench", "mamba2", *args, "--out", str(tmp_path))
    assert json.loads((tmp_path / "bench.json").read_text())["machine"]


def test_compare_trains_reports_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "compare"
    args = ("compare", "gla", "--metaplastic", *TINY, "--rates", "0.01", "--out", str(out))
    first = run(*args, "--seeds", "1", "--json")
    assert [r["label"] for r in first["rows"]] == ["gla", "metaplastic_gla"]
    lines = (out / "runs.jsonl").read_text().splitlines()
    assert len(lines) == 2
    monkeypatch.setattr("glazoo.compare.running.run_all", in_this_process)
    run(*args, "--seeds", "1", "--json")
    assert (out / "runs.jsonl").read_text().splitlines() == lines
    text = run(*args, "--seeds", "2")
    assert re.search(r"difference", text)
    assert re.search(r"[+-]\d+\.\d ± \d", text)
    assert (out / "runs.jsonl").read_text().splitlines()[:2] == lines
    runs = [json.loads(x) for x in (out / "runs.jsonl").read_text().splitlines()]
    assert len(runs) == 4
    assert len({r["data_hash"] for r in runs}) == 1
    # A seed means the same data for every variant, and other data than another seed.
    by_seed = {(r["seed"], r["first_batch_hash"]) for r in runs}
    assert len(by_seed) == 2
    report = (out / "report.html").read_text()
    assert "metaplastic_gla" in report
    assert runs[0]["data_hash"] in report
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', report)
    assert sources
    assert all(s.startswith("data:image/svg+xml;base64,") for s in sources)
    markdown = (out / "report.md").read_text()
    for figure in re.findall(r"\]\((plots/[^)]*)\)", markdown):
        assert (out / figure).exists()
    assert len((out / "plots" / "accuracy.csv").read_text().splitlines()) > 4
    with pytest.raises(CompareError, match=r"training\.steps: 4 there, 5 here"):
        run(*args, "--seeds", "1", "--steps", "5")


def test_conversions_are_shown_beside_their_source_and_their_control(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glazoo.compare.running.run_all", in_this_process)
    out = tmp_path / "converted"
    args = ("compare", "gated_deltanet", "--convert", "--task", "records", *TINY, "--length", "24")
    args = (*args, "--further-steps", "3", "--plasticity-rate", "1,10", "--out", str(out))
    found = run(*args, "--seeds", "2", "--json")
    labels = ["before", "trained on", "converted"]
    assert [r["label"].split(", ")[1] for r in found["rows"]] == labels
    before, source, converted = found["rows"]
    assert before["difference"] is None
    assert source["difference"] is None
    for row in (converted, converted["control"]):
        rival = source if row is converted else source["control"]
        paired = [a - b for a, b in zip(row["accuracies"], rival["accuracies"], strict=True)]
        assert row["difference"]["mean"] == pytest.approx(sum(paired) / 2)
        assert row["difference"]["seeds"] == 2
    assert converted["control"]["task"] == "static"
    assert converted["shape"]["key_size"] == source["shape"]["key_size"]
    runs = [json.loads(x) for x in (out / "runs.jsonl").read_text().splitlines()]
    # Of both tasks: two seeds of three lines, and on the seed that chooses a source and two rates.
    assert len(runs) == 2 * (2 * 3 + 1 + 2)
    assert all(r["seed"] >= 1000 for r in runs if r["selection"])
    # Runs that end within a minute leave nothing of the way there.
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["plots", "weights"]
    markdown = (out / "report.md").read_text()
    head = next(line for line in markdown.splitlines() if line.startswith("| variant"))
    columns = [c.strip() for c in head.split("|")[1:-1]]
    assert columns[:3] == [
        "variant",
        "difference to the source trained on (points)",
        "static: difference (points)",
    ]
    assert "(chosen)" in markdown
    accuracy = csv.DictReader((out / "plots" / "accuracy.csv").read_text().splitlines())
    assert {line["task"] for line in accuracy} == {"records", "static"}
    with pytest.raises(CompareError, match="palimpsa, of which none has a metaplastic form"):
        run("compare", "palimpsa", "--convert", *TINY, "--out", str(tmp_path / "none"))


def test_a_dry_run_shows_equal_sizes_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "none"
    data = run("compare", "mamba2", "gla", "mesanet", "--dry-run", "--out", str(out), "--json")
    assert not out.exists()
    budget = PRESETS["quick"].models[0].state_bytes
    parameters = [r["parameters"] for r in data["rows"]]
    channel = 2 * PRESETS["quick"].models[0].width + 1
    assert max(parameters) - min(parameters) <= channel
    for row in data["rows"]:
        assert 0.8 * budget < row["shape"]["state_bytes"] <= budget
    quick = PRESETS["quick"]
    assert data["runs"] == 3 * (len(quick.rates) + quick.seeds)
    assert data["seconds"] > 0


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (("compare", "gla", "--task", "mqr"), CompareError, "did you mean 'mqar'"),
        (("compare", "gla", "--task", "chess"), CompareError, "accepted are mqar, noisy_recall"),
        (("compare", "mamab2"), SpecError, "did you mean 'mamba2'"),
        (("compare", "gla", "--state", "64"), CompareError, "its smallest state with 16 value"),
        (("compare", "gla", "--load", "200"), CompareError, "keys for a load of at most"),
        (("compare", "gla", "--load", "40", "--length", "50"), CompareError, "length of at least"),
        (("compare", "gla", "--rates", "fast"), CompareError, "rates: got 'fast'"),
        (("compare", "gla", "--rates", "-1"), CompareError, "rates: got"),
        (("compare", "gla", "--plasticity-rate", "-1"), CompareError, "plasticity-rate: got"),
        (("compare", "gla", "--preset", "papr"), CompareError, "did you mean 'paper'"),
        (("compare", "gla", "--device", "abacus"), CompareError, "device: got 'abacus'"),
        (("compare", "gla", "--width", "65"), CompareError, "65 is not a multiple"),
        (("capacity", "gla", "--keys", "round"), CompareError, "accepted are random, clustered"),
        (("capacity", "gla", "--keys", "trained", "--pairs", "999"), CompareError, "in a row"),
        (("capacity", "gla", "--pairs", "4,x"), CompareError, "positive integers"),
        (("capacity", "palimpsa", "--state", "8"), CompareError, "too few for 'palimpsa'"),
        (("decay", "gla", "--time-constant", "nan"), CompareError, "time-constant"),
        (("bench", "gla", "--engine", "magic"), CompareError, "engine: got 'magic'"),
        (("bench", "gla", "--mode", "trian"), CompareError, "did you mean 'train'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    tmp_path: Path, args: tuple[str, ...], error: type[Exception], message: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(error, match=message):
        CliRunner().invoke(app, [*args, "--out", str(out)], catch_exceptions=False)
    assert not out.exists()


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = str(tmp_path / "out")
    for command in ("capacity", "decay", "compare"):
        with pytest.raises(ImportError, match=r"glazoo\[plots\].*--no-plots"):
            CliRunner().invoke(app, [command, "gla", "--out", out], catch_exceptions=False)
    small = ("--key-size", "4", "--before", "2", "--after", "8", "--seeds", "1")
    run("decay", "gla", *small, "--no-plots", "--out", out)
    assert not (tmp_path / "out" / "decay.png").exists()


def test_two_specs_of_one_name_are_refused(tmp_path: Path) -> None:
    from importlib import resources

    text = (resources.files("glazoo.specs") / "gla.toml").read_text("utf-8")
    (tmp_path / "mine.toml").write_text(text.replace("divisor = 16.0", "divisor = 8.0"))
    with pytest.raises(CompareError, match="two different specs are named 'gla'"):
        CliRunner().invoke(
            app, ["compare", "gla", str(tmp_path / "mine.toml")], catch_exceptions=False
        )


@pytest.mark.parametrize(
    ("name", "length", "load_", "batch"), [("paper", 512, 128, 128), ("paper-long", 1024, 256, 64)]
)
def test_the_paper_presets_are_the_papers_setting(
    name: str, length: int, load_: int, batch: int
) -> None:
    p = PRESETS[name]
    theirs, ours = p.models
    assert (theirs.layers, theirs.width, theirs.heads, theirs.mlp) == (2, 128, 8, 0)
    assert (theirs.key_size, theirs.value_size, theirs.start) == (16, 32, "drawn")
    assert (p.vocab, p.length, p.load, p.filler_tokens) == (8192, length, load_, 1)
    t = p.training
    assert (t.examples, t.batch, t.decay, t.curriculum) == (100_000, batch, 0.1, 0.0)
    assert t.steps == 60 * (100_000 // batch)
    assert [round(r, 5) for r in p.rates] == [0.001, 0.00215, 0.00464, 0.01]
    assert (p.seeds, p.every_rate) == (8, (theirs,))
    assert ours.key_size is None
    assert (ours.value_size, ours.width, ours.layers) == (32, 128, 2)
    task = Task(name="mqar", vocab=p.vocab, length=length, load=load_, filler_tokens=1)
    specs = {n: load(n) for n in ("mamba2", "meta_mamba2", "palimpsa", "gated_deltanet")}
    plan = Plan(specs, task, p.models, t, p.rates, p.seeds, every_rate=p.every_rate)
    plan.check()
    by_model = {m: [a.shape for a in plan.arms if a.model == m] for m in p.models}
    assert {s.key_size for s in by_model[theirs]} == {16}
    sizes = [s.state_bytes for s in by_model[ours]]
    assert max(sizes) <= ours.state_bytes
    assert min(sizes) > 0.9 * ours.state_bytes


def test_the_small_paper_preset_is_the_papers_but_for_its_sizes() -> None:
    p, small = PRESETS["paper"], PRESETS["paper-small"]
    for theirs, own in zip(p.models, small.models, strict=True):
        sizes = {"width", "heads", "key_size", "state_bytes"}
        assert own.model_dump(exclude=sizes) == theirs.model_dump(exclude=sizes)
    sizes = {"steps", "batch", "examples", "eval_examples"}
    assert small.training.model_dump(exclude=sizes) == p.training.model_dump(exclude=sizes)
    assert small.every_rate == small.models[:1]
    assert small.filler_tokens == 1
    assert set(small.rates) < set(p.rates)
    # As many pairs for every key channel as in the paper.
    theirs, own = p.models[0], small.models[0]
    assert theirs.key_size
    assert own.key_size
    assert p.load / (theirs.heads * theirs.key_size) == 1
    assert small.load / (own.heads * own.key_size) == 1
