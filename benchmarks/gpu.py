"""Time the kernels on this machine's GPU, against fla where importable and against the hardware.

    python benchmarks/gpu.py            everything; writes results/kernels_<gpu>_<date>.md, .json
    python benchmarks/gpu.py --quick    one length and one number of heads

Needs torch, triton and glazoo.kernels, nothing else. Nothing is timed before it is right: every
operation is first compared with a float64 loop. Times are medians with the 20th and 80th percentile
of single calls, measured with device events after a warm-up; the operands of a call exceed the
cache at these sizes. `limit` is the larger of two times: bytes that must move over the bandwidth of
a large copy, and the operations of the chunked form over the rate of a large bfloat16 product, both
measured here.
"""

import argparse
import datetime
import importlib
import json
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from glazoo.kernels import delta, delta_step, importance, importance_step, linear, linear_step

TOKENS = 32768
LENGTHS = (2048, 8192, 32768)
HEADS = (16, 32)
SHAPES = ((64, 64), (128, 128), (128, 256), (96, 192))
DECODE_BATCH = 128
RESULTS = pathlib.Path(__file__).with_name("results")
Row = dict[str, Any]


def quantiles(run: Callable[[], object], seconds: float = 0.3) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile in milliseconds of single calls."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    repeats = min(100, max(10, int(seconds / max(time.perf_counter() - begin, 1e-5))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) for start, end in events)
    return statistics.median(times), times[len(times) // 5], times[len(times) * 4 // 5]


def replayed(run: Callable[[], object]) -> Callable[[], object]:
    """The call as a replay of a captured graph, so that launching costs nothing."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes that a call needs at its peak above what is allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def hardware_limits() -> tuple[float, float]:
    """Bytes per second of a large copy (read plus written) and bfloat16 operations per second."""
    x = torch.randn(1 << 28, device="cuda")
    y = torch.empty_like(x)
    copy, _, _ = quantiles(lambda: y.copy_(x))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product, _, _ = quantiles(lambda: a @ b)
    return 2 * x.nbytes / copy * 1e3, 2 * 8192**3 / product * 1e3


def make_operands(B: int, T: int, H: int, K: int, V: int, gate: str, dtype: torch.dtype) -> Row:
    """Operands of every operation, of the sizes a trained layer has."""
    options = {"device": "cuda", "dtype": torch.float32}

    def unit(size: int) -> Tensor:
        x = torch.randn(B, T, H, size, **options)
        return x / x.norm(dim=-1, keepdim=True)

    shape = {"none": None, "head": (B, T, H), "key": (B, T, H, K)}[gate]
    beta = torch.rand(B, T, H, **options)
    k = unit(K)
    return {
        "q": (unit(K) * K**-0.5).to(dtype),
        "k": k.to(dtype),
        "e": (k * beta[..., None]).to(dtype),
        "v": torch.randn(B, T, H, V, **options).to(dtype),
        "g": None if shape is None else -0.2 * torch.rand(shape, **options),
        "beta": beta.to(dtype),
        "b": beta,
    }


def loop(x: Row, name: str, low: torch.dtype | None = None) -> Tensor:
    """The recurrence token by token; with `low` every state and output is rounded to it."""
    round_ = (lambda y: y) if low is None else (lambda y: y.to(low).to(y.dtype))
    B, T, H, K = x["q"].shape
    s = x["v"].new_zeros(B, H, K, x["v"].shape[3])
    outputs = []
    for t in range(T):
        if x["g"] is not None:
            a = x["g"][:, t].exp()
            s = s * a.reshape(*a.shape, *(1,) * (4 - a.ndim))
        u = x["v"][:, t]
        if name == "delta":
            u = u - torch.einsum("bhkv,bhk->bhv", s, x["e"][:, t])
        s = round_(s + x["k"][:, t][..., None] * u[:, :, None, :])
        outputs.append(round_(torch.einsum("bhkv,bhk->bhv", s, x["q"][:, t])))
    return torch.stack(outputs, 1)


def gradients(
    run: Callable[[Row], Tensor], x: Row, names: list[str], weight: Tensor
) -> list[Tensor]:
    """Output and the gradients of its weighted sum."""
    leaves = x | {name: x[name].detach().clone().requires_grad_() for name in names}
    o = run(leaves)
    return [
        o.detach(),
        *torch.autograd.grad((o * weight.to(o.dtype)).sum(), [leaves[n] for n in names]),
    ]


def check(name: str, gate: str) -> list[str]:
    """What is wrong with an operation: errors over twice those of a loop that rounds its states.

    Both errors are root mean squares against float64; an ulp of the result is allowed on top.
    """
    x = make_operands(2, 130, 2, 64, 96, gate, torch.bfloat16)
    names = ["q", "k", "v", *(["e"] if name == "delta" else []), *(["g"] if gate != "none" else [])]
    exact = {key: None if y is None else y.double() for key, y in x.items()}
    weight = torch.randn(x["v"].shape, device="cuda").bfloat16().double()
    truth = gradients(lambda y: loop(y, name), exact, names, weight)
    rough = gradients(lambda y: loop(y, name, torch.bfloat16), exact, names, weight)
    found = gradients(lambda y: OPERATIONS[name](y)[0], x, names, weight)
    wrong = []
    for key, want, low, got in zip(["output", *names], truth, rough, found, strict=True):
        size = want.norm()
        error, allowed = (got.double() - want).norm() / size, 2 * (low - want).norm() / size + 2**-8
        if not error <= allowed:
            wrong.append(f"{name} {gate} {key}: relative error {error:.2e}, allowed {allowed:.2e}")
    return wrong


OPERATIONS: dict[str, Callable[[Row], tuple[Tensor, Tensor]]] = {
    "linear": lambda x: linear(x["q"], x["k"], x["v"], x["g"]),
    "delta": lambda x: delta(x["q"], x["e"], x["k"], x["v"], x["g"]),
    "metaplastic linear": lambda x: _metaplastic(x),
    "importance": lambda x: importance(x["k"], x["b"], x["g"]),
}


def _metaplastic(x: Row) -> tuple[Tensor, Tensor]:
    """`linear` that reads with the query over the importance."""
    total, _ = importance(x["k"], x["b"], x["g"])
    return linear((x["q"] / (total + 1.0)).to(x["v"].dtype), x["k"], x["v"], x["g"])


# Operation and gate -> module, function and arguments of fla.
FLA = {
    ("linear", "none"): ("linear_attn", "chunk_linear_attn", "qkv", {"normalize": False}),
    ("linear", "head"): ("simple_gla", "chunk_simple_gla", "qkvg", {}),
    ("linear", "key"): ("gla", "chunk_gla", "qkvg", {}),
    ("delta", "none"): ("delta_rule", "chunk_delta_rule", "qkvb", {}),
    ("delta", "head"): ("gated_delta_rule", "chunk_gated_delta_rule", "qkvgb", {}),
    ("delta", "key"): ("kda", "chunk_kda", "qkvgb", {}),
}


def fla_version() -> str | None:
    """Version of fla, if it can be imported."""
    try:
        return str(importlib.import_module("fla").__version__)
    except ImportError:
        return None


def fla_call(name: str, gate: str) -> Callable[[Row], Tensor] | None:
    """fla's chunked function for the same recurrence, if there is one."""
    if (name, gate) not in FLA or fla_version() is None:
        return None
    module, function, letters, options = FLA[name, gate]
    try:
        call = getattr(importlib.import_module(f"fla.ops.{module}"), function)
    except (ImportError, AttributeError):
        return None
    keys = {"q": "q", "k": "k", "v": "v", "g": "g", "b": "beta"}
    return lambda x: call(**{keys[c]: x[keys[c]] for c in letters}, scale=1.0, **options)[0]


def limit(x: Row, name: str, gate: str, backward: bool, bandwidth: float, rate: float) -> float:
    """Milliseconds that the hardware needs at least."""
    B, T, H, K = x["q"].shape
    V = x["v"].shape[3]
    used = {"linear": "qkvg", "delta": "qekvg", "metaplastic linear": "qkvgb", "importance": "kgb"}[
        name
    ]
    moved = sum(x[c].nbytes for c in used if x[c] is not None)
    output = B * T * H * K * 4 if name == "importance" else x["v"].nbytes
    # Backward reads inputs and the output's gradient, and writes gradients of the inputs' size.
    moved = 3 * moved + 2 * output if backward else moved + output
    # Per token and head: scores and their use over half a chunk of 64, state written and read.
    read = 64 * (K + V) + 4 * K * V
    operations = {"importance": 0}.get(
        name, B * T * H * (read + (64 * (K + V) + 2 * K * V) * (name == "delta"))
    )
    return 1e3 * max(moved / bandwidth, operations * (3 if backward else 1) / rate)


def time_case(name: str, gate: str, x: Row, bandwidth: float, rate: float) -> list[Row]:
    """Forward, and forward with backward, of one operation and of fla's."""
    names = [c for c in ("q", "k", "v", "g", "b") if x[c] is not None]
    if name == "importance":
        names = [c for c in names if c in "kgb"]
    elif name != "metaplastic linear":
        names = [c for c in names if c != "b"] + (["e"] if name == "delta" else [])
    calls: dict[str, Callable[[Row], Tensor]] = {"glazoo": lambda y: OPERATIONS[name](y)[0]}
    if (other := fla_call(name, gate)) is not None:
        calls["fla"] = other
    rows = []
    for backward in (False, True):
        row: Row = {"operation": name, "gate": gate, "pass": "fwd+bwd" if backward else "fwd"}
        row["limit_ms"] = limit(x, name, gate, backward, bandwidth, rate)
        for library, call in calls.items():
            theirs = library == "fla"
            wanted = ["beta" if theirs and c == "e" else c for c in names]
            leaves = x | {c: x[c].detach().requires_grad_(backward) for c in wanted}
            weight = None

            def run(call=call, leaves=leaves, wanted=wanted, backward=backward):
                nonlocal weight
                o = call(leaves)
                if backward:
                    weight = torch.randn_like(o) if weight is None else weight
                    torch.autograd.grad(o, [leaves[c] for c in wanted], weight)

            try:
                with torch.set_grad_enabled(backward):
                    run()
                    row[f"{library}_ms"], row[f"{library}_p20"], row[f"{library}_p80"] = quantiles(
                        run
                    )
                    row[f"{library}_mib"] = peak_memory(run) / 2**20
            except Exception as error:  # another library's failure is a result, not the end
                if not theirs:
                    raise
                row["fla_error"] = f"{type(error).__name__}: {error}"[:200]
        if "fla_ms" in row:
            row["fla_over_glazoo"] = row["fla_ms"] / row["glazoo_ms"]
        row["glazoo_over_limit"] = row["glazoo_ms"] / row["limit_ms"]
        rows.append(row)
    return rows


def time_decode(gate: str, H: int, K: int, V: int, bandwidth: float) -> list[Row]:
    """One token of every operation, state updated in place, as a replayed graph."""
    x = make_operands(DECODE_BATCH, 1, H, K, V, gate, torch.bfloat16)
    state = torch.zeros(DECODE_BATCH, H, K, V, device="cuda")
    total = torch.zeros(DECODE_BATCH, H, K, device="cuda")
    calls = {
        "linear": (state, lambda: linear_step(x["q"], x["k"], x["v"], x["g"], state=state)),
        "delta": (state, lambda: delta_step(x["q"], x["e"], x["k"], x["v"], x["g"], state=state)),
        "importance": (total, lambda: importance_step(x["k"], x["b"], x["g"], state=total)),
    }
    rows = []
    for name, (memory, call) in calls.items():
        with torch.no_grad():
            median, low, high = quantiles(replayed(call))
        least = 2e3 * memory.nbytes / bandwidth
        rows.append(
            {
                "operation": name,
                "gate": gate,
                "pass": "decode",
                "T": 1,
                "B": DECODE_BATCH,
                "heads": H,
                "K": K,
                "V": V,
                "glazoo_ms": median,
                "glazoo_p20": low,
                "glazoo_p80": high,
                "limit_ms": least,
                "glazoo_over_limit": median / least,
            }
        )
    return rows


def environment() -> Row:
    """What ran."""

    def output(*command: str) -> str:
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    root = pathlib.Path(__file__).parent.parent
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(),
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "triton": triton.__version__,
        "fla": fla_version() or "not importable",
        "commit": output("git", "-C", str(root), "rev-parse", "--short", "HEAD"),
    }


COLUMNS = (
    "operation",
    "gate",
    "pass",
    "B",
    "T",
    "heads",
    "K",
    "V",
    "glazoo_ms",
    "glazoo_p20",
    "glazoo_p80",
    "fla_ms",
    "fla_over_glazoo",
    "glazoo_over_limit",
    "glazoo_mib",
    "fla_mib",
    "over_source",
)


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table."""

    def cell(x: Any) -> str:
        return f"{x:.3g}" if isinstance(x, float) else "" if x is None else str(x)

    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell(row.get(c)) for c in COLUMNS) + " |" for row in rows]
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    """Ratios over all cases of an operation, a gate and a pass."""
    lines = []
    groups = sorted({(r["operation"], r["gate"], r["pass"]) for r in rows})
    for group in groups:
        of = [r for r in rows if (r["operation"], r["gate"], r["pass"]) == group]
        line = f"{' '.join(group)}:"
        for column, text in (
            ("fla_over_glazoo", "fla / glazoo"),
            ("glazoo_over_limit", "glazoo / limit"),
            ("over_source", "metaplastic / source"),
        ):
            found = [r[column] for r in of if column in r]
            if found:
                line += f"  {text} median {statistics.median(found):.2f}"
                line += f" ({min(found):.2f} to {max(found):.2f})"
        lines.append(line)
    return "\n".join(lines)


def write(header: Row, rows: list[Row]) -> pathlib.Path:
    """Write what there is so far; a run that is cut short leaves its results."""
    RESULTS.mkdir(exist_ok=True)
    gpu = "".join(c if c.isalnum() else "-" for c in header["gpu"].lower())
    path = RESULTS / f"kernels_{gpu}_{header['date'][:10]}.md"
    head = "\n".join(f"- {key}: {value}" for key, value in header.items())
    path.write_text(f"# Kernel timings\n\n{head}\n\n{summary(rows)}\n\n{table(rows)}\n")
    path.with_suffix(".json").write_text(
        json.dumps({"environment": header, "rows": rows}, indent=1) + "\n"
    )
    return path


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="T = 2048, 16 heads, K/V 128/128 only")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False")
        return 2
    torch.manual_seed(0)
    wrong = [
        y
        for name in ("linear", "delta")
        for gate in ("none", "head", "key")
        for y in check(name, gate)
    ]
    if wrong:
        print("wrong results, nothing is timed:", *wrong, sep="\n  ")
        return 1
    bandwidth, rate = hardware_limits()
    header = environment() | {
        "copy": f"{bandwidth / 1e12:.2f} TB/s",
        "bfloat16 product": f"{rate / 1e12:.0f} TFLOP/s",
    }
    print(*(f"{key}: {value}" for key, value in header.items()), sep="\n", flush=True)
    lengths, heads, shapes = (
        ((2048,), (16,), ((128, 128),)) if options.quick else (LENGTHS, HEADS, SHAPES)
    )
    cases = [("linear", g) for g in ("none", "head", "key")] + [
        ("delta", g) for g in ("none", "head", "key")
    ]
    cases += [("importance", "head"), ("metaplastic linear", "head")]
    rows: list[Row] = []
    for K, V in shapes:
        for H in heads:
            for T in lengths:
                source: dict[str, float] = {}
                for name, gate in cases:
                    x = make_operands(TOKENS // T, T, H, K, V, gate, torch.bfloat16)
                    for row in time_case(name, gate, x, bandwidth, rate):
                        if (name, gate) == ("linear", "head"):
                            source[row["pass"]] = row["glazoo_ms"]
                        if name == "metaplastic linear":
                            row["over_source"] = row["glazoo_ms"] / source[row["pass"]]
                        rows.append({"B": TOKENS // T, "T": T, "heads": H, "K": K, "V": V} | row)
                    del x
                write(header, rows)
                print(f"K/V {K}/{V}, {H} heads, T {T}: done", flush=True)
            for gate in ("head", "key"):
                rows += time_decode(gate, H, K, V, bandwidth)
    path = write(header, rows)
    print(table(rows), summary(rows), f"written: {path}", sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
