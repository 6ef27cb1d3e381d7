"""Blocks of threads that execute a kernel.

Threads that are at the same instruction execute it together, of as many blocks as fit in BATCH.
A branch that warps take differently splits them up; a branch inside a warp is refused. A group of
warps runs until it ends or waits at a barrier; when all wait, all go on. In which order the groups
run between barriers is the schedule: "lockstep" starts with all warps as one group, "forward" and
"backward" with one group a warp, first to last or last to first; of a kernel with wgmma, which four
warps execute together, with one group for each four.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .matrices import fragments, places, split, sums
from .memory import POISON, Access, Array, Global, Shared
from .semantics import DTYPES, F32, OPERATIONS, U16, U32, from_bf16
from .text import Instruction, Program, PtxError, read

BATCH = 1 << 14
LANES = 32
# Threads that execute a wgmma together.
WARPGROUP = 128
SCHEDULES = ("lockstep", "forward", "backward")
# More than any kernel here executes in one group: a loop without end is an error.
LIMIT = 1 << 24

Step = Callable[["Group"], Any]
Reader = Callable[["Group"], Array]


class _Absent:
    """A register that cannot be read."""

    def __init__(self, why: str) -> None:
        self.why = why

    def __getattr__(self, name: str) -> Any:
        raise PtxError(self.why)


UNSET: Any = _Absent("reads a register that has no value")
PENDING: Any = _Absent("reads a register that wgmma still writes")


@dataclasses.dataclass
class Run:
    """What the groups of one batch of blocks share."""

    arguments: Mapping[str, int]
    memory: Global
    shared: Shared
    # Barriers so far, of the block, and of the block or a warp.
    epoch: int = 1
    fine: int = 1

    @property
    def epochs(self) -> tuple[int, int]:
        return self.epoch, self.fine


def spread(x: Array, size: int) -> Array:
    """A value of each thread, of one that all threads share."""
    return x if x.size == size else np.repeat(x, size)


@dataclasses.dataclass
class Products:
    """What a wgmma reads and writes until it is waited for: memory, and registers by slot."""

    reads: list[Access]
    operands: dict[int, Array]
    sums: tuple[int, ...]


class Group:
    """Warps that are at the same instruction, and the registers of their threads."""

    def __init__(
        self, run: Run, registers: list[Array], agents: dict[str, Array], grid: dict[str, Array]
    ) -> None:
        self.run = run
        self.registers = registers
        self.agents = agents
        self.special = grid
        self.at = 0
        self.size = agents["thread"].size
        # cp.async: what was begun since the last commit, and what was committed.
        self.begun: list[tuple[Access, Array]] = []
        self.committed: list[list[tuple[Access, Array]]] = []
        # wgmma: likewise, sums by slot that are not waited for, and values at its fence.
        self.products: list[Products] = []
        self.multiplied: list[list[Products]] = []
        self.hidden: dict[int, Array] = {}
        self.fenced: dict[int, Array] = {}

    def part(self, chosen: Array) -> Group:
        """The group of some of the threads."""
        if self.hidden:
            raise PtxError("threads go different ways while wgmma multiplies")
        other = Group(
            self.run,
            [x if x is UNSET else x[chosen] for x in self.registers],
            {k: x[chosen] for k, x in self.agents.items()},
            {k: x[chosen] for k, x in self.special.items()},
        )
        other.at = self.at

        def mine(copies: list[tuple[Access, Array]]) -> list[tuple[Access, Array]]:
            found = []
            for access, values in copies:
                # A thread is known by its place in the batch and in the block.
                of = access.agents
                ids = of["place"] * (1 << 16) + of["thread"]
                own = other.agents["place"] * (1 << 16) + other.agents["thread"]
                keep = np.isin(ids, own)
                agents = {k: x[keep] for k, x in of.items()}
                found.append((Access(access.rows[keep], access.size, agents), values[:, keep]))
            return found

        other.begun = mine(self.begun)
        other.committed = [mine(x) for x in self.committed]
        return other


BARRIER = object()
EXIT = object()


class Kernel:
    """A kernel that can be run.

    Args:
        ptx: source as Triton emits it for sm_80 or sm_90.

    Raises:
        PtxError: an instruction is unknown; the message holds it.
    """

    def __init__(self, ptx: str) -> None:
        self.program: Program = read(ptx)
        self.slots: dict[str, int] = {}
        self.steps = [self._decode(x) for x in self.program.instructions]
        self.written = self._written()
        self.together = LANES
        if any(x.opcode.startswith("wgmma") for x in self.program.instructions):
            self.together = WARPGROUP
        self.units = {space: self._narrowest(space) for space in ("shared", "global")}

    def _written(self) -> set[str]:
        """Parameters through which the kernel may write to memory."""
        sources: dict[str, set[str]] = {}
        before = -1
        while before != (before := sum(map(len, sources.values()))):
            for x in self.program.instructions:
                if len(x.operands) < 2:
                    continue
                found = set()
                for operand in x.operands[1:]:
                    for name in re.findall(r"%?\w+", operand):
                        found |= sources.get(name, {name} & self.program.parameters.keys())
                for name in re.findall(r"%\w+", x.operands[0]):
                    sources.setdefault(name, set()).update(found)
        written: set[str] = set()
        for x in self.program.instructions:
            if x.opcode.startswith(("st.global", "red.global", "atom.global")):
                address = x.operands[1 if x.opcode.startswith("atom") else 0]
                for name in re.findall(r"%\w+", address):
                    written |= sources.get(name, set())
        return written

    def _narrowest(self, space: str) -> int:
        """Bytes of the narrowest access to a memory."""
        sizes = [16]
        for x in self.program.instructions:
            parts = x.opcode.split(".")
            if any(y.startswith(space) for y in parts) and parts[0] in ("ld", "st", "red", "atom"):
                names = x.operands[0 if parts[0] in ("ld", "atom") else 1]
                sizes.append(DTYPES[parts[-1]].itemsize * len(self.names(names)))
            if parts[0] == "cp" and len(x.operands) > 2:
                sizes.append(int(x.operands[2], 0))
        return min(sizes)

    # Operands.

    def slot(self, name: str) -> tuple[int, np.dtype[Any]]:
        """Where a register is, and its unsigned type."""
        prefix = name.rstrip("0123456789")
        kind = self.program.registers.get(prefix)
        if kind not in DTYPES:
            raise PtxError(f"unknown register {name}")
        return self.slots.setdefault(name, len(self.slots)), DTYPES[kind]

    def reader(self, text: str, kind: str) -> Reader:
        """How to read an operand of a type."""
        dtype = DTYPES[kind]
        if text.startswith(("%tid", "%ctaid")):
            return lambda g: g.special[text].view(dtype)
        if text.startswith("%"):
            i, width = self.slot(text)
            if width.itemsize == dtype.itemsize or kind == "pred":

                def register(g: Group) -> Array:
                    x = g.registers[i]
                    return x if x.dtype is dtype else x.view(dtype)

                return register
            if width.itemsize > dtype.itemsize:
                narrow = np.dtype(f"u{dtype.itemsize}")
                return lambda g: g.registers[i].view(width).astype(narrow).view(dtype)
            raise PtxError(f"{text} is narrower than {kind}")
        if text == "global_smem":
            return lambda g: np.zeros(1, dtype)
        if kind == "pred":
            constant = np.full(1, bool(int(text)))
        elif text.startswith(("0f", "0d")):
            constant = np.full(1, int(text[2:], 16), f"u{dtype.itemsize}").view(dtype)
        else:
            value = int(text.rstrip("U"), 0) & ((1 << 8 * dtype.itemsize) - 1)
            constant = np.full(1, value, f"u{dtype.itemsize}").view(dtype)
        return lambda g: constant

    def writer(self, text: str, kind: str, x: Instruction) -> Callable[[Group, Array], None]:
        """How to write a result of a type to a register, where the instruction's guard says so."""
        if text == "_":
            return lambda g, value: None
        i, width = self.slot(text)
        dtype = DTYPES[kind]
        if (kind == "pred") != (width.kind == "b") or width.itemsize < dtype.itemsize:
            raise PtxError(f"a result of type {kind} does not fit in {text}")
        widen = width.itemsize > dtype.itemsize
        mask = self.mask(x)

        def write(g: Group, value: Array) -> None:
            if widen:
                value = value.astype(width)
            value = spread(value, g.size)
            if mask is not None:
                active = mask(g)
                old = g.registers[i]
                if old is UNSET:
                    old = np.full(g.size * value.itemsize, POISON, np.uint8)
                value = np.where(active, value, old.view(value.dtype))
            g.registers[i] = value

        if mask is None and not widen:

            def plain(g: Group, value: Array) -> None:
                g.registers[i] = spread(value, g.size)

            return plain
        return write

    def mask(self, x: Instruction) -> Reader | None:
        """Which threads an instruction's guard lets execute it."""
        if x.guard is None:
            return None
        read = self.reader(x.guard, "pred")
        return (lambda g: ~read(g)) if x.negated else read

    def address(self, text: str, kind: str) -> Reader:
        """How to read an address, [register + offset]."""
        match = re.fullmatch(r"\[\s*(%?\w+)\s*(?:\+\s*(-?\w+)\s*)?\]", text)
        if match is None:
            raise PtxError(f"unknown address {text}")
        base, offset = self.reader(match[1], kind), int(match[2] or "0", 0)
        dtype = DTYPES[kind]
        shift = dtype.type(offset % (1 << 8 * dtype.itemsize))

        return lambda g: spread(base(g) + shift, g.size)

    @staticmethod
    def names(text: str) -> list[str]:
        """Registers in braces, or the one without."""
        return [x.strip() for x in text.strip("{} ").split(",")]

    # Instructions.

    def _decode(self, x: Instruction) -> Step:
        try:
            operation = OPERATIONS.get(x.opcode)
            if operation is not None and not any(y.startswith("{") for y in x.operands):
                return self._elementwise(x, operation)
            build = SPECIAL.get(x.opcode)
            if build is None:
                raise PtxError("unknown instruction")
            return build(self, x)
        except (PtxError, ValueError, KeyError, IndexError) as error:
            raise PtxError(f"{self.program.name}: {x}: {error}") from error

    def _elementwise(self, x: Instruction, operation: Any) -> Step:
        if len(x.operands) != len(operation.operands) + 1:
            raise PtxError(f"expected {len(operation.operands)} operands")
        write = self.writer(x.operands[0], operation.result, x)
        reads = [
            self.reader(y, kind) for y, kind in zip(x.operands[1:], operation.operands, strict=True)
        ]
        function = operation.function
        if len(reads) == 1:
            (a,) = reads
            return lambda g: write(g, function(a(g)))
        if len(reads) == 2:
            a, b = reads
            return lambda g: write(g, function(a(g), b(g)))
        a, b, c = reads
        return lambda g: write(g, function(a(g), b(g), c(g)))

    def run(
        self,
        grid: Sequence[int],
        arguments: Sequence[int],
        memory: Global,
        shared: int,
        schedule: str = "lockstep",
    ) -> int:
        """Run every block of a grid.

        Args:
            grid: blocks in x, and y and z.
            arguments: values of the parameters; of a tensor its address.
            memory: the tensors.
            shared: bytes of shared memory of a block.
            schedule: "lockstep", "forward" or "backward".

        Returns:
            How many instructions groups executed.

        Raises:
            PtxError: the kernel did something that it may not do; the message says where and what.
        """
        names = list(self.program.parameters)
        values = dict(zip(names, arguments, strict=True))
        threads = self.program.threads
        warps = threads // LANES
        sizes = [*grid, 1, 1][:3]
        blocks = sizes[0] * sizes[1] * sizes[2]
        written = [values[x] for x in self.written]
        memory.watch(written, self.units["global"], blocks, warps)
        count = 0
        step = max(1, BATCH // threads)
        for first in range(0, blocks, step):
            block = np.repeat(np.arange(first, min(first + step, blocks)), threads)
            thread = np.tile(np.arange(threads), block.size // threads)
            room = Shared(block.size // threads, shared, warps, self.units["shared"])
            run = Run(values, memory, room)
            agents = {
                "block": block.astype(np.int32),
                "warp": (thread // LANES).astype(np.int32),
                "thread": thread.astype(np.int32),
                "place": block - first,
            }
            special = {"%tid.x": thread.astype(U32)}
            for axis, size in zip("xyz", sizes, strict=True):
                special[f"%ctaid.{axis}"] = (block % size).astype(U32)
                block = block // size
            group = Group(run, [UNSET] * len(self.slots), agents, special)
            groups = [group]
            if schedule != "lockstep":
                order = range(threads // self.together)
                groups = [group.part(np.flatnonzero(thread // self.together == i)) for i in order]
                groups = groups if schedule == "forward" else groups[::-1]
            # Overflow and division by zero have results, here as there.
            with np.errstate(all="ignore"):
                count += self._batch(run, groups)
        return count

    def _batch(self, run: Run, groups: list[Group]) -> int:
        count = 0
        while groups:
            waiting = []
            while groups:
                group = groups.pop(0)
                executed, state, others = self._until_barrier(group)
                count += executed
                groups[:0] = others
                if state is BARRIER:
                    waiting.append(group)
            groups = waiting
            run.epoch += 1
            run.fine += 1
        return count

    def _until_barrier(self, group: Group) -> tuple[int, object, list[Group]]:
        """Run a group until it ends or waits; groups that left it are returned."""
        steps, others = self.steps, []
        for count in range(LIMIT):
            at = group.at
            if at >= len(steps):
                raise PtxError(f"{self.program.name}: runs past its end")
            group.at = at + 1
            try:
                result = steps[at](group)
            except PtxError as error:
                text = f"{self.program.name}: {self.program.instructions[at]}: {error}"
                raise PtxError(text) from None
            if result is None:
                continue
            if isinstance(result, Group):
                others.append(result)
            else:
                return count + 1, result, others
        raise PtxError(f"{self.program.name}: more than {LIMIT} instructions")


def _unguarded(x: Instruction) -> None:
    if x.guard is not None:
        raise PtxError("unknown with a guard")


def _by_warp(p: Array) -> tuple[bool, Array | None]:
    """Whether all threads agree, and if so on what; else the threads where it is true."""
    true = np.count_nonzero(p)
    if true in (0, p.size):
        return bool(true), None
    warps = p.reshape(-1, LANES)
    if (warps.any(1) != warps.all(1)).any():
        raise PtxError("threads of one warp go different ways")
    return False, p


def _leave(kernel: Kernel, x: Instruction, label: int | None) -> Step:
    """A branch to a label, or the end: threads that do not take it stay."""
    mask = kernel.mask(x)

    def step(g: Group) -> Any:
        if mask is None:
            taken, split = True, None
        else:
            taken, split = _by_warp(mask(g))
        if split is not None:
            # The group itself goes on with those that stay.
            gone, rest = g.part(np.flatnonzero(split)), g.part(np.flatnonzero(~split))
            g.__dict__.update(rest.__dict__)
            if label is None:
                return None
            gone.at = label
            return gone
        if not taken:
            return None
        if label is None:
            return EXIT
        g.at = label
        return None

    return step


def _branch(kernel: Kernel, x: Instruction) -> Step:
    return _leave(kernel, x, kernel.program.labels[x.operands[0]])


def _return(kernel: Kernel, x: Instruction) -> Step:
    return _leave(kernel, x, None)


def _barrier(kernel: Kernel, x: Instruction) -> Step:
    _unguarded(x)
    if x.operands != ("0",):
        raise PtxError("unknown barrier")
    return lambda g: BARRIER


def _warp_barrier(kernel: Kernel, x: Instruction) -> Step:
    _unguarded(x)
    if x.operands != ("-1",):
        raise PtxError("unknown members")

    def step(g: Group) -> None:
        g.run.fine += 1

    return step


def _parameter(kernel: Kernel, x: Instruction, kind: str) -> Step:
    write = kernel.writer(x.operands[0], kind, x)
    match = re.fullmatch(r"\[(\w+)\]", x.operands[1])
    if match is None or match[1] not in kernel.program.parameters:
        raise PtxError("unknown parameter")
    name, dtype = match[1], DTYPES[kind]
    bits = 8 * dtype.itemsize

    def step(g: Group) -> None:
        value = g.run.arguments[name] % (1 << bits)
        write(g, np.full(1, value, f"u{dtype.itemsize}").view(dtype))

    return step


class _Active:
    """The threads that execute a guarded memory instruction, and what they need."""

    def __init__(self, mask: Reader | None) -> None:
        self.mask = mask

    def __call__(self, g: Group) -> tuple[Any, dict[str, Array]]:
        if self.mask is None:
            return slice(None), g.agents
        active = self.mask(g)
        count = np.count_nonzero(active)
        if count == g.size:
            return slice(None), g.agents
        chosen = np.flatnonzero(active)
        return chosen, {k: x[chosen] for k, x in g.agents.items()} if count else {}


def _load(kernel: Kernel, x: Instruction, parts: int, kind: str, shared: bool) -> Step:
    names = kernel.names(x.operands[0])
    if len(names) != parts:
        raise PtxError(f"expected {parts} registers")
    writes = [kernel.writer(y, kind, x) for y in names]
    address = kernel.address(x.operands[1], "u32" if shared else "u64")
    active = _Active(kernel.mask(x))
    dtype = DTYPES[kind]
    size = parts * dtype.itemsize

    def step(g: Group) -> None:
        chosen, agents = active(g)
        values = np.full((parts, g.size * dtype.itemsize), POISON, np.uint8).view(dtype)
        if agents:
            at = address(g)[chosen]
            if shared:
                found = g.run.shared.load(
                    g.run.shared.access(at, size, agents), dtype, g.run.epochs
                )
            else:
                found = g.run.memory.load(at, size, dtype, agents, g.run.epoch)
            values[:, chosen] = found
        for write, value in zip(writes, values, strict=True):
            write(g, value)

    return step


def _store(kernel: Kernel, x: Instruction, parts: int, kind: str, shared: bool) -> Step:
    names = kernel.names(x.operands[1])
    if len(names) != parts:
        raise PtxError(f"expected {parts} registers")
    reads = [kernel.reader(y, kind) for y in names]
    address = kernel.address(x.operands[0], "u32" if shared else "u64")
    active = _Active(kernel.mask(x))
    size = parts * DTYPES[kind].itemsize

    def step(g: Group) -> None:
        chosen, agents = active(g)
        if not agents:
            return
        values = np.stack([spread(read(g), g.size)[chosen] for read in reads])
        at = address(g)[chosen]
        if shared:
            memory = g.run.shared
            memory.store(memory.access(at, size, agents), values, g.run.epochs)
        else:
            g.run.memory.store(at, values, agents, g.run.epoch)

    return step


def _atomic(kernel: Kernel, x: Instruction, kind: str, *, returns: bool) -> Step:
    operands = x.operands if returns else ("_", *x.operands)
    write = kernel.writer(operands[0], kind, x)
    address, value = kernel.address(operands[1], "u64"), kernel.reader(operands[2], kind)
    active = _Active(kernel.mask(x))
    dtype = DTYPES[kind]

    def step(g: Group) -> None:
        chosen, agents = active(g)
        if not agents:
            return
        found = np.zeros(g.size, dtype)
        values = spread(value(g), g.size)[chosen]
        found[chosen] = g.run.memory.add(address(g)[chosen], values, agents, g.run.epoch)
        write(g, found)

    return step


def _copy(kernel: Kernel, x: Instruction) -> Step:
    """cp.async: what it reads is read now, what it writes is there when it is waited for."""
    to, source = kernel.address(x.operands[0], "u32"), kernel.address(x.operands[1], "u64")
    size = int(x.operands[2], 0)
    given = kernel.reader(x.operands[3], "u32") if len(x.operands) > 3 else None
    active = _Active(kernel.mask(x))
    if size not in (4, 8, 16):
        raise PtxError("unknown size")

    def step(g: Group) -> None:
        chosen, agents = active(g)
        if not agents:
            return
        destination, origin = to(g)[chosen], source(g)[chosen]
        values = np.zeros((size // 4, destination.size), U32)
        if given is None:
            whole = np.ones(destination.size, bool)
        else:
            length = spread(given(g), g.size)[chosen]
            whole = length == size
            if (length[~whole] != 0).any():
                raise PtxError("copies a part of its size")
        if whole.any():
            some = {k: y[whole] for k, y in agents.items()}
            values[:, whole] = g.run.memory.load(origin[whole], size, U32, some, g.run.epoch)
        access = g.run.shared.access(destination, size, agents)
        g.run.shared.begin(access, g.run.epochs)
        g.begun.append((access, values))

    return step


def _commit(kernel: Kernel, x: Instruction) -> Step:
    _unguarded(x)

    def step(g: Group) -> None:
        g.committed.append(g.begun)
        g.begun = []

    return step


def _wait(kernel: Kernel, x: Instruction) -> Step:
    _unguarded(x)
    left = int(x.operands[0], 0)

    def step(g: Group) -> None:
        while len(g.committed) > left:
            for access, values in g.committed.pop(0):
                g.run.shared.end(access, values, g.run.epochs)

    return step


def _shuffle(kernel: Kernel, x: Instruction, mode: str) -> Step:
    _unguarded(x)
    if x.operands[4] != "-1":
        raise PtxError("unknown members")
    result, *predicate = x.operands[0].split("|")
    write = kernel.writer(result, "b32", x)
    inside = kernel.writer(predicate[0], "pred", x) if predicate else None
    value, by, bound = (kernel.reader(y, "u32") for y in x.operands[1:4])

    def step(g: Group) -> None:
        lane = np.arange(LANES)
        b, c = (spread(y(g), g.size).reshape(-1, LANES).astype(np.int64) for y in (by, bound))
        b, segment, end = b & 31, (c >> 8) & 31, c & 31
        low = lane & segment
        high = low | (end & ~segment)
        if mode == "up":
            at, valid = lane - b, lane - b >= high
        elif mode == "down":
            at, valid = lane + b, lane + b <= high
        elif mode == "bfly":
            at, valid = lane ^ b, (lane ^ b) <= high
        else:
            at = low | (b & ~segment)
            valid = at <= high
        at = np.where(valid, at, lane)
        values = spread(value(g), g.size).reshape(-1, LANES)
        write(g, np.take_along_axis(values, at, 1).ravel())
        if inside is not None:
            inside(g, np.broadcast_to(valid, values.shape).ravel())

    return step


REDUCTIONS: dict[str, Any] = {
    "add": functools.partial(np.sum, axis=1),
    "min": functools.partial(np.min, axis=1),
    "max": functools.partial(np.max, axis=1),
}


def _reduce(kernel: Kernel, x: Instruction, name: str, kind: str) -> Step:
    _unguarded(x)
    write, value = kernel.writer(x.operands[0], kind, x), kernel.reader(x.operands[1], kind)
    members = kernel.reader(x.operands[2], "s32")
    dtype = DTYPES[kind]

    def step(g: Group) -> None:
        if (members(g) != -1).any():
            raise PtxError("unknown members")
        warps = spread(value(g), g.size).reshape(-1, LANES)
        write(g, np.repeat(REDUCTIONS[name](warps).astype(dtype), LANES))

    return step


def _matrices(kernel: Kernel, x: Instruction, parts: int, *, transposed: bool) -> Step:
    """ldmatrix: of each 8 lanes an address of a row of 8 16-bit numbers; a matrix a register."""
    _unguarded(x)
    names = kernel.names(x.operands[0])
    if len(names) != parts:
        raise PtxError(f"expected {parts} registers")
    writes = [kernel.writer(y, "b32", x) for y in names]
    address = kernel.address(x.operands[1], "u32")

    def step(g: Group) -> None:
        # Addresses of lanes beyond the last matrix mean nothing.
        chosen = np.flatnonzero(np.arange(g.size) % LANES < 8 * parts)
        agents = {k: y[chosen] for k, y in g.agents.items()}
        memory = g.run.shared
        rows = memory.load(memory.access(address(g)[chosen], 16, agents), U16, g.run.epochs)
        # [warps, matrix, row, column]
        whole = rows.T.reshape(-1, parts, 8, 8)
        if transposed:
            whole = whole.swapaxes(2, 3)
        for i, write in enumerate(writes):
            pairs = np.ascontiguousarray(whole[:, i].reshape(-1, 8))
            write(g, pairs.view(U32).ravel())

    return step


def numbers(x: Array, kind: str) -> Array:
    """The factors of products that 32 bits hold: one or two."""
    if kind == "tf32":
        return (x.view(U32) & U32.type(0xFFFFE000)).view(F32)
    return from_bf16(x.view(U16)) if kind == "bf16" else x.view(np.float16).astype(F32)


def _multiply(kernel: Kernel, x: Instruction, depth: int, kind: str) -> Step:
    """mma m16n8k`depth`: D = A B + C, each product exact, sums in float32."""
    _unguarded(x)
    names = [kernel.names(y) for y in x.operands]
    counts = [len(y) for y in names]
    each = 1 if kind == "tf32" else 2
    if counts != [4, 2 * depth // (4 * each), depth // (4 * each), 4]:
        raise PtxError("unknown number of registers")
    writes = [kernel.writer(y, "f32", x) for y in names[0]]
    a, b = ([kernel.reader(y, "b32") for y in of] for of in names[1:3])
    c = [kernel.reader(y, "f32") for y in names[3]]

    def whole(g: Group, reads: list[Reader]) -> list[Array]:
        return [spread(y(g), g.size) for y in reads]

    def step(g: Group) -> None:
        left = fragments([numbers(y, kind) for y in whole(g, a)], 16, depth, each)
        # B is held as A is, transposed.
        right = fragments([numbers(y, kind) for y in whole(g, b)], 8, depth, each)
        total = sums(whole(g, c)) + left @ right.swapaxes(1, 2)
        for write, value in zip(writes, split(total), strict=True):
            write(g, value)

    return step


def _store_matrices(kernel: Kernel, x: Instruction, parts: int, *, transposed: bool) -> Step:
    """stmatrix: what ldmatrix does, the other way."""
    _unguarded(x)
    names = kernel.names(x.operands[1])
    if len(names) != parts:
        raise PtxError(f"expected {parts} registers")
    reads = [kernel.reader(y, "b32") for y in names]
    address = kernel.address(x.operands[0], "u32")

    def step(g: Group) -> None:
        chosen = np.flatnonzero(np.arange(g.size) % LANES < 8 * parts)
        agents = {k: y[chosen] for k, y in g.agents.items()}
        memory = g.run.shared
        whole = np.stack([spread(read(g), g.size) for read in reads])
        # [warps, matrix, row, column]
        whole = whole.reshape(parts, -1, 8, 4).swapaxes(0, 1).copy().view(U16)
        if transposed:
            whole = whole.swapaxes(2, 3)
        rows = np.ascontiguousarray(whole.reshape(-1, 8).T)
        memory.store(memory.access(address(g)[chosen], 16, agents), rows, g.run.epochs)

    return step


def _fence(kernel: Kernel, x: Instruction) -> Step:
    """fence.proxy.async: wgmma sees what these threads wrote or could have read."""
    _unguarded(x)
    return lambda g: g.run.shared.fence(g.agents, g.run.epoch)


def _where(x: Array) -> int:
    """What registers of one value share."""
    return id(x) if isinstance(x, _Absent) else x.__array_interface__["data"][0]


def _registers_fence(kernel: Kernel, x: Instruction) -> Step:
    """wgmma.fence: wgmma sees the registers, and what is only moved from one to another later."""
    _unguarded(x)

    def step(g: Group) -> None:
        g.fenced = {_where(y): y for y in g.registers}

    return step


def _warpgroups(kernel: Kernel, x: Instruction, n: int, depth: int, kind: str) -> Step:
    """wgmma m64n`n`k`depth`: D = A B + C, A of registers or shared memory, B of shared memory.

    What it reads is read now, what it writes is there when it is waited for.
    """
    _unguarded(x)
    d, a, b, accumulate, *flags = x.operands
    each = 1 if kind == "tf32" else 2
    in_registers = a.startswith("{")
    transposes = [False] * (each == 1 or in_registers)
    transposes += [bool(int(y)) for y in flags[2:]]
    if each == 1:
        transposes += [False]
    if flags[:2] != ["1", "1"] or len(transposes) != 2:
        raise PtxError("unknown signs or transposes")
    results = [kernel.slot(y)[0] for y in kernel.names(d)]
    left = [kernel.slot(y)[0] for y in kernel.names(a)] if in_registers else []
    if len(results) != n // 2 or (in_registers and len(left) != 4):
        raise PtxError("unknown number of registers")
    further = kernel.reader(accumulate, "pred")
    descriptors = [None if in_registers else kernel.reader(a, "b64"), kernel.reader(b, "b64")]

    def uniform(g: Group, read: Reader) -> Array:
        """A value of each warpgroup."""
        whole = spread(read(g), g.size).reshape(-1, WARPGROUP)
        if (whole != whole[:, :1]).any():
            raise PtxError("threads of a warpgroup differ in what they multiply")
        return whole[:, 0]

    def operand(g: Group, read: Reader, rows: int, transposed: bool, reads: list[Access]) -> Array:
        """A matrix of each warpgroup, [warpgroups, rows, columns]."""
        at = places(uniform(g, read), rows, major=not transposed)
        memory = g.run.shared
        # As if each of the four warps read all.
        for warp in range(4):
            agents = {k: y[LANES * warp :: WARPGROUP] for k, y in g.agents.items()}
            agents = {k: np.repeat(y, at.shape[1]) for k, y in agents.items()}
            reads.append(memory.access(at.ravel(), 16, agents))
        for access in reads[-4:]:
            found = memory.multiply(access, g.run.epochs)
        found = numbers(found.T.copy(), kind).reshape(len(at), -1, 16 // 4 * each)
        if transposed:
            found = found.reshape(len(at), depth, rows).swapaxes(1, 2)
        return found.reshape(len(at), rows, depth)

    def step(g: Group) -> None:
        fours = g.agents["warp"][::LANES]
        if fours.size % 4 or (fours.reshape(-1, 4) % 4 != np.arange(4)).any():
            raise PtxError("wgmma without all four warps of a warpgroup")
        used = [g.registers[i] for i in (*results, *left) if g.registers[i] is not PENDING]
        if not {_where(y) for y in used} <= g.fenced.keys():
            raise PtxError("no wgmma.fence after a register was computed that wgmma uses")
        reads: list[Access] = []
        if in_registers:
            registers = [numbers(spread(g.registers[i], g.size), kind) for i in left]
            of_a = fragments(registers, 16, depth, each).reshape(-1, 64, depth)
        else:
            of_a = operand(g, descriptors[0], 64, transposes[0], reads)
        of_b = operand(g, descriptors[1], n, transposes[1], reads)
        total = of_a @ of_b.swapaxes(1, 2)
        further_ = uniform(g, further)
        if further_.any():
            old = [g.hidden.get(i, g.registers[i]).view(F32) for i in results]
            old = sums([spread(y, g.size) for y in old]).reshape(-1, 64, n)
            total = np.where(further_[:, None, None], total + old, total)
        for i, value in zip(results, split(total.reshape(-1, 16, n)), strict=True):
            g.hidden[i] = value
            g.registers[i] = PENDING
        g.products.append(Products(reads, {i: g.registers[i] for i in left}, tuple(results)))

    return step


def _commit_products(kernel: Kernel, x: Instruction) -> Step:
    _unguarded(x)

    def step(g: Group) -> None:
        g.multiplied.append(g.products)
        g.products = []

    return step


def _wait_products(kernel: Kernel, x: Instruction) -> Step:
    _unguarded(x)
    left = int(x.operands[0], 0)

    def step(g: Group) -> None:
        done: list[Products] = []
        while len(g.multiplied) > left:
            done += g.multiplied.pop(0)
        later = {i for y in (*itertools.chain(*g.multiplied), *g.products) for i in y.sums}
        for product in done:
            for access in product.reads:
                g.run.shared.multiplied(access, g.run.epochs)
            if any(g.registers[i] is not y for i, y in product.operands.items()):
                raise PtxError("a register was written that wgmma still reads")
            for i in product.sums:
                if i in g.hidden and i not in later:
                    if g.registers[i] is not PENDING:
                        raise PtxError("a register was written that wgmma still writes")
                    g.registers[i] = g.hidden.pop(i)

    return step


def _pack(kernel: Kernel, x: Instruction, kind: str) -> Step:
    """mov between a register and parts of it in braces, the lowest first."""
    whole, pieces = x.operands[::-1] if x.operands[0].startswith("{") else x.operands
    names = kernel.names(pieces)
    dtype = DTYPES[kind]
    part = f"b{8 * dtype.itemsize // len(names)}"
    narrow = DTYPES[part]
    if x.operands[0] == whole:
        write = kernel.writer(whole, kind, x)
        reads = [kernel.reader(y, part) for y in names]

        def join(g: Group) -> None:
            columns = [spread(read(g), g.size) for read in reads]
            write(g, np.stack(columns, 1).ravel().view(dtype))

        return join
    writes = [kernel.writer(y, part, x) for y in names]
    read = kernel.reader(whole, kind)

    def split(g: Group) -> None:
        value = spread(read(g), g.size)
        columns = value.view(narrow).reshape(g.size, len(names)).T
        for write, y in zip(writes, np.ascontiguousarray(columns), strict=True):
            write(g, y)

    return split


def _special() -> dict[str, Callable[[Kernel, Instruction], Step]]:
    found: dict[str, Callable[[Kernel, Instruction], Step]] = {
        "bra": _branch,
        "bra.uni": _branch,
        "ret": _return,
        "bar.sync": _barrier,
        "bar.warp.sync": _warp_barrier,
        "cp.async.ca.shared.global": _copy,
        "cp.async.cg.shared.global": _copy,
        "cp.async.commit_group": _commit,
        "cp.async.wait_group": _wait,
        "fence.proxy.async.shared::cta": _fence,
        "wgmma.fence.sync.aligned": _registers_fence,
        "wgmma.commit_group.sync.aligned": _commit_products,
        "wgmma.wait_group.sync.aligned": _wait_products,
    }

    def add(opcode: str, build: Callable[..., Step], *arguments: Any, **options: Any) -> None:
        found[opcode] = lambda kernel, x: build(kernel, x, *arguments, **options)

    for kind in ("b32", "b64", "u32", "u64", "s32", "s64", "f32"):
        add(f"ld.param.{kind}", _parameter, kind)
    spaces = {"global": False, "shared": True, "shared::cta": True}
    vectors = {"": 1, ".v2": 2, ".v4": 4}
    for (space, shared), (vector, parts), kind in itertools.product(
        spaces.items(), vectors.items(), ("b8", "b16", "b32", "b64")
    ):
        if parts * DTYPES[kind].itemsize <= 16:
            add(f"ld.{space}{vector}.{kind}", _load, parts, kind, shared)
            add(f"st.{space}{vector}.{kind}", _store, parts, kind, shared)
    add("atom.global.gpu.relaxed.add.f32", _atomic, "f32", returns=True)
    add("red.global.gpu.relaxed.add.f32", _atomic, "f32", returns=False)
    for mode in ("bfly", "up", "down", "idx"):
        add(f"shfl.sync.{mode}.b32", _shuffle, mode)
    for name, kind in itertools.product(REDUCTIONS, ("s32", "u32")):
        add(f"redux.sync.{name}.{kind}", _reduce, name, kind)
    for parts, transposed in itertools.product((1, 2, 4), (False, True)):
        trans = ".trans" if transposed else ""
        opcode = f"ldmatrix.sync.aligned.m8n8.x{parts}{trans}.shared.b16"
        add(opcode, _matrices, parts, transposed=transposed)
        add(f"st{opcode[2:]}", _store_matrices, parts, transposed=transposed)
    for kind, depth in (("bf16", 16), ("f16", 16), ("tf32", 8)):
        opcode = f"mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32"
        add(opcode, _multiply, depth, kind)
        for n in (8, 16, 32, 64, 128, 256):
            opcode = f"wgmma.mma_async.sync.aligned.m64n{n}k{depth}.f32.{kind}.{kind}"
            add(opcode, _warpgroups, n, depth, kind)
    for kind in ("b32", "b64"):
        add(f"mov.{kind}", _pack, kind)
    return found


SPECIAL = _special()
