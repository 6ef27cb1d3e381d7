"""`glazoo verify` and `glazoo posterior` as commands."""

import json

import pytest
import typer
from theory.mutants import MUTANTS
from typer.testing import CliRunner

import glazoo
from glazoo.theory import commands

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
app.command()(commands.verify)
app.command()(commands.posterior)


def invoke(*args: str):
    return CliRunner().invoke(app, list(args))


def test_verify_prints_a_table_and_exits_with_zero() -> None:
    done = invoke("verify", "causal", "gla", "--impl", "reference", "--examples", "2")
    assert done.exit_code == 0, done.output
    assert "y_1..t does not depend on tokens after t" in done.output
    assert "1 statements, 33 instances: 11 passed, 0 failed, 0 skipped" in done.output


def test_verify_as_json_is_json_and_deterministic() -> None:
    args = ("verify", "linear-in-values", "gla", "--json", "--seed", "5", "--dtype", "float32")
    first, second = invoke(*args), invoke(*args)
    assert first.stdout == second.stdout
    rows = json.loads(first.stdout)
    assert {row["impl"] for row in rows} == set(glazoo.engines.available())
    assert {row["verdict"] for row in rows} == {"passed"}


def test_a_failure_prints_a_program_and_exits_with_one(monkeypatch) -> None:
    wrong = next(m for m in MUTANTS if m.name == "missing_scale").op()
    # An engine of that name, and what calling it gives.
    monkeypatch.setitem(glazoo.engines._ENGINES, "broken", None)
    monkeypatch.setattr("glazoo.theory.verify.attention", lambda *a, impl, **o: wrong(*a, **o))
    done = invoke("verify", "scale-multiplies-the-query", "gla", "--impl", "broken")
    assert done.exit_code == 1
    assert "FAILED (11 of 11)" in done.output
    assert "print(replay('scale-multiplies-the-query', spec, instance, impl='broken'" in done.output


def test_posterior_prints_a_ranking_and_writes_a_plot(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    image = tmp_path / "ranking.png"
    names = ("palimpsa", "gated_deltanet")
    done = invoke("posterior", *names, "--seeds", "2", "--key-size", "4", "--plot", str(image))
    assert done.exit_code == 0, done.output
    assert "metaplastic_gated_deltanet" in done.output
    assert f"wrote {image}" in done.output.replace("\n", "")
    assert image.exists()
    assert image.with_suffix(".json").exists()


def test_posterior_as_json() -> None:
    done = invoke("posterior", "palimpsa", "--seeds", "2", "--key-size", "2", "--json")
    rows = json.loads(done.stdout)
    assert {row["spec"] for row in rows} == {"palimpsa"}
    assert all(row["low"] <= row["mean"] <= row["high"] for row in rows)
