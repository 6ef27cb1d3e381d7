"""Times the CPU engines against the PyTorch fallbacks that transformers ships.

    python benchmarks/cpu.py            # the whole table, ten minutes on two idle cores
    python benchmarks/cpu.py --quick    # two sizes, two and a half minutes
    python benchmarks/cpu.py --decode   # tokens of decoding and generation alone, about a minute
    python benchmarks/cpu.py --output FILE    # goes on where a run that was stopped left FILE
    python benchmarks/cpu.py --table FILE     # the rows of docs/engines.md, from what a run wrote

Every contender of a size gets the same operands and is timed in the same rounds (interleaved, so
that a busy machine disturbs all alike): as many as fit into its seconds, three at least. Who needs
longer than LONGEST for one call, or more than MEMORY_LIMIT, is left out of that size, and printed.
Rivals' values and gradients are compared once for all lengths, on CHECKED tokens.
Times are wall-clock medians with the 20th and 80th percentile, ratios those of rounds; memory is
the growth of the peak resident set over one forward and backward pass, the first of that size.
Nothing is asserted about time. The result is printed and written to benchmarks/results/.

Pure PyTorch forms of other packages take part where they can be imported:

    pip install --target DIR --no-deps flash-linear-attention fla-core mlstm_kernels
    PYTHONPATH=DIR python benchmarks/cpu.py

mamba_ssm does not: its package imports a CUDA extension, which only nvcc builds.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import datetime
import gc
import importlib
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import (
    Mamba2Config,
    Mamba2ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.qwen3_next import modeling_qwen3_next

from glazoo import attention, load, metaplasticize
from glazoo.compare.machine import machine
from glazoo.compare.timing import Spread, in_turns, spread
from glazoo.engines import available, chunked
from glazoo.theory.instances import Instance
from glazoo.versions import stated

RESULTS = Path(__file__).parent / "results"
# Who makes tensors of T x 64 x H x K numbers, about six of which live at once; bytes at most.
LARGE = ("chunk_kimi_delta_attention", "fla's naive_chunk_kda")
MEMORY_LIMIT = 2 << 30
# Seconds of a forward and backward pass at most.
LONGEST = 8.0
# Rivals are compared at this length, whole chunks of all of them.
CHECKED = 192
# (contender, rival, what the ratio should be): rival's time over the contender's for a speed-up,
# the contender's over the rival's for a cost. None: no goal, other packages are for comparison.
GOALS: tuple[tuple[str, str, str, float | None], ...] = (
    ("linear", "mamba2_chunk_scan", "speed-up", 1.5),
    ("delta", "torch_chunk_gated_delta_rule", "speed-up", 1.5),
    ("delta, decay per key", "chunk_kimi_delta_attention", "speed-up", 1.5),
    ("metaplastic mamba2", "mamba2", "cost", 1.3),
    ("metaplastic deltanet", "deltanet", "cost", 1.2),
    ("metaplastic gated_deltanet", "gated_deltanet", "cost", 1.2),
    ("metaplastic kda", "kda", "cost", 1.2),
    ("synapse", "linear", "cost", 8.0),
    ("synapse, compiled", "synapse", "speed-up", 4.0),
    ("synapse_delta, compiled", "synapse_delta", "speed-up", 4.0),
    ("importance, compiled", "importance", "speed-up", 2.0),
    ("mamba2, full precision", "delta", "cost", 6.0),
    ("gated_deltanet, full precision", "delta", "cost", 6.0),
    ("linear", "fla's naive_chunk_simple_gla", "speed-up", None),
    ("delta", "fla's naive_chunk_gated_delta_rule", "speed-up", None),
    ("delta, decay per key", "fla's naive_chunk_kda", "speed-up", None),
    ("mlstm", "mlstm_kernels' native", "speed-up", None),
)
# Goals that are stated for one width of K = V only.
ONE_WIDTH = dict.fromkeys(
    ("synapse", "mamba2, full precision", "gated_deltanet, full precision"), 64
)


@dataclass(frozen=True)
class Size:
    tokens: int
    heads: int
    width: int

    def __str__(self) -> str:
        return f"T {self.tokens}, H {self.heads}, K = V = {self.width}"


@dataclass
class Timing:
    """Seconds of one contender at one size; memory in bytes."""

    size: Size
    contender: str
    forward: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)
    memory: int | None = None

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = {**asdict(self.size), "contender": self.contender}
        for name in ("forward", "both"):
            times = getattr(self, name)
            found[name] = {**spread(times)._asdict(), "n": len(times)}
        found["memory"] = self.memory
        return found


def operands(size: Size) -> dict[str, Tensor]:
    """Queries, unit keys, values and gates of a layer with sensible ranges; leaves."""
    generator = torch.Generator().manual_seed(0)
    lead = (1, size.tokens, size.heads)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    made = {
        "q": F.normalize(normal(*lead, size.width), dim=-1),
        "k": F.normalize(normal(*lead, size.width), dim=-1),
        "v": normal(*lead, size.width),
        "g": -0.2 * uniform(*lead),
        "g_key": -0.2 * uniform(*lead, size.width),
        "beta": uniform(*lead),
        "b": uniform(*lead),
        "b_value": uniform(*lead, size.width),
        "prior": torch.ones(size.heads, size.width),
    }
    return {name: x.requires_grad_() for name, x in made.items()}


def contenders(x: dict[str, Tensor], size: Size) -> dict[str, Callable[[], Tensor]]:
    """Return what is timed: functions of the operands that return the output."""
    mamba2 = inspect.unwrap(modeling_mamba2.mamba2_chunk_scan)
    delta_rule = inspect.unwrap(modeling_qwen3_next.torch_chunk_gated_delta_rule)
    kimi = inspect.unwrap(modeling_kimi_linear.chunk_kimi_delta_attention)
    q, k, v, g, beta = x["q"], x["k"], x["v"], x["g"], x["beta"]
    scale = size.width**-0.5
    # Mamba2 discretises with dt: decay exp(A dt), write dt x. A = -1 and dt = -g.
    slope = -torch.ones(size.heads)

    def linear() -> Tensor:
        return chunked.linear(q, k, v, g, beta=-g)[0]

    def delta(decay: Tensor) -> Tensor:
        return chunked.delta(q, None, k, v, decay, beta=beta, erase=beta, scale=scale)[0]

    def synapse(core: Any) -> Tensor:
        values = v * (-g).unsqueeze(-1)
        return core.synapse(q, k, values, x["b_value"], g, prior=x["prior"])[0]

    def synapse_delta(core: Any) -> Tensor:
        return core.synapse_delta(q, k, v, beta, x["b_value"], g, prior=x["prior"])[0]

    def variant(name: str, metaplastic: bool, **form: Any) -> Callable[[], Tensor]:
        spec = load(name)
        gates: dict[str, Tensor] = {"beta": beta}
        if spec.decay.shape != "none":
            gates["g"] = x["g_key"] if spec.decay.shape == "key" else g
        if metaplastic:
            spec = metaplasticize(spec, gate="head", **form)
            gates |= {"b": x["b"], "prior": x["prior"]}
        return lambda: attention(spec, q, k, v, impl="chunked", **gates).output

    found = {
        "mamba2_chunk_scan": lambda: mamba2(v, -g, slope, k, q, 256),
        "linear": linear,
        "torch_chunk_gated_delta_rule": lambda: delta_rule(q, k, v, g, beta)[0],
        "delta": lambda: delta(g),
        "delta, decay per key": lambda: delta(x["g_key"]),
    }
    cores = {"": chunked}
    if "compiled" in available():
        from glazoo.engines import compiled

        cores[", compiled"] = compiled
    for suffix, core in cores.items():
        found[f"synapse{suffix}"] = partial(synapse, core)
        found[f"synapse_delta{suffix}"] = partial(synapse_delta, core)
        found[f"importance{suffix}"] = lambda core=core: core.importance(k, x["b"], g)[0]
    found["mlstm"] = variant("mlstm", metaplastic=False)
    for name in ("mamba2", "deltanet", "gated_deltanet", "kda"):
        found[name] = variant(name, metaplastic=False)
        found[f"metaplastic {name}"] = variant(name, metaplastic=True)
    for name in ("mamba2", "gated_deltanet"):
        found[f"{name}, full precision"] = variant(name, metaplastic=True, precision="full")
    found["chunk_kimi_delta_attention"] = lambda: kimi(q, k, v, x["g_key"], beta)[0]
    return found | of_packages(x)


def of_packages(x: dict[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    """The same of other packages, where these are installed."""
    q, k, v, g, beta = x["q"], x["k"], x["v"], x["g"], x["beta"]
    found: dict[str, Callable[[], Tensor]] = {}
    with contextlib.suppress(ModuleNotFoundError):
        simple_gla, gated_delta_rule, kda = (
            importlib.import_module(f"fla.ops.{name}.naive")
            for name in ("simple_gla", "gated_delta_rule", "kda")
        )
        found["fla's naive_chunk_simple_gla"] = lambda: simple_gla.naive_chunk_simple_gla(
            q, k, v * (-g).unsqueeze(-1), g, scale=1.0
        )[0]
        found["fla's naive_chunk_gated_delta_rule"] = lambda: (
            gated_delta_rule.naive_chunk_gated_delta_rule(q, k, v, g, beta)[0]
        )
        found["fla's naive_chunk_kda"] = lambda: kda.naive_chunk_kda(q, k, v, x["g_key"], beta)[0]
    with contextlib.suppress(ModuleNotFoundError):
        native = importlib.import_module("mlstm_kernels.torch.chunkwise.native")

        def mlstm() -> Tensor:
            # It takes what exp and a sigmoid make the gates of, and heads first.
            gates = (beta.log(), g - (-torch.expm1(g)).log())
            y: Tensor = native.mlstm_chunkwise__native_custbw(
                *(y.transpose(1, 2) for y in (q, k, v, *gates)), eps=0.0
            )
            return y.transpose(1, 2)

        found["mlstm_kernels' native"] = mlstm
    return found


def check(size: Size) -> dict[str, float]:
    """Largest difference of output and gradients between rivals, relative to the largest entry."""
    size = replace(size, tokens=CHECKED)
    x = operands(size)
    found = contenders(x, size)
    differences = {}
    leaves = list(x.values())
    for contender, rival, kind, _ in GOALS:
        if kind != "speed-up" or rival not in found:
            continue
        pairs = []
        for name in (contender, rival):
            y = found[name]()
            gradients = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
            pairs.append([y.detach(), *(z for z in gradients if z is not None)])
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*pairs, strict=True))
        differences[f"{contender} / {rival}"] = worst
    for name, function in found.items():
        if not bool(torch.isfinite(function()).all()):
            raise RuntimeError(f"{name} gives a result that is not finite")
    # Two float32 algorithms: a few hundred units of rounding apart at most, a bug is far more.
    limit = 512 * torch.finfo(torch.float32).eps
    for pair, worst in differences.items():
        if not worst <= limit:
            raise RuntimeError(f"{pair}: results differ by {worst:.2g}, more than {limit:.0e}")
    return differences


def once(function: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[float, float]:
    """Seconds of one forward pass and of one forward and backward pass."""
    for leaf in leaves:
        leaf.grad = None
    start = time.perf_counter()
    y = function()
    middle = time.perf_counter()
    y.backward(torch.ones_like(y))
    return middle - start, time.perf_counter() - start


def resident(key: str) -> int:
    """A memory figure of this process in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def peak(function: Callable[[], Tensor], leaves: list[Tensor]) -> int | None:
    """Growth of the peak resident set over a forward and backward pass; None where not known."""
    for leaf in leaves:
        leaf.grad = None
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS:")
        once(function, leaves)
        return resident("VmHWM:") - before
    except (OSError, RuntimeError, AttributeError):
        return None


def measure(
    size: Size, rounds: int, patience: float, memory: bool, console: Console
) -> tuple[list[Timing], dict[str, str]]:
    """All contenders at one size, interleaved, and who is left out, with the reason."""
    x = operands(size)
    leaves = list(x.values())
    timings: dict[str, Timing] = {}
    calls: list[Callable[[], tuple[float, float]]] = []
    left_out: dict[str, str] = {}
    need = 6 * 64 * 4 * size.tokens * size.heads * size.width
    for name, function in contenders(x, size).items():
        if name in LARGE and need > MEMORY_LIMIT:
            left_out[name] = f"it needs {need / 2**30:.0f} GiB"
            continue
        start = time.perf_counter()
        grown = (peak if memory else once)(function, leaves)
        spent = time.perf_counter() - start
        if spent > LONGEST:
            left_out[name] = f"one call takes {spent:.1f} s"
            continue
        timings[name] = Timing(size, name, memory=grown if isinstance(grown, int) else None)
        calls.append(partial(once, function, leaves))
    times = in_turns(calls, seconds=patience, most=rounds, warm=True)
    for timing, own in zip(timings.values(), times, strict=True):
        timing.forward, timing.both = map(list, zip(*own, strict=True))
    for name, why in left_out.items():
        console.print(f"{name} is left out: {why}")
    return list(timings.values()), left_out


# Shapes that chunks of 64 tokens do not suit: contender and rival, each a variant, an engine and an
# instance, with the cost that the contender should have at most, both of as many tokens.
FEW, MORE = Instance(B=64, T=16, H=4, K=64, V=64), Instance(B=8, T=128, H=4, K=64, V=64)
NARROW = Instance(T=1500, H=256, K=16, V=1)
SHAPES = (
    *(
        ((name, "chunked", FEW), (name, "chunked", MORE), 1.2)
        for name in ("simple_gla", "gla", "gated_deltanet", "metaplastic_gated_deltanet")
    ),
    (("gla", "chunked", NARROW), ("gla", "reference", NARROW), 1.0),
)


def shapes(rounds: int, patience: float, console: Console) -> list[dict[str, Any]]:
    """Those shapes, forward and backward, in turns."""

    def call(name: str, impl: str, one: Instance) -> Callable[[], tuple[float, float]]:
        spec = load(name)
        x = one.operands(spec, torch.float32)
        leaves = [y.requires_grad_() for y in x.values()]
        return partial(once, lambda: attention(spec, **x, impl=impl).output, leaves)

    rows: list[dict[str, Any]] = []
    for contender, rival, goal in SHAPES:
        calls = [call(*contender), call(*rival)]
        ours, theirs = ([y for _, y in x] for x in in_turns(calls, seconds=patience, most=rounds))
        against = spread([a / b for a, b in zip(ours, theirs, strict=False)])
        labels = [
            f"{name}, {impl}, B {one.B}, T {one.T}, H {one.H}, K {one.K}, V {one.V}"
            for name, impl, one in (contender, rival)
        ]
        rows.append(
            {
                "contender": labels[0],
                "rival": labels[1],
                "goal": goal,
                "seconds": spread(ours)._asdict(),
                "rival_seconds": spread(theirs)._asdict(),
                "ratio": against._asdict(),
                "met": against.p50 <= goal,
            }
        )
        console.print(
            f"{labels[0]}: {against.p50:.2f} ({against.p20:.2f} to {against.p80:.2f}) times "
            f"{labels[1]}, {median(ours) * 1e3:.1f} ms (goal <= {goal})"
        )
    return rows


def synapse_memory(tokens: tuple[int, ...], console: Console) -> list[dict[str, float]]:
    """Peak memory of the synapse class's training against keeping the states of every token."""
    table = Table(title="synapse, forward + backward: peak memory (H 4, K = V = 64)")
    for column in (
        "T",
        "peak MiB",
        "of which grows per token and head, KiB",
        "per-token states, KiB",
    ):
        table.add_column(column, justify="right")
    rows: list[dict[str, float]] = []
    for count in tokens:
        size = Size(count, 4, 64)
        x = operands(size)
        leaves = list(x.values())
        function = contenders(x, size)["synapse"]
        once(function, leaves)
        found = peak(function, leaves)
        if found is None:
            return []
        states = 2 * 64 * 64 * 4
        row: dict[str, float] = {"tokens": count, "peak": found, "states": states}
        grown = ""
        if rows:
            grown_bytes = (found - rows[-1]["peak"]) / (4 * (count - rows[-1]["tokens"]))
            row["per_token_head"] = grown_bytes
            grown = f"{grown_bytes / 1024:.2f}"
        rows.append(row)
        table.add_row(str(count), f"{found / 2**20:.0f}", grown, f"{states / 1024:.0f}")
    console.print(table)
    return rows


# A token of decoding: the function that transformers falls back to, and what computes the same.
TOKENS = {
    "mamba2": "mamba2_selective_state_update",
    "gated_deltanet": "torch_recurrent_gated_delta_rule",
}
# What has no function of its own there stands beside the second.
OTHERS = (
    "kda", "gla", "retnet", "palimpsa", "longhorn", "metaplastic_mamba2",
    "metaplastic_gated_deltanet", "metaplastic_gated_deltanet[value]",
)  # fmt: skip


def processor_time(function: Callable[[], object], calls: int) -> float:
    """Seconds of this process per call: others who share the cores do not count."""
    start = time.process_time()
    for _ in range(calls):
        function()
    return (time.process_time() - start) / calls


def token_contenders() -> dict[str, tuple[str, Callable[[], object]]]:
    """Functions of a token, B 1, H 8, K = V = 64, with the name of each one's rival."""
    mamba2 = inspect.unwrap(modeling_mamba2.mamba2_selective_state_update)
    delta_rule = inspect.unwrap(modeling_qwen3_next.torch_recurrent_gated_delta_rule)
    one = Instance(T=1, H=8, K=64, V=64, start=True)
    x = one.operands(load("gated_deltanet"), torch.float32)
    memory = one.state(load("gated_deltanet")).memory.float()
    q, k, v, g, beta = (x[name] for name in ("q", "k", "v", "g", "beta"))
    # Of the shapes that the mixer expands: a number of a head for all of its channels.
    a = g[0, 0, :, None, None].expand(8, 64, 64)
    held, step = memory.clone(), beta[:, 0, :, None].expand(1, 8, 64)
    found: dict[str, tuple[str, Callable[[], object]]] = {
        "mamba2_selective_state_update": (
            "",
            lambda: mamba2(held, v[:, 0], step, a, k[:, 0], q[:, 0]),
        ),
        "torch_recurrent_gated_delta_rule": (
            "",
            lambda: delta_rule(q, k, v, g, beta, memory, True),
        ),
    }
    engines = [name for name in available() if name != "reference"]
    for name in (*TOKENS, *OTHERS):
        source, _, gate = name.removesuffix("]").partition("[")
        spec = load(source)
        if gate:
            spec = metaplasticize(load(source.removeprefix("metaplastic_")), gate="value")
        given = {"k": None, **one.operands(spec, torch.float32)}
        state = one.state(spec).map(lambda y: y.float())
        options = {"initial_state": state, "output_final_state": True}
        rival = TOKENS.get(name, TOKENS["gated_deltanet"])
        for impl in engines:
            call = partial(attention, spec, **given, **options, impl=impl)
            found[f"{name}, {impl}"] = rival, call
    return found


def generation() -> dict[str, tuple[str, Callable[[], object]]]:
    """Generation of small models, and of what they are when converted."""
    shared = {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 4}
    mamba2 = Mamba2Config(
        **shared, num_heads=8, head_dim=32, state_size=32, n_groups=1, chunk_size=16
    )
    qwen3 = Qwen3NextConfig(
        **shared, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        linear_num_value_heads=8, linear_num_key_heads=4, linear_key_head_dim=32,
        linear_value_head_dim=32, intermediate_size=256, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=64, shared_expert_intermediate_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    models = {
        "mamba2": Mamba2ForCausalLM(mamba2).eval(),
        "qwen3_next": Qwen3NextForCausalLM(qwen3).eval(),
    }
    prompt = torch.randint(0, 256, (1, 16))
    found: dict[str, tuple[str, Callable[[], object]]] = {}
    for name, model in models.items():
        converted = metaplasticize(copy.deepcopy(model))
        for label, one in ((name, model), (f"{name}, converted", converted)):
            found[f"{label}: 32 tokens"] = (
                "" if one is model else f"{name}: 32 tokens",
                partial(
                    one.generate, prompt, max_new_tokens=32, min_new_tokens=32, do_sample=False,
                    pad_token_id=0,
                ),
            )  # fmt: skip
    return found


def decode(rounds: int, console: Console) -> list[dict[str, Any]]:
    """Tokens and generation in turns, one thread, in processor time, with the ratio of each round
    to its rival's."""
    rows: list[dict[str, Any]] = []
    table = Table(title="decoding, one thread: microseconds of the processor")
    for column in ("contender", "rival", "p20", "p50", "p80", "times the rival's", "p20 .. p80"):
        table.add_column(column, justify="left" if column in ("contender", "rival") else "right")
    kept = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        for found, calls, most in ((token_contenders(), 20, rounds), (generation(), 1, 9)):
            measures = [partial(processor_time, f, calls) for _, f in found.values()]
            times = dict(zip(found, in_turns(measures, seconds=60, most=most), strict=True))
            for name, (rival, _) in found.items():
                own = spread(times[name])
                row: dict[str, Any] = {"contender": name, "rival": rival, "seconds": own._asdict()}
                texts = ["", ""]
                if rival:
                    pairs = zip(times[name], times[rival], strict=True)
                    against = spread([x / y for x, y in pairs])
                    row["ratio"] = against._asdict()
                    texts = [f"{against.p50:.2f}", f"{against.p20:.2f} .. {against.p80:.2f}"]
                rows.append({**row, "n": len(times[name])})
                table.add_row(name, rival, *(f"{x * 1e6:.0f}" for x in own), *texts)
    torch.set_num_threads(kept)
    Console(width=max(console.width, 130)).print(table)
    return rows


def ratios(timings: list[Timing]) -> list[dict[str, Any]]:
    """Each pair at a size: medians of the rounds' ratios, forward and with backward, and memory."""
    by_name = {timing.contender: timing for timing in timings}
    found = []
    for contender, rival, kind, goal in GOALS:
        if contender not in by_name or rival not in by_name:
            continue
        ours, theirs = by_name[contender], by_name[rival]

        def of_rounds(a: list[float], b: list[float], kind: str = kind) -> Spread:
            # One of them may have had more rounds.
            pairs = zip(a, b, strict=False)
            return spread([y / x if kind == "speed-up" else x / y for x, y in pairs])

        both = of_rounds(ours.both, theirs.both)
        if ONE_WIDTH.get(contender, ours.size.width) != ours.size.width:
            goal = None
        memory = None
        if ours.memory and theirs.memory:
            memory = ours.memory / theirs.memory
        met = None
        if goal is not None:
            met = both.p50 >= goal if kind == "speed-up" else both.p50 <= goal
        found.append(
            {
                **asdict(ours.size),
                "contender": contender,
                "rival": rival,
                "kind": kind,
                "goal": goal,
                "forward": of_rounds(ours.forward, theirs.forward).p50,
                "both": both.p50,
                "spread": both._asdict(),
                "memory": memory,
                "met": met,
            }
        )
    return found


def show(size: Size, timings: list[Timing], compared: list[dict[str, Any]], to: Console) -> None:
    table = Table(title=str(size))
    for column in ("contender", "forward ms", "forward + backward ms", "p20 .. p80", "peak MiB"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for timing in timings:
        made = timing.summary()
        both = made["both"]
        table.add_row(
            timing.contender,
            f"{made['forward']['p50'] * 1e3:.1f}",
            f"{both['p50'] * 1e3:.1f}",
            f"{both['p20'] * 1e3:.1f} .. {both['p80'] * 1e3:.1f}",
            "-" if timing.memory is None else f"{timing.memory / 2**20:.0f}",
        )
    to.print(table)
    for row in compared:
        sign = ">=" if row["kind"] == "speed-up" else "<="
        goal = f"goal {sign} {row['goal']}: {'met' if row['met'] else 'missed'}"
        if row["met"] is None:
            goal = "no goal"
        memory = "" if row["memory"] is None else f", memory x {row['memory']:.2f}"
        to.print(
            f"  {row['contender']} against {row['rival']}: {row['kind']} {row['both']:.2f} "
            f"({row['spread']['p20']:.2f} .. {row['spread']['p80']:.2f}; {goal}), "
            f"forward alone {row['forward']:.2f}{memory}"
        )


def about(threads: int) -> dict[str, Any]:
    """Return what the numbers depend on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    load = os.getloadavg()[0]
    used = stated("torch", "transformers")
    return {"machine": machine(), "threads": threads, "load": load, **used, "commit": commit}


# Rows of docs/engines.md: (contender, rival, what they are called there).
TABLES = (
    (
        ("linear", "mamba2_chunk_scan", "`linear` | transformers' `mamba2_chunk_scan`"),
        (
            "delta",
            "torch_chunk_gated_delta_rule",
            "`delta` | transformers' `torch_chunk_gated_delta_rule`",
        ),
        (
            "delta, decay per key",
            "chunk_kimi_delta_attention",
            "`delta`, one decay per key | transformers' Kimi delta attention",
        ),
    ),
    (
        *(
            (f"metaplastic {name}", name, f"`{name}`, metaplastic, importance per key | `{name}`")
            for name in ("mamba2", "deltanet", "gated_deltanet", "kda")
        ),
        ("synapse", "linear", "`synapse` (one importance per synapse) | `linear`"),
    ),
)
WRITTEN = {
    "gated_deltanet": "`gated_deltanet`",
    "kda": "`kda`",
    "metaplastic_gated_deltanet": "`metaplastic_gated_deltanet`",
    "metaplastic_gated_deltanet[value]": "the same, importance per synapse",
    "palimpsa": "`palimpsa`",
}


def markdown(result: dict[str, Any]) -> str:
    """The rows of docs/engines.md: ratios at 8 heads of 64, ranges over all sizes, tokens."""

    def number(x: float) -> str:
        return f"{x:.2f}" if x < 2 else f"{x:.1f}" if x < 10 else f"{x:.0f}"

    def range_of(values: list[float]) -> str:
        return f"{number(min(values))} to {number(max(values))}"

    lines: list[str] = []
    for rows in TABLES:
        for contender, rival, text in rows:
            pair = [
                row
                for row in result["ratios"]
                if (row["contender"], row["rival"]) == (contender, rival)
            ]
            if not pair:
                continue
            at = {
                row["tokens"]: row["both"]
                for row in pair
                if (row["heads"], row["width"]) == (8, 64)
            }
            cells = [text, *(number(at[t]) if t in at else "" for t in (512, 2048, 8192))]
            cells.append(range_of([row["both"] for row in pair]))
            memory = [row["memory"] for row in pair if row["memory"]]
            if pair[0]["kind"] == "speed-up" and memory:
                cells.append(range_of(memory))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    tokens = {row["contender"]: row.get("ratio") for row in result.get("decode", ())}

    def times(name: str) -> str:
        x = tokens.get(name)
        return "" if x is None else f"{x['p50']:.2f} ({x['p20']:.2f} to {x['p80']:.2f})"

    lines += [
        f"| {text} | {times(f'{name}, compiled')} | {times(f'{name}, chunked')} |"
        for name, text in WRITTEN.items()
    ]
    alone = ("mamba2, compiled", "mamba2, chunked", *(x for x in tokens if "converted" in x))
    lines += ["", *(f"{name}: {times(name)}" for name in alone)]
    for row in result.get("shapes", ()):
        x = row["ratio"]
        against = f"{x['p50']:.2f} ({x['p20']:.2f} to {x['p80']:.2f})"
        lines.append(f"{row['contender']} against {row['rival']}: {against}")
    for size, left_out in result.get("left_out", {}).items():
        lines += [f"{size}, {name} is left out: {why}" for name, why in left_out.items()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two sizes, few rounds")
    parser.add_argument("--decode", action="store_true", help="decoding alone")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=None, help="at most; default 9, quick 5")
    parser.add_argument("--patience", type=float, default=None, help="seconds per contender")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--output", type=Path, default=None, help="where to write the JSON")
    parser.add_argument("--table", type=Path, help="print Markdown of this JSON, measure nothing")
    options = parser.parse_args()
    if options.table:
        print(markdown(json.loads(options.table.read_text())))
        return 0
    torch.set_num_threads(options.threads)
    console = Console()
    lengths = (512, 2048) if options.quick else (512, 2048, 8192)
    widths = ((8, 64),) if options.quick else ((4, 32), (16, 32), (2, 64), (8, 64), (4, 128))
    rounds = options.rounds or (5 if options.quick else 9)
    patience = options.patience or 1.5
    here = about(options.threads)
    console.print(here)
    today = datetime.datetime.now(tz=datetime.UTC)
    kind = "decode_" if options.decode else "quick_" if options.quick else ""
    name = f"cpu_{kind}{today:%Y-%m-%d_%H%M}.json"
    path: Path = options.output or RESULTS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "date": today.isoformat(timespec="seconds"),
        "quick": options.quick,
        "machine": here,
        "agreement": {},
        "timings": [],
        "ratios": [],
        "left_out": {},
        "shapes": [],
        "synapse_memory": [],
        "decode": [],
    }
    if path.exists():
        result |= json.loads(path.read_text())
        constant = ("machine", "threads", "torch", "transformers")
        if any(result["machine"].get(key) != here[key] for key in constant):
            sys.exit(f"{path} is of another machine: {result['machine']}; give another --output")

    def keep() -> None:
        path.write_text(json.dumps(result, indent=1) + "\n")

    absent = [name for name in ("fla", "mlstm_kernels", "numba") if find_spec(name) is None]
    if absent:
        console.print(f"not installed, left out: {', '.join(absent)}")
    start = time.perf_counter()
    if not result["decode"]:
        result["decode"] = decode(20 if options.quick else 60, console)
        keep()
    sizes = [Size(tokens, *width) for tokens in lengths for width in widths]
    for done, size in enumerate(() if options.decode else sizes):
        if str(size) in result["left_out"]:
            continue
        passed = (time.perf_counter() - start) / 60
        console.print(f"[bold]{size}[/bold]: {done} of {len(sizes)} done, {passed:.1f} minutes")
        width = f"H {size.heads}, K = V = {size.width}"
        if width not in result["agreement"]:
            result["agreement"][width] = differences = check(size)
            console.print(f"{width}: results agree, {max(differences.values()):.1e} at most")
        timings, left_out = measure(size, rounds, patience, not options.no_memory, console)
        found = ratios(timings)
        show(size, timings, found, console)
        result["timings"] += [timing.summary() for timing in timings]
        result["ratios"] += found
        result["left_out"][str(size)] = left_out
        keep()
    if not (options.decode or result["shapes"]):
        result["shapes"] = shapes(rounds, patience, console)
        keep()
    if not (options.no_memory or options.decode or result["synapse_memory"]):
        result["synapse_memory"] = synapse_memory((512, 2048, 8192), console)
    keep()
    compared = result["ratios"] + result["shapes"]
    stated = [row["met"] for row in compared if row["met"] is not None]
    console.print(f"{sum(stated)} of {len(stated)} goals met; written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
