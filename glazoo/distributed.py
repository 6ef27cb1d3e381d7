"""One recurrence over the tokens of several processes: context parallelism.

What the tokens of a process do to a state that is linear in what it was is one map of the state, of
the state's size and not of the tokens'. So every process makes the map of its own tokens, all maps
are gathered, and each process composes those before it: a decay and a sum for a linear state, a
matrix and a sum for a delta rule. Gathering (decay, state) of linear attention is LASP's (Sun et
al., arXiv:2404.02882, from process to process) and LASP-2's (Sun et al., arXiv:2502.07563, with one
all-gather); gathering (matrix, state) of delta rules is that of flash-linear-attention's context
parallelism. Here the same is done for each core operation of a program, so that an importance is
known to the tokens of a process before the keys that it divides are.
"""

from __future__ import annotations

import functools
import hashlib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from glazoo.api import check_domains, count_sequences, validated
from glazoo.engines import pick
from glazoo.program import Core, Program, lower
from glazoo.program.env import Env
from glazoo.spec import Spec
from glazoo.state import Output, OutputWithUncertainty, State
from glazoo.zoo import load

__all__ = ["attention"]


def attention(
    spec: str | Path | Spec,
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B nT H K"] | None,
    v: Float[Tensor, "B nT HV V"],
    *,
    group: dist.ProcessGroup | None = None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    output_uncertainty: bool = False,
    cu_seqlens: Int[Tensor, "N1"] | None = None,
    impl: str = "auto",
    **operands: Tensor | float | None,
) -> Output | OutputWithUncertainty:
    """Runs the recurrence of a spec on tokens that are spread over the processes of a group.

        state before the tokens of process r = M_{r-1} (... (M_0 initial_state + C_0) ...) + C_{r-1}

    The process of rank r has the tokens that follow those of rank r - 1. Every process calls this
    function, and runs its backward pass, with operands that are alike but for T: the number of
    tokens of a process is its own, and may be 0. Outputs and gradients are those of
    `glazoo.attention` on all tokens at once, where the loss is the sum of the losses of all
    processes; there are no second derivatives. Of what all processes have alike (`initial_state`,
    `prior`, `u`, `basis`, `center`, a fixed decay) each gets the gradient of its own tokens: sum
    these over the group.

    The classes linear, delta, synapse and full exchange one map per process at once. What has none
    (a gain per synapse, an importance whose variance grows, a covariance) passes its state from
    process to process, one after the other: correct, but no faster than one process.

    Args:
        spec: name of a variant, path of a spec file, or a `Spec`.
        q: [B, T, H, K], queries of this process's tokens.
        k: [B, T, H, K], their keys, as for `glazoo.attention`.
        v: [B, T, HV, V], their values.
        group: the processes, in the order of their tokens. Default: all.
        scale: factor on q. Default: the spec's.
        initial_state: state of the N sequences before the first token of all, the same on every
            process; default: nothing written.
        output_final_state: whether to give the state after the last token of all, on every process.
        output_uncertainty: whether to give the posterior variance of the output.
        cu_seqlens: [N + 1], int: bounds of packed sequences among the tokens of all processes, the
            same on every process, B = 1; a sequence may lie on several.
        impl: "chunked", "compiled", "triton" or "auto", as for `glazoo.attention`.
        operands: the others of `glazoo.attention`, by name, of this process's tokens.

    Returns:
        `Output(output, final_state)`, with a third field `uncertainty` if asked for, of this
        process's tokens.

    Raises:
        ValueError: there is no process group; what should be alike on all processes is not, which
            each of them says; cu_seqlens does not end at the sum of their T; what
            `glazoo.attention` refuses, on the process that has it: the others wait for it until it
            ends, or the group's time is over.
        TypeError: an operand is not a tensor.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "group: this process is in none; start the processes with torchrun and call "
            "torch.distributed.init_process_group first"
        )
    if impl in ("reference", "fla"):
        raise ValueError(
            f"impl: got {impl!r}, accepted are auto, chunked, compiled and triton, whose states "
            "can be given to other processes"
        )
    program = lower(load(spec))
    own = {"q": q, "k": k, "v": v} | operands
    check_domains(program, own)
    given = dict.fromkeys(o.name for o in program.operands) | own
    # What is wrong with the operands is said before other processes are waited for.
    validated(program, given, scale, None, None, output_uncertainty)
    options = {"output_final_state": output_final_state, "output_uncertainty": output_uncertainty}
    alike = _alike(program, own, initial_state, cu_seqlens, options)
    place, borders = _place(q, cu_seqlens, alike, group)
    call = validated(program, given, scale, initial_state, borders, output_uncertainty)
    tensors = [*call.operands.values(), *(initial_state or ())]
    place.operands += [x for x in tensors if x is not None and x.requires_grad]
    result = pick(impl, call)(replace(call, spread=functools.partial(_spread, place)))
    final = None
    if output_final_state:
        final = result.state.map(place.ended)
    # A process that uses one result alone takes part in the derivative of the others, too.
    output = _tie(result.output.to(v.dtype), *place.ties)
    final = None if final is None else final.map(lambda x: _tie(x, output))
    if output_uncertainty:
        assert result.uncertainty is not None
        return OutputWithUncertainty(output, final, _tie(result.uncertainty, output))
    return Output(output, final)


class _Gather(torch.autograd.Function):
    """Stacks the tensors of all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x, group)
        return torch.stack(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None


class _Sum(torch.autograd.Function):
    """Sums the tensors of all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Sum.forward(ctx, grad, ctx.group), None


class _Tie(torch.autograd.Function):
    """A tensor whose derivative also runs those of others, which get no gradient of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.others = len(others)
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, *[None] * ctx.others


def _tie(x: Tensor, *others: Tensor) -> Tensor:
    tied: Tensor = _Tie.apply(x, *others)  # type: ignore[no-untyped-call]
    return tied


@dataclass(slots=True)
class _Place:
    """Where the tokens of this process stand among those of all.

    Exchanges are part of the derivative on every process, whether it has tokens or not and uses
    what it gets or not: a process that left one out would let the others wait forever. Autograd
    runs them in the reverse of the order in which they were made, which is one on all processes.
    """

    group: dist.ProcessGroup | None
    rank: int
    world: int
    tokens: int
    first: int
    """First token of the sequence, or of the batch, that may go on after this process."""
    into: int | None
    """Packed sequence of the first token; None: the batch."""
    out: int | None
    """Packed sequence of the last token; None: the batch."""
    before: tuple[int, ...]
    """Processes that have earlier tokens of the sequence of the first token."""
    ends: Tensor
    """Whether each sequence ends here, [N]."""
    operands: list[Tensor] = field(default_factory=list)
    """What a derivative may be asked for."""
    ties: list[Tensor] = field(default_factory=list)
    """What was exchanged."""

    def cut(self, x: Tensor) -> Tensor:
        """Return the (sub-)tokens of the sequences that may go on after this process."""
        return x[:, self.first * (x.shape[1] // max(1, self.tokens)) :]

    def leaving(self, state: Tensor) -> Tensor:
        """Return the state of these sequences from that of all."""
        return state if self.out is None else state[self.out : self.out + 1]

    def entering(self, state: Tensor) -> Tensor:
        """Return the state of the sequences that may have begun earlier from that of all."""
        return state if self.into is None else state[self.into : self.into + 1]

    def entered(self, state: Tensor, new: Tensor) -> Tensor:
        """Return the state of all sequences with a new one of those that may have begun earlier."""
        if self.into is None:
            return new
        return torch.cat([state[: self.into], new, state[self.into + 1 :]])

    def gather(self, x: Tensor) -> list[Tensor]:
        """Return what the processes before this one give, in their order."""
        tied = _tie(x.contiguous(), *self.operands)
        found = _Gather.apply(tied, self.group)  # type: ignore[no-untyped-call]
        self.ties.append(found)
        return [found[r] for r in self.before]

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over all processes."""
        tied = _tie(x, *self.operands)
        found: Tensor = _Sum.apply(tied, self.group)  # type: ignore[no-untyped-call]
        self.ties.append(found)
        return found

    def ended(self, state: Tensor) -> Tensor:
        """Return the final state of every sequence from the process on which it ends."""
        ends = self.ends.view(-1, *[1] * (state.ndim - 1))
        return self.sum(torch.where(ends, state, 0.0))


def _alike(
    program: Program,
    operands: Mapping[str, Tensor | float | None],
    state: State | None,
    cu_seqlens: Any,
    options: Mapping[str, bool],
) -> dict[str, str]:
    """Return in words what has to be the same on all processes: what differs would be exchanged all
    the same and taken for what it is not, or waited for forever."""

    def described(name: str, x: Tensor) -> str:
        operand = program.operand(name)
        shape = x.shape[2:] if operand is not None and operand.per_token else x.shape
        return f"{name} {list(shape)} {str(x.dtype)[6:]}"

    given = {n: x for n, x in sorted(operands.items()) if isinstance(x, Tensor)}
    starts = {} if state is None else {n: x for n, x in state._asdict().items() if x is not None}
    learned = any(x.requires_grad for x in (*given.values(), *starts.values()))
    bounds = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens
    return {
        "spec": f"{program.spec.name} ({'; '.join(program.recurrence)})",
        "operands but for B and T": ", ".join(described(n, x) for n, x in given.items()),
        "initial_state": ", ".join(described(n, x) for n, x in starts.items()) or "None",
        "cu_seqlens": str(bounds),
        "options": ", ".join(f"{n}={x}" for n, x in options.items()),
        "whether gradients are asked for": str(learned and torch.is_grad_enabled()),
    }


def _number(text: str) -> int:
    """Return a number that stands for a text, the same one on every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())


def _place(
    q: Tensor,
    cu_seqlens: Tensor | None,
    alike: Mapping[str, str],
    group: dist.ProcessGroup | None,
) -> tuple[_Place, Tensor | None]:
    """Return where this process stands, and the bounds of packed sequences among its tokens."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    sizes = torch.tensor([*q.shape[:2], *map(_number, alike.values())], device=q.device)
    every = [torch.empty_like(sizes) for _ in range(world)]
    dist.all_gather(every, sizes, group)
    batches, lengths, *numbers = zip(*torch.stack(every).tolist(), strict=True)
    if len(set(batches)) > 1:
        raise ValueError(f"q: got B = {list(batches)} on the processes, accepted is one B on all")
    for (what, text), found in zip(alike.items(), numbers, strict=True):
        others = [r for r in range(world) if found[r] != found[rank]]
        if others:
            raise ValueError(
                f"{what}: got {text} on process {rank} and something else on {others}, accepted is "
                "the same on all"
            )
    starts = [0, *accumulate(lengths)]
    mine, full = range(starts[rank], starts[rank + 1]), [r for r in range(world) if lengths[r]]
    count_sequences(cu_seqlens, q.shape[0], starts[-1])
    if cu_seqlens is None:
        ends = rank == max(full, default=0)
        place = _Place(
            group,
            rank,
            world,
            len(mine),
            first=0,
            into=None,
            out=None,
            before=tuple(r for r in full if r < rank),
            ends=torch.full((q.shape[0],), ends, device=q.device),
        )
        return place, None
    bounds = cu_seqlens.tolist()

    def sequence(token: int) -> int:
        return bisect_right(bounds, token) - 1

    def at(token: int) -> int:
        return bisect_right(starts, token) - 1

    into, out = (sequence(t) if mine else 0 for t in (mine.start, mine.stop - 1))
    before = [r for r in full if mine and r < rank and starts[r + 1] > bounds[into]]
    # A sequence without tokens ends where it began.
    ended = [(at(b - 1) if a < b else 0) == rank for a, b in pairwise(bounds)]
    place = _Place(
        group,
        rank,
        world,
        len(mine),
        first=max(0, bounds[out] - mine.start) if mine else 0,
        into=into,
        out=out,
        before=tuple(before),
        ends=torch.tensor(ended, device=q.device),
    )
    return place, (cu_seqlens - mine.start).clamp(0, len(mine))


def _spread(place: _Place, env: Env) -> Env:
    """Return an environment over all processes."""
    own = {f.name: getattr(env, f.name) for f in fields(Env)}
    return _Env(**own | {"core": _Over(env.core, place, env)}, place=place)


@dataclass(slots=True)
class _Env(Env):
    """An environment whose tokens follow those of other processes."""

    place: _Place

    def _before(self, x: Tensor, first: Tensor | None) -> Tensor:
        """Return what stands before each sequence here: the last token of another process, or
        `first`."""
        if first is None:
            first = x.new_zeros(self.sequences(), *x.shape[2:])
        like = self.place.leaving(first)
        found = self.place.gather(x[:, -1].to(like.dtype) if x.shape[1] else torch.zeros_like(like))
        return self.place.entered(first, found[-1]) if found else first

    def previous(self, x: Tensor, first: Tensor | None) -> Tensor:
        return Env.previous(self, x, self._before(x, first))

    def log_sums(self, x: Tensor, first: Tensor) -> Tensor:
        place, own = self.place, self.place.cut(x)
        total = own.logsumexp(1) if own.shape[1] else place.leaving(first).new_full((), -torch.inf)
        found = place.gather(total.expand(place.leaving(first).shape))
        start = functools.reduce(torch.logaddexp, found, place.entering(first))
        return Env.log_sums(self, x, place.entered(first, start))


class _Over:
    """The core operations of an engine over the tokens of all processes."""

    posterior_step = None
    # What it finds of an importance, other processes may have.
    whiten = None
    whitened_linear = None

    def __init__(self, core: Core, place: _Place, env: Env) -> None:
        self.core, self.place, self.env = core, place, env

    def _start(self, given: Tensor | None, like: Tensor, *shape: int) -> Tensor:
        """Return the state [N, HV, ...] before the first token of all."""
        if given is not None:
            return given
        return like.new_zeros(self.env.sequences(), *shape, dtype=self.env.wide)

    def _sums(
        self, start: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], g: Tensor | None
    ) -> Tensor:
        """Return the linear states [N, HV, K, D] that tokens here begin with: they decay by g, and
        add the products of each pair [B, T, H, K], [B, T, HV, D], side by side."""
        place, wide = self.place, self.env.wide
        heads, keys = start.shape[1:3]
        keep, left = start.new_ones(1).expand(place.leaving(start).shape[0], heads, keys), None
        if g is not None:
            g = place.cut(g if g.ndim == 4 else g[..., None])
            keep = g.sum(1).exp().expand(keep.shape)
            # Of each token's decay what comes after it: no difference, of which -inf has none.
            rest = g.flip(1).cumsum(1).flip(1)[:, 1:]
            left = torch.cat([rest, torch.zeros_like(g[:, :1])], 1).exp()
        added = []
        for k, w in pairs:
            k = self.env.spread(place.cut(k).to(wide), heads)
            k = k if left is None else k * left
            added.append(torch.einsum("nthk,nthd->nhkd", k, place.cut(w).to(wide)))
        state = place.entering(start)
        for found in place.gather(torch.cat([*added, keep[..., None]], -1)):
            state = found[..., -1:] * state + found[..., :-1]
        return place.entered(start, state)

    def _in_turn(
        self,
        run: Callable[[tuple[Tensor, ...]], tuple[Any, tuple[Tensor, ...]]],
        start: tuple[Tensor, ...],
    ) -> tuple[Any, tuple[Tensor, ...]]:
        """Run an operation that gives its result and its final states, after the processes before
        this one have run it."""
        place, found = self.place, None
        own = tuple(torch.zeros_like(place.leaving(x)) for x in start)
        for r in range(place.world):
            if r == place.rank:
                found = run(start)
                own = tuple(place.leaving(x) for x in found[1])
            if r + 1 < place.world:
                sent = [place.sum(x if r == place.rank else torch.zeros_like(x)) for x in own]
                if r in place.before:
                    start = tuple(place.entered(x, y) for x, y in zip(start, sent, strict=True))
        assert found is not None
        return found

    def linear(
        self,
        q: Tensor,
        k: Tensor,
        w: Tensor,
        g: Tensor | None = None,
        *,
        beta: Tensor | None = None,
        initial_state: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        start = self._start(initial_state, k, w.shape[2], k.shape[3], w.shape[3])
        start = self._sums(start, [(k, self.env.times(beta, w))], g)
        return self.core.linear(q, k, w, g, beta=beta, initial_state=start, **options)

    def delta(
        self,
        q: Tensor,
        e: Tensor | None,
        k: Tensor,
        w: Tensor,
        g: Tensor | None = None,
        *,
        beta: Tensor | None = None,
        erase: Tensor | None = None,
        scale: float = 1.0,
        initial_state: Tensor | None = None,
        base: str = "decayed",
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        place, (heads, keys, values) = self.place, (w.shape[2], k.shape[3], w.shape[3])
        start = self._start(initial_state, k, heads, keys, values)
        # What is written makes the sum; the identity, to which nothing is written, the matrix.
        one = torch.eye(keys, dtype=start.dtype, device=start.device)
        nothing = torch.zeros_like(place.leaving(start))
        state = torch.cat([nothing, one.expand(*nothing.shape[:3], keys)], -1)
        written = torch.nn.functional.pad(place.cut(w), (0, keys))
        predicted, decay, write, remove = (
            None if x is None else place.cut(x) for x in (e, g, beta, erase)
        )
        _, own = self.core.delta(
            place.cut(q),
            predicted,
            place.cut(k),
            written,
            decay,
            beta=write,
            erase=remove,
            initial_state=state,
            base=base,
        )
        state = place.entering(start)
        for found in place.gather(own):
            state = found[..., values:] @ state + found[..., :values]
        start = place.entered(start, state)
        return self.core.delta(
            q,
            e,
            k,
            w,
            g,
            beta=beta,
            erase=erase,
            scale=scale,
            initial_state=start,
            base=base,
            cu_seqlens=cu_seqlens,
        )

    def importance(
        self,
        k: Tensor,
        b: Tensor,
        g: Tensor | None = None,
        *,
        initial_state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        start = self._start(initial_state, k, b.shape[2], k.shape[3])
        pairs = [(k.to(self.env.wide).square(), b[..., None])]
        start = self._sums(start[..., None], pairs, g)[..., 0]
        return self.core.importance(k, b, g, initial_state=start, cu_seqlens=cu_seqlens)

    def synapse(
        self,
        q: Tensor,
        k: Tensor,
        w: Tensor,
        b: Tensor,
        g: Tensor | None = None,
        *,
        initial_state: tuple[Tensor, Tensor] | None = None,
        **options: Any,
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
        shape = w.shape[2], k.shape[3], w.shape[3]
        both = [self._start(x, k, *shape) for x in initial_state or (None, None)]
        # The memory is importance times mean, which is as linear as the importance.
        pairs = [(k, w), (k.to(self.env.wide).square(), b)]
        memory, importance = self._sums(torch.cat(both, -1), pairs, g).chunk(2, -1)
        return self.core.synapse(q, k, w, b, g, initial_state=(memory, importance), **options)

    def synapse_delta(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *gates: Tensor | None,
        initial_state: tuple[Tensor, Tensor] | None = None,
        **options: Any,
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
        shape = v.shape[2], k.shape[3], v.shape[3]

        def run(start: Any) -> tuple[Any, tuple[Tensor, ...]]:
            found: Any = self.core.synapse_delta
            y, states, doubt = found(q, k, v, *gates, initial_state=start, **options)
            return (y, doubt), states

        start = tuple(self._start(x, k, *shape) for x in initial_state or (None, None))
        (y, doubt), (memory, importance) = self._in_turn(run, start)
        return y, (memory, importance), doubt

    def solve(
        self,
        q: Tensor,
        k: Tensor,
        beta: Tensor,
        g: Tensor | None = None,
        *,
        initial_state: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        heads, keys = beta.shape[2], k.shape[3]
        start = self._start(initial_state, k, heads, keys, keys)
        wide = k.to(self.env.wide)
        written = beta[..., None] * self.env.spread(wide, heads)
        start = self._sums(start, [(wide, written)], g)
        return self.core.solve(q, k, beta, g, initial_state=start, **options)

    def riccati(
        self,
        a: Tensor,
        c: Tensor,
        d: Tensor,
        u: Tensor,
        *,
        initial_state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        def run(start: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
            z, final = self.core.riccati(a, c, d, u, initial_state=start[0], cu_seqlens=cu_seqlens)
            return z, (final,)

        start = self._start(initial_state, u, *u.shape[2:])
        z, (final,) = self._in_turn(run, (start,))
        return z, final

    def covariance(
        self,
        q: Tensor,
        k: Tensor,
        b: Tensor,
        *gates: Tensor | None,
        initial_state: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        def run(start: tuple[Tensor, ...]) -> tuple[Any, tuple[Tensor, ...]]:
            found: Any = self.core.covariance
            *read, final = found(q, k, b, *gates, initial_state=start[0], **options)
            return read, (final,)

        start = self._start(initial_state, k, b.shape[2], k.shape[3], k.shape[3])
        (found, spread), (final,) = self._in_turn(run, (start,))
        return found, spread, final
