"""Questions to a spec's axes, and specs that differ from another in an axis."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from glazoo.program import lower
from glazoo.spec import Decay, Erase, Gate, Spec, SpecError, freeze
from glazoo.theory.entry import Pair, Trial
from glazoo.theory.instances import Operands

__all__ = [
    "Test",
    "bayesian",
    "changed",
    "corrected",
    "default_erase",
    "discounts",
    "every",
    "expanded",
    "freezable",
    "frozen",
    "full",
    "has",
    "has_variance",
    "heads_of",
    "hebbian",
    "identical",
    "isotropic",
    "keeps_source",
    "log_evidence",
    "named",
    "noisy",
    "observes",
    "observing",
    "own_decay",
    "plain",
    "preconditioned",
    "prior_of",
    "rate",
    "rate_of",
    "relative",
    "rotated",
    "same",
    "still",
    "tempered",
    "tempers",
    "token_decay",
    "where",
    "with_gain",
    "without",
    "without_importance",
]

Test = Callable[[Spec], bool]


def every(spec: Spec) -> bool:
    """Any spec."""
    return True


def where(*tests: Test) -> Test:
    """All of the tests."""
    return lambda spec: all(test(spec) for test in tests)


def without(*tests: Test) -> Test:
    """None of the tests."""
    return lambda spec: not any(test(spec) for test in tests)


def named(*names: str) -> Test:
    """A shipped variant, for statements about two particular variants."""
    return lambda spec: spec.name in names


def has(operand: str) -> Test:
    """Takes the operand."""
    return lambda spec: lower(spec).operand(operand) is not None


hebbian: Test = attrgetter("hebbian")
has_variance: Test = attrgetter("has_variance")
log_evidence: Test = attrgetter("log_evidence")


def frozen(spec: Spec) -> bool:
    """Importance is the constant one."""
    return spec.importance is None


def bayesian(spec: Spec) -> bool:
    """Importance is I = J + I_p with evidence b k^2, and its reciprocal a posterior variance."""
    imp = spec.importance
    return imp is not None and imp.evidence == "key_squared" and spec.has_variance


def full(spec: Spec) -> bool:
    """Importance is a matrix over keys."""
    return spec.posterior.precision == "full"


def isotropic(spec: Spec) -> bool:
    """Importance is one number per head."""
    return spec.posterior.precision == "isotropic"


def rotated(spec: Spec) -> bool:
    """Importance is counted along other axes than those of the keys."""
    return spec.importance is not None and spec.importance.basis == "rotated"


def tempers(spec: Spec) -> bool:
    """What is forgotten of importance is what lies above the prior."""
    return spec.forgetting == "temper"


def relative(spec: Spec) -> bool:
    """Its prior is in proportion to what it counted."""
    return spec.importance is not None and spec.importance.prior.shape == "relative"


def discounts(spec: Spec) -> bool:
    """The prior is forgotten, too."""
    return spec.forgetting == "discount"


def noisy(spec: Spec) -> bool:
    """Its variance grows by a gate of its own."""
    return has("noise")(spec)


def tempered(spec: Spec) -> bool:
    """A posterior variance per synapse, or per key, that returns to the prior's by tempering."""
    here = spec.posterior.precision == "diagonal" and not rotated(spec)
    return bayesian(spec) and here and tempers(spec)


def preconditioned(spec: Spec) -> bool:
    """Importance only rescales the write key."""
    return not spec.has_variance


def own_decay(spec: Spec) -> bool:
    """Importance forgets by a decay of its own."""
    return spec.importance is not None and spec.importance.own_decay is not None


def token_decay(spec: Spec) -> bool:
    """Its decay is an operand per token."""
    g = lower(spec).operand("g")
    return g is not None and g.required


def plain(spec: Spec) -> bool:
    """One write per token, read after it and not normalised."""
    return (spec.read.when, spec.read.normalizer, spec.steps.count) == ("post", "none", 1)


def observes(spec: Spec) -> bool:
    """A token is one observation of a value under its key."""
    sequential = plain(spec) and default_erase(spec) and spec.key == "operand"
    return sequential and spec.posterior.gain != "flow"


def default_erase(spec: Spec) -> bool:
    """Predicts from the decayed state with the key that it writes."""
    return spec.erase == Erase()


def corrected(gain: str, correction: str = "full") -> Test:
    """Subtracts a prediction with the given gain."""
    return lambda spec: (
        spec.posterior.correction == correction
        and spec.posterior.gain == gain
        and spec.posterior.precision != "full"
    )


def rate(spec: Spec) -> bool:
    """Subtracts a prediction with the exact gain of the precision whose rate the write gate is."""
    return spec.posterior.beta == "rate"


def rate_of(precision: Tensor, k: Tensor) -> Tensor:
    """Return the write gate [B, T, HV] or [.., V] whose keys [B, T, HV, K] observe with a
    precision."""
    square = k.square().sum(-1)
    return precision / (1 + precision * (square if precision.ndim == 3 else square[..., None]))


def freezable(spec: Spec) -> bool:
    """Has a source whose importance is constant."""
    try:
        freeze(spec)
    except SpecError:
        return False
    return not preconditioned(spec)


def keeps_source(spec: Spec) -> bool:
    """Computes what its source does where importance stays at a prior of one."""
    return freezable(spec) and not noisy(spec) and not discounts(spec)


def changed(spec: Spec, **update: Any) -> Spec:
    """Return a spec with other values of some fields, validated."""
    return Spec.model_validate(spec.model_copy(update=update).model_dump())


def still(operands: Operands) -> Operands:
    """Return operands that forget nothing."""
    forgetting = ("g", "noise")
    return operands | {n: torch.zeros_like(operands[n]) for n in forgetting if n in operands}


def observing(t: Trial, ops: Operands) -> tuple[Operands, Tensor]:
    """Make write and importance gates those of one observation per token; gives its precision."""
    i = t.instance
    gate = t.uniform(i.B, i.T, i.HV) if "beta" in ops else torch.ones(i.B, i.T, i.HV).to(t.dtype)
    out = dict(ops)
    for name in ("beta", "b"):
        if name in ops:
            out[name] = expanded(gate, i.V) if ops[name].ndim == 4 else gate
    if rate(t.spec):
        out["beta"] = rate_of(out["beta"], heads_of(ops, "k", i.HV))
    return out, gate


def prior_of(operands: Operands) -> Tensor:
    """Return the prior per head and key channel [HV, K], or [HV, 1]."""
    prior = operands["prior"]
    return prior if prior.ndim == 2 else prior.reshape(-1, 1)


def without_importance(operands: Operands) -> Operands:
    """Return the operands that a source shares with its metaplastic form."""
    own = ("b", "noise", "basis", "prior")
    return {name: x for name, x in operands.items() if name not in own}


def with_gain(spec: Spec, gain: str) -> Spec:
    """Return a spec with another gain, of a write gate that is no rate."""
    imp = spec.importance
    if imp is not None and imp.gate.tie == "precision":
        gate = imp.gate.model_copy(update={"tie": "write"})
        imp = imp.model_copy(update={"gate": gate})
    posterior = spec.posterior.model_copy(update={"gain": gain, "beta": "precision"})
    return changed(spec, posterior=posterior, importance=imp)


def data_decay(spec: Spec, shape: str) -> Spec:
    """Return a spec with a decay per token of another shape."""
    kept = {"softplus_exp", "softplus_product"}
    parameterization = spec.decay.parameterization
    formula = parameterization if parameterization in kept else "identity"
    return changed(spec, decay=Decay.model_validate({"shape": shape, "parameterization": formula}))


def write_gate(spec: Spec, shape: str) -> Spec:
    """Return a spec with a write gate of another shape."""
    return changed(spec, write=Gate.model_validate({"shape": shape}))


def expanded(gate: Tensor, size: int) -> Tensor:
    """Return a gate per head [..., HV] as one per channel [..., HV, size]."""
    return gate[..., None].expand(*gate.shape, size)


def heads_of(operands: Operands, name: str, heads: int) -> Tensor:
    """Return an operand [B, T, H, D] per value head."""
    x = operands[name]
    return x.repeat_interleave(heads // x.shape[2], 2)


def same(left: Any, right: Any, *, parts: Iterable[str] = ("memory",)) -> Iterator[Pair]:
    """Compares outputs and parts of the final states."""
    yield Pair("output", left.output, right.output)
    for part in parts:
        a, b = getattr(left.final_state, part), getattr(right.final_state, part)
        if a is not None and b is not None:
            yield Pair(f"final {part}", a, b)
        elif (a is None) != (b is None):
            yield Pair(f"final {part}: one is missing", torch.zeros(1), torch.ones(1))


def identical(left: Any, right: Any) -> Iterator[Pair]:
    """Compares outputs and final memories bit by bit."""
    for what, a, b in (
        ("bits of the output", left.output, right.output),
        ("bits of the final memory", left.final_state.memory, right.final_state.memory),
    ):
        yield Pair(what, (a == b).double(), torch.ones_like(a, dtype=torch.float64))


STATE = ("memory", "importance", "normalizer", "lag_key", "lag_value")
