"""The GPU benchmark's own code in the interpreter, so that no mistake of it waits for a GPU."""

import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import pytest

PATH = pathlib.Path(__file__).parents[2] / "benchmarks" / "gpu.py"
spec = importlib.util.spec_from_file_location("gpu_benchmark", PATH)
gpu = importlib.util.module_from_spec(spec)
# Dataclasses look their module up.
sys.modules["gpu_benchmark"] = gpu
spec.loader.exec_module(gpu)
CASES = gpu.make_cases(gpu.REHEARSAL)


@pytest.mark.parametrize(
    "case",
    # With one gate each.
    [pytest.param(x, marks=[pytest.mark.slow] * (x.gate in ("none", "key"))) for x in CASES],
    ids=lambda x: f"{x.name} {x.gate}",
)
def test_every_case_is_measured(case):
    rows = list(gpu.measure(case, gpu.REHEARSAL))
    assert not gpu.failed(rows)
    if case.name != "hardware":
        assert [row["pass"] for row in rows] == ["fwd", "fwd+bwd", "decode"]
        assert all(row["glazoo_ms"] > 0 for row in rows)


def test_a_wrong_result_is_not_timed(monkeypatch):
    wrong = gpu.dataclasses.replace(
        gpu.OPERATIONS["importance"],
        run=lambda x: (1.1 * gpu.importance(x["k"], x["b"], x["g"])[0],),
    )
    monkeypatch.setitem(gpu.OPERATIONS, "importance", wrong)
    gpu.check.cache_clear()
    (row,) = gpu.measure(next(x for x in CASES if x.name == "importance"), gpu.REHEARSAL)
    gpu.check.cache_clear()
    assert row["pass"] == "check"
    assert "output 0: relative error" in row["error"]


def test_a_failure_costs_no_other_row(monkeypatch):
    operation = gpu.OPERATIONS["importance"]

    def fail(*_):
        raise RuntimeError("out of memory | no\nmore")

    monkeypatch.setitem(gpu.OPERATIONS, "importance", gpu.dataclasses.replace(operation, step=fail))
    rows = list(gpu.measure(next(x for x in CASES if x.name == "importance"), gpu.REHEARSAL))
    assert [row.get("error") for row in rows] == [
        None,
        None,
        "RuntimeError: out of memory / no more",
    ]


# What a process that measures could do: a line for every case it was given, or for some.
FAKE = """
import json, sys, time
todo, path, how = [int(i) for i in sys.argv[1].split(",")], sys.argv[2], sys.argv[3]
for i in todo:
    if i == 2 and how == "crash":
        sys.exit("illegal memory access")
    if i == 2 and how == "hang":
        time.sleep(60)
    row = {"operation": "linear", "gate": str(i), "pass": "fwd", "T": 1, "K": 1, "V": 1}
    if i == 2 and how == "unusable":
        row["error"] = "x"
    else:
        row |= {"glazoo_ms": 1.0, "bytes": 1, "operations": 1, "reciprocals": 0}
    with open(path, "a") as lines:
        lines.write(json.dumps({"case": i, "rows": [row]}) + chr(10))
    if i == 2 and how == "unusable":
        sys.exit(3)
"""


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("crash", "process ended with status 1: illegal memory access"),
        ("hang", "no result in 1 s"),
        ("unusable", "x"),
    ],
)
def test_a_process_that_dies_costs_one_case(how, message, monkeypatch, tmp_path):
    run = gpu.Run("rehearse", tmp_path, 60.0)
    monkeypatch.setattr(gpu, "STALL", 1.0)
    run.cases = run.cases[:4]

    def start(todo, compile_only=False):
        command = [sys.executable, "-c", FAKE, ",".join(map(str, todo)), str(run.folder / "rows")]
        with run.log.open("ab") as log:
            return subprocess.Popen([*command, how], stdout=log, stderr=log)

    monkeypatch.setattr(run, "start", start)
    run.time()
    rows = run.rows()
    assert len(rows) == 4
    assert [x["error"] for x in gpu.failed(rows)] == [message]
    written = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert len(written["rows"]) == 4


def test_time_runs_out(monkeypatch, tmp_path):
    run = gpu.Run("rehearse", tmp_path, 0.0)
    run.cases = run.cases[:2]
    run.time()
    assert [x["error"] for x in run.rows()] == ["not measured: out of time"] * 2
    assert "not measured: out of time" in next(tmp_path.glob("*.md")).read_text()


def test_a_process_of_its_own_measures(tmp_path):
    run = gpu.Run("rehearse", tmp_path, 100.0)
    run.cases = run.cases[:1]
    run.time()
    (row,) = run.rows()
    assert row["reciprocals per second"] > 0


def test_ratios_and_goals():
    size = {"gate": "head", "B": 1, "T": 2, "heads": 1, "K": 4, "V": 4}
    work = {"bytes": 100, "operations": 10, "reciprocals": 0}
    machine = {"operation": "hardware", "bytes per second": 1e5}
    machine |= {"bfloat16 operations per second": 1e5, "reciprocals per second": 1e4}
    base = size | work | {"pass": "fwd", "glazoo_mib": 2.0}
    rows = gpu.derived(
        [
            machine,
            base | {"operation": "linear", "glazoo_ms": 2.0},
            base | {"operation": "linear", "library": "fla", "fla_ms": 3.0, "fla_mib": 4.0},
            base | {"operation": "synapse", "glazoo_ms": 8.0, "reciprocals": 50},
            base | {"operation": "metaplastic linear", "glazoo_ms": 2.5},
        ]
    )[1:]
    assert rows[0]["limit_ms"] == pytest.approx(1.0)
    assert rows[0]["fla_over_glazoo"] == pytest.approx(1.5)
    assert rows[0]["mib_over_fla"] == pytest.approx(0.5)
    assert rows[1]["over_linear"] == pytest.approx(4.0)
    assert rows[1]["arithmetic"] == pytest.approx(5 / 8)
    assert rows[2]["over_source"] == pytest.approx(1.25)
    text = gpu.goals(rows)
    assert "synapse, fwd: time over linear's, at most 3: 0 of 1 cases (4.00 to 4.00)" in text
    assert "at least 0.5: 1 of 1 cases (0.62 to 0.62)" in text
    assert "metaplastic delta, fwd+bwd: likewise 1.3: not measured" in text


@pytest.mark.parametrize(
    "name", ["linear", "delta", "importance", "synapse", "synapse_delta", "solve", "other"]
)
def test_every_test_is_in_one_process(name):
    def selected(shard: str) -> bool:
        return eval(re.sub(r"(?!and|not)\b[a-z]+", lambda x: str(x[0] in name), shard))

    assert [selected(shard) for shard in gpu.SHARDS].count(True) == 1


def test_fla_is_measured_where_it_is_and_its_failures_are_results(monkeypatch):
    name, gate = "linear", "head"
    case = gpu.Case(name, gate, *gpu.REHEARSAL.cases[0], fla=True)
    ours = (lambda x: gpu.linear(x["q"], x["k"], x["v"], x["g"])[:1]), ["q", "k", "v", "g"]
    monkeypatch.setattr(gpu, "fla_call", lambda *_: ours)
    rows = list(gpu.measure(case, gpu.REHEARSAL))
    assert [row["pass"] for row in rows] == ["fwd", "fwd+bwd"]
    assert all(row["fla_ms"] > 0 and "glazoo_ms" not in row for row in rows)
    monkeypatch.setattr(gpu, "fla_call", lambda *_: (lambda x: 1 / 0, ["q"]))
    rows = list(gpu.measure(case, gpu.REHEARSAL))
    assert all("ZeroDivisionError" in row["fla_error"] for row in rows)
    assert not gpu.failed([*rows, gpu.row_of(case, "hangs")])


def test_without_a_gpu_nothing_runs(capsys):
    assert gpu.main(["--results", "nowhere"]) == (0 if gpu.torch.cuda.is_available() else 2)
    assert "no GPU" in capsys.readouterr().out


@pytest.fixture
def tune(monkeypatch):
    monkeypatch.syspath_prepend(str(PATH.parent))
    import tune

    monkeypatch.setattr(tune.gpu, "OPERATIONS", {"linear": tune.gpu.OPERATIONS["linear"]})
    return tune


def test_other_tiles_give_the_same(tune):
    from glazoo.kernels import chunk

    launch = chunk.launch
    found = list(tune.tries(["chunk_far"], (16, 16), "cpu"))
    assert {(x.name, x.gate) for x in found if x.tiles is not None} >= {("linear", "key")}
    assert all(tune.checked(x, (16, 16), "cpu")["difference"] < 1e-6 for x in found[:3])
    assert chunk.launch is launch


def test_tiles_that_give_something_else_are_seen(tune, monkeypatch):
    of = next(x for x in tune.tries(["chunk_far"], (16, 16), "cpu") if x.tiles is not None)
    real = tune.Watch.launch

    def wrong(self, kernel, rows, tiles, *shared, **own):
        real(self, kernel, rows, tiles, *shared, **own)
        if kernel.__name__ == f"{self.kernel}_kernel":
            own["score"].mul_(2)

    monkeypatch.setattr(tune.Watch, "launch", wrong)
    assert tune.checked(of, (16, 16), "cpu")["difference"] > tune.ALIKE
