"""Runs in parallel processes, of which any may be killed without harm to the others."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from glazoo.compare.train import Run, train

__all__ = ["Event", "Failed", "Finished", "Moved", "run_all"]

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


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    run: Run | None = None


@dataclass
class _Queue:
    waiting: list[Run]
    attempts: dict[str, int] = field(default_factory=dict)


def _serve(connection: Connection, threads: int, work: Callable[..., dict[str, Any]]) -> None:
    """Trains what comes through the pipe until it is closed."""
    # Ctrl-C reaches the whole group; the parent decides what to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    while True:
        try:
            run = connection.recv()
        except EOFError:
            return
        last = 0.0

        def report(share: float, loss: float) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last > 0.5:
                last = now
                connection.send(("moved", share, loss))

        try:
            try:
                answer: tuple[str, Any] = "finished", work(run, report)
            except ConnectionError:
                raise
            except Exception as e:
                answer = "failed", f"{type(e).__name__}: {e}"
            connection.send(answer)
        except ConnectionError:
            # The parent is gone; nobody waits for the rest.
            return


def run_all(
    runs: list[Run],
    *,
    jobs: int,
    threads: int = 1,
    more: Callable[[dict[str, Any]], list[Run]] | None = None,
    work: Callable[..., dict[str, Any]] = train,
) -> Generator[Event, None, None]:
    """Runs everything over processes and gives what happens as it happens.

    A process that is killed costs its run one attempt: the run is started once more in a new
    process, and given up if that one is killed too. The others are not touched.

    Args:
        runs: what to do, in this order.
        jobs: number of processes.
        threads: threads of each.
        more: called with every result, gives runs to add to the queue.
        work: what to do with a run.

    Yields:
        Events.
    """
    queue = _Queue(list(runs))
    workers: list[_Worker] = []
    try:
        while queue.waiting or any(w.run is not None for w in workers):
            while queue.waiting and len(workers) < jobs:
                workers.append(_start(threads, work))
            for worker in workers:
                if worker.run is None and queue.waiting:
                    worker.run = queue.waiting.pop(0)
                    # A worker that died meanwhile is noticed below.
                    try:
                        worker.connection.send(worker.run)
                    except OSError:
                        continue
            ready = wait(
                [x for w in workers for x in (w.connection, w.process.sentinel)], timeout=1.0
            )
            for worker in list(workers):
                if worker.connection not in ready and worker.process.sentinel not in ready:
                    continue
                yield from _listen(worker, workers, queue, more)
    finally:
        for worker in workers:
            worker.connection.close()
            worker.process.terminate()
        for worker in workers:
            worker.process.join()


def _start(threads: int, work: Callable[..., dict[str, Any]]) -> _Worker:
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_serve, args=(theirs, threads, work), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _listen(
    worker: _Worker,
    workers: list[_Worker],
    queue: _Queue,
    more: Callable[[dict[str, Any]], list[Run]] | None,
) -> Iterator[Event]:
    try:
        while worker.connection.poll():
            message = worker.connection.recv()
            run = worker.run
            if run is None:
                continue
            if message[0] == "moved":
                yield Moved(run, message[1], message[2])
                continue
            worker.run = None
            if message[0] == "failed":
                yield Failed(run, message[1], again=False)
                continue
            yield Finished(run, message[1])
            if more is not None:
                queue.waiting.extend(more(message[1]))
    except (EOFError, OSError):
        pass
    else:
        if worker.process.is_alive():
            return
    worker.process.join()
    worker.connection.close()
    workers.remove(worker)
    run, worker.run = worker.run, None
    if run is None:
        return
    tries = queue.attempts[run.key] = queue.attempts.get(run.key, 0) + 1
    again = tries < 2
    if again:
        queue.waiting.insert(0, run)
    yield Failed(run, _ending(worker.process.exitcode), again)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
        return f"its process was killed by {name}{hint}"
    return f"its process ended with exit code {code}"
