"""What a variant tends to when one of its numbers becomes small, and how fast."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from glazoo.spec import Posterior, freeze
from glazoo.theory.catalogue.axes import (
    changed,
    corrected,
    default_erase,
    discounts,
    frozen,
    has,
    hebbian,
    keeps_source,
    token_decay,
    where,
    with_gain,
    without,
    without_importance,
)
from glazoo.theory.entry import Comparison, Domain, Entry, Kind, Trial, curve
from glazoo.theory.instances import Operands

__all__ = ["ENTRIES"]

Found = Iterator[Comparison]

_SMALL = (1e-3, 1e-4, 1e-5, 1e-6)
_GENERIC = Domain(
    regimes=("normal",), batch=(1, 1), tokens=(5, 7), heads=(1, 1), groups=(1, 2), keys=(3, 4),
    values=(2, 3), start=False,
)  # fmt: skip


def _large_prior(t: Trial) -> Found:
    ops = t.operands()
    limit = t.run(freeze(t.spec), without_importance(ops)).output
    yield curve(
        "output against 1 / I_p",
        _SMALL,
        lambda x: (
            t.run(
                t.spec,
                ops | {"v": ops["v"] / x, "prior": torch.full_like(ops["prior"], 1 / x)},
            ).output
        ),
        lambda x: limit,
    )


def _small_gate(t: Trial) -> Found:
    ops = t.operands()
    limit = t.run(freeze(t.spec), without_importance(ops)).output
    one = torch.ones_like(ops["prior"])
    yield curve(
        "output against b",
        _SMALL,
        lambda x: t.run(t.spec, ops | {"b": x * ops["b"], "prior": one}).output,
        lambda x: limit,
    )


def _strong_decay(t: Trial) -> Found:
    ops, i = t.operands(), t.instance
    # Not the last token: its decay is invisible to a read before it.
    at = t.integer(1, i.T - 2)

    def with_decay(x: float) -> torch.Tensor:
        g = ops["g"].clone()
        g[:, at] = torch.tensor(x, dtype=torch.float64).log()
        output: torch.Tensor = t.run(t.spec, ops | {"g": g}).output
        return output

    limit = with_decay(0.0)
    yield curve("output against a", _SMALL, with_decay, lambda x: limit)


def _small_keys(t: Trial) -> Found:
    ops = t.operands()
    hebb = changed(t.spec, posterior=Posterior(precision="frozen", correction="none"))
    limit = t.run(hebb, ops).output
    yield curve(
        "output against |k|",
        (1e-1, 1e-2, 1e-3, 1e-4),
        lambda x: t.run(t.spec, ops | {"k": x * ops["k"], "v": ops["v"] / x}).output,
        lambda x: limit,
    )


def _small_write(t: Trial) -> Found:
    ops = t.operands()
    first = with_gain(t.spec, "first_order")

    def scaled(x: float) -> Operands:
        return ops | {name: x * ops[name] for name in ("beta", "b") if name in ops}

    yield curve(
        "output against beta",
        (1e-2, 1e-3, 1e-4, 1e-5),
        lambda x: t.run(t.spec, scaled(x)).output,
        lambda x: t.run(first, scaled(x)).output,
    )


_PALIMPSA = "arXiv:2602.09075"

ENTRIES: tuple[Entry, ...] = (
    Entry(
        "large-prior-is-the-source",
        "metaplastic X(I_p v; I_p) -> X(v) as I_p -> inf, error ~ 1 / I_p  (Palimpsa -> Mamba2)",
        "a Hebbian metaplastic spec with values scaled by the prior",
        "its source",
        f"{_PALIMPSA}, section 3",
        _large_prior,
        where(keeps_source, hebbian, without(has("u"))),
        kind=Kind.LIMIT,
        condition="b > 0",
        domain=_GENERIC,
        rate=1.0,
    ),
    Entry(
        "plasticity-is-linear",
        "metaplastic X(x b) -> X as x -> 0, error ~ x",
        "a metaplastic spec at I_p = 1 with a small importance gate",
        "its source",
        "ours",
        _small_gate,
        keeps_source,
        kind=Kind.LIMIT,
        condition="I_p = 1",
        domain=_GENERIC,
        rate=1.0,
    ),
    Entry(
        "strong-forgetting-is-a-reset",
        "y(a_t = x) -> y(a_t = 0), error ~ x",
        "any spec with a decay per token",
        "the same spec with g_t = -inf",
        "ours",
        _strong_decay,
        where(token_decay, without(discounts)),
        kind=Kind.LIMIT,
        domain=_GENERIC,
        rate=1.0,
    ),
    Entry(
        "small-keys-make-a-delta-rule-hebbian",
        "delta(x k, v / x) -> Hebbian(k, v) as x -> 0, error ~ x^2",
        "a frozen spec that subtracts a prediction",
        "the same spec without correction",
        "ours",
        _small_keys,
        where(
            frozen,
            default_erase,
            # What erases first is nothing without its correction.
            lambda s: s.steps.source != "erase_then_write",
            lambda s: (
                corrected("first_order")(s)
                or corrected("exact")(s)
                or corrected("exact", "diagonal")(s)
                or corrected("flow")(s)
            ),
        ),
        kind=Kind.LIMIT,
        domain=_GENERIC,
        rate=2.0,
    ),
    Entry(
        "first-order-gain-is-a-small-step",
        "exact gain(x beta) - first-order gain(x beta) ~ x^2, and that of a flow",
        "a delta rule with the exact gain, or as a flow",
        "the same spec with the first-order gain",
        "ours",
        _small_write,
        # Where the prior is forgotten, a step is small against what is left of it much later.
        where(
            lambda s: corrected("exact")(s) or corrected("flow")(s),
            has("beta"),
            without(discounts),
        ),
        kind=Kind.LIMIT,
        domain=_GENERIC,
        rate=2.0,
    ),
)
