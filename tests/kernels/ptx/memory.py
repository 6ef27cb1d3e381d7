"""Global and shared memory: where bytes are, and which thread may touch them when.

Every tensor lies in a region of its own of the address space, so that an address outside of it is
in no tensor at all. What no one wrote cannot be read: shared memory knows its writers, and tensors
that the host code allocated without a value hold POISON. Two accesses to the same bytes, at least
one of them a write, must be of one thread or be ordered by a barrier (`Shadow`).
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from .text import PtxError

Array = np.ndarray[Any, Any]
# Each byte of a number that must not be read, as `kernel_cases.fill_with_poison` writes it.
POISON = 0xFF
# Of an address, the bits from here on say in which buffer it is.
REGION = 40
# The widest access, which everything is padded to.
WIDEST = 16


def flat(x: Tensor) -> Tensor:
    """Every element between a tensor's first and its last, flat."""
    extent = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
    return x.detach().as_strided((extent if x.numel() else 0,), (1,))


def padded(size: int) -> int:
    """Size rounded up to whole widest accesses."""
    return -(-size // WIDEST) * WIDEST


@dataclasses.dataclass(frozen=True)
class Access:
    """One access by many threads: what it is in the rows of as many bytes each that memory has."""

    rows: Array
    size: int
    agents: Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Clash:
    """Which threads write what another agent wrote since the last barrier, or writes at once."""

    before: Array
    now: Array


class Shadow:
    """Who touched which bytes since the last barrier.

    An agent is a block, a warp or a thread; an epoch is what lies between two barriers. Two agents
    conflict where they touch the same bytes in the same epoch and one writes. Of the readers of an
    epoch the first and the last agent are kept, enough to know whether there was one beside
    oneself, and only once somebody writes. Atomic additions are one agent, beyond the others: they
    conflict with all but themselves.
    """

    PENDING = np.iinfo(np.int32).max

    def __init__(self, size: int, unit: int, kind: str, agents: int, barrier: str) -> None:
        self.kind = kind
        self.barrier = barrier
        self.agents = agents + 1
        # Bytes of an entry: no access is narrower.
        self.unit = unit
        entries = padded(size) // unit
        # Each is epoch * agents + agent, of `first` agents - 1 - agent: a maximum is always right.
        self.writer, self.first, self.last = (np.zeros(entries, np.int32) for _ in range(3))
        self.reads: list[Access] = []
        self.epoch = 0

    def _rows(self, x: Array, size: int) -> Array:
        return x.reshape(-1, size // self.unit)

    def _conflicts(self, seen: Array, mine: Array, epoch: int) -> Array:
        return (seen >= epoch * self.agents) & (seen != mine)

    def _forbid(self, conflict: Array, verb: str, before: str) -> None:
        if conflict.any():
            raise PtxError(
                f"race: a {self.kind} {verb} what another {self.kind} {before} before, "
                f"and no {self.barrier} lies between"
            )

    def _finished(self, writer: Array, verb: str) -> None:
        if (writer == self.PENDING).any():
            raise PtxError(f"{verb} what cp.async still copies")

    def _mine(self, access: Access, epoch: int) -> tuple[Array, Array]:
        agent = access.agents[self.kind][:, None]
        return epoch * self.agents + agent, epoch * self.agents + self.agents - 1 - agent

    def _note_reads(self, epoch: int) -> None:
        """Agents ascend, and of numpy's assignments to one entry the last stays."""
        for access in self.reads:
            rows = access.rows
            first, last = (self._rows(x, access.size) for x in (self.first, self.last))
            mine, mirrored = self._mine(access, epoch)
            last[rows] = np.maximum(last.take(rows, 0), mine)
            first[rows[::-1]] = np.maximum(first.take(rows, 0), mirrored)[::-1]
        self.reads.clear()

    def _begin(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.reads.clear()
            self.epoch = epoch

    def read(self, access: Access, epoch: int) -> Array:
        """Note a read.

        Returns:
            The last write of each entry, 0 where there was none.
        """
        self._begin(epoch)
        writer = self._rows(self.writer, access.size).take(access.rows, 0)
        self._finished(writer, "reads")
        mine, _ = self._mine(access, epoch)
        self._forbid(self._conflicts(writer, mine, epoch), "reads", "wrote")
        self.reads.append(access)
        return writer

    def write(self, access: Access, epoch: int, *, atomic: bool = False) -> Clash:
        """Note a write."""
        self._begin(epoch)
        self._note_reads(epoch)
        rows = access.rows
        writer, first, last = (
            self._rows(x, access.size) for x in (self.writer, self.first, self.last)
        )
        mine, mirrored = self._mine(access, epoch)
        if atomic:
            beyond = epoch * self.agents + self.agents - 1
            mine, mirrored = np.full_like(mine, beyond), np.full_like(mine, epoch * self.agents)
        self._forbid(self._conflicts(last.take(rows, 0), mine, epoch), "writes", "read")
        self._forbid(self._conflicts(first.take(rows, 0), mirrored, epoch), "writes", "read")
        seen = writer.take(rows, 0)
        self._finished(seen, "writes")
        writer[rows] = mine
        return Clash(
            self._conflicts(seen, mine, epoch).any(1), (writer.take(rows, 0) != mine).any(1)
        )

    def refuse(self, clash: Clash) -> None:
        """Of writes that must not meet: raise where they do."""
        self._forbid(clash.before | clash.now, "writes", "wrote")

    def begin(self, access: Access, epoch: int) -> None:
        """Note a write whose bytes are not there yet."""
        self.refuse(self.write(access, epoch))
        self._rows(self.writer, access.size)[access.rows] = self.PENDING

    def finish(self, access: Access, epoch: int) -> None:
        """Note that the bytes of a pending write are there."""
        self._rows(self.writer, access.size)[access.rows] = self._mine(access, epoch)[0]


def take(data: Array, access: Access, dtype: np.dtype[Any]) -> Array:
    """What is in memory, [parts of the access, threads]."""
    parts = access.size // dtype.itemsize
    return np.ascontiguousarray(data.view(dtype).reshape(-1, parts)[access.rows].T)


def put(data: Array, access: Access, values: Array, clash: Clash) -> None:
    """Write [parts, threads]; what more than one warp writes between barriers must be the same.

    Lanes of one warp may differ: where the sum of a butterfly is contracted into fused products,
    each lane rounds another of them, and all are right.
    """
    bits = values.view(f"u{values.dtype.itemsize}").T
    room = data.view(bits.dtype).reshape(-1, values.shape[0])
    rows = access.rows
    if clash.now.any():
        # As if one warp came after the other.
        warps, done = access.agents["warp"], rows[:0]
        for warp in np.unique(warps):
            mine = warps == warp
            part = Access(rows[mine], access.size, {"warp": warps[mine]})
            again = clash.before[mine] | np.isin(part.rows, done)
            put(data, part, values[:, mine], Clash(again, np.zeros_like(again)))
            done = np.concatenate([done, part.rows])
        return
    old = room[rows[clash.before]]
    room[rows] = bits
    if (room[rows[clash.before]] != old).any():
        raise PtxError(
            "race: writes other values than were written before, and no barrier lies between"
        )


class Shared:
    """Shared memory of the blocks that run together."""

    def __init__(self, blocks: int, size: int, warps: int, unit: int) -> None:
        self.size = size
        self.stride = padded(size)
        self.data = np.full(blocks * self.stride, POISON, np.uint8)
        self.warps = Shadow(self.data.size, unit, "warp", warps, "bar.sync")
        self.threads = Shadow(self.data.size, unit, "thread", warps * 32, "bar.warp.sync")
        # Of 16 bytes, how many wgmma read them that nobody waited for.
        self.multiplying = np.zeros(self.data.size // WIDEST, np.int32)
        # The store of every entry that wgmma cannot see yet, 0 where it can, and these stores by
        # number, each with its epoch.
        self.unseen = np.zeros(self.data.size // unit, np.int32)
        self.stores: dict[int, tuple[Access, int]] = {}
        self.count = 0

    def access(self, address: Array, size: int, agents: Mapping[str, Array]) -> Access:
        """The access of `size` bytes at an address in each thread's block."""
        bad = address.astype(np.int64) > self.size - size
        if bad.any():
            raise PtxError(
                f"out of bounds: {size} bytes at {int(address[bad][0])} of shared memory, "
                f"which has {self.size}"
            )
        if (address % address.dtype.type(size)).any():
            raise PtxError(f"misaligned: {size} bytes of shared memory")
        rows = (agents["place"] * self.stride + address.astype(np.int64)) // size
        return Access(rows, size, agents)

    def load(self, access: Access, dtype: np.dtype[Any], epochs: tuple[int, int]) -> Array:
        if not self.warps.read(access, epochs[0]).all():
            raise PtxError("reads shared memory that nobody wrote")
        self.threads.read(access, epochs[1])
        return take(self.data, access, dtype)

    def _unread(self, access: Access) -> None:
        if self.multiplying[access.rows * access.size // WIDEST].any():
            raise PtxError("writes what wgmma still reads")

    def store(self, access: Access, values: Array, epochs: tuple[int, int]) -> None:
        self._unread(access)
        self.count += 1
        self.unseen.reshape(-1, access.size // self.warps.unit)[access.rows] = self.count
        self.stores[self.count] = access, epochs[0]
        warps = self.warps.write(access, epochs[0])
        lanes = self.threads.write(access, epochs[1])
        put(self.data, access, values, Clash(warps.before | lanes.before, warps.now))

    def begin(self, access: Access, epochs: tuple[int, int]) -> None:
        """A copy to here begins: until it ends nobody may touch the bytes.

        wgmma sees what it writes without a fence: compilers rely on that.
        """
        self._unread(access)
        self.unseen.reshape(-1, access.size // self.warps.unit)[access.rows] = 0
        self.warps.begin(access, epochs[0])
        self.threads.begin(access, epochs[1])

    def end(self, access: Access, values: Array, epochs: tuple[int, int]) -> None:
        """A copy ends, seen by the thread that began it and, after a barrier, by all."""
        self.warps.finish(access, epochs[0])
        self.threads.finish(access, epochs[1])
        none = np.zeros(access.rows.size, bool)
        put(self.data, access, values, Clash(none, none))

    def fence(self, agents: Mapping[str, Array], epoch: int) -> None:
        """Let wgmma see what threads wrote, and what others of their blocks wrote before."""
        mine = agents["place"] * (1 << 16) + agents["thread"]
        for number, (access, written) in list(self.stores.items()):
            of = access.agents
            if written < epoch:
                seen = np.isin(of["place"], agents["place"])
            else:
                seen = np.isin(of["place"] * (1 << 16) + of["thread"], mine)
            unseen = self.unseen.reshape(-1, access.size // self.warps.unit)
            rows = access.rows[seen]
            unseen[rows] = np.where(unseen[rows] == number, 0, unseen[rows])
            if seen.all():
                del self.stores[number]
            else:
                left = {k: x[~seen] for k, x in of.items()}
                self.stores[number] = Access(access.rows[~seen], access.size, left), written

    def multiply(self, access: Access, epochs: tuple[int, int]) -> Array:
        """wgmma begins to read: until it is waited for nobody may write to the bytes."""
        found = self.load(access, np.dtype(np.uint32), epochs)
        if self.unseen.reshape(-1, access.size // self.warps.unit)[access.rows].any():
            raise PtxError("wgmma reads what was stored, and no fence.proxy.async lies between")
        np.add.at(self.multiplying, access.rows, 1)
        return found

    def multiplied(self, access: Access, epochs: tuple[int, int]) -> None:
        """wgmma has read."""
        np.subtract.at(self.multiplying, access.rows, 1)
        self.warps.read(access, epochs[0])
        self.threads.read(access, epochs[1])


class Buffer:
    """A tensor, or several that overlap, as bytes in global memory."""

    def __init__(self, name: str, start: int, size: int, region: int) -> None:
        self.name = name
        self.size = size
        # Bytes before the first that belong to the same widest access: they are never touched.
        self.lead = start % WIDEST
        self.base = (region << REGION) + start % 256
        self.start = start
        raw = (ctypes.c_uint8 * padded(self.lead + size)).from_address(start - self.lead)
        self.data = np.frombuffer(raw, np.uint8) if size else np.zeros(0, np.uint8)
        self.atomic = False
        self.item = 0
        self.shadows: tuple[Shadow, ...] = ()

    def watch(self, unit: int, blocks: int, warps: int) -> None:
        """Look for conflicts between blocks, which nothing orders, and between warps."""
        size = self.data.size
        self.shadows = (
            Shadow(size, unit, "block", blocks, "order of blocks"),
            Shadow(size, unit, "warp", warps, "bar.sync"),
        )


class Global:
    """Tensors by name, each in a region of its own."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.buffers: list[Buffer] = []
        self.addresses: dict[str, int] = {}
        for name, x in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
            start, size = x.data_ptr(), flat(x).nbytes
            last = self.buffers[-1] if self.buffers else None
            if last is not None and size and start < last.start + last.size:
                whole = max(last.start + last.size, start + size) - last.start
                both = Buffer(f"{last.name}, {name}", last.start, whole, len(self.buffers))
                both.item = last.item
                self.buffers[-1] = both
            else:
                self.buffers.append(Buffer(name, start, size, len(self.buffers) + 1))
                self.buffers[-1].item = x.element_size() if x.is_floating_point() else 0
            self.addresses[name] = self.buffers[-1].base + start - self.buffers[-1].start

    def watch(self, addresses: Iterable[int], unit: int, blocks: int, warps: int) -> None:
        """Look for conflicts in the tensors at addresses: those that a kernel may write."""
        for address in addresses:
            if region := self._region(address):
                self.buffers[region - 1].watch(unit, blocks, warps)

    def added_to(self, name: str) -> bool:
        """Whether the kernel added to a tensor atomically."""
        return self.buffers[self._region(self.addresses[name]) - 1].atomic

    @staticmethod
    def _region(address: Any) -> Any:
        # The nearest buffer, also for what lies before it.
        return (address + (1 << (REGION - 1))) >> REGION

    def accesses(
        self, address: Array, size: int, agents: Mapping[str, Array]
    ) -> Iterator[tuple[Buffer, Any, Access]]:
        """Buffers, which of the threads access each, and the access."""
        where = self._region(address.view(np.int64))
        regions = [int(where[0])] if (where == where[0]).all() else np.unique(where).tolist()
        for region in regions:
            chosen = slice(None) if len(regions) == 1 else np.flatnonzero(where == region)
            if not 1 <= region <= len(self.buffers):
                raise PtxError(
                    f"out of bounds: address {int(address[chosen][0]):#x} is of no tensor"
                )
            buffer = self.buffers[region - 1]
            offset = address[chosen].view(np.int64) - buffer.base
            bad = (offset < 0) | (offset > buffer.size - size)
            if bad.any():
                raise PtxError(
                    f"out of bounds: {size} bytes at {int(offset[bad][0])} of {buffer.name}, "
                    f"which has {buffer.size}"
                )
            offset += buffer.lead
            if (offset % size).any():
                raise PtxError(f"misaligned: {size} bytes of {buffer.name}")
            here = agents if len(regions) == 1 else {k: x[chosen] for k, x in agents.items()}
            yield buffer, chosen, Access(offset // size, size, here)

    def load(
        self,
        address: Array,
        size: int,
        dtype: np.dtype[Any],
        agents: Mapping[str, Array],
        epoch: int,
    ) -> Array:
        found = np.empty((size // dtype.itemsize, address.size), dtype)
        for buffer, chosen, access in self.accesses(address, size, agents):
            for shadow in buffer.shadows:
                shadow.read(access, 1 if shadow.kind == "block" else epoch)
            values = take(buffer.data, access, dtype)
            if 0 < buffer.item <= dtype.itemsize:
                bits = values.view(f"u{buffer.item}")
                if (bits == np.iinfo(bits.dtype).max).any():
                    raise PtxError(f"reads what nobody wrote to {buffer.name}")
            found[:, chosen] = values
        return found

    def store(self, address: Array, values: Array, agents: Mapping[str, Array], epoch: int) -> None:
        size = values.shape[0] * values.dtype.itemsize
        for buffer, chosen, access in self.accesses(address, size, agents):
            blocks, warps = buffer.shadows
            blocks.refuse(blocks.write(access, 1))
            clash = warps.write(access, epoch)
            put(buffer.data, access, np.ascontiguousarray(values[:, chosen]), clash)

    def add(self, address: Array, values: Array, agents: Mapping[str, Array], epoch: int) -> Array:
        """Add atomically, one thread after the other; what was there before each."""
        before = np.empty_like(values)
        for buffer, chosen, access in self.accesses(address, values.dtype.itemsize, agents):
            for shadow in buffer.shadows:
                at = 1 if shadow.kind == "block" else epoch
                shadow.refuse(shadow.write(access, at, atomic=True))
            buffer.atomic = True
            room, old = buffer.data.view(values.dtype), before[chosen]
            for i, (row, x) in enumerate(zip(access.rows, values[chosen], strict=True)):
                old[i] = room[row]
                room[row] += x
            before[chosen] = old
        return before
