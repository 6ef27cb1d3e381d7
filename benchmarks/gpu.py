"""Time the kernels on this machine's GPU: against each other, the hardware and, if there, fla.

    python benchmarks/gpu.py              everything; writes results/kernels_<gpu>_<date>.md, .json
    python benchmarks/gpu.py --quick      one length and one shape
    python benchmarks/gpu.py --tests      first the tests that need a GPU
    python benchmarks/gpu.py --rehearse   the same code at tiny sizes, in Triton's interpreter

Needs torch, triton and glazoo.kernels (and pytest for the tests), nothing else. Nothing is timed
before it is right: every operation is first compared with a float64 loop. Times are medians with
the 20th and 80th percentile of single calls, measured with device events after a warm-up; the
operands of a call exceed the cache at these sizes.

`limit` is the largest of three times: bytes that must move over the bandwidth of a large copy, the
operations of the chunked form over the rate of a large bfloat16 product, and approximate
reciprocals over the rate of a kernel that does nothing else; all three rates are measured here.
`arithmetic` is the last of the three alone, in parts of the time that a call takes: one reciprocal
per synapse and token, two where a backward pass forms it again.

Kernels are compiled by several processes at once, and timed by one. A case that fails is a row with
its error; one that takes the process with it, or hangs, costs that process and no other case. What
was measured is written as it comes, so that a run which is cut short leaves it. Exit status: 0; 1
if anything failed or was left out, 2 without a GPU.
"""

import argparse
import collections
import dataclasses
import datetime
import functools
import importlib
import itertools
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glazoo.kernels import (
    delta,
    delta_step,
    importance,
    importance_step,
    linear,
    linear_step,
    posterior_step,
    riccati,
    solve,
    synapse,
    synapse_delta,
    synapse_delta_step,
    synapse_step,
    whiten,
    whitened_linear,
)
from glazoo.kernels.common import interpreting, reciprocal, reciprocal_kind

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = pathlib.Path(__file__).with_name("results")
TESTS = ROOT / "tests" / "kernels" / "test_gpu.py"
# Seconds after which a process that reports nothing is taken to hang.
STALL = 120.0
# Processes that compile, and that run tests.
JOBS = min(8, os.cpu_count() or 1)
Row = dict[str, Any]
States = list[Tensor]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured: tokens in a call, tokens, heads and K/V of its cases, decoded sequences."""

    device: str
    dtype: torch.dtype
    tokens: int
    cases: tuple[tuple[int, int, int, int], ...]
    decoded: int
    checked: tuple[int, int, int, int, int]
    copied: int
    multiplied: int


# T, heads, K, V of the cases, what matters most first.
WHOLE = ((8192, 16, 128, 128), (8192, 16, 64, 64), (8192, 16, 128, 256), (8192, 16, 96, 192))
WHOLE += ((2048, 16, 128, 128), (32768, 16, 128, 128))
CHECKED = (2, 300, 2, 64, 96)
GPU = Sizes("cuda", torch.bfloat16, 32768, WHOLE, 128, CHECKED, 1 << 28, 8192)
QUICK = dataclasses.replace(GPU, cases=WHOLE[:1])
REHEARSAL = Sizes("cpu", torch.float32, 3, ((3, 1, 4, 8),), 2, (1, 4, 1, 4, 8), 1 << 10, 16)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def quantiles(
    run: Callable[[], object], device: str, seconds: float = 0.2
) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile in milliseconds of single calls."""
    if device != "cuda":
        begin = time.perf_counter()
        run()
        return (1e3 * (time.perf_counter() - begin),) * 3
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    repeats = min(100, max(5, int(seconds / max(time.perf_counter() - begin, 1e-5))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) for start, end in events)
    return statistics.median(times), times[len(times) // 5], times[len(times) * 4 // 5]


def replayed(run: Callable[[], object], device: str) -> Callable[[], object]:
    """The call as a replay of a captured graph, so that launching costs nothing."""
    if device != "cuda":
        return run
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


def peak_memory(run: Callable[[], object], device: str) -> int:
    """Bytes that a call needs at its peak above what is allocated before it."""
    if device != "cuda":
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@triton.jit
def reciprocals_kernel(x, ROUNDS: tl.constexpr, SIZE: tl.constexpr, RECIP: tl.constexpr):
    """Nothing but reciprocals, several independent ones a thread. Each of a sum: of reciprocals of
    reciprocals ptxas leaves nothing."""
    o_x = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    b_x = tl.load(x + o_x)
    for _ in range(ROUNDS):
        b_x = reciprocal(b_x + 1.0, RECIP)
        b_x = reciprocal(b_x + 1.0, RECIP)
        b_x = reciprocal(b_x + 1.0, RECIP)
        b_x = reciprocal(b_x + 1.0, RECIP)
    tl.store(x + o_x, b_x)


def hardware(sizes: Sizes) -> Row:
    """Bytes of a large copy (read plus written), operations of a large bfloat16 product and
    approximate reciprocals, all per second; and what ran."""
    device, on_gpu = sizes.device, sizes.device == "cuda"
    x = torch.randn(sizes.copied, device=device)
    y = torch.empty_like(x)
    copied, _, _ = quantiles(lambda: y.copy_(x), device)
    n = sizes.multiplied
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    multiplied, _, _ = quantiles(lambda: a @ b, device)
    rounds, size, programs = (256, 1024, 132 * 64) if on_gpu else (1, 16, 1)
    z = torch.rand(programs * size, device=device) + 0.5
    inverted, _, _ = quantiles(
        lambda: reciprocals_kernel[(programs,)](
            z, ROUNDS=rounds, SIZE=size, RECIP=reciprocal_kind(False), num_warps=4
        ),
        device,
    )
    return {
        "bytes per second": 2 * x.nbytes / copied * 1e3,
        "bfloat16 operations per second": 2 * n**3 / multiplied * 1e3,
        "reciprocals per second": 4 * rounds * z.numel() / inverted * 1e3,
    } | environment()


def environment() -> Row:
    """Return what ran."""

    def output(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return "unknown"
        return done.stdout.strip()

    on_gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else "none, interpreter",
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip or "none",
        "triton": triton.__version__,
        "fla": fla_version() or "not importable",
        "commit": output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
    }


def make_operands(
    B: int, T: int, H: int, K: int, V: int, gate: str, dtype: torch.dtype, device: str
) -> Row:
    """Operands of every operation, of the sizes a trained layer has."""
    options: Any = {"device": device, "dtype": torch.float32}

    def unit(size: int) -> Tensor:
        x = torch.randn(B, T, H, size, **options)
        return x / x.norm(dim=-1, keepdim=True)

    shape = {"none": None, "head": (B, T, H), "key": (B, T, H, K)}[gate]
    beta = torch.rand(B, T, H, **options)
    k = unit(K)
    g = None if shape is None else -0.2 * torch.rand(shape, **options)
    keep = torch.ones_like(beta) if g is None else (2 * g).exp()
    keep = keep if gate == "key" else keep.unsqueeze(3)
    return {
        "q": (unit(K) * K**-0.5).to(dtype),
        "k": k.to(dtype),
        "e": (k * beta[..., None]).to(dtype),
        "v": torch.randn(B, T, H, V, **options).to(dtype),
        "g": g,
        "beta": beta.to(dtype),
        # Importance gates of a head and of a value.
        "b": beta,
        "c": torch.rand(B, T, H, V, **options).to(dtype),
        "prior": 0.5 + torch.rand(H, **options),
        # Of a filter whose variance grows: what it keeps, what it loses, and evidence.
        "keep": keep,
        "lost": (1 - keep) / (0.5 + torch.rand(K, **options)),
        "seen": beta[..., None] * k**2,
    }


def _metaplastic(x: Row) -> tuple[Tensor, ...]:
    """`linear` that reads with the query over the importance."""
    given = (x[c] for c in ("q", "k", "v", "b", "g"))
    return whitened_linear(*given, prior=x["prior"])[:1]


def _metaplastic_delta(x: Row) -> tuple[Tensor, ...]:
    """`delta` that writes with the key over the importance, and whose decay is the importance's."""
    q, k, v, beta, g = (x[c] for c in ("q", "k", "v", "beta", "g"))
    kappa, _, f, *_ = whiten(None, k, x["b"], g, prior=x["prior"], forgets=g is not None)
    return delta(q, k, kappa, v, f, beta=beta, erase=beta)[:1]


def _riccati(x: Row, state: Tensor | None = None) -> tuple[Tensor, ...]:
    one = torch.ones_like(x["keep"])
    return riccati(x["keep"], x["lost"], one, x["seen"], initial_state=state)[:1]


def _synapse(x: Row, uncertainty: bool = False) -> tuple[Tensor, ...]:
    o, _, u = synapse(
        x["q"], x["k"], x["v"], x["c"], x["g"], prior=x["prior"], uncertainty=uncertainty
    )
    return (o,) if u is None else (o, u)


def _synapse_delta(x: Row) -> tuple[Tensor, ...]:
    return synapse_delta(x["q"], x["k"], x["v"], x["beta"], x["c"], x["g"], prior=x["prior"])[:1]


def _solve(x: Row, state: Tensor | None = None) -> tuple[Tensor, ...]:
    given = (x[c] for c in ("q", "k", "beta", "g"))
    return solve(*given, prior=x["prior"], initial_state=state)[:1]


# One token of every recurrence in plain torch: x holds [B, H, ..] of the token.
def _decay(x: Row, state: Tensor) -> Tensor:
    if x["g"] is None:
        return state.new_ones(())
    a = x["g"].exp()
    return a.reshape(*a.shape, *(1,) * (state.ndim - a.ndim))


def _read(q: Tensor, state: Tensor) -> Tensor:
    return torch.einsum("bhkv,bhk->bhv", state, q)


def _outer(k: Tensor, v: Tensor) -> Tensor:
    return k[..., :, None] * v[..., None, :]


def linear_rule(x: Row, s: Tensor) -> tuple[States, States]:
    s = _decay(x, s) * s + _outer(x["k"], x["v"])
    return [_read(x["q"], s)], [s]


def delta_rule(x: Row, s: Tensor) -> tuple[States, States]:
    s = _decay(x, s) * s
    s = s + _outer(x["k"], x["v"] - _read(x["e"], s))
    return [_read(x["q"], s)], [s]


def importance_rule(x: Row, j: Tensor) -> tuple[States, States]:
    j = _decay(x, j) * j + x["b"][..., None] * x["k"] ** 2
    return [j], [j]


def riccati_rule(x: Row, z: Tensor) -> tuple[States, States]:
    z = x["keep"] * z / (x["lost"] * z + 1) + x["seen"]
    return [z], [z]


def metaplastic_rule(x: Row, s: Tensor, j: Tensor) -> tuple[States, States]:
    s = _decay(x, s) * s + _outer(x["k"], x["v"])
    j = _decay(x, j) * j + x["b"][..., None] * x["k"] ** 2
    return [_read(x["q"] / (j + x["prior"][:, None]), s)], [s, j]


def metaplastic_delta_rule(x: Row, m: Tensor, j: Tensor) -> tuple[States, States]:
    prior, a = x["prior"][:, None], _decay(x, j)
    m = (a * (j + prior) / (a * j + prior))[..., None] * m
    j = a * j + x["b"][..., None] * x["k"] ** 2
    error = x["beta"][..., None] * (x["v"] - _read(x["k"], m))
    m = m + _outer(x["k"] / (j + prior), error)
    return [_read(x["q"], m)], [m, j]


def synapse_rule(x: Row, h: Tensor, j: Tensor, uncertainty: bool = False) -> tuple[States, States]:
    h = _decay(x, h) * h + _outer(x["k"], x["v"])
    j = _decay(x, j) * j + _outer(x["k"] ** 2, x["c"])
    total = j + x["prior"][:, None, None]
    found = [_read(x["q"], h / total)]
    return [*found, _read(x["q"] ** 2, 1 / total)] if uncertainty else found, [h, j]


def synapse_delta_rule(x: Row, m: Tensor, j: Tensor) -> tuple[States, States]:
    prior, a = x["prior"][:, None, None], _decay(x, m)
    m = a * (j + prior) / (a * j + prior) * m
    j = a * j + _outer(x["k"] ** 2, x["c"])
    error = x["beta"][..., None] * (x["v"] - _read(x["k"], m))
    m = m + _outer(x["k"], error) / (j + prior)
    return [_read(x["q"], m)], [m, j]


def solve_rule(x: Row, m: Tensor) -> tuple[States, States]:
    m = _decay(x, m) * m + x["beta"][..., None, None] * _outer(x["k"], x["k"])
    prior = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device) * x["prior"][:, None, None]
    return [torch.linalg.solve(m + prior, x["q"])], [m]


def _posterior_step(x: Row, s: Tensor, j: Tensor, correction: str) -> object:
    return posterior_step(
        x["q"],
        x["k"],
        x["v"],
        x["beta"] if correction == "full" else None,
        x["b"],
        x["g"],
        prior=x["prior"],
        initial_state=(s, j),
        correction=correction,
    )


@dataclasses.dataclass(frozen=True)
class Operation:
    """A recurrence: its kernels, one token of it in plain torch, and what it needs.

    products: operations per token and head of the chunked form, of K and V; reciprocals: per
    synapse and token. source: the operation whose metaplastic form this is.
    """

    run: Callable[[Row], tuple[Tensor, ...]]
    rule: Callable[..., tuple[States, States]]
    step: Callable[..., object] | None
    operands: tuple[str, ...]
    states: tuple[str, ...]
    gates: tuple[str, ...]
    products: Callable[[int, int], int]
    reciprocals: int = 0
    source: str = ""


def _chunked(K: int, V: int) -> int:
    """Scores and their use over half a chunk of 64, the state written and read."""
    return 64 * (K + V) + 4 * K * V


def _corrected(K: int, V: int) -> int:
    """Scores of the erase keys, the solved values, and what these read from the state."""
    return _chunked(K, V) + 64 * (K + V) + 2 * K * V


GATES = ("none", "head", "key")
PER_SYNAPSE = ("q", "k", "v", "c", "prior", "g")
OPERATIONS = {
    "linear": Operation(
        lambda x: linear(x["q"], x["k"], x["v"], x["g"])[:1],
        linear_rule,
        lambda x, s: linear_step(x["q"], x["k"], x["v"], x["g"], state=s),
        ("q", "k", "v", "g"),
        ("KV",),
        GATES,
        _chunked,
    ),
    "synapse": Operation(
        _synapse,
        synapse_rule,
        lambda x, *s: synapse_step(
            x["q"], x["k"], x["v"], x["c"], x["g"], prior=x["prior"], state=s
        ),
        PER_SYNAPSE,
        ("KV", "KV"),
        ("head", "key"),
        lambda K, V: 4 * K * V,
        1,
    ),
    "synapse uncertainty": Operation(
        functools.partial(_synapse, uncertainty=True),
        functools.partial(synapse_rule, uncertainty=True),
        lambda x, *s: synapse_step(
            *(x[c] for c in ("q", "k", "v", "c", "g")), prior=x["prior"], state=s, uncertainty=True
        ),
        PER_SYNAPSE,
        ("KV", "KV"),
        ("head",),
        lambda K, V: 4 * K * V,
        1,
    ),
    "delta": Operation(
        lambda x: delta(x["q"], x["e"], x["k"], x["v"], x["g"])[:1],
        delta_rule,
        lambda x, s: delta_step(x["q"], x["e"], x["k"], x["v"], x["g"], state=s),
        ("q", "e", "k", "v", "g"),
        ("KV",),
        GATES,
        _corrected,
    ),
    "metaplastic linear": Operation(
        _metaplastic,
        metaplastic_rule,
        functools.partial(_posterior_step, correction="none"),
        ("q", "k", "v", "b", "prior", "g"),
        ("KV", "K"),
        ("head",),
        _chunked,
        source="linear",
    ),
    "metaplastic delta": Operation(
        _metaplastic_delta,
        metaplastic_delta_rule,
        functools.partial(_posterior_step, correction="full"),
        ("q", "k", "v", "beta", "b", "prior", "g"),
        ("KV", "K"),
        ("head",),
        _corrected,
        source="delta",
    ),
    "importance": Operation(
        lambda x: importance(x["k"], x["b"], x["g"])[:1],
        importance_rule,
        lambda x, s: importance_step(x["k"], x["b"], x["g"], state=s),
        ("k", "b", "g"),
        ("K",),
        ("head",),
        lambda K, V: 0,
    ),
    # No step kernel here either: decoding is a call of one token.
    "riccati": Operation(
        _riccati,
        riccati_rule,
        _riccati,
        ("keep", "lost", "seen"),
        ("K",),
        ("head",),
        lambda K, V: 0,
    ),
    "synapse_delta": Operation(
        _synapse_delta,
        synapse_delta_rule,
        lambda x, *s: synapse_delta_step(
            *(x[c] for c in ("q", "k", "v", "beta", "c", "g")), prior=x["prior"], state=s
        ),
        (*PER_SYNAPSE, "beta"),
        ("KV", "KV"),
        ("head",),
        lambda K, V: 0,
        2,
    ),
    # The class has no step kernel: decoding is a call of one token. One application of the matrix.
    "solve": Operation(
        _solve,
        solve_rule,
        _solve,
        ("q", "k", "beta", "prior", "g"),
        ("KK",),
        ("head",),
        lambda K, V: 128 * K + 4 * K * K,
    ),
}


def loop(x: Row, operation: Operation, low: torch.dtype | None = None) -> States:
    """The recurrence token by token; with `low` every state and output is rounded to it."""

    def rounded(tensors: States) -> States:
        return tensors if low is None else [y.to(low).to(y.dtype) for y in tensors]

    B, T, H, K = x["k"].shape
    sizes = {"K": K, "V": x["v"].shape[3]}
    states = [x["v"].new_zeros(B, H, *(sizes[c] for c in shape)) for shape in operation.states]
    outputs = []
    for t in range(T):
        token = {c: y if y is None or c == "prior" else y[:, t] for c, y in x.items()}
        found, states = operation.rule(token, *states)
        states = rounded(states)
        outputs.append(rounded(found))
    return [torch.stack(y, 1) for y in zip(*outputs, strict=True)]


def gradients(
    run: Callable[[Row], Iterable[Tensor]], x: Row, names: list[str], weights: States
) -> list[Tensor]:
    """Outputs, and the gradients of their weighted sum."""
    leaves = x | {name: x[name].detach().clone().requires_grad_() for name in names}
    outputs = list(run(leaves))
    loss = sum((o * w.to(o.dtype)).sum() for o, w in zip(outputs, weights, strict=True))
    found = torch.autograd.grad(loss, [leaves[name] for name in names])
    return [*(o.detach() for o in outputs), *found]


def differentiated(operation: Operation, x: Row) -> list[str]:
    return [name for name in operation.operands if x[name] is not None]


@functools.cache
def check(name: str, gate: str, sizes: Sizes) -> str:
    """Return what is wrong with an operation: errors over twice those of a loop that rounds its
    states.

    Both errors are root mean squares against float64; an ulp of the result is allowed on top.
    """
    operation = OPERATIONS[name]
    torch.manual_seed(0)
    x = make_operands(*sizes.checked, gate, sizes.dtype, sizes.device)
    names = differentiated(operation, x)
    exact = {key: None if y is None else y.double() for key, y in x.items()}
    with torch.no_grad():
        weights = [torch.randn_like(y).bfloat16().double() for y in loop(exact, operation)]
    truth = gradients(lambda y: loop(y, operation), exact, names, weights)
    rough = gradients(lambda y: loop(y, operation, torch.bfloat16), exact, names, weights)
    found = gradients(operation.run, x, names, weights)
    wrong = []
    labels = [*(f"output {i}" for i in range(len(weights))), *(f"gradient of {c}" for c in names)]
    for label, want, low, got in zip(labels, truth, rough, found, strict=True):
        size = want.norm()
        error, allowed = (got.double() - want).norm() / size, 2 * (low - want).norm() / size + 2**-8
        if not error <= allowed:
            wrong.append(f"{label}: relative error {error:.2e}, allowed {allowed:.2e}")
    return "; ".join(wrong)


# Operation and gate -> module, function and arguments of fla.
FLA: dict[tuple[str, str], tuple[str, str, tuple[str, ...], dict[str, Any]]] = {
    ("linear", "none"): ("linear_attn", "chunk_linear_attn", ("q", "k", "v"), {"normalize": False}),
    ("linear", "head"): ("simple_gla", "chunk_simple_gla", ("q", "k", "v", "g"), {}),
    ("linear", "key"): ("gla", "chunk_gla", ("q", "k", "v", "g"), {}),
    ("delta", "none"): ("delta_rule", "chunk_delta_rule", ("q", "k", "v", "beta"), {}),
    ("delta", "head"): (
        "gated_delta_rule",
        "chunk_gated_delta_rule",
        ("q", "k", "v", "g", "beta"),
        {},
    ),
    ("delta", "key"): ("kda", "chunk_kda", ("q", "k", "v", "g", "beta"), {}),
}


def fla_version() -> str | None:
    """Version of fla, if it can be imported."""
    try:
        return str(importlib.import_module("fla").__version__)
    except Exception:  # whatever another library's import raises, it cannot be compared with
        return None


def fla_call(name: str, gate: str) -> tuple[Callable[[Row], tuple[Tensor, ...]], list[str]]:
    """fla's chunked function for the same recurrence, and its operands."""
    module, function, names, options = FLA[name, gate]
    call = getattr(importlib.import_module(f"fla.ops.{module}"), function)

    def run(x: Row) -> tuple[Tensor, ...]:
        return (call(**{c: x[c] for c in names}, scale=1.0, **options)[0],)

    return run, list(names)


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation and gate at one size, ours or fla's; or the hardware."""

    name: str
    gate: str = ""
    T: int = 0
    heads: int = 0
    K: int = 0
    V: int = 0
    fla: bool = False

    def __str__(self) -> str:
        name = f"{'fla ' * self.fla}{self.name} {self.gate}"
        return f"{name} T {self.T}, {self.heads} heads, K/V {self.K}/{self.V}"


def make_cases(sizes: Sizes) -> list[Case]:
    """Every case; fla's, which tune themselves for minutes, last."""
    cases = [Case("hardware")]
    cases += [
        Case(name, gate, *shape)
        for shape in sizes.cases
        for name, operation in OPERATIONS.items()
        for gate in operation.gates
    ]
    if sizes.device == "cuda" and fla_version() is not None:
        cases += [Case(*of, *shape, fla=True) for shape in sizes.cases for of in FLA]
    return cases


def call_of(
    run: Callable[[Row], tuple[Tensor, ...]], x: Row, names: list[str], backward: bool
) -> Callable[[], object]:
    """A call of an operation, with its backward pass or without."""
    leaves = x | {c: x[c].detach().requires_grad_(backward) for c in names}
    weights: States = []

    def call() -> None:
        with torch.set_grad_enabled(backward):
            outputs = run(leaves)
            if backward:
                if not weights:
                    weights.extend(torch.randn_like(o) for o in outputs)
                torch.autograd.grad(outputs, [leaves[c] for c in names], weights)

    return call


def timed(call: Callable[[], object], device: str, prefix: str) -> Row:
    median, low, high = quantiles(call, device)
    memory = peak_memory(call, device) / 2**20
    values = {"ms": median, "p20": low, "p80": high, "mib": memory}
    return {f"{prefix}_{key}": value for key, value in values.items()}


def message(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ").replace("|", "/")[:200]


def measure(case: Case, sizes: Sizes) -> Iterator[Row]:
    """Rows of a case: forward, forward with backward, decode."""
    if case.name == "hardware":
        yield {"operation": "hardware"} | hardware(sizes)
        return
    operation, gate, H, K, V = OPERATIONS[case.name], case.gate, case.heads, case.K, case.V
    B = max(1, sizes.tokens // case.T)
    size: Row = {"B": B, "T": case.T, "heads": H, "K": K, "V": V}
    try:
        wrong = "" if case.fla else check(case.name, gate, sizes)
    except Exception as error:
        wrong = message(error)
    if wrong:
        yield {"operation": case.name, "gate": gate, "pass": "check"} | size | {"error": wrong}
        return
    torch.manual_seed(0)
    x = make_operands(B, case.T, H, K, V, gate, sizes.dtype, sizes.device)
    run, names = operation.run, differentiated(operation, x)
    if case.fla:
        run, names = fla_call(case.name, gate)
    library = "fla" if case.fla else "glazoo"
    moved = sum(x[c].nbytes for c in names)
    state = case.name in ("importance", "riccati", "solve")
    output = B * case.T * H * K * 4 if state else x["v"].nbytes
    for backward in (False, True):
        kind = "fwd+bwd" if backward else "fwd"
        row: Row = {"operation": case.name, "gate": gate, "pass": kind, "library": library} | size
        # Backward reads inputs and the output's gradient, and writes gradients of the inputs' size.
        row["bytes"] = 3 * moved + 2 * output if backward else moved + output
        row["operations"] = B * case.T * H * operation.products(K, V) * (3 if backward else 1)
        row["reciprocals"] = B * case.T * H * K * V * operation.reciprocals * (1 + backward)
        try:
            row |= timed(call_of(run, x, names, backward), sizes.device, library)
        except Exception as error:
            row[error_key(case)] = message(error)
        yield row
    if case.fla:
        return
    del x
    if operation.step is not None and sizes.cases[0][0] == case.T:
        yield time_decode(case, sizes)


def time_decode(case: Case, sizes: Sizes) -> Row:
    """One token of an operation, as a replayed graph; the states are read and written."""
    operation, H, K, V = OPERATIONS[case.name], case.heads, case.K, case.V
    B = sizes.decoded
    row: Row = {"operation": case.name, "gate": case.gate, "pass": "decode"}
    row |= {"B": B, "T": 1, "heads": H, "K": K, "V": V}
    lengths = {"K": K, "V": V}
    states = [
        torch.zeros(B, H, *(lengths[c] for c in shape), device=sizes.device)
        for shape in operation.states
    ]
    x = make_operands(B, 1, H, K, V, case.gate, sizes.dtype, sizes.device)
    row |= {"bytes": 2 * sum(s.nbytes for s in states), "operations": 0, "reciprocals": 0}
    try:
        with torch.no_grad():
            call = functools.partial(operation.step, x, *states)  # type: ignore[arg-type]
            row |= timed(replayed(call, sizes.device), sizes.device, "glazoo")
    except Exception as error:
        row["error"] = message(error)
    return row


def worker(
    cases: list[Case], indices: list[int], sizes: Sizes, file: pathlib.Path, compile_only: bool
) -> int:
    """Run some cases, a line of JSON each; or only compile what they need.

    Ends early, with status 3, if a failure leaves the GPU unusable to this process.
    """
    for i in indices:
        rows = []
        try:
            if compile_only:
                prepare(cases[i], sizes)
            else:
                rows = list(measure(cases[i], sizes))
        except Exception as error:
            rows = [row_of(cases[i], message(error))]
        if not compile_only:
            with file.open("a") as lines:
                lines.write(json.dumps({"case": i, "rows": rows}) + "\n")
        try:
            synchronize(sizes.device)
            if sizes.device == "cuda":
                torch.cuda.empty_cache()
        except Exception as error:
            # The parent starts another process for the cases that are left.
            print(f"the GPU is unusable to this process: {message(error)}", file=sys.stderr)
            return 3
    return 0


def prepare(case: Case, sizes: Sizes) -> None:
    """Have every kernel of a case compiled."""
    if case.name == "hardware" or case.fla:
        return
    check(case.name, case.gate, sizes)
    operation, B = OPERATIONS[case.name], max(1, sizes.tokens // case.T)
    shape = (case.heads, case.K, case.V, case.gate, sizes.dtype, sizes.device)
    x = make_operands(B, case.T, *shape)
    for backward in (False, True):
        call_of(operation.run, x, differentiated(operation, x), backward)()


def error_key(case: Case) -> str:
    """Another library's failure is a result."""
    return "fla_error" if case.fla else "error"


def row_of(case: Case, error: str) -> Row:
    row: Row = {"operation": case.name, "gate": case.gate, "pass": "all", "T": case.T}
    return row | {"heads": case.heads, "K": case.K, "V": case.V, error_key(case): error}


class Run:
    """A run: its cases, and rows of those that are done."""

    def __init__(self, mode: str, results: pathlib.Path, seconds: float) -> None:
        self.mode, self.results = mode, results
        self.sizes = SIZES[mode]
        self.cases = make_cases(self.sizes)
        self.done: dict[int, list[Row]] = {}
        self.deadline = time.monotonic() + seconds
        self.header: Row = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        }
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="glazoo-gpu-"))
        self.log = self.folder / "log"

    def start(self, indices: list[int], compile_only: bool = False) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-P", str(pathlib.Path(__file__).resolve())]
        command += ["--mode", self.mode, "--worker", str(self.folder / "rows")]
        command += ["--cases", ",".join(map(str, indices))]
        command += ["--compile-only"] if compile_only else []
        with self.log.open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)

    def compile(self) -> None:
        """Compile in several processes; what fails here fails again, and is seen, when timed."""
        groups: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
        for i, case in enumerate(self.cases):
            groups[case.name, case.gate].append(i)
        chains = [itertools.chain(*list(groups.values())[n::JOBS]) for n in range(JOBS)]
        slices = [list(x) for x in chains]
        processes = [self.start(x, compile_only=True) for x in slices if x]
        # What is not compiled by then is compiled when it is timed.
        end = time.monotonic() + 0.4 * (self.deadline - time.monotonic())
        while any(p.poll() is None for p in processes) and time.monotonic() < end:
            time.sleep(0.2)
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def read(self) -> bool:
        """Take what has been measured; whether anything was new."""
        known = len(self.done)
        file = self.folder / "rows"
        for line in file.read_text().splitlines() if file.exists() else ():
            try:
                found = json.loads(line)
            except json.JSONDecodeError:
                continue  # a line that is still being written
            if found["case"] not in self.done:
                self.done[found["case"]] = found["rows"]
                print(f"{self.cases[found['case']]}: done", flush=True)
        return len(self.done) > known

    def time(self) -> None:
        """Time every case, in one process after another if need be."""
        while todo := [i for i in range(len(self.cases)) if i not in self.done]:
            process, heard = self.start(todo), time.monotonic()
            why = ""
            while process.poll() is None and not why:
                time.sleep(0.2)
                if self.read():
                    heard = time.monotonic()
                    self.write()
                if time.monotonic() > self.deadline:
                    why = "not measured: out of time"
                elif time.monotonic() - heard > STALL:
                    why = f"no result in {STALL:.0f} s"
            if process.poll() is None:
                process.kill()
            status = process.wait()
            self.read()
            todo = [i for i in todo if i not in self.done]
            if why.startswith("not measured"):
                self.done |= {i: [row_of(self.cases[i], why)] for i in todo}
            elif todo and (why or status not in (0, 3)):
                end = self.log.read_text(errors="replace").strip().splitlines()[-1:]
                why = why or f"process ended with status {status}: {' '.join(end)}"[:200]
                self.done[todo[0]] = [row_of(self.cases[todo[0]], why)]
            self.write()

    def rows(self) -> list[Row]:
        return derived([row for i in sorted(self.done) for row in self.done[i]])

    def write(self) -> pathlib.Path:
        """Write what there is so far; a run that is cut short leaves its results."""
        rows = self.rows()
        of_hardware = [x for x in rows if x["operation"] == "hardware"]
        header = self.header | (of_hardware[0] if of_hardware else {})
        header.pop("operation", None)
        rows = [x for x in rows if x["operation"] != "hardware"]
        self.results.mkdir(parents=True, exist_ok=True)
        gpu = "".join(c if c.isalnum() else "-" for c in str(header.get("gpu", "gpu")).lower())
        path = self.results / f"kernels_{gpu}_{header['date'][:10]}.md"
        head = "\n".join(f"- {key}: {cell(value)}" for key, value in header.items())
        path.write_text(
            f"# Kernel timings\n\n{head}\n\n## Goals\n\n{goals(rows)}\n\n## Ratios\n\n"
            f"{summary(rows)}\n\n## Failures\n\n{failures(rows)}\n\n## Rows\n\n{table(rows)}\n"
        )
        path.with_suffix(".json").write_text(
            json.dumps({"environment": header, "rows": rows}, indent=1) + "\n"
        )
        return path


def derived(rows: list[Row]) -> list[Row]:
    """Rows with their ratios to other rows and to the hardware's limits."""
    machine = next((x for x in rows if x["operation"] == "hardware"), {})
    rates = [
        ("bytes", machine.get("bytes per second")),
        ("operations", machine.get("bfloat16 operations per second")),
        ("reciprocals", machine.get("reciprocals per second")),
    ]

    def key(row: Row, name: str) -> tuple[Any, ...]:
        return name, *(row.get(c) for c in ("gate", "pass", "B", "T", "heads", "K", "V"))

    times = {key(x, x["operation"]): x["glazoo_ms"] for x in rows if "glazoo_ms" in x}
    theirs = {key(x, x["operation"]): x for x in rows if x.get("library") == "fla"}
    found = []
    for x in rows:
        if x.get("library") == "fla":
            continue
        other = theirs.get(key(x, x["operation"]), {})
        row = x | {c: y for c, y in other.items() if c.startswith("fla_")}
        if "glazoo_ms" in row:
            took = row["glazoo_ms"]
            limits = {c: 1e3 * row[c] / rate for c, rate in rates if rate}
            if limits:
                row["limit_ms"] = max(limits.values())
                row["over_limit"] = took / max(row["limit_ms"], 1e-9)
            if row["reciprocals"] and "reciprocals" in limits:
                row["arithmetic"] = limits["reciprocals"] / took
            source = OPERATIONS[row["operation"]].source
            for column, name in (("over_linear", "linear"), ("over_source", source)):
                if name != row["operation"] and key(row, name) in times:
                    row[column] = took / times[key(row, name)]
            if "fla_ms" in row:
                row["fla_over_glazoo"] = row["fla_ms"] / took
                row["mib_over_fla"] = row["glazoo_mib"] / max(row["fla_mib"], 1e-9)
        found.append(row)
    return found


# Operations, pass, column, bound from above (or below), and what it says.
GOALS = (
    (("synapse",), "fwd", "over_linear", 3.0, "time over linear's, at most"),
    (("synapse",), "fwd+bwd", "over_linear", 4.0, "time over linear's, at most"),
    (("synapse",), "fwd", "arithmetic", -0.5, "part of the reciprocals' rate, at least"),
    (("metaplastic linear", "metaplastic delta"), "fwd", "over_source", 1.3, "time over source's"),
    (("metaplastic linear", "metaplastic delta"), "fwd+bwd", "over_source", 1.3, "likewise"),
    (("linear", "delta"), "fwd+bwd", "mib_over_fla", 1.0, "memory over fla's, at most"),
)


def goals(rows: list[Row]) -> str:
    """How many cases reach each goal."""
    lines = []
    for names, kind, column, bound, text in GOALS:
        for name in names:
            of = [
                x[column]
                for x in rows
                if (x["operation"], x["pass"]) == (name, kind) and column in x
            ]
            sign = math.copysign(1, bound)
            met = sum(sign * y <= bound for y in of)
            line = f"- {name}, {kind}: {text} {abs(bound):g}: "
            line += f"{met} of {len(of)} cases" if of else "not measured"
            if of:
                line += f" ({min(of):.2f} to {max(of):.2f})"
            lines.append(line)
    return "\n".join(lines)


RATIOS = (
    "over_linear",
    "over_source",
    "over_limit",
    "arithmetic",
    "fla_over_glazoo",
    "mib_over_fla",
)
COLUMNS = ("operation", "gate", "pass", "B", "T", "heads", "K", "V", "glazoo_ms", "glazoo_p20")
COLUMNS += ("glazoo_p80", "glazoo_mib", "limit_ms", *RATIOS[:4], "fla_ms", "fla_mib", *RATIOS[4:])
COLUMNS += ("error", "fla_error")


def cell(x: Any) -> str:
    return f"{x:.3g}" if isinstance(x, float) else "" if x is None else str(x)


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell(row.get(c)) for c in COLUMNS) + " |" for row in rows]
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    """Ratios over all cases of an operation, a gate and a pass."""
    groups: dict[str, list[Row]] = collections.defaultdict(list)
    for x in rows:
        groups[" ".join((x["operation"], x["gate"], x["pass"]))].append(x)
    lines = []
    for group, of in sorted(groups.items()):
        line = f"- {group}:"
        for column in RATIOS:
            if found := [x[column] for x in of if column in x]:
                line += f" {column} {statistics.median(found):.2f}"
                line += f" ({min(found):.2f} to {max(found):.2f});"
        lines.append(line.rstrip(";"))
    return "\n".join(lines)


def failed(rows: list[Row]) -> list[Row]:
    return [x for x in rows if "error" in x]


def failures(rows: list[Row]) -> str:
    lines = [
        f"- {x['operation']} {x['gate']} {x['pass']} T {x['T']} K/V {x['K']}/{x['V']}: {x['error']}"
        for x in failed(rows)
    ]
    return "\n".join(lines) or "None."


# Selections of the GPU tests, each for a process of its own; together they are all tests.
SHARDS = (
    "linear",
    "delta and not synapse",
    "importance",
    "synapse and not delta",
    "synapse and delta",
    "solve",
    "not linear and not delta and not importance and not synapse and not solve",
)


def run_tests(results: pathlib.Path, seconds: float) -> bool:
    """Run the GPU tests in a few processes at once; whether all passed. Their logs are kept."""
    results.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    running = []
    for i, shard in enumerate(SHARDS):
        # -W: other versions of other libraries warn of other things.
        command = [sys.executable, "-P", "-m", "pytest", "-W", "default", "-m", "gpu", "-k", shard]
        command += ["-p", "no:cacheprovider", "-v", "--durations=5", str(TESTS)]
        path = results / f"tests_{i}.log"
        with path.open("wb") as log:
            running.append(
                (shard, path, subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log))
            )
    passed = True
    for shard, path, process in running:
        try:
            status = process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = -1
        text = path.read_text(errors="replace").strip().splitlines()
        # 5: no test has such a name.
        good = status in (0, 5)
        passed &= good
        last = text[-1] if text else ""
        print(
            f"tests ({shard}): {last if status != -1 else f'out of time after: {last}'}", flush=True
        )
        if not good:
            print("\n".join(text[-60:]), flush=True)
    return passed


SIZES = {"all": GPU, "quick": QUICK, "rehearse": REHEARSAL}


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    mode = parser.add_mutually_exclusive_group()
    for name, text in (
        ("quick", "one length and one shape"),
        ("rehearse", "on a CPU in Triton's interpreter (TRITON_INTERPRET=1), at tiny sizes"),
    ):
        mode.add_argument(f"--{name}", dest="mode", action="store_const", const=name, help=text)
    mode.add_argument("--mode", choices=SIZES, help=argparse.SUPPRESS)
    parser.add_argument("--tests", action="store_true", help="first the tests that need a GPU")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="where to write")
    parser.add_argument("--minutes", type=float, default=9.0, help="for tests and timings together")
    parser.add_argument("--worker", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--cases", help=argparse.SUPPRESS)
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    mode_name = options.mode or "all"
    sizes = SIZES[mode_name]
    if sizes.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False")
        return 2
    if sizes.device == "cpu" and not interpreting():
        print("--rehearse: set TRITON_INTERPRET=1")
        return 2
    if options.worker is not None:
        indices = [int(i) for i in options.cases.split(",")]
        return worker(make_cases(sizes), indices, sizes, options.worker, options.compile_only)
    begin = time.monotonic()
    good = True
    if options.tests:
        # Less than half the time, so that a slow machine measures something too.
        good = run_tests(options.results, 60 * 0.45 * options.minutes)
    run = Run(mode_name, options.results, 60 * options.minutes - (time.monotonic() - begin))
    if sizes.device == "cuda":
        run.compile()
    run.time()
    rows = [x for x in run.rows() if x["operation"] != "hardware"]
    print(goals(rows), summary(rows), "Failures:", failures(rows), sep="\n\n")
    print(f"written: {run.write()}")
    return 0 if good and not failed(run.rows()) else 1


if __name__ == "__main__":
    sys.exit(main())
