"""Every precision, basis and forgetting of every source: refused with a reason, or the same on
every engine, and the source itself where importance stays at a prior of one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from budget import assert_within_budget, witnesses

import glazoo
from glazoo import Spec, SpecError, State
from glazoo.engines import available
from glazoo.spec import freeze, no_exact_gain
from glazoo.theory.catalogue.axes import data_decay, expanded, without_importance
from glazoo.theory.forms import forms
from glazoo.theory.instances import Instance, Operands, run
from glazoo.theory.maps import explicit, tokens

ENGINES = available()
SOURCES = [name for name in glazoo.names() if not glazoo.load(name).metaplastic]
OPTIONS = tuple(
    itertools.product(
        ("diagonal", "isotropic", "full"),
        ("own", "rotated"),
        ("temper", "diffuse"),
        (None, "first_order", "exact"),
    )
)


def impossible(spec: Spec, precision: str, basis: str, forgetting: str, gain: str | None) -> bool:
    """Whether a source has no form with these options."""
    other = precision != "diagonal" or basis == "rotated"
    fixed = spec.posterior.gain != "first_order" and gain not in (None, spec.posterior.gain)
    return (
        fixed
        or (gain == "exact" and no_exact_gain(spec) is not None)
        or (precision != "diagonal" and basis == "rotated")
        or (other and spec.posterior.correction == "diagonal")
        or (other and forgetting == "temper" and spec.decay.shape == "key")
        or (other and spec.read.when == "pre")
        or ((precision == "full" or forgetting == "diffuse") and spec.erase.side == "removal")
    )


def everything(result: Any) -> list[torch.Tensor]:
    doubt = [result.uncertainty] if len(result) == 3 else []
    return [result.output, *(x for x in result.final_state if x is not None), *doubt]


def compare(spec: Spec, ops: Operands, state: State | None = None, **options: Any) -> None:
    """Every engine by the budget of the reference's own conditioning."""
    names = list(ops)
    parts = {} if state is None else {n: x for n, x in state._asdict().items() if x is not None}

    def reference(*x: torch.Tensor) -> list[torch.Tensor]:
        return engine("reference", *x)

    def engine(impl: str, *x: torch.Tensor) -> list[torch.Tensor]:
        given, start = dict(zip(names, x, strict=False)), None
        if parts:
            start = State(**dict(zip(parts, x[len(names) :], strict=True)))
        call = {"initial_state": start, "output_uncertainty": True, "impl": impl} | options
        return everything(run(glazoo.attention, spec, given, **call))

    inputs = [*ops.values(), *parts.values()]
    truth, noisy = reference(*inputs), witnesses(reference, inputs)
    for impl in ENGINES:
        for n, (x, y) in enumerate(zip(engine(impl, *inputs), truth, strict=True)):
            assert_within_budget(x, y, witness=[w[n] for w in noisy], name=f"{spec.name} {n}")


def at_zero(spec: Spec, ops: Operands) -> None:
    """Without importance a form is its source: to the last bit, if nothing turns the keys and both
    run on one kernel class."""
    closed = {"b": torch.zeros_like(ops["b"]), "prior": torch.ones_like(ops["prior"])}
    source, imp = freeze(spec), spec.importance
    own = explicit(glazoo.lower(spec), without_importance(ops))
    assert imp is not None
    found, expected = (
        run(glazoo.attention, s, x, impl="reference").output
        for s, x in ((spec, ops | closed), (source, own))
    )
    if imp.basis == "own":
        assert torch.equal(found, expected), spec.name
    else:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found = run(glazoo.attention, spec, ops | closed, impl="chunked").output
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    diagonal = spec.posterior.precision == "diagonal"
    per_key = diagonal if imp.forgetting == "diffuse" and spec.hebbian else not spec.hebbian
    if per_key and imp.forgetting == ("diffuse" if spec.hebbian else "temper") and "g" in own:
        # A mean that forgets by its importance does so by key channel.
        K, B, T = ops["q"].shape[-1], *ops["v"].shape[:2]
        g = own["g"].expand(B, T, -1) if own["g"].ndim == 1 else own["g"]
        own["g"], source = g if g.ndim == 4 else expanded(g, K), data_decay(source, "key")
    same = glazoo.lower(spec).kernel == glazoo.lower(source).kernel
    if same and imp.basis == "own" and spec.read.normalizer == "none":
        expected = run(glazoo.attention, source, own, impl="chunked").output
        assert torch.equal(found, expected), spec.name


@pytest.mark.parametrize("name", SOURCES)
def test_every_form_is_refused_or_right(name: str) -> None:
    source, refused = glazoo.load(name), 0
    for precision, basis, forgetting, gain in OPTIONS:
        options = (precision, basis, forgetting, gain)
        if gain is None and source.posterior.gain != "flow":
            continue  # the default, which is one of the others
        chosen = dict(zip(("precision", "basis", "forgetting", "gain"), options, strict=True))
        if impossible(source, *options):
            refused += 1
            with pytest.raises(SpecError, match=r"gain: |precision: |form with precision = .*: \w"):
                glazoo.metaplasticize(source, **chosen)
            continue
        spec = glazoo.metaplasticize(source, **chosen)
        ops = Instance(B=1, T=7, H=1, G=2, K=3, V=2, seed=5).operands(spec)
        compare(spec, ops)
        at_zero(spec, ops)
    assert refused < len(OPTIONS)


# One form of each kind.
KINDS: dict[Any, Any] = {}
for form in forms(["mamba2", "gated_deltanet", "kda", "efla", "kdn", "gka", "bayesian_layer"]):
    if (imp := form.spec.importance) is not None:
        way = (imp.evidence, imp.basis, imp.forgetting, imp.noise.shape, imp.gate.shape)
        KINDS.setdefault((form.spec.posterior, form.spec.hebbian, way), form)


@pytest.mark.parametrize("form", KINDS.values(), ids=lambda form: form.label)
def test_edges(form: Any) -> None:
    """No token, one token, several chunks, resets, packed and continued sequences."""
    spec = form.spec
    for tokens_ in (0, 1):
        one = Instance(B=2, T=tokens_, H=1, G=2, K=3, V=2, start=True, seed=tokens_)
        compare(spec, one.operands(spec), one.state(spec))
    long = Instance(B=1, T=67, H=1, G=1, K=3, V=2, regime="reset", seed=3)
    compare(spec, long.operands(spec))
    bounds = [0, 3, 3, 4, 9]
    packed = Instance(B=1, T=9, H=2, G=2, K=3, V=2, regime="mixed", seed=4)
    many = Instance(B=4, H=2, G=2, K=3, V=2, start=True, seed=4).state(spec)
    compare(spec, packed.operands(spec), many, cu_seqlens=torch.tensor(bounds))
    ops, program = packed.operands(spec), glazoo.lower(spec)
    whole = run(glazoo.attention, spec, ops)
    head = run(glazoo.attention, spec, tokens(program, ops, 0, 4))
    rest = run(glazoo.attention, spec, tokens(program, ops, 4, 9), initial_state=head.final_state)
    torch.testing.assert_close(rest.final_state.memory, whole.final_state.memory)
    torch.testing.assert_close(torch.cat([head.output, rest.output], 1), whole.output)


@pytest.mark.parametrize("form", KINDS.values(), ids=lambda form: form.label)
def test_gradients(form: Any) -> None:
    spec = form.spec
    drawn = Instance(B=1, T=6, H=1, G=2, K=3, V=2, start=True, seed=7)
    ops, state = drawn.operands(spec), drawn.state(spec)
    assert state is not None
    parts = {n: x for n, x in state._asdict().items() if x is not None}
    names = [*ops, *parts]

    def slopes(impl: str, *given: torch.Tensor) -> list[torch.Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in given]
        x = dict(zip(names, leaves, strict=True))
        start = {name: x[name] for name in parts}
        if spec.posterior.precision == "full":
            # Symmetric: only the symmetric part of its gradient means something.
            start["importance"] = (start["importance"] + start["importance"].mT) / 2
        moving = {name: x[name] for name in ops}
        result = run(glazoo.attention, spec, moving, initial_state=State(**start), impl=impl)
        weights = torch.Generator().manual_seed(1)
        total = sum(
            (y * torch.randn(y.shape, generator=weights, dtype=torch.float64).to(y.dtype)).sum()
            for y in everything(result)
        )
        found = torch.autograd.grad(total, leaves, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]

    inputs = [*ops.values(), *parts.values()]
    truth = slopes("reference", *inputs)
    noisy = witnesses(lambda *x: slopes("reference", *x), inputs, runs=4)
    for impl in ENGINES[1:]:
        for n, (x, y) in enumerate(zip(slopes(impl, *inputs), truth, strict=True)):
            assert_within_budget(x, y, witness=[w[n] for w in noisy], name=names[n])
