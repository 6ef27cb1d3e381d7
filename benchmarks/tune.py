"""Try other tiles, warps and stages of every kernel on this machine's GPU, beside those it has.

    python benchmarks/tune.py                     every kernel, K = V = 128
    python benchmarks/tune.py --kernels near,far --shape 64/64 --output FILE

For each operation of gpu.py that launches a kernel, the operation runs with the kernel's tiles
replaced and everything else as it is; timed are this kernel's launches alone, with device events.
Nothing is timed before it is right: results and gradients of a short call are first compared with
those that the kernel's own tiles give, by several processes at once, which compile. One process
times. A process whose GPU becomes unusable is replaced; the tiles that did it are a row with the
error.

Needs what gpu.py needs. Rows are a line of JSON each. Exit status: 0, or 2 without a GPU.
"""

import argparse
import dataclasses
import functools
import importlib
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import gpu
import torch

from glazoo.kernels import common
from glazoo.kernels.common import Tiles

MODULES = [
    importlib.import_module(f"glazoo.kernels.{name}")
    for name in ("chunk", "linear", "delta", "importance", "whiten", "synapse", "synapse_delta")
]
# What of a kernel may change: tiles of keys and of values (0: as they are), warps, stages.
WARPS = (1, 2, 4, 8)
SPACE: dict[str, tuple[tuple[int, ...], ...]] = {
    "chunk_near": ((16, 32), (0,), (1, 2), (1,)),
    "chunk_far": ((16, 32, 64), (0,), (4, 8), (1,)),
    "chunk_dfar": ((16, 32, 64), (32, 64), (4, 8), (1,)),
    "chunk_dnear": ((16, 32), (0,), (1, 2, 4), (1,)),
    "chunk_solve": ((0,), (0,), (1, 2, 4, 8), (1, 2)),
    "chunk_output": ((32, 64, 128), (64, 128), (4, 8), (2, 3)),
    "chunk_dvalue": ((32, 64), (64, 128), (4, 8), (2, 3)),
    "chunk_dkey": ((0,), (32, 64), (4, 8), (1, 2)),
    "chunk_dscore": ((0,), (32, 64, 128), (2, 4, 8), (1, 2)),
    "linear_state": ((32, 64, 128), (32, 64, 128), (4,), (2, 3, 4)),
    "linear_dstate": ((32, 64, 128), (32, 64, 128), (4,), (2, 3, 4)),
    "delta_state": ((0,), (16, 32, 64), (4, 8), (1, 2, 3)),
    "delta_dstate": ((0,), (16, 32, 64), (4, 8), (1, 2, 3)),
    "delta_write": ((0,), (0,), WARPS, (1,)),
    "importance": ((16, 32, 64, 128), (0,), WARPS, (1,)),
    "importance_backward": ((16, 32, 64, 128), (0,), WARPS, (1,)),
    "whiten": ((16, 32, 64, 128), (0,), WARPS, (1,)),
    "whiten_backward": ((16, 32, 64, 128), (0,), WARPS, (1,)),
    "synapse_state": ((0,), (16, 32, 64), (1, 2, 4), (1, 2)),
    "synapse_output": ((0,), (8, 16, 32, 64), WARPS, (1,)),
    "synapse_local": ((16, 32), (16, 32, 64), WARPS, (1,)),
    "synapse_gradient": ((0,), (16, 32, 64), (1, 2, 4), (1,)),
}
SEVERAL = ("chunk_near", "chunk_far", "chunk_dfar", "chunk_dnear", "chunk_dkey", "chunk_solve")
LEFT_OUT = ("solve", "riccati", "synapse uncertainty", "metaplastic delta")
TOKENS = 300
# What other orders of summation make of results in bfloat16, in the norm.
ALIKE = 2**-6


@dataclasses.dataclass(frozen=True)
class Try:
    """An operation with the tiles of one of its kernels replaced, or none."""

    name: str
    gate: str
    kernel: str
    tiles: tuple[int, int, int, int] | None = None


class Watch:
    """Stands for `launch` of every module: replaces tiles, and times launches of one kernel."""

    def __init__(self) -> None:
        self.kernel = ""
        self.tiles: tuple[int, int, int, int] | None = None
        self.used: dict[str, Tiles] = {}
        self.events: list[tuple[Any, Any]] = []

    def __enter__(self) -> "Watch":
        self.real = common.launch
        for module in MODULES:
            module.launch = self.launch
        return self

    def __exit__(self, *_: object) -> None:
        for module in MODULES:
            module.launch = self.real

    def launch(self, kernel: Any, rows: Any, tiles: Tiles, *shared: Any, **own: Any) -> None:
        name = kernel.__name__.removesuffix("_kernel")
        self.used[name] = tiles
        if name != self.kernel:
            self.real(kernel, rows, tiles, *shared, **own)
            return
        if self.tiles is not None:
            BK, BV, warps, stages = self.tiles
            tiles = Tiles(BK or tiles.BK, BV or tiles.BV, warps, stages)
        if torch.cuda.is_available():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self.real(kernel, rows, tiles, *shared, **own)
            end.record()
            self.events.append((begin, end))
        else:
            self.real(kernel, rows, tiles, *shared, **own)


@functools.lru_cache(1)
def call(name: str, gate: str, B: int, T: int, H: int, K: int, V: int, device: str) -> Any:
    """Forward and backward pass of an operation; results and gradients when called."""
    operation = gpu.OPERATIONS[name]
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = gpu.make_operands(B, T, H, K, V, gate, dtype, device)
    names = gpu.differentiated(operation, x)
    with torch.no_grad():
        weights = [torch.randn_like(o) for o in operation.run(x)]
    return functools.partial(gpu.gradients, operation.run, x, names, weights)


def kernels_of(name: str, gate: str, shape: tuple[int, int], device: str) -> dict[str, Tiles]:
    """Kernels that an operation launches, and the tiles they have."""
    with Watch() as watch:
        call(name, gate, 1, 70, 2, *shape, device)()
    return watch.used


def tries(patterns: list[str], shape: tuple[int, int], device: str) -> Iterator[Try]:
    """Every choice of tiles for every kernel that some operation launches, its own first. Kernels
    that differ with the operation are tried with each."""
    seen = set()
    operations = [x for x in gpu.OPERATIONS.items() if x[0] not in LEFT_OUT]
    for (name, operation), gate in itertools.product(operations, ("head", "key")):
        if gate not in operation.gates:
            continue
        for kernel, own in kernels_of(name, gate, shape, device).items():
            which = (kernel, name, gate) if kernel in SEVERAL else kernel
            wanted = not patterns or any(x in kernel for x in patterns)
            if kernel not in SPACE or not wanted or which in seen:
                continue
            seen.add(which)
            yield Try(name, gate, kernel)
            for BK, BV, warps, stages in itertools.product(*SPACE[kernel]):
                tiles = Tiles(BK or own.BK, BV or own.BV, warps, stages)
                fits = max(16, shape[0]) >= tiles.BK and max(16, shape[1]) >= tiles.BV
                if fits and tiles != own:
                    yield Try(name, gate, kernel, dataclasses.astuple(tiles))


def difference(found: list[Any], want: list[Any]) -> float:
    """The largest relative distance, in the norm, of results from those of the own tiles."""
    pairs = zip(found, want, strict=True)
    return max(
        float((x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-30))
        for x, y in pairs
    )


def worker(what: str, todo: list[int], shape: tuple[int, int], every: list[Try], out: Any) -> int:
    """Check or time some tries; status 3 once the GPU is unusable to this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for i in todo:
        print(json.dumps({"try": i}), file=out, flush=True)
        row: gpu.Row = {"try": i}
        try:
            row |= (checked if what == "check" else timed)(every[i], shape, device)
        except Exception as error:
            row["error"] = gpu.message(error)
        print(json.dumps(row), file=out, flush=True)
        try:
            gpu.synchronize(device)
        except Exception as error:
            print(f"the GPU is unusable to this process: {gpu.message(error)}", file=sys.stderr)
            return 3
    return 0


def checked(of: Try, shape: tuple[int, int], device: str) -> gpu.Row:
    """How far results are from those of the kernel's own tiles."""
    with Watch() as watch:
        run = call(of.name, of.gate, 2, TOKENS if device == "cuda" else 20, 2, *shape, device)
        want = run()
        watch.kernel, watch.tiles = of.kernel, of.tiles
        return {"difference": difference(run(), want)}


def timed(of: Try, shape: tuple[int, int], device: str, seconds: float = 0.1) -> gpu.Row:
    """Median, 20th and 80th percentile of the milliseconds of the kernel's launches in a call."""
    times = []
    with Watch() as watch:
        run = call(of.name, of.gate, 4, 8192, 16, *shape, device)
        watch.kernel, watch.tiles = of.kernel, of.tiles
        for _ in range(2):
            run()
        begin = time.perf_counter()
        while len(times) < 5 or (time.perf_counter() - begin < seconds and len(times) < 50):
            watch.events.clear()
            run()
            torch.cuda.synchronize()
            times.append(sum(a.elapsed_time(b) for a, b in watch.events))
    times.sort()
    at = (len(times) // 5, len(times) * 4 // 5)
    found = [statistics.median(times), *(times[i] for i in at)]
    return {"ms": found, "launches": len(watch.events)}


def found_by(what: str, todo: list[int], jobs: int, argv: list[str]) -> dict[int, gpu.Row]:
    """What checking or timing found of some tries, in as many processes."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="glazoo-tune-"))
    found: dict[int, gpu.Row] = {}
    queues = [todo[n::jobs] for n in range(jobs)]
    running: dict[int, tuple[subprocess.Popen[bytes], pathlib.Path]] = {}

    def start(n: int) -> None:
        file = folder / f"{n}_{time.monotonic_ns()}"
        command = [sys.executable, str(pathlib.Path(__file__).resolve()), *argv]
        command += ["--worker", what, "--tries", ",".join(map(str, queues[n])), "--output"]
        with (folder / "log").open("ab") as log:
            running[n] = subprocess.Popen([*command, str(file)], stdout=log, stderr=log), file

    def ended(n: int) -> None:
        file = running.pop(n)[1]
        lines = file.read_text().splitlines() if file.exists() else []
        rows = [json.loads(x) for x in lines]
        found.update({x["try"]: x for x in rows if len(x) > 1})
        if rows and rows[-1]["try"] not in found:
            found[rows[-1]["try"]] = {"error": "took its process with it"}
        rest = [i for i in queues[n] if i not in found]
        # One that says nothing at all is not started again.
        if rest and len(rest) < len(queues[n]):
            queues[n] = rest
            start(n)

    for n in range(jobs):
        if queues[n]:
            start(n)
    while running:
        time.sleep(0.2)
        for n in [n for n, (process, _) in running.items() if process.poll() is not None]:
            ended(n)
    return {i: found.get(i, {"error": f"no {what}: see {folder / 'log'}"}) for i in todo}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", default="", help="parts of names, with commas; all without")
    parser.add_argument("--shape", default="128/128", help="K/V")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--output", type=pathlib.Path, help="where rows go, a line each")
    parser.add_argument("--worker", choices=("check", "time"), help=argparse.SUPPRESS)
    parser.add_argument("--tries", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    K, V = map(int, options.shape.split("/"))
    if options.worker is None and device != "cuda":
        print("no GPU: torch.cuda.is_available() is False")
        return 2
    every = list(tries([x for x in options.kernels.split(",") if x], (K, V), device))
    if options.worker is not None:
        todo = [int(i) for i in options.tries.split(",")]
        with options.output.open("a") as out:
            return worker(options.worker, todo, (K, V), every, out)
    argv = ["--kernels", options.kernels, "--shape", options.shape]
    found = found_by("check", list(range(len(every))), options.jobs, argv)
    right = [i for i, x in found.items() if x.get("difference", 1.0) <= ALIKE]
    print(f"{len(right)} of {len(every)} choices are right", flush=True)
    for i, x in found_by("time", right, 1, argv).items():
        found[i] = found[i] | x
    own: dict[tuple[str, str, str], float] = {}
    for i, of in enumerate(every):
        row = dataclasses.asdict(of) | {k: v for k, v in found[i].items() if k != "try"}
        text = f"{of.name} {of.gate} {of.kernel} {of.tiles or 'own'}: "
        if "ms" in row:
            took = row["ms"][0]
            first = own.setdefault((of.name, of.gate, of.kernel), took)
            text += f"{took:.4f} ms, {took / first:.2f} of its own"
        else:
            text += row.get("error", f"differs by {row.get('difference', 1.0):.1e}")
        print(text)
        if options.output is not None:
            with options.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
