"""The recurrence alone, without training: keys, constant gates, writing and reading.

Everything follows from a spec's axes and from the operands of its program, so that a new spec file
is measured at once.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from glazoo.api import attention, schedule
from glazoo.compare.errors import CompareError
from glazoo.program import Program
from glazoo.state import State
from glazoo.theory.instances import run

__all__ = [
    "Gates",
    "crossing",
    "gate_grid",
    "key_scale_matters",
    "key_size_for",
    "mapped_size",
    "missed_values",
    "operands",
    "read",
    "retrieval_error",
    "write",
]


@dataclass(frozen=True, slots=True)
class Gates:
    """Gates that stay the same at every token; a spec uses those that it has."""

    decay: float = 0.0
    """Natural logarithm of the decay per token."""
    write: float = 1.0
    """Write gate beta."""
    importance: float = 1.0
    """Importance gate b."""
    prior: float = 1.0
    """Prior importance."""
    erase: float = 1.0
    """The delta rule's own erase or removal gate."""
    key_scale: float = 1.0
    """Length of the keys, for specs that a key's length changes by more than a factor."""

    def describe(self, program: Program) -> dict[str, float]:
        """Return the gates that a program uses, by name."""
        used: set[str] = {o.role for o in program.operands}
        if program.spec.key != "operand":
            used -= {"decay"}
        if key_scale_matters(program):
            used |= {"key_scale"}
        return {name: x for name, x in asdict(self).items() if name in used}


def mapped_size(program: Program, size: int) -> int:
    """Counts the key channels that the recurrence sees, for `size` channels before the spec's
    feature map."""
    kinds = {program.spec.layer.q.feature_map, program.spec.layer.k.feature_map}
    sizes = {"taylor": 1 + size + size * size, "quadratic": size * size}
    return max(sizes.get(kind, size) for kind in kinds)


def key_size_for(program: Program, floats: int, value_size: int) -> int:
    """Return the largest key size, before feature maps, whose state has at most `floats` numbers
    per head.

    Raises:
        CompareError: the smallest state is larger.
    """

    def count(size: int) -> int:
        return program.state_floats(mapped_size(program, size), value_size)

    if count(1) > floats:
        raise CompareError(
            f"state: {4 * floats:,} bytes a head are too few for {program.spec.name!r}: its "
            f"smallest state with {value_size} value channels has {4 * count(1):,} bytes"
        )
    low, high = 1, 2
    while count(high) <= floats:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= floats else (low, middle)
    return low


def key_scale_matters(program: Program) -> bool:
    """Return whether the length of a key changes more than the size of what it writes."""
    spec = program.spec
    mapped = "none" not in (spec.layer.q.feature_map, spec.layer.k.feature_map)
    mapped = mapped and mapped_size(program, 2) != 2
    return mapped or spec.log_evidence or spec.key == "one_minus_decay"


def gate_grid(program: Program, pairs: int) -> list[Gates]:
    """Lists the constant gates to choose from when `pairs` pairs are stored.

    Gates that cannot change the error (it does not depend on the output's scale) are left at one:
    the write gate of a Hebbian memory, and the prior beside the other gates, of which only ratios
    count.
    """
    spec, imp = program.spec, program.spec.importance
    roles = {o.role for o in program.operands}
    decays = [0.0]
    if spec.decay.source == "fixed":
        decays = schedule(spec.decay, 8).tolist()
    elif "decay" in roles and spec.key == "operand":
        decays = [0.0, -0.5 / pairs, -2.0 / pairs, -8.0 / pairs]
    writes = [1.0]
    if "write" in roles and spec.read.normalizer == "max_abs_one":
        writes = [0.01, 0.1, 1.0, 10.0]
    elif "write" in roles and (spec.posterior.gain, spec.posterior.beta) == ("exact", "precision"):
        writes = [0.1, 1.0, 10.0, 100.0, 1000.0]
    elif "write" in roles and not spec.hebbian:
        writes = [0.1, 0.2, 0.4, 0.7, 1.0]
    evidence = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0] if "importance" in roles else [1.0]
    # The prior acts alone only where no gate scales what is counted.
    alone = imp is not None and "prior" in roles and not roles & {"importance", "write"}
    priors = [0.01, 0.1, 1.0, 10.0] if alone else [1.0]
    if imp is not None and imp.prior.shape == "relative":
        # In proportion to what is counted: no gate can take its place, and the write gate has no
        # say in it.
        priors, writes = [imp.prior.init], [1.0]
    erases = [0.1, 0.2, 0.4, 0.7, 1.0] if "erase" in roles else [1.0]
    if erases[1:] and "write" in roles:
        writes = [1.0]
    scales = [0.25, 0.5, 1.0, 2.0, 4.0, 8.0] if key_scale_matters(program) else [1.0]
    return [Gates(*x) for x in itertools.product(decays, writes, evidence, priors, erases, scales)]


def _map_keys(program: Program, x: Tensor) -> Tensor:
    """Applies what of a spec's key path defines its memory: the feature map without learned parts,
    and the range of keys that are tied to the decay."""
    if program.spec.key == "one_minus_decay":
        return x.abs().clamp(max=1 - 1e-4)
    d = x.shape[-1]
    kind = program.spec.layer.k.feature_map
    if kind == "quadratic":
        x = F.layer_norm(x, (d,)) * d**-0.25
        return (x[..., :, None] * x[..., None, :]).flatten(-2)
    if kind == "taylor":
        x = x * d**-0.25
        square = (x[..., :, None] * x[..., None, :]).flatten(-2) * 2**-0.5
        return torch.cat([torch.ones_like(x[..., :1]), x, square], -1)
    return x


def operands(
    program: Program,
    keys: Float[Tensor, "B N d"] | None,
    values: Float[Tensor, "B N V"],
    queries: Float[Tensor, "B T d"] | None,
    grid: list[Gates],
) -> dict[str, Tensor | None]:
    """Builds the operands that store pairs, or that only read.

    The heads are the grid: value head j runs with the constant gates grid[j].

    Args:
        program: any program.
        keys: [B, N, d], keys of the pairs before any feature map, N a multiple of the spec's writes
            per token; None to write nothing, which leaves every state as it is.
        values: [B, N, V], values; zeros where nothing is written.
        queries: [B, T, d], what is read at each token, as keys are given; None reads nothing.
        grid: constant gates, one per value head.

    Returns:
        The operands by name; `k` is None where the spec ties keys to the decay.
    """
    spec = program.spec
    batch, written, value_size = values.shape
    tokens = written // spec.substeps
    scale = _per_head(grid, "key_scale")
    own_keys = key_scale_matters(program)

    def mapped(x: Tensor) -> Tensor:
        x = x[:, :, None]
        return _map_keys(program, x * scale[:, None] if own_keys else x)

    given = keys if keys is not None else queries
    assert given is not None
    k = mapped(given) if keys is not None else None
    q = mapped(queries) if queries is not None else None
    if q is not None and spec.key == "one_minus_decay":
        # Keys that are all positive share their mean; a query may have any sign.
        q = q - q.mean(-1, keepdim=True)
    if q is None:
        assert k is not None
        q = torch.zeros_like(k[:, :: spec.substeps])
    sizes = {"B": batch, "T": tokens, "nT": written, "H": q.shape[2], "HV": len(grid)}
    sizes |= {"K": q.shape[-1], "V": value_size}
    known = {f.name for f in fields(Gates)}
    out: dict[str, Tensor | None] = {
        "q": q,
        "k": None,
        "v": values[:, :, None].expand(-1, -1, len(grid), -1).contiguous(),
    }
    for operand in program.operands:
        dims = next(s for s in operand.shapes if s)
        shape = [sizes[d] for d in dims]
        if operand.role in ("query", "value"):
            continue
        if k is None and operand.idle is not None:
            x = torch.full(shape, operand.idle)
        elif operand.role in ("key", "erase_key"):
            assert k is not None
            x = k
        elif operand.role == "decay" and spec.key == "one_minus_decay":
            assert k is not None
            x = torch.log1p(-k)
        elif operand.role in known:
            gate = _per_head(grid, operand.role)
            x = gate.view([-1 if d == "HV" else 1 for d in dims]).expand(shape)
        elif operand.role == "noise":
            # What the decay loses of the variance of a prior of one.
            lost = -torch.expm1(2 * _per_head(grid, "decay"))
            x = lost.view([-1 if d == "HV" else 1 for d in dims]).expand(shape)
        elif operand.default is not None:
            continue
        else:
            # No bonus of the token just written, no lagged tap, no forgetting of importance; what
            # is solved is read as it is.
            x = torch.full(shape, 1.0 if operand.role in ("tap", "mix") else 0.0)
        out[operand.name] = x
    return out


def _per_head(grid: list[Gates], name: str) -> Float[Tensor, "HV"]:
    return torch.tensor([getattr(gates, name) for gates in grid])


def _run(
    program: Program, ops: dict[str, Tensor | None], impl: str, state: State | None
) -> tuple[Tensor, State]:
    with torch.no_grad():
        output, final = run(attention, program.spec, ops, initial_state=state, impl=impl)
    return output, final


def write(
    program: Program,
    keys: Float[Tensor, "B N d"],
    values: Float[Tensor, "B N V"],
    grid: list[Gates],
    *,
    impl: str = "auto",
) -> State:
    """Stores pairs in an empty memory, under every set of constant gates.

    Returns:
        The state of B sequences with one head per set of gates.
    """
    n = program.spec.substeps
    missing = -keys.shape[1] % n
    if missing:
        # A token has n writes: the first token's free ones store nothing.
        keys = torch.cat([keys.new_zeros(keys.shape[0], missing, keys.shape[2]), keys], 1)
        values = torch.cat([values.new_zeros(values.shape[0], missing, values.shape[2]), values], 1)
    return _run(program, operands(program, keys, values, None, grid), impl, None)[1]


def read(
    program: Program,
    state: State,
    queries: Float[Tensor, "B T d"],
    value_size: int,
    grid: list[Gates],
    *,
    impl: str = "auto",
) -> Float[Tensor, "B T HV V"]:
    """Reads a memory at every query without changing it."""
    n = program.spec.substeps
    batch, tokens = queries.shape[:2]
    nothing = queries.new_zeros(batch, n * tokens, value_size)
    return _run(program, operands(program, None, nothing, queries, grid), impl, state)[0]


def retrieval_error(
    outputs: Float[Tensor, "B T HV V"], values: Float[Tensor, "B T V"]
) -> Float[Tensor, "B HV"]:
    """Return the share of the values' energy that is not read back, at the best output scale.

        error = min_c sum |v - c y|^2 / sum |v|^2 = 1 - (sum y . v)^2 / (sum |y|^2 sum |v|^2)

    Zero is perfect, one is nothing; the scale c >= 0 is free because a layer's output norm sets it.
    An output that is not finite has error one.
    """
    y, v = outputs.double(), values.double()[:, :, None]
    dot = (y * v).sum((1, 3)).clamp(min=0)
    energy = y.square().sum((1, 3)) * v.square().sum((1, 3))
    error = 1 - dot.square() / energy.clamp(min=1e-300)
    return torch.where(torch.isfinite(error), error, torch.ones_like(error)).clamp(0, 1)


def missed_values(
    outputs: Float[Tensor, "B T HV V"], values: Float[Tensor, "B T V"]
) -> Float[Tensor, "B HV"]:
    """Return the share of reads that point more to another stored value than to their own.

    Zero is perfect, 1 - 1 / T is chance. A read that is nothing or not finite is missed.
    """
    y = outputs.transpose(1, 2)
    found = y @ F.normalize(values, dim=-1).mT[:, None]
    own = found.diagonal(dim1=-2, dim2=-1)
    # A tie with another value, or nan, finds nothing.
    others = found.masked_fill(torch.eye(found.shape[-1], dtype=torch.bool), -math.inf).amax(-1)
    return 1 - ((own > others) & (own > 0)).to(values.dtype).mean(-1)


def crossing(pairs: list[int], errors: list[float], threshold: float) -> float:
    """Return the number of pairs at which the error first exceeds a threshold, interpolated in the
    logarithm of the pairs; the last number of pairs if it never does."""
    previous_n, previous_e = float(pairs[0]), errors[0]
    if previous_e > threshold:
        return previous_n * threshold / previous_e
    for n, e in zip(pairs[1:], errors[1:], strict=True):
        if e > threshold:
            share = (threshold - previous_e) / (e - previous_e)
            return math.exp(math.log(previous_n) + share * math.log(n / previous_n))
        previous_n, previous_e = float(n), e
    return previous_n
