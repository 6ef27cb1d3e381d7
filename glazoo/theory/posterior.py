"""Distance of every variant to exact inference: the ranking that the theory predicts.

A memory is asked to store pairs of random keys and values, and then read at random queries; the
exact posterior over memories answers the same queries. All variants get the same gates: noise
precision beta as write gate (as its rate, where the write gate is one) and as importance gate, one
decay per token, prior 1.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glazoo.api import attention
from glazoo.errors import extra
from glazoo.plotting import Axes, Line, panels, require
from glazoo.program import Role, lower
from glazoo.spec import Spec
from glazoo.stats import interval
from glazoo.strictjson import dumps
from glazoo.theory.catalogue.axes import data_decay, noisy, relative
from glazoo.theory.exact import posterior
from glazoo.theory.forms import Form, forms
from glazoo.theory.instances import Operands
from glazoo.theory.instances import run as call

with extra("verify"):
    from rich import box
    from rich.table import Table

__all__ = ["CONDITIONS", "Condition", "Distance", "groups", "plot", "render", "run", "unsuited"]


@dataclass(frozen=True, slots=True)
class Condition:
    """How crowded a memory is, and whether it forgets."""

    keys: str
    """orthogonal (a random orthonormal basis), random (unit vectors), correlated (unit vectors that
    share a direction)."""
    load: float
    """Stored pairs per key channel."""
    decay: float
    """Forgetting gate a of every token; 1 forgets nothing."""

    @property
    def label(self) -> str:
        """Short text for tables."""
        forget = "no forgetting" if self.decay == 1 else f"a = {self.decay:g}"
        return f"{self.keys}, {self.load:g} pairs per channel, {forget}"


_LOADS = (0.25, 0.5, 1.0, 2.0, 4.0)

CONDITIONS: tuple[Condition, ...] = tuple(
    Condition(keys, load, decay)
    for decay in (1.0, 0.9)
    for keys in ("orthogonal", "random", "correlated")
    for load in _LOADS
    if keys != "orthogonal" or load <= 1
)
"""From orthogonal to crowded keys, without and with forgetting."""


@dataclass(frozen=True, slots=True)
class Distance:
    """Relative distance of one spec's answers to those of the exact posterior."""

    spec: str
    source: str
    """The variant that the spec is, or is the metaplastic form of."""
    metaplastic: bool
    condition: Condition
    mean: float
    """Over seeds: |y - y_exact| / |y_exact|, norms over queries and value channels."""
    low: float
    """Lower end of the 95 % confidence interval of the mean (Student's t over seeds)."""
    high: float
    """Upper end."""
    seeds: int

    def to_json(self) -> dict[str, Any]:
        """Return the distance as plain data."""
        return asdict(self)


def unsuited(spec: Spec) -> str | None:
    """Says why a spec answers no regression question, or gives None."""
    if spec.key != "operand":
        return "its key is tied to its decay: pairs cannot be stored under given keys"
    if spec.log_evidence:
        return "its keys enter as positive evidence only"
    if spec.read.normalizer == "sum":
        return "its normaliser needs positive features"
    return None


def run(
    which: Sequence[str | Path | Spec] | None = None,
    *,
    seeds: int = 20,
    key_size: int = 16,
    value_size: int = 8,
    queries: int = 64,
    conditions: Sequence[Condition] = CONDITIONS,
    impl: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Distance]:
    """Measures the distance of variants and their metaplastic forms to the exact posterior.

    Args:
        which: names or files of variants; default: all that answer the question.
        seeds: random problems per condition.
        key_size: key channels.
        value_size: value channels.
        queries: random unit queries that read the final memory.
        conditions: how crowded the memory is.
        impl: the engine.
        progress: called as `progress(condition, done, total)`.

    Returns:
        One distance per spec and condition, the closest spec (on average) first.

    Raises:
        ValueError: seeds, queries or sizes below 1; a spec answers no regression question.
    """
    sizes = {"seeds": seeds, "queries": queries, "key_size": key_size, "value_size": value_size}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: got {size}, accepted are numbers from 1")
    shapes = _forms(which)
    out: list[Distance] = []
    for done, condition in enumerate(conditions):
        if progress is not None:
            progress(condition.label, done, len(conditions))
        problem = _problem(condition, seeds, key_size, value_size, queries)
        for form in shapes:
            errors = _errors(form.spec, problem, impl)
            mean, low, high, _ = interval(errors.tolist())
            source = form.spec.counterpart or form.spec.name
            out.append(
                Distance(
                    form.label,
                    source,
                    form.spec.metaplastic,
                    condition,
                    mean,
                    low,
                    high,
                    seeds,
                )
            )
    if progress is not None:
        progress("done", len(conditions), len(conditions))
    order = _ranking(out)
    return sorted(out, key=lambda d: order.index(d.spec))


def _forms(which: Sequence[str | Path | Spec] | None) -> tuple[Form, ...]:
    given = forms(which)
    if which is None:
        # Noise is that which keeps the prior: forms with a gate for it are those without.
        made = (f for f in given if not (noisy(f.spec) and f.spec.counterpart))
        return tuple(f for f in made if unsuited(f.spec) is None)
    for form in given:
        reason = unsuited(form.spec)
        if reason is not None:
            raise ValueError(f"which: {form.label} has no distance to the posterior: {reason}")
    return given


@dataclass(frozen=True, slots=True)
class _Problem:
    """Random pairs, gates and queries, one row per seed, and the exact answers."""

    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor
    q: Tensor
    truth: Tensor


def _unit(x: Tensor) -> Tensor:
    length: Tensor = x.norm(dim=-1, keepdim=True)
    return x / length


def _problem(c: Condition, seeds: int, keys: int, values: int, queries: int) -> _Problem:
    count = max(1, round(c.load * keys))
    rows = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        basis, shared = normal(keys, keys), normal(1, keys)
        k = normal(count, keys)
        v, q = normal(count, values), _unit(normal(queries, keys))
        beta = normal(count).sigmoid()
        if c.keys == "orthogonal":
            k = torch.linalg.qr(basis)[0][:count]
        elif c.keys == "correlated":
            k = _unit(k) + _unit(shared)
        rows.append((_unit(k), v, beta, q))
    k, v, beta, q = (torch.stack(x) for x in zip(*rows, strict=True))
    g = torch.full_like(beta, c.decay).log()
    mean = posterior(k, v, beta, g=g).mean[:, -1]
    return _Problem(k, v, beta, g, q, torch.einsum("skv,sqk->sqv", mean, q))


def _errors(spec: Spec, p: _Problem, impl: str) -> Tensor:
    """Return the relative distance per seed."""
    if spec.decay.source == "fixed":
        # A fixed decay would forget at every read; the same decay per token need not.
        spec = data_decay(spec, "head")
    op = functools.partial(attention, impl=impl)
    y: Tensor = call(op, spec, _operands(spec, p), scale=1.0).output[:, p.k.shape[1] :, 0]
    difference: Tensor = (y - p.truth).flatten(1).norm(dim=1)
    size: Tensor = p.truth.flatten(1).norm(dim=1)
    return difference / size


def _operands(spec: Spec, p: _Problem) -> Operands:
    """Writes the pairs, one per token, then reads the memory with tokens that change nothing."""
    seeds, keys = p.k.shape[0], p.k.shape[2]
    reads, values, n = p.q.shape[1], p.v.shape[2], spec.substeps

    def tokens(x: Tensor, *, steps: bool = True) -> Tensor:
        """Puts [S, T, ...] before idle reads; further writes of a token are idle too."""
        x = torch.cat([x, x.new_zeros(seeds, reads, *x.shape[2:])], 1)
        if n > 1 and steps:
            idle = [torch.zeros_like(x)] * (n - 1)
            x = torch.stack([x, *idle], 2).flatten(1, 2)
        return x[:, :, None]

    def gate(x: Tensor, shape: tuple[str, ...]) -> Tensor:
        x = tokens(x, steps="nT" in shape)
        size = {"K": keys, "V": values}.get(shape[-1])
        return x if size is None else x[..., None].expand(*x.shape, size)

    # A prediction from the state before the decay needs a key that decays for it.
    decayed = p.g.exp() if spec.erase.base == "prev" else torch.ones_like(p.g)
    ops: Operands = {
        "q": torch.cat([torch.zeros_like(p.k), p.q], 1)[:, :, None],
        "k": tokens(p.k),
        "v": tokens(p.v),
    }
    # What a removal takes along the decayed key, it takes once per decay of that key.
    erase = p.beta / decayed if spec.erase.side == "removal" else p.beta
    gates: dict[Role, Tensor] = {
        "decay": p.g,
        "importance_decay": p.g,
        "write": p.beta / (1 + p.beta) if spec.posterior.beta == "rate" else p.beta,
        "importance": p.beta,
        "erase": erase,
        "tap": torch.ones_like(p.beta),
        # What the decay loses of the prior's variance.
        "noise": 1 - (2 * p.g).exp(),
    }
    constants: dict[Role, float] = {"bonus": 0.0, "prior": 1.0}
    for operand in lower(spec).operands:
        role, shape = operand.role, operand.shapes[-1]
        if role in gates:
            ops[operand.name] = gate(gates[role], shape)
        elif role == "erase_key":
            ops[operand.name] = tokens(p.k * decayed[..., None])
        elif role == "mix":
            ops[operand.name] = torch.ones_like(tokens(p.beta))
        elif role in constants and not relative(spec):
            ops[operand.name] = p.k.new_full((1, keys)[: len(shape)], constants[role])
    if "beta" not in ops:
        ops["v"] = ops["v"] * tokens(p.beta)[..., None]
    return ops


def _ranking(distances: Sequence[Distance]) -> list[str]:
    """Orders specs by their average distance over conditions."""
    labels = list(dict.fromkeys(d.spec for d in distances))

    def average(label: str) -> float:
        mine = [d.mean for d in distances if d.spec == label]
        # Rounded: specs of one class stay in the order of their names on every engine.
        return round(sum(mine) / len(mine), 9)

    return sorted(labels, key=average)


def groups(distances: Sequence[Distance]) -> dict[str, list[Distance]]:
    """Groups specs that give the same answers everywhere: one class of the theory each.

    Args:
        distances: what `run` gives.

    Returns:
        The distances of each class, the closest class first, under the names of its specs.
    """
    classes: dict[tuple[float, ...], list[str]] = {}
    by_spec = {
        label: [d for d in distances if d.spec == label]
        for label in dict.fromkeys(d.spec for d in distances)
    }
    for label, mine in by_spec.items():
        classes.setdefault(tuple(round(d.mean, 9) for d in mine), []).append(label)
    return {_name(labels): by_spec[labels[0]] for labels in classes.values()}


def _name(labels: Sequence[str]) -> str:
    """Names a class by its specs; both gate shapes of one metaplastic form count as one."""
    short: dict[str, None] = {}
    for label in labels:
        stem = label.split("[")[0]
        both = f"{stem}[head]" in labels and f"{stem}[value]" in labels
        short[stem if both else label] = None
    return " = ".join(short)


def render(distances: Sequence[Distance]) -> Table:
    """Return the ranking as a table: distance per kind of keys and load, mean over all.

    Args:
        distances: what `run` gives.
    """
    conditions = list(dict.fromkeys(d.condition for d in distances))
    panels = list(dict.fromkeys((c.keys, c.decay) for c in conditions))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.caption = (
        "relative distance |y - y_exact| / |y_exact| to the exact posterior, mean over seeds and "
        "loads, half width of the 95 % interval"
    )
    table.add_column("rank", justify="right")
    table.add_column("specs with these answers", overflow="fold", ratio=1)
    for keys, decay in panels:
        forget = "a = 1" if decay == 1 else f"a = {decay:g}"
        table.add_column(f"{keys}\n{forget}", justify="right", no_wrap=True)
    table.add_column("mean", justify="right", no_wrap=True)
    for rank, (label, mine) in enumerate(groups(distances).items(), 1):
        cells = []
        for panel in panels:
            here = [d for d in mine if (d.condition.keys, d.condition.decay) == panel]
            mean = sum(d.mean for d in here) / len(here)
            half = sum(d.high - d.low for d in here) / len(here) / 2
            cells.append(f"{mean:.3f} +- {half:.3f}" if mean > _EXACT else "0")
        total = sum(d.mean for d in mine) / len(mine)
        table.add_row(str(rank), label, *cells, f"{total:.3f}" if total > _EXACT else "0")
    return table


_EXACT = 1e-9
"""Below this, answers are those of the exact posterior up to rounding."""


def _homes(classes: dict[str, list[Distance]]) -> dict[str, str]:
    """Return the class of each class's source; its own, where that has none."""
    members = {d: label for label in classes for d in _labels(label)}
    return {label: members.get(mine[0].source, label) for label, mine in classes.items()}


def _labels(name: str) -> list[str]:
    return [part.split("[")[0] for part in name.split(" = ")]


def plot(distances: Sequence[Distance], path: str | Path) -> tuple[Path, Path]:
    """Plots distance against load, one panel per kind of keys and decay, and writes the data.

    A class and its metaplastic form share a colour: the form is hollow and dashed.

    Args:
        distances: what `run` gives.
        path: image file; the format follows from its suffix. The data go beside it, as JSON.

    Returns:
        The image's path and the data's.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the suffix is none of matplotlib's.
    """
    require()
    image = Path(path)
    data = image.with_suffix(".json")
    conditions = list(dict.fromkeys(d.condition for d in distances))
    classes = groups(distances)
    names = {
        label: _wrapped(label if max(d.mean for d in mine) > _EXACT else f"{label} (exact: 0)")
        for label, mine in classes.items()
    }
    homes = _homes(classes)
    axes = []
    decays = list(dict.fromkeys(c.decay for c in conditions))
    kinds = list(dict.fromkeys(c.keys for c in conditions))
    for decay, keys in itertools.product(decays, kinds):
        lines = []
        for label, mine in classes.items():
            # Rounding is not a distance, and a logarithmic axis has no zero.
            here = sorted(
                (
                    d
                    for d in mine
                    if (d.condition.decay, d.condition.keys) == (decay, keys) and d.mean > _EXACT
                ),
                key=lambda d: d.condition.load,
            )
            lines.append(
                Line(
                    names[label],
                    [d.condition.load for d in here],
                    [d.mean for d in here],
                    [d.low for d in here],
                    [d.high for d in here],
                    source=names[homes[label]],
                )
            )
        forget = "no forgetting" if decay == 1 else f"forgetting gate a = {decay:g}"
        axes.append(
            Axes(
                f"{keys} keys, {forget}",
                "load (stored pairs per key channel)",
                "distance to exact posterior, |y - y*| / |y*|",
                lines,
                log_x=True,
                log_y=True,
                y_range=(0.03, 10),
                ticks=sorted({c.load for c in conditions}),
            )
        )
    title = "bands: 95 % intervals of the mean over seeds; exact answers are not drawn"
    image.write_bytes(panels(axes, title=title, columns=len(kinds), kind=image.suffix[1:]))
    data.write_text(dumps([d.to_json() for d in distances], indent=1) + "\n", "utf-8")
    return image, data


def _wrapped(label: str, width: int = 72) -> str:
    """Breaks the name of a class into lines."""
    out, line = [], ""
    for part in label.split(" = "):
        candidate = f"{line} = {part}" if line else part
        if line and len(candidate) > width:
            out.append(line + " =")
            line = part
        else:
            line = candidate
    return "\n".join([*out, line])
