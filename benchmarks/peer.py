"""What a peer's kernels move and issue beside ours, by one estimate of time on an H100.

    pip install --target DIR --no-deps flash-linear-attention fla-core
    PYTHONPATH=DIR python benchmarks/census.py --peer fla

Both sides are called on meta tensors as a training step calls them, and their launches recorded. Of
every launch are counted: bytes, as traffic.py does; and issue slots, the instructions that the
warps of its programs issue: those of its machine code, each as often as the loops around it and the
conditions over it run in Triton's interpreter. A launch takes the longer of the times that its
bytes need of the memory and its slots of the schedulers, an eager operation that of its bytes. As
in traffic.py, everything is the difference between two lengths, per token and head.

Where the peer tries configurations on a GPU it has one that does well by this estimate, see
`of_choices`. What the estimate leaves out: latencies, programs too few to fill the machine, what
a cache has already, time of the tensor cores.
"""

import contextlib
import importlib
import importlib.util
import itertools
import math
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
import traffic
import triton
from machine_code import IDLE, SHARED_LIMIT, TARGETS, Listing, assemble, parse
from torch import Tensor
from traffic import Recording, Touched
from triton.runtime.autotuner import Autotuner

import glazoo
from glazoo.kernels.common import Launch, Tiles

TARGET = "sm_90"
# Of an H100 SXM, by its data sheet: bytes a second; multiprocessors, schedulers of each, clock.
BANDWIDTH = 3.35e12
ISSUE = 132 * 4 * 1.755e9
SHAPES = ((128, 128), (64, 64))
HEADS = 16
# Of the time of the peer, and of that of the source of a metaplastic form, over ours.
GOAL, METAPLASTIC_GOAL = 1.1, 1 / 1.2


class Cost(NamedTuple):
    """Of a launch or of several things, per token and head."""

    name: str
    bytes: float
    slots: float
    seconds: float

    @classmethod
    def of(cls, name: str, moved: float, slots: float = 0.0) -> "Cost":
        """Of one thing, which the slower of memory and schedulers decides."""
        return cls(name, moved, slots, max(moved / BANDWIDTH, slots / ISSUE))

    @classmethod
    def total(cls, name: str, parts: Sequence["Cost"]) -> "Cost":
        """Of things one after the other."""
        return cls(name, *(math.fsum(x[i] for x in parts) for i in (1, 2, 3)))


def issued(listing: Listing, touched: Touched) -> float:
    """Instructions that a warp of a program issues, in the mean over programs.

    Raises:
        RuntimeError: a loop of the machine code is none of the source, or one of several that are.
    """
    blocks = [x for x in touched.reached if touched.reached[x]]
    headers = {(x.file, x.header): x for x in blocks if x.loops}
    loops = []
    for loop in listing.loops:
        block = next((headers[x] for x in loop.places if x in headers), None)
        if block is None:
            # The jump back may be counted to a line of the loop, next to which it was placed.
            around = [
                x
                for file, line in loop.places
                for x in headers.values()
                if x.file == file and x.first <= line <= x.last
            ]
            block = min(around, key=lambda x: x.last - x.first, default=None)
        if block is None or sum(x.places == loop.places for x in listing.loops) > 1:
            raise RuntimeError(f"the loop at {loop.places} is not one loop of the source")
        loops.append((loop, block.times(touched, block.first)))
    # Of conditions inside of other functions nothing is said: each call may decide otherwise.
    conditions = [x for x in blocks if not x.loops]
    total = 0.0
    for i, (opcode, places) in enumerate(zip(listing.opcodes, listing.places, strict=True)):
        if opcode not in IDLE:
            times = [n for x, n in loops if x.start <= i < x.end]
            file, line = places[-1] if places else ("", 0)
            times += [x.times(touched, line) for x in conditions if x.file == file]
            total += math.prod(times)
    return total


def _identity(launch: Launch) -> str:
    """Return what decides what a launch touches."""
    storages: list[int] = []

    def of(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        storage = x.untyped_storage()._cdata
        if storage not in storages:
            storages.append(storage)
        return x.dtype, tuple(x.shape), storages.index(storage)

    arguments = [(name, of(x)) for name, x in sorted(launch.arguments.items())]
    return f"{launch.kernel.__name__} {launch.grid} {arguments}"


_touched: dict[str, Touched] = {}


def touched_by(launch: Launch) -> Touched:
    """As traffic.py counts it, once for launches that differ in warps and stages alone."""
    identity = _identity(launch)
    if identity not in _touched:
        _touched[identity] = traffic.touched_by(launch)
    return _touched[identity]


class Launched(NamedTuple):
    """A launch with one head, which is run in the interpreter, and with HEADS, which is compiled:
    a program may be for several heads, and lines of memory hold those of several."""

    one: Launch
    all: Launch


def of_launch(few: Launched, many: Launched) -> tuple[bool, Cost]:
    """Whether a launch spills registers, and what a token and head costs in it, from the launches
    for both of traffic.TOKENS."""
    code = assemble(many.all, TARGET)
    listing, touched = parse(code.text), [touched_by(x.one) for x in (few, many)]
    moved = traffic.marginal(*(x.bytes for x in touched))
    warps = (math.prod(x.all.grid) * many.all.tiles.num_warps / HEADS for x in (few, many))
    slots = (issued(listing, x) * n for x, n in zip(touched, warps, strict=True))
    spills = code.spill > 0 or code.shared > SHARED_LIMIT[TARGET]
    name = many.all.kernel.__name__.removesuffix("_kernel")
    return spills, Cost.of(name, moved, traffic.marginal(*slots))


def of_choices(few: Sequence[Launched], many: Sequence[Launched]) -> Cost:
    """The same of a configuration: of those whose tiles move least and that spill no registers the
    fastest, with the fewest stages, and with four or eight warps where there are such."""
    tiles: dict[int, dict[int, tuple[Launched, Launched]]] = {}
    pairs = zip(few, many, strict=True)
    for pair in sorted(pairs, key=lambda x: x[1].one.tiles.num_stages):
        moved = touched_by(pair[1].one).bytes if len(many) > 1 else 0
        tiles.setdefault(moved, {}).setdefault(pair[1].one.tiles.num_warps, pair)
    spilling = []
    for _, by_warps in sorted(tiles.items()):
        # Fewer warps issue more for the same products and hold more in registers.
        chosen = [x for x in (4, 8) if x in by_warps] or by_warps
        found = [of_launch(*by_warps[x]) for x in chosen]
        if fitting := [x for spills, x in found if not spills]:
            return min(fitting, key=lambda x: x.seconds)
        spilling += [x for _, x in found]
    return min(spilling, key=lambda x: x.seconds)


# What records launches and operations for a number of tokens and one of heads; launches may be
# lists of those that one may choose from.
Recorder = Callable[[int, int], Mapping[str, Recording]]


def _launched(one: Recording, wide: Recording) -> Iterator[list[Launched]]:
    for pair in zip(one.launches, wide.launches, strict=True):
        yield [
            Launched(*x)
            for x in zip(*(y if isinstance(y, list) else [y] for y in pair), strict=True)
        ]


def costs(recorded: Recorder) -> dict[str, list[Cost]]:
    """Costs of launches and of all eager operations, by direction."""
    few, many = ([recorded(x, heads) for heads in (1, HEADS)] for x in traffic.TOKENS)
    found = {}
    for x in traffic.DIRECTIONS:
        launches = zip(*(_launched(*(y[x] for y in of)) for of in (few, many)), strict=True)
        parts = [of_choices(*pair) for pair in launches]
        eager = traffic.marginal(*(sum(n for _, n in of[0][x].eager) for of in (few, many)))
        found[x] = [*parts, Cost.of("eager operations", eager)]
    return found


class _Device:
    """As much of a driver of Triton as says that there is an H100."""

    utils = types.SimpleNamespace(
        get_device_properties=lambda _: {
            "max_shared_mem": SHARED_LIMIT[TARGET],
            "multiprocessor_count": 132,
        }
    )

    def get_current_target(self) -> Any:
        return TARGETS[TARGET]


@contextlib.contextmanager
def pretending() -> Iterator[None]:
    """Inside, who asks learns that there is an H100."""
    driver = triton.runtime.driver
    cuda = {
        "get_device_name": lambda *_: "NVIDIA H100 80GB HBM3",
        "get_device_capability": lambda *_: (9, 0),
        "device_count": lambda: 1,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(driver, "_active", _Device()))
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        yield


@contextlib.contextmanager
def recording() -> Iterator[list[list[Launch]]]:
    """Collect what is launched through Triton inside, each in all its configurations; run none."""
    launches: list[list[Launch]] = []

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        named |= dict(zip(kernel.arg_names, arguments, strict=False))
        bound = {x.name: named.get(x.name, x.default) for x in kernel.params}
        tiles = Tiles(0, 0, named.get("num_warps", 4), named.get("num_stages", 3))
        grid = tuple(grid(bound) if callable(grid) else grid)
        launches.append([Launch(kernel, grid, bound, tiles)])

    def tune(tuner: Any, *arguments: Any, **named: Any) -> None:
        at = len(launches)
        tuner.nargs = dict(zip(tuner.arg_names, arguments, strict=False))
        for x in tuner.prune_configs(named):
            tuner.fn.run(*arguments, **named, **x.all_kwargs())
        launches[at:] = [[x for (x,) in launches[at:]]]

    with (
        mock.patch.object(triton.JITFunction, "run", run),
        mock.patch.object(Autotuner, "run", tune),
        pretending(),
    ):
        yield launches


def imported() -> types.ModuleType:
    """Flash-linear-attention, as it is imported where there is an H100.

    Raises:
        ImportError: it is not installed.
    """
    if importlib.util.find_spec("fla") is None:
        raise ImportError(
            "--peer fla: flash-linear-attention is not installed; `pip install --target DIR "
            "--no-deps flash-linear-attention fla-core`, then the same with PYTHONPATH=DIR"
        )
    with pretending():
        hardware = importlib.import_module("fla.utils.hardware")
        # It asks by the number of a tensor's device, of which meta tensors have none.
        shared = dict.fromkeys((None, 0), SHARED_LIMIT[TARGET])
        hardware.get_all_max_shared_mem = lambda: shared
        return importlib.import_module("fla.ops")


class Rival(NamedTuple):
    """A recurrence, and how fla computes it of the same operands."""

    spec: str
    function: str
    call: Callable[..., tuple[Tensor, Any]]


FLA = {
    "linear": Rival(
        "linear_attention", "simple_gla.chunk_simple_gla", lambda f, q, k, v: f(q, k, v)
    ),
    "linear, constant decay": Rival(
        "retnet", "retention.chunk_retention", lambda f, q, k, v, g: f(q, k, v)
    ),
    "linear, head": Rival(
        "simple_gla", "simple_gla.chunk_simple_gla", lambda f, q, k, v, g: f(q, k, v, g=g)
    ),
    "linear, head, write gate": Rival(
        "mamba2",
        "simple_gla.chunk_simple_gla",
        lambda f, q, k, v, g, beta: f(q, k, beta[..., None].to(v.dtype) * v, g=g),
    ),
    "linear, key": Rival("gla", "gla.chunk_gla", lambda f, q, k, v, g: f(q, k, v, g)),
    "delta": Rival(
        "deltanet", "delta_rule.chunk_delta_rule", lambda f, q, k, v, beta: f(q, k, v, beta)
    ),
    "delta, head": Rival(
        "gated_deltanet",
        "gated_delta_rule.chunk_gated_delta_rule",
        lambda f, q, k, v, g, beta: f(q, k, v, g, beta),
    ),
    "delta, key": Rival("kda", "kda.chunk_kda", lambda f, q, k, v, g, beta: f(q, k, v, g, beta)),
    "delta, bounded key": Rival(
        "kda_bounded",
        "kda.chunk_kda",
        lambda f, q, k, v, g, beta: f(q, k, v, g, beta, safe_gate=True),
    ),
}


def rival(name: str, size: tuple[int, int]) -> Recorder:
    """Records one of FLA."""
    spec, (module, function) = glazoo.load(FLA[name].spec), FLA[name].function.split(".")
    compute = getattr(importlib.import_module(f"fla.ops.{module}"), function)

    def run(**given: Tensor) -> Tensor:
        return FLA[name].call(compute, **given)[0]

    def recorded(tokens: int, heads: int) -> dict[str, Recording]:
        return traffic.record(run, traffic.operands(spec, tokens, size, heads), recording())

    return recorded


def ours(spec: glazoo.Spec, size: tuple[int, int]) -> Recorder:
    """Records our kernels."""
    return lambda tokens, heads: traffic.of_spec(spec, tokens, TARGET, size, heads)


class Row(NamedTuple):
    """Our costs in one direction and those of what they are compared with."""

    name: str
    direction: str
    ours: list[Cost]
    other: list[Cost]
    goal: float
    """What the other's time over ours has to be at least."""

    @property
    def totals(self) -> tuple[Cost, Cost]:
        return Cost.total("ours", self.ours), Cost.total("other", self.other)

    @property
    def ratio(self) -> float:
        ours, other = self.totals
        return other.seconds / ours.seconds


def rows(size: tuple[int, int], pattern: str) -> Iterator[Row]:
    """Every recurrence so named that fla has, and every one with an importance for every key."""
    found: dict[glazoo.Spec, dict[str, list[Cost]]] = {}

    def of(spec: glazoo.Spec) -> dict[str, list[Cost]]:
        if spec not in found:
            found[spec] = costs(ours(spec, size))
        return found[spec]

    for name, peer in FLA.items():
        if re.search(pattern, name):
            mine, other = of(glazoo.load(peer.spec)), costs(rival(name, size))
            for x in traffic.DIRECTIONS:
                yield Row(name, x, mine[x], other[x], GOAL)
    for name, make in traffic.CASES.items():
        if name.startswith("metaplastic") and re.search(pattern, name):
            source = name.removeprefix("metaplastic ").split(",")[0]
            mine, other = of(make()), of(traffic.CASES[source]())
            for x in traffic.DIRECTIONS:
                yield Row(name, x, mine[x], other[x], METAPLASTIC_GOAL)


def print_rows(shapes: Sequence[tuple[int, int]], pattern: str, passes: bool) -> bool:
    """Print a table of all rows, with `passes` what each is the sum of; return whether all reach
    their goals."""
    from rich.console import Console
    from rich.table import Table

    imported()
    sides = "ours", "other"
    reached = True
    for size in shapes:
        shape = f"{size[0]}/{size[1]}"
        title = f"{shape}, per token and head: bytes, issue slots, picoseconds of an H100; bfloat16"
        table = Table("recurrence", "direction", title=title)
        for side, column in itertools.product(sides, ("B", "slots", "ps")):
            table.add_column(f"{side} {column}", justify="right")
        table.add_column("ratio", justify="right")
        table.add_column("goal")
        for x in rows(size, pattern):
            good = x.ratio >= x.goal
            cells = [y for of in x.totals for y in _cells(of)]
            goal = f"{x.goal:.2f}{'' if good else ' missed'}"
            table.add_row(x.name, x.direction, *cells, f"{x.ratio:.2f}", goal)
            reached = reached and good
            for side, parts in zip(sides, (x.ours, x.other), strict=True) if passes else ():
                for y in parts:
                    numbers = "{} B, {} slots, {} ps".format(*_cells(y))
                    print(f"{x.name} {shape} {x.direction}, {side}: {y.name} {numbers}", flush=True)
        # As wide as the table is, also in a file.
        Console(width=140).print(table)
    return reached


def _cells(x: Cost) -> Iterator[str]:
    return (f"{y:,.0f}" for y in (x.bytes, x.slots, x.seconds * 1e12))
