"""Running the catalogue: selection, determinism, shrinking, snippets, reports."""

import functools
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from theory.mutants import MUTANTS

import glazoo
from glazoo.engines import available
from glazoo.theory import Instance, replay, verify
from glazoo.theory.results import failures, passed, render, summary

CAUSAL = "causal"
REFERENCE = functools.partial(glazoo.api.attention, impl="reference")


def mutant(name: str):
    return next(m for m in MUTANTS if m.name == name)


def text(renderable) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


@pytest.mark.parametrize("impl", available())
def test_every_engine_passes_a_few_statements(impl: str) -> None:
    results = verify.run(
        [CAUSAL, "segmented-is-whole", "engine-is-reference", "palimpsa", "gated_deltanet"],
        impl=impl,
        examples=2,
    )
    assert passed(results), "\n".join(failures(results))
    engine = {r.id for r in results} & {"engine-is-reference"}
    assert bool(engine) == (impl != "reference")


def test_kernels_are_verified_in_float32() -> None:
    results = verify.run(["full-step-recalls", "deltanet"], impl="triton", examples=1)
    assert [(r.impl, r.dtype, r.verdict) for r in results] == [
        ("triton", "float32", "passed")
    ] * len(results)
    assert results
    with pytest.raises(ValueError, match="verifies in float32 only"):
        verify.run(["full-step-recalls"], impl="triton", dtype="float64")


def test_kernels_compiled_for_no_device_are_refused() -> None:
    program = (
        "import triton\nfrom glazoo.theory import verify\n"
        "try:\n    verify.run(['full-step-recalls'], impl='triton')\n"
        "except ValueError as e:\n    print(e)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    said = subprocess.run(
        [sys.executable, "-P", "-c", program], env=environment, capture_output=True, text=True
    )
    assert "set TRITON_INTERPRET=1 before" in said.stdout, said.stderr


def test_float32_passes_and_leaves_out_limits() -> None:
    results = verify.run(
        ["gated-deltanet-is-kda", "plasticity-is-linear", "gated_deltanet"],
        impl="reference",
        dtype="float32",
    )
    assert passed(results)
    verdicts = {(r.id, r.verdict) for r in results}
    assert ("plasticity-is-linear", "skipped") in verdicts
    assert ("gated-deltanet-is-kda", "passed") in verdicts


def test_same_seed_same_results_whatever_else_runs() -> None:
    options = {"impl": "reference", "examples": 4}
    alone = verify.run(["prefix-of-outputs", "gla"], seed=3, **options)
    again = verify.run(["prefix-of-outputs", "gla"], seed=3, **options)
    among = verify.run(
        ["sequences-are-independent", "prefix-of-outputs", "gla", "kda"], seed=3, **options
    )
    assert alone == again
    assert set(alone) <= set(among)
    other = verify.run(["linear-in-values", "gla"], seed=4, **options)
    assert other != verify.run(["linear-in-values", "gla"], seed=3, **options)


def test_progress_counts_to_the_end() -> None:
    seen = []
    verify.run([CAUSAL, "gla"], op=REFERENCE, progress=lambda *x: seen.append(x))
    assert [done for _, done, _ in seen] == list(range(len(seen)))
    assert seen[-1] == ("done", 11, 11)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ["palimps"]}, "names: 'palimps' is no statement, and .*mean 'palimpsa'"),
        ({"names": ["causl"]}, "did you mean the statement 'causal'"),
        ({"names": ["simple-gla-is-gla", "kda"]}, "none of the statements is claimed for any"),
        ({"examples": 0}, "examples: got 0, accepted"),
        ({"dtype": "float16"}, "dtype: got 'float16', accepted are float64, float32"),
        ({"impl": "fast"}, "impl: got 'fast', accepted are"),
    ],
)
def test_wrong_options_are_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verify.run(**options)


def test_a_failure_shrinks_to_a_small_instance_and_a_snippet_that_shows_it() -> None:
    wrong = mutant("decay_of_the_next_token")
    results = verify.run(["prefix-of-outputs", "kda"], op=wrong.op())
    failed = [r for r in results if r.verdict == "failed"]
    first = failed[0].instance
    assert first is not None
    # A look into the future needs two tokens or, where the cut falls elsewhere, three.
    assert (first.B, first.H, first.G, first.K, first.V) == (1, 1, 1, 1, 1)
    assert first.T in (2, 3)
    assert (first.regime, first.start) == ("normal", False)
    assert "replay('prefix-of-outputs', spec, instance, op=op, dtype='float64')" in (
        failed[0].snippet or ""
    )
    names = {"op": wrong.op()}
    exec((failed[0].snippet or "").replace("op = ...", "pass"), names)
    assert "FAILED: output: residual" in replay("prefix-of-outputs", "kda", first, op=wrong.op())
    report = failures(results)
    assert len(report) == 1
    assert report[0].startswith("prefix-of-outputs fails for kda on op: output: ")
    assert "also fails for: metaplastic_kda[head], metaplastic_kda[head, first order]" in report[0]


def test_without_hypothesis_the_instance_at_hand_has_to_do(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    results = verify.run(["packed-is-separate", "gla"], op=mutant("packed_sequences_leak").op())
    assert not passed(results)
    assert all(r.snippet for r in results if r.verdict == "failed")


def test_snippet_is_a_program(capsys) -> None:
    results = verify.run(
        ["segmented-is-whole", "palimpsa"], op=mutant("importance_not_carried").op()
    )
    snippet = results[0].snippet
    assert snippet is not None
    # On an engine that is right, the same program says so.
    program = snippet.replace("op=op, ", "impl='reference', ").replace("op = ...", "pass")
    exec(program, {})
    shown = capsys.readouterr().out
    assert "segmented-is-whole (invariance)" in shown
    assert "passed: " in shown


def test_replay_shows_small_operands() -> None:
    shown = replay("linear-in-values", "gla", Instance(T=2, K=1, V=1))
    assert "  q = [[[[" in shown
    assert "passed: " in shown
    assert "  q = " not in replay("linear-in-values", "gla", Instance(T=9, K=5, V=3, B=2))


def test_what_an_implementation_does_not_do_is_skipped_and_listed() -> None:
    def unpacked(*args, cu_seqlens=None, **kwargs):
        if cu_seqlens is not None:
            raise NotImplementedError("packed sequences")
        return REFERENCE(*args, **kwargs)

    results = verify.run(["packed-is-separate", CAUSAL, "gla"], op=unpacked)
    assert {(r.id, r.verdict) for r in results} == {
        (CAUSAL, "passed"),
        ("packed-is-separate", "skipped"),
    }
    assert passed(results)
    assert "skipped on op: not implemented: packed sequences" in summary(results)

    def nothing(*args, **kwargs):
        raise NotImplementedError("anything")

    assert not passed(verify.run([CAUSAL, "gla"], op=nothing))


def test_an_engine_that_cannot_run_is_skipped_with_its_reason(monkeypatch) -> None:
    def broken(call):
        raise ImportError("no such library")

    monkeypatch.setitem(glazoo.engines._ENGINES, "broken", broken)
    results = verify.run([CAUSAL, "gla"])
    skipped = [r for r in results if r.verdict == "skipped"]
    assert [(r.impl, r.what) for r in skipped] == [("broken", "cannot run here: no such library")]
    assert passed(results)


def test_table_and_json() -> None:
    results = verify.run([CAUSAL, "plasticity-is-linear", "gla"], op=REFERENCE) + verify.run(
        ["decay-is-a-gauge", "gla"], op=mutant("decay_in_base_two").op()
    )
    table = text(render(results))
    assert "y_1..t does not depend on tokens after t" in table
    assert re.search(r"rate (0\.9[5-9]|1\.0[0-4])\d", table)
    assert "FAILED (1 of 1)" in table
    assert "invariance" in table
    data = json.loads(json.dumps([r.to_json() for r in results]))
    assert {d["verdict"] for d in data} == {"passed", "failed"}
    assert data[-1]["instance"]["T"] >= 1
    assert "3 statements" in summary(results)


def test_an_infinite_residual_is_json() -> None:
    def wrong_shape(*args, **kwargs):
        result = REFERENCE(*args, **kwargs)
        return result._replace(output=result.output[..., :0])

    results = verify.run(["causal", "engine-is-reference", "gla"], op=wrong_shape, shrink=False)
    failed = [r.to_json() for r in results if r.verdict == "failed"]
    assert failed[0]["residual"] == "inf"
    json.loads(json.dumps(failed, allow_nan=False))


def test_gradients_of_an_implementation_are_checked() -> None:
    class Detached(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 0.5 * grad

    def op(spec, q, k, v, **options):
        return REFERENCE(spec, Detached.apply(q), k, v, **options)

    results = verify.run(
        ["engine-gradients-are-reference", "engine-is-reference", "gla"],
        op=op,
        only_source=True,
        shrink=False,
    )
    assert {r.id: (r.verdict, r.what) for r in results} == {
        "engine-is-reference": ("passed", results[0].what),
        "engine-gradients-are-reference": ("failed", "gradient of q"),
    }
