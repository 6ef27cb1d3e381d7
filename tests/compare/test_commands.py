import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from glazoo.compare import commands
from glazoo.compare.errors import CompareError
from glazoo.compare.plan import PRESETS, Plan
from glazoo.spec import SpecError
from glazoo.zoo import load

app = typer.Typer(pretty_exceptions_enable=False)
for name in ("bench", "capacity", "compare", "decay"):
    app.command()(getattr(commands, name))


def run(*args: str) -> Any:
    result = CliRunner().invoke(app, args, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout) if "--json" in args else result.stdout


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
    run("bench", "mamba2", *args, "--out", str(tmp_path))
    assert json.loads((tmp_path / "bench.json").read_text())["machine"]


def test_compare_trains_reports_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out = tmp_path / "compare"
    args = ("compare", "gla", "--metaplastic", *TINY, "--rates", "0.01", "--out", str(out))
    first = run(*args, "--seeds", "1", "--json")
    assert [r["label"] for r in first["rows"]] == ["gla", "metaplastic_gla"]
    lines = (out / "runs.jsonl").read_text().splitlines()
    assert len(lines) == 2
    run(*args, "--seeds", "1", "--json")
    assert (out / "runs.jsonl").read_text().splitlines() == lines
    text = run(*args, "--seeds", "2")
    assert "not separated" in text
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
    assert all(s.startswith("data:image/png;base64,") for s in sources)
    markdown = (out / "report.md").read_text()
    for figure in re.findall(r"\]\((plots/[^)]*)\)", markdown):
        assert (out / figure).exists()
    assert len((out / "plots" / "accuracy.csv").read_text().splitlines()) > 4
    with pytest.raises(CompareError, match=r"training\.steps: 4 there, 5 here"):
        run(*args, "--seeds", "1", "--steps", "5")


def test_a_dry_run_shows_equal_sizes_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "none"
    data = run("compare", "mamba2", "gla", "mesanet", "--dry-run", "--out", str(out), "--json")
    assert not out.exists()
    budget = PRESETS["quick"].model.state_bytes
    parameters = [r["parameters"] for r in data["rows"]]
    channel = 2 * PRESETS["quick"].model.width + 1
    assert max(parameters) - min(parameters) <= channel
    for row in data["rows"]:
        assert 0.8 * budget < row["shape"]["state_bytes"] <= budget
    quick = PRESETS["quick"]
    assert data["runs"] == 3 * (len(quick.rates) + quick.seeds)


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
        (("compare", "gla", "--device", "abacus"), CompareError, "device: got 'abacus'"),
        (("compare", "gla", "--width", "65"), CompareError, "65 is not a multiple"),
        (("capacity", "gla", "--keys", "round"), CompareError, "accepted are random, clustered"),
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
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "matplotlib" else find(n, *a)
    )
    out = str(tmp_path / "out")
    for command in ("capacity", "decay", "compare"):
        with pytest.raises(CompareError, match=r"glazoo\[plots\].*--no-plots"):
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


def test_the_paper_preset_is_the_papers_setting() -> None:
    from glazoo.compare.tasks import Task

    p = PRESETS["paper"]
    task = Task(name="mqar", vocab=p.vocab, length=p.length, load=p.load)
    plan = Plan({"palimpsa": load("palimpsa")}, task, (p.model,), p.training, p.rates, p.seeds)
    plan.check()
    assert (p.model.layers, p.model.width, p.model.heads) == (2, 128, 8)
    assert (p.vocab, p.length, p.load, p.training.examples) == (8192, 512, 128, 100_000)
    assert len(p.rates) == 4
