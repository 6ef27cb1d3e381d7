"""Engines that do runs: processes of this machine, and submitit's jobs on it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import psutil
import pytest
from compare.doing import pid_of, run_of, work

from glazoo.compare import workers
from glazoo.compare.errors import CompareError
from glazoo.compare.workers import (
    Cluster,
    Failed,
    Finished,
    Moved,
    Pool,
    Processes,
    pool_for,
    run_all,
)


@pytest.fixture
def preloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes share the seconds that the imports take."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["glazoo.compare.workers"])
    monkeypatch.setattr(workers, "_CONTEXT", context)


def jobs_of_submitit(folder: Path, monkeypatch: pytest.MonkeyPatch, jobs: int = 1) -> Cluster:
    pytest.importorskip("submitit")
    # submitit cancels by SIGINT, which a shell has its background jobs, and all below them, ignore.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # What runs do is imported from the folder of the tests.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    return Cluster("local", folder / "jobs", jobs=jobs, options=["timeout_min=5"])


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    """Waits until something holds, so long at most; gives whether it does."""
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()


def check_killed_and_failing(pool: Pool, folder: Path) -> list[str]:
    """Gives the reasons of what was killed."""
    runs = [
        run_of("fine"),
        run_of(f"die {folder / 'once'}", 1),
        run_of("always", 2),
        run_of("fail", 3),
        run_of("last", 4),
    ]
    added = run_of("added", 5)

    def more(result: dict[str, object]) -> list[object]:
        return [added] if result["label"] == "fine" else []

    events = list(run_all(runs, pool=pool, more=more, work=work))  # type: ignore[arg-type]
    finished = [e.run.label for e in events if isinstance(e, Finished)]
    assert sorted(x.split()[0] for x in finished) == ["added", "die", "fine", "last"]
    failed = sorted((e.run.label.split()[0], e.again) for e in events if isinstance(e, Failed))
    assert failed == [("always", False), ("always", True), ("die", True), ("fail", False)]
    reasons = {e.run.label.split()[0]: e.reason for e in events if isinstance(e, Failed)}
    assert reasons["fail"] == "ValueError: as asked"
    assert any(isinstance(e, Moved) and (e.share, e.loss) == (0.5, 1.0) for e in events)
    return [reasons["always"], reasons["die"]]


@pytest.mark.usefixtures("preloaded")
@pytest.mark.parametrize("jobs", [1, 3])
def test_killed_and_failing_processes_cost_only_their_own_runs(tmp_path: Path, jobs: int) -> None:
    pool = Processes(jobs)
    for reason in check_killed_and_failing(pool, tmp_path):
        assert reason == "its process was killed by SIGKILL, perhaps for want of memory"
    assert not pool.folder.exists()


@pytest.mark.usefixtures("preloaded")
def test_a_process_that_is_killed_while_it_waits_costs_nothing() -> None:
    pool = Processes(1)
    first = pool.submit(os.getpid)
    ((executor, _),) = pool._by_job.values()
    os.kill(first.result(), signal.SIGKILL)
    # Until its executor knows of it, it is the next call that fails.
    assert within(20, lambda: bool(executor._broken))  # type: ignore[attr-defined]
    assert pool.submit(os.getpid).result() != first.result()
    pool.close()


@pytest.mark.usefixtures("preloaded")
def test_a_result_that_cannot_be_sent_is_named() -> None:
    events = list(run_all([run_of("unsendable")], pool=Processes(1), work=work))
    assert [type(e) for e in events if not isinstance(e, Moved)] == [Failed, Failed]
    assert "pickle" in events[-1].reason  # type: ignore[union-attr]


@pytest.mark.slow
def test_killed_and_failing_jobs_cost_only_their_own_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = jobs_of_submitit(tmp_path, monkeypatch, 2)
    for reason in check_killed_and_failing(pool, tmp_path):
        assert "what it printed is in" in reason
        assert Path(reason.rpartition(" ")[2]).exists()


def stopped(pool: Pool, folder: Path) -> None:
    """Starts a run of a minute, stops it, and waits until its process is gone."""
    file = folder / "pid"
    events = run_all([run_of(f"slow {file}")], pool=pool, work=work)
    for event in events:
        assert isinstance(event, Moved)
        break
    # It says that it has begun before it says which process it is.
    assert within(60, lambda: bool(pid_of(file)))
    events.close()
    assert within(20, lambda: not pid_of(file))


@pytest.mark.usefixtures("preloaded")
def test_who_stops_listening_stops_the_runs(tmp_path: Path) -> None:
    before = {*active_children()}
    stopped(Processes(1), tmp_path)
    assert {*active_children()} <= before


ALONE = """
import sys
from pathlib import Path
from compare.doing import run_of, work
from glazoo.compare.workers import Processes, run_all

if __name__ == "__main__":
    list(run_all([run_of(f"slow {sys.argv[1]}")], pool=Processes(1), work=work))
"""


@pytest.mark.slow
def test_runs_end_with_who_started_them(tmp_path: Path) -> None:
    script, file = tmp_path / "alone.py", tmp_path / "pid"
    script.write_text(ALONE)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    starter = subprocess.Popen([sys.executable, str(script), str(file)], env=environment)
    assert within(120, lambda: bool(pid_of(file)))
    # As when there is no memory left: nothing of it runs any more.
    starter.kill()
    starter.wait()
    assert within(20, lambda: not pid_of(file))


@pytest.mark.usefixtures("preloaded")
def test_runs_stop_when_their_time_is_over(tmp_path: Path) -> None:
    began = time.monotonic()
    events = run_all(
        [run_of(f"slow {tmp_path / 'pid'}")], pool=Processes(1), work=work, until=began
    )
    assert list(events) == []
    assert time.monotonic() - began < 20


def test_who_stops_listening_cancels_the_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = jobs_of_submitit(tmp_path, monkeypatch)
    stopped(pool, tmp_path)
    assert within(20, lambda: all(job.done() for job in pool._jobs))


@pytest.mark.slow
def test_a_job_without_time_goes_on_in_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = jobs_of_submitit(tmp_path, monkeypatch)
    file, events, sent = tmp_path / "pid", [], False
    for event in run_all([run_of(f"twice {file}")], pool=pool, work=work):
        events.append(event)
        if not sent:
            assert within(60, lambda: bool(pid_of(file)))
            # What SLURM sends when the time is nearly over, or another job needs the place.
            os.kill(pid_of(file), signal.SIGUSR2)
            sent = True
    assert isinstance(events[-1], Finished)
    assert not any(isinstance(e, Failed) for e in events)
    assert len({*file.read_text().split()}) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Cluster("local", p, jobs=1, options=["partition"]), "got 'partition', accepted"),
        (lambda p: Cluster("local", p, jobs=1, options=["colour=1"]), "--cluster local: .*colour"),
        (lambda p: Cluster("nowhere", p, jobs=1), "--cluster nowhere: .*nowhere"),
        (lambda p: Cluster("slurm", p, jobs=1), "--cluster slurm: "),
        (lambda p: pool_for(None, p, options=["a=1"]), "--cluster, which is missing"),
    ],
)
def test_refusals(
    make: Callable[[Path], object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    # Where SLURM is, too.
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CompareError, match=message):
        make(tmp_path)


def test_jobs_on_a_gpu_ask_for_one(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    given = {"device": "cuda", "threads": 3, "options": ["mem_gb=8"]}
    pool = pool_for("local", tmp_path, **given)  # type: ignore[arg-type]
    assert isinstance(pool, Cluster)
    assert pool.jobs == 32
    parameters = pool._executor.parameters
    assert {k: parameters[k] for k in ("gpus_per_node", "cpus_per_task", "mem_gb")} == {
        "gpus_per_node": 1, "cpus_per_task": 3, "mem_gb": 8
    }  # fmt: skip


def test_slurm_gets_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    # SLURM's commands, of which the second keeps the script and refuses it.
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").write_text(
        f'#!/bin/sh\ncp "$1" {tmp_path}/script\necho invalid partition >&2\nexit 1\n'
    )
    for name in ("srun", "sbatch"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    pool = pool_for(
        "slurm", tmp_path, threads=2, device="cuda", options=["slurm_partition=gpu", "mem_gb=8"]
    )
    with pytest.raises(CompareError, match=r"a job was refused: [\s\S]*invalid partition"):
        list(run_all([run_of("fine")], pool=pool, work=work))
    script = (tmp_path / "script").read_text()
    for line in ("partition=gpu", "cpus-per-task=2", "gpus-per-node=1", "mem=8GB", "time=240"):
        assert f"#SBATCH --{line}\n" in script


def of_group(group: int) -> list[psutil.Process]:
    """Gives what runs of a process group."""
    return [
        p
        for p in psutil.process_iter(["status"])
        if p.info["status"] != psutil.STATUS_ZOMBIE and os.getpgid(p.pid) == group
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_measurement_that_is_stopped_leaves_nothing(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    temporary, out = tmp_path / "temporary", tmp_path / "out"
    temporary.mkdir()
    # Workers are still starting when they are counted, and would say what stopped them.
    slow = """import signal, sys, time
if "spawn_main" in str(sys.orig_argv):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    time.sleep(3)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
"""
    (tmp_path / "sitecustomize.py").write_text(slow)
    sizes = ("--pairs", "4096", "--seeds", "64", "--state", "65536", "--out", str(out))
    command = (
        sys.executable,
        "-P",
        "-m",
        "glazoo",
        "capacity",
        "mamba2",
        "gla",
        "deltanet",
        *sizes,
    )
    starter = subprocess.Popen(
        [*command, "--jobs", "2"],
        env=os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Background jobs of a shell ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    # The workers, and multiprocessing's tracker.
    assert within(120, lambda: len(psutil.Process(starter.pid).children()) >= 3)
    # Ctrl-C reaches all processes of the terminal; what kills for want of memory, one.
    (os.killpg if number == signal.SIGINT else os.kill)(starter.pid, number)
    said, _ = starter.communicate(timeout=60)
    assert starter.returncode == code
    assert "Traceback" not in said
    assert within(20, lambda: not [*temporary.iterdir()])
    # multiprocessing's tracker ends once it sees its parent gone.
    assert within(20, lambda: not of_group(starter.pid))


@pytest.mark.slow
def test_a_process_that_ctrl_c_meets_while_it_starts_is_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    submit = ProcessPoolExecutor.submit

    def interrupted(self: Any, *arguments: Any) -> Any:
        job = submit(self, *arguments)
        os.kill(os.getpid(), signal.SIGINT)
        return job

    pool = Processes(1)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(ProcessPoolExecutor, "submit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                pool.submit(time.sleep, 300)
    finally:
        signal.signal(signal.SIGINT, before)
    ((_, process),) = pool._by_job.values()
    pool.close()
    assert process.exitcode == -signal.SIGTERM
