"""Work for worker processes, in a module that they can import."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glazoo.compare.model import ModelConfig
from glazoo.compare.tasks import Task
from glazoo.compare.train import Run, Training
from glazoo.zoo import load

SMALL = ModelConfig(width=16, heads=2, state_bytes=512, mlp=8)


def run_of(label: str, seed: int = 0, **changes: Any) -> Run:
    fields: dict[str, Any] = {
        "label": label,
        "spec": load("gla"),
        "task": Task(name="mqar", vocab=32, length=16, load=4),
        "model": SMALL,
        "training": Training(steps=3, batch=4, eval_examples=8),
        "mlp": 8,
        "rate": 1e-3,
        "seed": seed,
    }
    return Run(**(fields | changes))


def pid_of(file: Path) -> int:
    """The process that wrote its number to a file, while it lives."""
    # A file that is there may still be empty.
    pid = int(file.read_text() or 0) if file.exists() else 0
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return 0
    return pid


def work(run: Run, report: Callable[[float, float], None]) -> dict[str, Any]:
    """Does what the label says: `die PATH` kills its process while PATH does not exist,
    `unsendable` gives what cannot be pickled, `slow PATH` and `twice PATH` write their process
    there, and the second is quick the second time."""
    report(0.5, 1.0)
    what, _, where = run.label.partition(" ")
    if what == "fail":
        raise ValueError("as asked")
    if what == "die" and not Path(where).exists():
        # The second attempt finds the file.
        Path(where).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "unsendable":
        return {"key": lambda: 0}
    if what == "always":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "slow":
        Path(where).write_text(str(os.getpid()))
        time.sleep(1)
        report(0.6, 1.0)
        time.sleep(60)
    if what == "twice":
        with Path(where).open("a") as file:
            file.write(f"{os.getpid()} ")
        if len(Path(where).read_text().split()) == 1:
            time.sleep(60)
    return {"key": run.key, "label": run.label}
