"""Speed and memory of any spec's recurrence on this machine, per engine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from glazoo.api import attention
from glazoo.compare.timing import in_turns, seconds_of, spread
from glazoo.program import lower
from glazoo.spec import Spec
from glazoo.state import State
from glazoo.theory.instances import Operands, operands, run

__all__ = ["MODES", "BenchPlan", "Measurement", "measure"]

Mode = Literal["train", "prefill", "decode"]

MODES: tuple[Mode, ...] = ("train", "prefill", "decode")
"""train: forward and backward; prefill: forward over the whole sequence; decode: one token of every
sequence from a state."""

_REFERENCE_TOKENS = 64
"""The reference runs token by token: it judges, and is timed, on this many tokens at most."""


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """Sizes of one measurement."""

    spec: Spec
    label: str
    engine: str
    mode: Mode
    batch: int = 1
    tokens: int = 512
    heads: int = 4
    key_size: int = 64
    value_size: int = 64
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seconds: float = 1.0
    """Time to spend on repetitions."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was measured."""

    label: str
    engine: str
    mode: Mode
    tokens: int
    """Tokens per sequence and call."""
    milliseconds: tuple[float, float, float]
    """20th, 50th and 80th percentile of a call."""
    tokens_per_second: float
    repetitions: int
    state_bytes: int
    """Recurrent state of one sequence."""
    saved_bytes: int
    """Kept between forward and backward, operands included; 0 where nothing is trained."""
    peak_bytes: int | None
    """Peak of the device's memory; unset on a CPU, where it belongs to the process."""
    error: float | None
    """Largest difference to the reference engine over the largest output, on the first tokens."""
    failure: str = ""
    """Why there is no measurement."""

    def to_json(self) -> dict[str, Any]:
        """Return the measurement as plain data."""
        return {
            "label": self.label,
            "engine": self.engine,
            "mode": self.mode,
            "tokens": self.tokens,
            "ms_p20": self.milliseconds[0],
            "ms_p50": self.milliseconds[1],
            "ms_p80": self.milliseconds[2],
            "tokens_per_second": self.tokens_per_second,
            "repetitions": self.repetitions,
            "state_bytes": self.state_bytes,
            "saved_bytes": self.saved_bytes,
            "peak_bytes": self.peak_bytes,
            "error": self.error,
            "failure": self.failure,
        }


def _call(plan: BenchPlan, ops: Operands, engine: str, state: State | None = None) -> Any:
    return run(attention, plan.spec, ops, initial_state=state, impl=engine)


def _draw(plan: BenchPlan, tokens: int) -> Operands:
    """Draws operands; the sequence of a shorter one is not the start of a longer."""
    drawn = operands(
        plan.spec,
        torch.Generator().manual_seed(0),
        plan.batch,
        tokens,
        plan.heads,
        plan.heads,
        plan.key_size,
        plan.value_size,
        plan.dtype,
    )
    # Gates and importance stay in float32 whatever the streams are.
    wide = {o.name for o in lower(plan.spec).operands if o.wide}
    return {n: x.to(plan.device, torch.float32 if n in wide else None) for n, x in drawn.items()}


def _error(plan: BenchPlan) -> float:
    """Compares an engine with the reference in float64 on a short sequence."""
    ops = _draw(plan, min(plan.tokens, _REFERENCE_TOKENS))
    with torch.no_grad():
        wanted = _call(plan, {n: x.double() for n, x in ops.items()}, "reference").output
        got = _call(plan, ops, plan.engine).output.double()
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-300))


def _saved(run: Callable[[], Any]) -> int:
    """Counts the bytes that autograd keeps between forward and backward, each storage once."""
    seen: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = run()
    total = sum(seen.values())
    del kept
    return total


def measure(plan: BenchPlan) -> Measurement:
    """Measures one spec, engine and mode.

    The engine is first compared with the reference; time is that of whole calls of
    `glazoo.attention`, with float32 gates, after a warm-up.

    Args:
        plan: what to measure.

    Returns:
        The measurement; with a `failure` and no times where the engine refuses.
    """
    program = lower(plan.spec)
    floats = plan.heads * program.state_floats(plan.key_size, plan.value_size)
    tokens = plan.tokens
    if plan.engine == "reference":
        tokens = min(tokens, _REFERENCE_TOKENS)
    if plan.mode == "decode":
        tokens = 1
    nothing = Measurement(
        plan.label, plan.engine, plan.mode, tokens, (0.0, 0.0, 0.0), 0.0, 0, 4 * floats, 0, None,
        None,
    )  # fmt: skip
    try:
        error = _error(plan)
        ops = _draw(plan, tokens)
        state: State | None = None
        if plan.mode == "decode":
            with torch.no_grad():
                state = _call(plan, _draw(plan, 8), plan.engine).final_state
        if plan.mode == "train":
            ops = {n: x.requires_grad_() for n, x in ops.items()}
        run = _runner(plan, ops, state)
        cuda = torch.device(plan.device).type == "cuda"
        saved = _saved(lambda: _call(plan, ops, plan.engine)) if plan.mode == "train" else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats(plan.device)
        once = functools.partial(seconds_of, run, plan.device)
        (times,) = in_turns([once], seconds=plan.seconds)
        peak = torch.cuda.max_memory_allocated(plan.device) if cuda else None
    except (ValueError, ImportError, RuntimeError, NotImplementedError, AttributeError) as e:
        lines = str(e).strip().splitlines()
        return _failed(nothing, f"{type(e).__name__}: {lines[0] if lines else ''}")
    shares = spread(times)
    return Measurement(
        plan.label,
        plan.engine,
        plan.mode,
        tokens,
        (1000 * shares.p20, 1000 * shares.p50, 1000 * shares.p80),
        plan.batch * tokens / shares.p50,
        len(times),
        4 * floats,
        saved,
        peak,
        error,
    )


def _failed(nothing: Measurement, reason: str) -> Measurement:
    return replace(nothing, failure=reason)


def _runner(plan: BenchPlan, ops: Operands, state: State | None) -> Callable[[], None]:
    if plan.mode == "train":
        leaves = list(ops.values())

        def train() -> None:
            output = _call(plan, ops, plan.engine).output
            torch.autograd.grad(output.float().square().sum(), leaves, allow_unused=True)

        return train

    @torch.no_grad()
    def forward() -> None:
        _call(plan, ops, plan.engine, state)

    return forward
