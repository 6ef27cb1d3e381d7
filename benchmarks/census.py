"""Read registers, spill, shared memory and instructions of every kernel from machine code.

    python benchmarks/census.py                          every kernel, sm_90, K/V = 128/128
    python benchmarks/census.py --target gfx942 --shape 96/192
    python benchmarks/census.py --opcodes delta_state    its main loop by opcode
    python benchmarks/census.py --sum                    sums over passes, against their goals
    python benchmarks/census.py --traffic [CASE]         bytes of kernels and of what is around them
    python benchmarks/census.py --check [--quick]        compare with benchmarks/budgets.toml
    python benchmarks/census.py --write-budgets          measure the matrix, write budgets
    python benchmarks/census.py --peer fla               what fla moves and issues beside ours

No GPU is needed. The host code runs on meta tensors and records what it would launch, so
signatures, tiles and pointer alignment are those of a real call. `work` is instructions of the main
loop, times threads, per unit of work of one iteration: per token x key x value of a program's tile
(per token x key where the kernel has no values, per state entry in a decode step). Without a loop
it is the whole kernel's. Of a kernel with several loops the longest that holds no other counts.

The class with an importance for every synapse has a goal: the work of its passes that touch every
synapse and token, one after the other, is at most GOALS. Passes over every key and token alone are
left out; `--sum` lists them, divided by V. Approximate reciprocals, as they are the default.

`--traffic` counts bytes per token and head of a whole `glazoo.attention(impl="triton")`, see
traffic.py. Those of the eager operations around the kernels have budgets, too. `--peer` adds the
instructions that are issued and compares with another package, see peer.py.
"""

import argparse
import collections
import dataclasses
import functools
import importlib
import itertools
import math
import pathlib
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import peer
import torch
import traffic
import triton
from machine_code import SHARED_LIMIT, TARGETS, assemble, main_loop, misled_products, parse
from torch import Tensor

from glazoo.kernels.common import IMPORTANCES, Launch, interpreting, record_launches
from glazoo.kernels.loops import (
    GatedDelta,
    GatedLinear,
    Importance,
    Riccati,
    Solve,
    Synapse,
    SynapseDelta,
    Whiten,
    WhitenedLinear,
)
from glazoo.kernels.step import (
    Posterior,
    run_delta_step,
    run_importance_step,
    run_linear_step,
    run_posterior_step,
)

HERE = pathlib.Path(__file__).parent
BUDGETS = HERE / "budgets.toml"
# The table of BUDGETS that is of no target.
EAGER = "eager"
SHAPES = ((64, 64), (128, 128), (128, 256), (96, 192))
# Kernels that are faster for all that they spill as many bytes: measured, see LOG.md.
SPILLED = {"chunk_dkey": 112}
# Room that a budget leaves for instructions: another Triton schedules a little differently.
ROOM = 1.05
GATES = ("none", "head", "key")
# Arguments whose product is the units of work in one iteration of a kernel's main loop; 1 where a
# kernel has no such argument. synapse_local's loop is unrolled by two.
UNIT = ("BT", "BK", "BV", "BH")
UNITS: dict[str, tuple[str | int, ...]] = {
    "importance": ("ROWS", "BK"),
    "importance_backward": ("ROWS", "BK"),
    "importance_carry": ("BC", "BK"),
    "riccati_carry": ("BC", "BK"),
    "synapse_keep": ("BS", "BK"),
    "synapse_state": ("BS", "BK", "BV"),
    "synapse_output": ("BK", "BV"),
    "synapse_local": (2, "BK", "BV"),
    "synapse_carry": ("SUB", "BK", "BV"),
    "synapse_columns": ("SUB", "BK"),
    "synapse_gradient": ("SUB", "BV"),
    "synapse_finish": ("SUB", "BK"),
    "solve": ("BR", "K"),
}
# Kernels whose machine code no V decides, and K by little but a tile that all shapes share.
PLAIN = ("importance", "riccati", "chunk_gate")


def given(arguments: Mapping[str, Any], name: str) -> bool:
    """Return whether a kernel got an optional operand."""
    return arguments.get(name) is not None


# Kernels that give what a chunk does to a state where they are given none.
MAPS = ("importance", "importance_backward", "riccati_scan", "riccati_backward")
# What else tells apart launches of one kernel, and its place in their name.
VARIANTS: dict[str, Callable[[str, Mapping[str, Any]], object]] = {
    "has_e": lambda name, x: x.get("HAS_E") or (given(x, "e_near") or given(x, "de_near")),
    "reverse": lambda _, x: x.get("REVERSE"),
    "has_state": lambda _, x: x.get("HAS_STATE"),
    "pre": lambda _, x: x.get("PRE"),
    "prev": lambda _, x: x.get("PREV"),
    "delta": lambda _, x: x.get("DELTA"),
    **{
        at: lambda _, x, i=i: (given(x, "scaled") or given(x, "dscaled")) and x["AT"] == i
        for i, at in enumerate(IMPORTANCES)
    },
    "exact": lambda _, x: x.get("EXACT"),
    "diagonal": lambda _, x: x.get("DIAGONAL"),
    "uncertainty": lambda name, x: (
        name.startswith(("synapse", "posterior"))
        and (x.get("DOUBT") or given(x, "u") or given(x, "du"))
    ),
    "map": lambda name, x: name in MAPS and not given(x, "entering"),
    "frozen": lambda name, x: name.startswith("synapse_delta") and not given(x, "b"),
    "one_state": lambda name, x: name == "synapse_state" and not given(x, "b"),
    "kept": lambda name, x: name == "synapse_delta" and given(x, "kept"),
    "{BV}_values": lambda name, x: name in ("delta_state", "delta_dstate"),
    "solved": lambda _, x: given(x, "matrix") and given(x, "score"),
}
# Forms of synapse, the default first: read, uncertainty.
READS = (("post", False), ("pre", False), ("post", True))
# Forms of synapse_delta, the default first: frozen; gain, correction, base; uncertainty.
RULES = (
    (False, ("first_order", "full", "decayed"), False),
    (False, ("first_order", "full", "decayed"), True),
    (False, ("first_order", "full", "prev"), False),
    (False, ("exact", "full", "decayed"), False),
    (False, ("exact", "diagonal", "decayed"), False),
    (True, ("exact", "diagonal", "decayed"), False),
)
# Forms of posterior_step, the default first: correction, gain, uncertainty.
POSTERIORS = (
    ("none", "first_order", False),
    ("none", "first_order", True),
    ("full", "first_order", False),
    ("full", "exact", False),
    ("diagonal", "exact", False),
)


class Direction(NamedTuple):
    """Passes of a class in one direction: over every synapse and token, whose work has a goal, and
    over every key and token alone."""

    passes: tuple[str, ...]
    keyed: tuple[str, ...]
    goal: float


GOALS = {
    "synapse": {
        "forward": Direction(("synapse_state", "synapse_output"), ("synapse_keep",), 12.0),
        "backward": Direction(
            ("synapse_state", "synapse_local", "synapse_carry", "synapse_gradient"),
            ("synapse_keep", "synapse_columns", "synapse_finish"),
            45.0,
        ),
    }
}


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What the machine code of one launch needs."""

    name: str
    target: str
    shape: tuple[int, int]
    registers: int
    spill: int
    shared: int
    work: float
    opcodes: collections.Counter[str]
    misled: int

    @property
    def key(self) -> tuple[str, str]:
        return self.target, self.name


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _calls(K: int, V: int, gate: str, B: int, T: int) -> Iterator[Callable[[], object]]:
    """The host functions behind every public operation and its options, at one gate's shape."""
    H, HV = 8, 16
    q, k, e, w = (_meta(B, T, h, d) for h, d in ((H, K), (H, K), (H, K), (HV, V)))
    shapes = {"none": None, "head": (B, T, HV), "key": (B, T, HV, K)}
    g = None if (shape := shapes[gate]) is None else _meta(*shape, dtype=torch.float32)
    state = _meta(B, HV, K, V, dtype=torch.float32)
    importance = _meta(B, HV, K, dtype=torch.float32)
    b = _meta(B, T, HV, dtype=torch.float32)
    value_b = _meta(B, T, HV, V)
    prior = _meta(HV, K, dtype=torch.float32)
    matrix = _meta(B, HV, K, K, dtype=torch.float32)

    def passes(name: str, x: Any, *read: int) -> Callable[[], None]:
        """Forward and backward pass, which reads some outputs; or a step of decoding."""
        of = importlib.import_module(f"glazoo.kernels.{name}")

        def call() -> None:
            if T == 1:
                of.step(x)
                return
            found = of.forward(x, True)
            grads = [y if y.numel() else None for y in found]
            of.gradients(x, grads, x, *(found[i] for i in read))

        return call

    # Other forms than the default: with a gate, which takes more than none.
    forms = 1 if gate == "none" else None
    for read, uncertainty in READS[:forms]:
        options = (None, read, uncertainty, False)
        yield passes("synapse", Synapse(q, k, w, value_b, g, prior, state, state, *options))
    for frozen, rule, uncertainty in RULES[:forms]:
        gates = (value_b, None if frozen else value_b, g)
        rest = (prior, state, state, None, *rule, uncertainty, False)
        yield passes("synapse_delta", SynapseDelta(q, k, w, *gates, e, k, *rest))
    # With gates of writes where there is one of decays: without any these cost nothing.
    write = None if gate == "none" else b
    linear = GatedLinear(q, k, w, g, write, state, None, "post", 0.5)
    delta = GatedDelta(q, e, k, w, g, write, write, state, None, "decayed", 0.5)
    scan = Importance(k, b, g, importance, None)
    if T == 1:
        yield lambda: run_linear_step(linear)
        yield lambda: run_delta_step(delta)
        yield lambda: run_importance_step(scan)
        given = (q, k, e, w, b, b, g, prior, state, importance)
        for correction, gain, uncertainty in POSTERIORS[:forms]:
            x = Posterior(*given, correction, gain, "post", "decayed", False, uncertainty)
            yield functools.partial(run_posterior_step, x)
        return
    yield passes("linear", linear)
    yield passes("delta", delta, 2)
    yield passes("importance", scan, 2)
    for at in ("written", "found"):
        options = (at, g is not None, at == "found", False)
        yield passes("whiten", Whiten(None, k, b, g, prior, importance, None, *options), -1)
    gates = (b, g, write, prior, state, importance)
    for read in ("post", "pre"):
        x = WhitenedLinear(q, k, w, *gates, None, read, 0.5, False)
        yield passes("whitened_linear", x, -2, -1)
    one, kept = b.unsqueeze(3), _meta(B, T, HV, K, dtype=torch.float32)
    factors = {"none": (one, one, one), "head": (one, kept, one), "key": (kept, kept, one)}[gate]
    yield passes("riccati", Riccati(*factors, kept, importance, None), 0)
    if gate != "key":
        solve = Solve(q, k, b, g, prior, matrix, None)
        yield lambda: importlib.import_module("glazoo.kernels.solve").forward(solve, False)


def _identity(launch: Launch) -> str:
    """Return what decides the machine code of a launch."""
    constants = {
        name: str(x.dtype) if isinstance(x, Tensor) else x
        for name, x in launch.arguments.items()
        if name not in ("T", "dg_stride", "c_first", "c_end")
    }
    return f"{launch.kernel.__name__} {sorted(constants.items(), key=str)} {launch.tiles}"


def _kernel(launch: Launch) -> str:
    return launch.kernel.__name__.removesuffix("_kernel")


def launches(
    target: str, K: int, V: int, pattern: str = "", gates: Iterable[str] = GATES
) -> Iterator[tuple[str, Launch]]:
    """Every distinct launch of the operations, with a name: kernel, gate, variants."""
    seen = set()
    for gate, (batch, tokens) in itertools.product(gates, ((1, 4096), (16, 2048), (64, 1))):
        for call in _calls(K, V, gate, batch, tokens):
            with record_launches(target) as recorded:
                call()
            for launch in recorded:
                kernel, arguments = _kernel(launch), launch.arguments
                # What no shape but K decides is measured at one shape.
                if kernel.startswith(PLAIN) and (K, V) != (128, 128):
                    continue
                if (identity := _identity(launch)) in seen:
                    continue
                seen.add(identity)
                labels = [x for x, has in VARIANTS.items() if has(kernel, arguments)]
                name = "/".join([kernel, gate, *(x.format_map(arguments) for x in labels)])
                if re.search(pattern, name):
                    yield name, launch


def _unit(launch: Launch) -> int:
    """Units of work of one iteration of a program."""
    factors = UNITS.get(_kernel(launch), UNIT)
    return math.prod(x if isinstance(x, int) else launch.arguments.get(x, 1) for x in factors)


def measure(name: str, launch: Launch, target: str, shape: tuple[int, int]) -> Measurement:
    """Compile one launch and read its machine code."""
    code = assemble(launch, target)
    opcodes = main_loop(parse(code.text))
    misled = misled_products(code.text) if target.startswith("sm_") else 0
    threads = launch.tiles.num_warps * TARGETS[target].warp_size
    work = len(opcodes) * threads / _unit(launch)
    count = collections.Counter(x.split(".")[0] for x in opcodes)
    return Measurement(
        name, target, shape, code.registers, code.spill, code.shared, work, count, misled
    )


def matrix(
    targets: Iterable[str],
    shapes: Iterable[tuple[int, int]],
    pattern: str = "",
    gates: Iterable[str] = GATES,
) -> Iterator[Measurement]:
    """Measurements of every kernel in whose name `pattern`, a regular expression, is found."""
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET is set: kernels cannot be compiled in this process")
    for target, shape in itertools.product(targets, shapes):
        for name, launch in launches(target, *shape, pattern, gates):
            yield measure(name, launch, target, shape)


class Total(NamedTuple):
    """Work of a class in one direction, per synapse and token, and what its kernels spill."""

    target: str
    shape: tuple[int, int]
    name: str
    work: float
    keyed: float
    goal: float
    spill: int


def totals(target: str, shape: tuple[int, int]) -> Iterator[Total]:
    """Every sum that has a goal, of the default form of its class: a read after the write, no
    uncertainty."""
    for (name, directions), gate in itertools.product(GOALS.items(), ("head", "key")):
        names = {x for of in directions.values() for x in (*of.passes, *of.keyed)}
        found: dict[str, Measurement] = {}
        for x in matrix([target], [shape], rf"^({'|'.join(sorted(names))})/{gate}$", [gate]):
            kernel = x.name.split("/")[0]
            # Forward and backward differ in how far apart they store states.
            found[kernel] = max(x, found.get(kernel, x), key=lambda y: y.work)
        for direction, of in directions.items():
            yield Total(
                target,
                shape,
                f"{name} {gate} {direction}",
                sum(found[x].work for x in of.passes),
                # Only a gate of every key needs all of these.
                sum(found[x].work for x in of.keyed if x in found) / shape[1],
                of.goal,
                sum(found[x].spill for x in (*of.passes, *of.keyed) if x in found),
            )


def violations(found: Measurement, budget: dict[str, float] | None) -> list[str]:
    """In what a measurement is over its budget."""
    where = f"{found.target} {found.name} K/V {found.shape[0]}/{found.shape[1]}"
    if budget is None:
        return [f"{where}: has no budget in {BUDGETS.name}"]
    over = [
        f"{where}: {field} {getattr(found, field):.3g}, budget {budget[field]:.3g}"
        for field in ("registers", "shared", "work")
        if getattr(found, field) > budget[field]
    ]
    if found.spill > SPILLED.get(found.name.partition("/")[0], 0):
        over.append(f"{where}: {found.spill} bytes spilled")
    if found.misled:
        over.append(f"{where}: {found.misled} products take addresses from data")
    if found.shared > SHARED_LIMIT[found.target]:
        over.append(
            f"{where}: shared memory {found.shared}, the target has {SHARED_LIMIT[found.target]}"
        )
    return over


def eager_bytes(pattern: str = "") -> dict[str, dict[str, float]]:
    """Bytes of eager operations, by case so named and direction."""
    return {x: traffic.eager_bytes(x) for x in traffic.CASES if re.search(pattern, x)}


def eager_violations(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """In what eager bytes differ from their budgets: fewer are a budget to be written anew."""
    budgets = read_budgets()[EAGER]
    return [
        f"eager bytes of {case}, {direction}: {x:.0f}, budget {budget}"
        for case, directions in found.items()
        for direction, x in directions.items()
        if round(x) != (budget := budgets.get(case, {}).get(direction))
    ]


@functools.cache
def read_budgets() -> dict[str, dict[str, dict[str, float]]]:
    """Budgets by target and kernel, and of eager bytes by case and direction."""
    return tomllib.loads(BUDGETS.read_text())


def write_budgets(found: list[Measurement], keep: bool) -> None:
    """Write what was measured, the largest over shapes, and with `keep` over what the file says."""
    most: dict[tuple[str, str], tuple[int, int, float]] = {}
    for target in TARGETS if keep and BUDGETS.exists() else ():
        for name, x in read_budgets().get(target, {}).items():
            most[target, name] = (int(x["registers"]), int(x["shared"]), x["work"] / ROOM)
    for x in found:
        seen = most.get(x.key, (0, 0, 0.0))
        most[x.key] = (max(seen[0], x.registers), max(seen[1], x.shared), max(seen[2], x.work))
    lines = [
        "# Largest need of each kernel over K/V = 64/64, 128/128, 128/256, 96/192 in bfloat16;",
        f"# of {', '.join(f'{x}*' for x in PLAIN)} at 128/128: no V decides them, K by little.",
        "# registers per thread, bytes of shared memory, work: see census.py. Spill: none.",
        f"# Work has {ROOM - 1:.0%} of room.",
        f"# Written by `python benchmarks/census.py --write-budgets`, Triton {triton.__version__}.",
    ]
    for target in TARGETS:
        lines += ["", f"[{target}]"]
        lines += [
            f'"{name}" = {{ registers = {r}, shared = {s}, work = {w * ROOM:.4g} }}'
            for (at, name), (r, s, w) in sorted(most.items())
            if at == target
        ]
    lines += [
        "",
        "# Bytes of eager operations, per token and head: see traffic.py.",
    ]
    lines += [f"[{EAGER}]"]
    lines += [
        f'"{case}" = {{ forward = {x["forward"]:.0f}, backward = {x["backward"]:.0f} }}'
        for case, x in eager_bytes().items()
    ]
    BUDGETS.write_text("\n".join(lines) + "\n")


def _print(found: list[Measurement], opcodes: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="resources")
    for column in ("kernel", "target", "K/V"):
        table.add_column(column, overflow="fold")
    for column in ("registers", "spilled B", "shared B", "work"):
        table.add_column(column, justify="right")
    for x in found:
        shape = f"{x.shape[0]}/{x.shape[1]}"
        table.add_row(
            x.name, x.target, shape, str(x.registers), str(x.spill), str(x.shared), f"{x.work:.3g}"
        )
    console.print(table)
    for x in found if opcodes else ():
        total = x.opcodes.total()
        table = Table("opcode", title=f"{x.name}, {x.target}: main loop, {total} instructions")
        for column in ("count", "share"):
            table.add_column(column, justify="right")
        for opcode, count in x.opcodes.most_common():
            table.add_row(opcode, str(count), f"{count / total:.0%}")
        console.print(table)


def _print_totals(found: list[Total]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="instructions per synapse and token, summed over passes")
    for column in ("class, gate, direction", "target", "K/V"):
        table.add_column(column, overflow="fold")
    for column in ("work", "goal", "passes over keys, / V", "spilled B"):
        table.add_column(column, justify="right")
    for x in found:
        shape = f"{x.shape[0]}/{x.shape[1]}"
        work, goal, keyed = (f"{y:.2f}" for y in (x.work, x.goal, x.keyed))
        table.add_row(x.name, x.target, shape, work, goal, keyed, str(x.spill))
    Console().print(table)


def _print_traffic(pattern: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="bytes per token and head, K/V = 128/128, bfloat16")
    table.add_column("case", overflow="fold")
    for direction in traffic.DIRECTIONS:
        for column in ("kernels", "eager", "sum"):
            table.add_column(f"{direction} {column}", justify="right")
    for case in traffic.CASES:
        if re.search(pattern, case):
            found = traffic.traffic(case).values()
            cells = (y for x in found for y in (x.kernels, x.eager, x.total))
            table.add_row(case, *(f"{y:,.0f}" for y in cells))
    Console().print(table)


# What --quick compiles: a part of the kernels where most users are, and where limits are tight.
QUICK = (
    ("sm_90", (128, 128), r"^(?!synapse|solve|riccati).*/head"),
    ("sm_90", (128, 128), r"^synapse_(?!.*/one_state)\w+/head$"),
    ("sm_90", (128, 128), "keyed"),
    ("sm_80", (128, 128), r"^delta_dstate|^synapse_(local|gradient)/key$|^solve/head$"),
    ("sm_80", (128, 128), r"^riccati_backward/head$"),
    ("sm_100", (128, 128), "dkey"),
    ("gfx942", (128, 128), r"^delta_state|^synapse_output/head$"),
)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--target", choices=TARGETS, help="default: sm_90; all with --check or --write-budgets"
    )
    parser.add_argument(
        "--shape", help="K/V; default: 128/128; all with --check or --write-budgets"
    )
    parser.add_argument("--opcodes", metavar="KERNEL", help="census by opcode of kernels so named")
    parser.add_argument(
        "--sum", action="store_true", help="sums of work that have goals; 1 if one is over"
    )
    parser.add_argument(
        "--traffic",
        metavar="CASE",
        nargs="?",
        const="",
        help="bytes that kernels and eager operations move, of all cases or those so named",
    )
    parser.add_argument(
        "--peer", choices=["fla"], help="an estimate of time of its kernels and ours; 1 if over"
    )
    parser.add_argument(
        "--case", metavar="PATTERN", default="", help="with --peer: recurrences so named"
    )
    parser.add_argument("--passes", action="store_true", help="with --peer: every kernel, too")
    parser.add_argument("--check", action="store_true", help="compare with the budgets; 1 if over")
    parser.add_argument("--quick", action="store_true", help="with --check: a part of the matrix")
    parser.add_argument("--write-budgets", action="store_true")
    options = parser.parse_args()
    shape = tuple(map(int, options.shape.split("/"))) if options.shape else None
    if options.traffic is not None:
        _print_traffic(options.traffic)
        return 0
    if options.peer:
        try:
            at = [shape] if shape else peer.SHAPES
            return 0 if peer.print_rows(at, options.case, options.passes) else 1
        except ImportError as error:
            parser.exit(2, f"{error}\n")
    one = [options.target or "sm_90"], [shape or (128, 128)]
    if options.sum:
        sums = [x for target, at in itertools.product(*one) for x in totals(target, at)]
        _print_totals(sums)
        return 1 if any(x.work > x.goal or x.spill for x in sums) else 0
    if not (options.check or options.write_budgets):
        _print(list(matrix(*one, options.opcodes or "")), options.opcodes is not None)
        return 0
    parts = [
        (target, at, "")
        for target in ([options.target] if options.target else TARGETS)
        for at in ([shape] if shape else SHAPES)
    ]
    found = []
    for target, at, pattern in QUICK if options.quick else parts:
        part = list(matrix([target], [at], pattern))
        found += part
        print(f"{target} K/V {at[0]}/{at[1]}: {len(part)} kernels compiled", flush=True)
    if options.write_budgets:
        write_budgets(found, keep=len(parts) < len(TARGETS) * len(SHAPES))
        read_budgets.cache_clear()
    over = [y for x in found for y in violations(x, read_budgets().get(x.target, {}).get(x.name))]
    over += eager_violations(eager_bytes())
    print(*over, f"{len(found)} kernels, {len(over)} over budget", sep="\n")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
