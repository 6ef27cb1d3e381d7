"""What test_distributed.py runs in several processes: recurrences whose tokens are spread over
them, with gradients."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from program.unusual import UNUSUAL
from torch import Tensor

import glazoo
from glazoo import distributed
from glazoo.program import lower
from glazoo.spec import Spec
from glazoo.theory.instances import operands as draw
from glazoo.theory.instances import run
from glazoo.theory.instances import state as draw_state

SIZES = {"H": 2, "HV": 4, "K": 4, "V": 3}
BORDERS = (0, 2, 2, 5, 9, 9, 12)
"""Packed sequences: borders on the edges of processes and on either side of them, and none."""
LENGTHS: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((12,),),
    2: ((5, 7), (0, 12)),
    3: ((1, 5, 6), (5, 0, 7)),
}
"""Tokens of every process, by their number."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A spec, and what it is run on."""

    label: str
    lengths: tuple[int, ...]
    packed: bool
    regime: str = "normal"
    dtype: torch.dtype = torch.float64
    start: bool = True
    apart: bool = False
    """Whether the first process uses the final state alone, and the others their outputs alone."""

    def __str__(self) -> str:
        parts = [self.label, *(str(n) for n in self.lengths), "packed" * self.packed, self.regime]
        parts += [str(self.dtype)[6:], "" if self.start else "from nothing", "apart" * self.apart]
        return " ".join(x for x in parts if x)

    @property
    def spec(self) -> Spec:
        name, _, gate = self.label.partition(" ")
        if self.label in UNUSUAL:
            return UNUSUAL[self.label]
        spec = glazoo.load(name)
        return glazoo.metaplasticize(spec, gate=gate) if gate else spec  # type: ignore[arg-type]

    @property
    def cu_seqlens(self) -> Tensor | None:
        return torch.tensor(BORDERS) if self.packed else None

    def leaves(self) -> tuple[dict[str, Tensor], glazoo.State | None]:
        """Operands and state, of which derivatives may be asked for."""
        generator = torch.Generator().manual_seed(7)
        batch = 1 if self.packed else 2
        found = draw(
            self.spec, generator, batch, sum(self.lengths), **SIZES,
            dtype=self.dtype, regime=self.regime,
        )  # fmt: skip
        ops = {name: x.requires_grad_() for name, x in found.items()}
        if not self.start:
            return ops, None
        sequences = len(BORDERS) - 1 if self.packed else batch
        start = draw_state(self.spec, generator, sequences, **SIZES, dtype=self.dtype)
        return ops, start.map(lambda x: x.requires_grad_())


def results_of(op: Any, case: Case, ops: Any, start: Any, **options: Any) -> list[list[Tensor]]:
    """What a process gives of its tokens, and final states."""
    spec = case.spec
    out = run(
        op, spec, ops, initial_state=start, cu_seqlens=case.cu_seqlens,
        output_uncertainty=spec.has_variance, **options,
    )  # fmt: skip
    tokens = [out.output, *([out.uncertainty] if len(out) == 3 else [])]
    return [tokens, [x for x in out.final_state if x is not None]]


def weights_of(results: list[list[Tensor]], case: Case) -> list[list[Tensor]]:
    """Weights of a loss, of all tokens."""
    generator, total = torch.Generator().manual_seed(8), sum(case.lengths)

    def weight(x: Tensor, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(x.dtype)

    tokens, finals = results
    return [
        [weight(x, x.shape[0], total, *x.shape[2:]) for x in tokens],
        [weight(x, *x.shape) for x in finals],
    ]


def weighted(results: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """A loss; of infinite results, which memories in logarithms begin with, no part."""
    loss = torch.zeros((), dtype=torch.float64)
    for x, w in zip(results, weights, strict=True):
        loss = loss + torch.where(x.isfinite(), x * w, 0.0).sum()
    return loss


def gradients(loss: Tensor, ops: dict[str, Tensor], start: Any) -> dict[str, Tensor]:
    leaves = ops | ({} if start is None else {f"initial {n}": x for n, x in named(start)})
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        f"gradient of {n}": torch.zeros_like(x) if g is None else g
        for (n, x), g in zip(leaves.items(), found, strict=True)
    }


def named(state: Any) -> list[tuple[str, Tensor]]:
    return [(name, x) for name, x in state._asdict().items() if x is not None]


def measure(case: Case, group: Any) -> dict[str, Tensor]:
    """What this process gives: its outputs, final states, and gradients of all operands."""
    rank, program = dist.get_rank(group), lower(case.spec)
    ops, start = case.leaves()
    begin = sum(case.lengths[:rank])
    mine = slice(begin, begin + case.lengths[rank])
    own = {}
    for name, x in ops.items():
        operand = program.operand(name)
        assert operand is not None
        n = x.shape[1] // sum(case.lengths) if operand.per_token else 0
        own[name] = x[:, n * mine.start : n * mine.stop] if operand.per_token else x
    results = results_of(distributed.attention, case, own, start, group=group, impl="chunked")
    tokens, finals = weights_of(results, case)
    parts = []
    if not case.apart or rank > 0:
        parts.append(weighted(results[0], [w[:, mine] for w in tokens]))
    if rank == 0:
        parts.append(weighted(results[1], finals))
    found = gradients(torch.stack(parts).sum(), ops, start)
    for i, x in enumerate(results[0]):
        found[f"output {i}"] = x.detach()
    for i, x in enumerate(results[1]):
        found[f"final {i}"] = x.detach()
    return found


def mismatches(group: Any) -> dict[str, str]:
    """What this process is told where the last one does something else than the others."""
    world = dist.get_world_size(group)
    last = dist.get_rank(group) == world - 1
    leaves, start = Case("gla", (12,), packed=True).leaves()
    assert start is not None
    ops = {n: x.detach() for n, x in leaves.items()}
    bounds = world * torch.tensor(BORDERS)
    # What the last does, and what the others do.
    changes: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "batch": ({n: torch.cat([x, x]) for n, x in ops.items()}, {}),
        "dtype": ({"q": ops["q"].float()}, {}),
        "bounds": ({"cu_seqlens": bounds[-1] - bounds.flip(0)}, {"cu_seqlens": bounds}),
        "unpacked": ({}, {"cu_seqlens": bounds}),
        "gradient": ({"q": leaves["q"]}, {}),
        "state": ({"initial_state": start.map(torch.zeros_like)}, {}),
        "final": ({"output_final_state": True}, {}),
        "spec": ({"spec": "simple_gla", "g": ops["g"][..., 0]}, {}),
    }
    changes["state"][0]["cu_seqlens"] = changes["state"][1]["cu_seqlens"] = bounds
    found = {}
    for name, change in changes.items():
        try:
            distributed.attention(**{"spec": "gla"} | ops | change[not last], group=group)
        except ValueError as e:
            found[name] = str(e)
    return found


def _work(rank: int, world: int, folder: str, cases: Sequence[Case]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    options: dict[str, Any] = {"rank": rank, "world_size": world, "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", store=store, **options)
    # One start of processes serves groups of several sizes.
    groups = {n: dist.new_group(list(range(n))) for n in LENGTHS if n <= world}
    found: dict[str, Any] = {}
    for case in cases:
        if rank < len(case.lengths):
            found[str(case)] = measure(case, groups[len(case.lengths)])
    found["mismatches"] = mismatches(groups[world])
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def spread(cases: Sequence[Case], folder: Path) -> list[dict[str, Any]]:
    """Run cases in as many processes as they need, and give what each process found."""
    world = max(len(case.lengths) for case in cases)
    # Processes share the seconds that the imports take.
    context = get_context("forkserver")
    context.set_forkserver_preload(["ranks"])
    started = [
        context.Process(target=_work, args=(rank, world, str(folder), cases), daemon=True)
        for rank in range(world)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(500)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    assert codes == [0] * world
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]
