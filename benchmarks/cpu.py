"""Times the chunked engine on a CPU against the PyTorch fallbacks that transformers ships.

    python benchmarks/cpu.py            # the whole table, eleven minutes on two cores
    python benchmarks/cpu.py --quick    # two sizes, about two minutes
    python benchmarks/cpu.py --decode   # tokens of decoding and generation alone, about two minutes
    python benchmarks/cpu.py --output FILE    # goes on where a run that was stopped left FILE

Every contender of a size gets the same operands, is first checked against the float32 result of its
rival, and is timed in the same rounds (interleaved, so that a busy machine disturbs all alike).
Times are wall-clock medians with the 20th and 80th percentile; memory is the growth of the peak
resident set over one forward and backward pass. Nothing is asserted about time. The result is
printed and written to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import datetime
import gc
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
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
from glazoo.compare.timing import in_turns, spread
from glazoo.engines import available, chunked
from glazoo.theory.instances import Instance
from glazoo.versions import stated

RESULTS = Path(__file__).parent / "results"
# The Kimi function makes tensors of T x 64 x H x K numbers, about six of which live at once.
MEMORY_LIMIT = 2 << 30
# (contender, rival, what the ratio should be): rival's time over the contender's for a speed-up,
# the contender's over the rival's for a cost.
GOALS = (
    ("linear", "mamba2_chunk_scan", "speed-up", 1.5),
    ("delta", "torch_chunk_gated_delta_rule", "speed-up", 1.5),
    ("delta, decay per key", "chunk_kimi_delta_attention", "speed-up", 1.5),
    ("metaplastic mamba2", "mamba2", "cost", 1.3),
    ("metaplastic deltanet", "deltanet", "cost", 1.3),
    ("metaplastic gated_deltanet", "gated_deltanet", "cost", 1.3),
    ("synapse", "linear", "cost", 8.0),
    ("synapse, compiled", "synapse", "speed-up", 4.0),
    ("synapse_delta, compiled", "synapse_delta", "speed-up", 4.0),
    ("importance, compiled", "importance", "speed-up", 2.0),
    ("mamba2, full precision", "delta", "cost", 6.0),
    ("gated_deltanet, full precision", "delta", "cost", 6.0),
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

    def gated(y: Tensor) -> Tensor:
        return y * beta.unsqueeze(-1)

    def linear() -> Tensor:
        return chunked.linear(q, k, v * (-g).unsqueeze(-1), g)[0]

    def delta(decay: Tensor) -> Tensor:
        return chunked.delta(q * scale, gated(k), k, gated(v), decay)[0]

    def synapse(core: Any) -> Tensor:
        values = v * (-g).unsqueeze(-1)
        return core.synapse(q, k, values, x["b_value"], g, prior=x["prior"])[0]

    def synapse_delta(core: Any) -> Tensor:
        return core.synapse_delta(q, k, v, beta, x["b_value"], g, prior=x["prior"])[0]

    def variant(name: str, metaplastic: bool, **form: Any) -> Callable[[], Tensor]:
        spec = load(name)
        gates: dict[str, Tensor] = {"beta": beta}
        if spec.decay.shape != "none":
            gates["g"] = g
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
    for name in ("mamba2", "deltanet", "gated_deltanet"):
        found[name] = variant(name, metaplastic=False)
        found[f"metaplastic {name}"] = variant(name, metaplastic=True)
    for name in ("mamba2", "gated_deltanet"):
        found[f"{name}, full precision"] = variant(name, metaplastic=True, precision="full")
    if 6 * 64 * 4 * size.tokens * size.heads * size.width <= MEMORY_LIMIT:
        found["chunk_kimi_delta_attention"] = lambda: kimi(q, k, v, x["g_key"], beta)[0]
    return found


def check(found: dict[str, Callable[[], Tensor]], x: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of output and gradients between rivals, relative to the largest entry."""
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
) -> tuple[list[Timing], dict[str, float]]:
    """All contenders at one size, interleaved."""
    x = operands(size)
    leaves = list(x.values())
    found = contenders(x, size)
    differences = check(found, x)
    console.print(f"[bold]{size}[/bold]: results agree, {max(differences.values()):.1e} at most")
    timings = {name: Timing(size, name) for name in found}
    if memory:
        for name, function in found.items():
            timings[name].memory = peak(function, leaves)
    calls = [partial(once, function, leaves) for function in found.values()]
    # Slow contenders get fewer rounds, but at least two.
    times = in_turns(calls, seconds=patience, least=2, most=rounds)
    for timing, own in zip(timings.values(), times, strict=True):
        timing.forward, timing.both = map(list, zip(*own, strict=True))
    return list(timings.values()), differences


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
    """Each goal at each size: medians of forward, forward + backward, and memory."""
    by_name = {timing.contender: timing for timing in timings}
    found = []
    for contender, rival, kind, goal in GOALS:
        if contender not in by_name or rival not in by_name:
            continue
        ours, theirs = by_name[contender], by_name[rival]

        def ratio(a: float, b: float, kind: str = kind) -> float:
            return b / a if kind == "speed-up" else a / b

        both = ratio(median(ours.both), median(theirs.both))
        stated = ONE_WIDTH.get(contender, ours.size.width) == ours.size.width
        memory = None
        if ours.memory and theirs.memory:
            memory = ours.memory / theirs.memory
        found.append(
            {
                **asdict(ours.size),
                "contender": contender,
                "rival": rival,
                "kind": kind,
                "goal": goal if stated else None,
                "forward": ratio(median(ours.forward), median(theirs.forward)),
                "both": both,
                "memory": memory,
                "met": None if not stated else both >= goal if kind == "speed-up" else both <= goal,
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
            goal = "no goal at this width"
        memory = "" if row["memory"] is None else f", memory x {row['memory']:.2f}"
        to.print(
            f"  {row['contender']} against {row['rival']}: {row['kind']} {row['both']:.2f} "
            f"({goal}), "
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two sizes, few rounds")
    parser.add_argument("--decode", action="store_true", help="decoding alone")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=None, help="default 5, quick 3")
    parser.add_argument("--patience", type=float, default=None, help="seconds per contender")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--output", type=Path, default=None, help="where to write the JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console()
    lengths = (512, 2048) if options.quick else (512, 2048, 8192)
    widths = ((8, 64),) if options.quick else ((4, 32), (16, 32), (2, 64), (8, 64), (4, 128))
    rounds = options.rounds or (3 if options.quick else 5)
    patience = options.patience or (5.0 if options.quick else 10.0)
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
        "synapse_memory": [],
        "decode": [],
    }
    if path.exists():
        result = json.loads(path.read_text())
        constant = ("machine", "threads", "torch", "transformers")
        if any(result["machine"].get(key) != here[key] for key in constant):
            sys.exit(f"{path} is of another machine: {result['machine']}; give another --output")
    if not result.get("decode"):
        result["decode"] = decode(20 if options.quick else 60, console)
        path.write_text(json.dumps(result, indent=1) + "\n")
    for tokens in () if options.decode else lengths:
        for heads, width in widths:
            size = Size(tokens, heads, width)
            if str(size) in result["agreement"]:
                continue
            timings, differences = measure(size, rounds, patience, not options.no_memory, console)
            found = ratios(timings)
            show(size, timings, found, console)
            result["timings"] += [timing.summary() for timing in timings]
            result["ratios"] += found
            result["agreement"][str(size)] = differences
            path.write_text(json.dumps(result, indent=1) + "\n")
    if not (options.no_memory or options.decode or result["synapse_memory"]):
        result["synapse_memory"] = synapse_memory((512, 2048, 8192), console)
    path.write_text(json.dumps(result, indent=1) + "\n")
    compared = result["ratios"]
    stated = [row["met"] for row in compared if row["met"] is not None]
    console.print(f"{sum(stated)} of {len(stated)} goals met; written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
