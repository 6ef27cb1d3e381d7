"""Runs in other processes, of this machine or of a cluster: any of them may be killed without harm
to the others."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import mkdtemp
from types import FrameType
from typing import Any

import torch

from glazoo.compare.errors import CompareError
from glazoo.compare.files import make_folder
from glazoo.compare.machine import cores
from glazoo.compare.train import Run, train
from glazoo.errors import extra

__all__ = [
    "Cluster",
    "Event",
    "Failed",
    "Finished",
    "Moved",
    "Pool",
    "Processes",
    "pool_for",
    "run_all",
]

_CONTEXT = get_context("spawn")


@dataclass(frozen=True, slots=True)
class Finished:
    """A run is done."""

    run: Run
    result: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Failed:
    """A run ended without a result."""

    run: Run
    reason: str
    again: bool
    """Whether it is started once more."""


@dataclass(frozen=True, slots=True)
class Moved:
    """A run has got further."""

    run: Run
    share: float
    loss: float


Event = Finished | Failed | Moved


class Processes:
    """Processes of this machine, by the standard library's executor; each does one run after the
    other.

    Args:
        jobs: how many.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.folder = Path(mkdtemp(prefix="glazoo-"))
        # An executor loses all of its processes when one is killed: so each has one.
        self._by_job: dict[Future[Any], tuple[ProcessPoolExecutor, BaseProcess]] = {}

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Start a call in a process that is free, or in a new one."""
        # Ctrl-C would end a Python that is just starting with a fatal error of its own, and what it
        # meets between two lines here nobody would stop.
        with _held():
            executor, process, job = self._started(function, *args)
            self._by_job[job] = executor, process
        return job

    def _started(
        self, function: Callable[..., Any], *args: Any
    ) -> tuple[ProcessPoolExecutor, BaseProcess, Future[Any]]:
        for free in [j for j in self._by_job if j.done() and j.exception() is None]:
            executor, process = self._by_job.pop(free)
            try:
                return executor, process, executor.submit(function, *args)
            except BrokenProcessPool:
                # It was killed while it waited, which costs nothing.
                executor.shutdown()
        executor, known = (
            ProcessPoolExecutor(1, _CONTEXT, _begin, (self.folder,)),
            {*active_children()},
        )
        job = executor.submit(function, *args)
        (process,) = {*active_children()} - known
        return executor, process, job

    def ending(self, job: Future[Any]) -> str:
        """Return what killed a process, its exit code, or why its result could not be sent."""
        executor, process = self._by_job.pop(job)
        executor.shutdown()
        if not isinstance(error := job.exception(), BrokenProcessPool):
            return f"{type(error).__name__}: {error}"
        code = process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
            return f"its process was killed by {name}{hint}"
        return f"its process ended with exit code {code}"

    def close(self) -> None:
        """Stop all processes."""
        for job, (_, process) in self._by_job.items():
            # What waits for its next run ends by itself, and cleans up.
            if not job.done():
                process.terminate()
        for executor, _ in self._by_job.values():
            executor.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)


class Cluster:
    """Jobs of a cluster, by submitit.

    Args:
        name: `slurm`, or `local`: submitit's own processes on this machine, to try it.
        folder: for what jobs get, give and print; all machines must see it.
        jobs: how many at once are running or wait in the queue.
        threads: processor cores of each.
        options: like `slurm_partition=gpu`, for `submitit.AutoExecutor.update_parameters`.

    Raises:
        CompareError: an option or the cluster is none that submitit knows.
        ImportError: submitit is not installed.
    """

    def __init__(
        self, name: str, folder: Path, *, jobs: int, threads: int = 1, options: Iterable[str] = ()
    ) -> None:
        with extra("cluster"):
            import submitit
        self.jobs, self.folder = jobs, make_folder(folder)
        given: dict[str, Any] = {"name": "glazoo", "cpus_per_task": threads, "timeout_min": 240}
        for option in options:
            key, equals, value = option.partition("=")
            if not equals:
                raise CompareError(f"--cluster-option: got {option!r}, accepted is NAME=VALUE")
            given[key] = int(value) if value.isdecimal() else value
        try:
            self._executor = submitit.AutoExecutor(folder=self.folder, cluster=name)
            self._executor.update_parameters(**given)
        # What an unknown option or cluster, and a machine without SLURM's commands, raise.
        except (ValueError, NameError, AssertionError, RuntimeError) as e:
            raise CompareError(f"--cluster {name}: {e}") from e
        self._jobs: list[Any] = []

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        """Start a job.

        Raises:
            CompareError: the cluster refuses it.
        """
        try:
            job = self._executor.submit(_Requeued(function), *args)
        except RuntimeError as e:
            raise CompareError(f"--cluster: a job was refused: {e}") from e
        self._jobs.append(job)
        return job

    def ending(self, job: Any) -> str:
        """Return a job's last state, and where it wrote what it had to say."""
        return f"job {job.job_id} ended as {job.state}; what it printed is in {job.paths.stderr}"

    def close(self) -> None:
        """Cancel the jobs that are not done."""
        for job in self._jobs:
            if not job.done():
                job.cancel(check=False)


Pool = Processes | Cluster
"""Where runs are done. Jobs have `done()` and `result()`, as futures have."""


def pool_for(
    cluster: str | None,
    folder: Path,
    *,
    jobs: int | None = None,
    threads: int = 1,
    device: str = "cpu",
    options: Iterable[str] = (),
) -> Pool:
    """Return where runs are done: on this machine, or on a cluster.

    Args:
        cluster: its name; None: this machine.
        folder: the folder of the results, of which a cluster's jobs get a folder `jobs`.
        jobs: how many at once. Default: one per CPU core, or 32 of a cluster.
        threads: processor cores of each.
        device: where runs compute; if it is no CPU, jobs of a cluster get one GPU each.
        options: of a cluster's jobs.

    Raises:
        CompareError: there are options without a cluster, or one that is not known.
        ImportError: submitit is not installed.
    """
    if cluster is not None:
        given = [*["gpus_per_node=1"] * (device != "cpu"), *options]
        return Cluster(cluster, folder / "jobs", jobs=jobs or 32, threads=threads, options=given)
    if any(True for _ in options):
        raise CompareError("--cluster-option: it is for the jobs of a --cluster, which is missing")
    return Processes(jobs or cores())


class _Requeued:
    """A function that submitit calls again when its job ran out of time or made room for another:
    runs go on where they saved themselves last."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        return self.function(*args)

    def checkpoint(self, *args: Any) -> Any:
        """Return what is to be called in the next job."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *args)


@contextmanager
def _held() -> Iterator[None]:
    """Hold Ctrl-C back until the end of the block, and from processes that start in it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[tuple[int, FrameType | None]] = []
    # Any thread may be given the signal: what is blocked here holds it back from processes alone.
    before = signal.signal(signal.SIGINT, lambda *x: caught.append(x))
    mask = set() if _MASK is None else _MASK(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if _MASK is not None:
            _MASK(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
        if caught and callable(before):
            before(*caught[0])


_MASK = getattr(signal, "pthread_sigmask", None)
"""Windows has none."""


def _begin(folder: Path) -> None:
    # Ctrl-C reaches the whole group; the parent decides what to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if _MASK is not None:
        _MASK(signal.SIG_UNBLOCK, {signal.SIGINT})

    def end() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        # Nobody waits for the rest, and a parent that was killed has not cleaned up.
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def _do(
    work: Callable[..., dict[str, Any]], run: Run, threads: int, file: Path
) -> dict[str, Any] | str:
    """Do a run, and write how far it is to a file; of a failure, return the reason."""
    torch.set_num_threads(threads)
    last = 0.0

    def report(share: float, loss: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 0.5:
            last, new = now, file.with_suffix(".new")
            new.write_text(f"{share} {loss}")
            new.replace(file)

    try:
        return work(run, report)
    except Exception as e:
        return f"{type(e).__name__}: {e}"


def run_all(
    runs: list[Run],
    *,
    pool: Pool,
    threads: int = 1,
    more: Callable[[dict[str, Any]], list[Run]] | None = None,
    work: Callable[..., dict[str, Any]] = train,
    until: float = float("inf"),
) -> Generator[Event, None, None]:
    """Runs everything over processes and gives what happens as it happens.

    A process that is killed costs its run one attempt: the run is started once more in a new
    process, and given up if that one is killed too. The others are not touched.

    Args:
        runs: what to do, in this order.
        pool: where; it is closed at the end.
        threads: threads of each process.
        more: called with every result, gives runs to add to the queue.
        work: what to do with a run.
        until: when to stop what is not done, by `time.monotonic()`.

    Yields:
        Events.
    """
    waiting, attempts = list(runs), Counter[str]()
    going: dict[Any, Run] = {}
    moved: dict[str, str] = {}
    try:
        while (waiting or going) and time.monotonic() < until:
            while waiting and len(going) < pool.jobs:
                run = waiting.pop(0)
                file = pool.folder / f"{run.key}.progress"
                file.unlink(missing_ok=True)
                going[pool.submit(_do, work, run, threads, file)] = run
            time.sleep(0.05)
            for job, run in list(going.items()):
                done, file = job.done(), pool.folder / f"{run.key}.progress"
                text = file.read_text() if file.exists() else ""
                if text and moved.get(run.key) != text:
                    moved[run.key] = text
                    share, loss = text.split()
                    yield Moved(run, float(share), float(loss))
                if not done:
                    continue
                del going[job]
                try:
                    result = job.result()
                # Whatever an engine says of a process that is gone.
                except Exception:
                    attempts[run.key] += 1
                    again = attempts[run.key] < 2
                    waiting[:0] = [run] * again
                    yield Failed(run, pool.ending(job), again)
                    continue
                if isinstance(result, str):
                    yield Failed(run, result, again=False)
                    continue
                yield Finished(run, result)
                if more is not None:
                    waiting.extend(more(result))
    finally:
        pool.close()
