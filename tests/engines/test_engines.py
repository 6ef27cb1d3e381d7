"""Every engine computes what the reference computes, for every spec and both metaplastic forms."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from oracles import METAPLASTIC_ORACLES, ORACLES, gate_shapes, make_operands, make_state
from program.unusual import UNUSUAL

import glazoo
from glazoo.engines import available
from glazoo.theory.instances import Instance
from glazoo.theory.instances import operands as draw

FORMS = [(n, None) for n in ORACLES] + [
    (n, gate) for n in METAPLASTIC_ORACLES for gate in gate_shapes(n)
]
# What differs from chunked in the compiled engine has tests of its own; here each loop meets one
# form, and all forms in `make test-all`, as the traceable engine does.
LOOPS = {
    ("palimpsa", None),
    ("longhorn", None),
    ("kdn", None),
    ("gla", "value"),
    ("mamba2", "head"),
    ("gated_deltanet", "head"),
    ("kda", "value"),
    ("gated_deltaproduct", "value"),
}
CASES = [
    pytest.param(
        name,
        gate,
        impl,
        marks=[pytest.mark.slow]
        * (impl == "traceable" or (impl == "compiled" and (name, gate) not in LOOPS)),
    )
    for name, gate in FORMS
    for impl in (*available(), "traceable")
    if impl != "reference"
]


def instance(name, gate, regime="normal", *, tokens=70, batch=2, sequences=None):
    rng = np.random.default_rng(zlib.crc32(f"{name} {gate} {regime} {tokens}".encode()))
    sizes = {"H": 2, "HV": 4, "K": 5, "V": 3}
    operands = make_operands(name, rng, batch, tokens, **sizes, gate=gate, regime=regime)
    start = make_state(name, rng, sequences or batch, **sizes, gate=gate)
    parts = [*start[:3], *(start.lag or (None, None))]
    tensor = {k: None if x is None else torch.from_numpy(np.array(x)) for k, x in operands.items()}
    state = glazoo.State(*(None if x is None else torch.from_numpy(np.array(x)) for x in parts))
    spec = glazoo.load(name)
    return (spec if gate is None else glazoo.metaplasticize(spec, gate=gate)), tensor, state


def run(spec, operands, impl, **options):
    ops = dict(operands)
    return glazoo.attention(
        spec,
        ops.pop("q"),
        ops.pop("k"),
        ops.pop("v"),
        **ops,
        output_final_state=True,
        impl=impl,
        **options,
    )


def everything(result) -> list[torch.Tensor]:
    uncertainty = [result.uncertainty] if len(result) == 3 else []
    return [result.output, *(x for x in result.final_state if x is not None), *uncertainty]


def assert_same(actual, expected, terms: int) -> None:
    """Two float64 evaluations of the same sums differ by one rounding per term, times the scale of
    the intermediate values; a reordered recurrence cannot be asked for more."""
    for x, y in zip(actual, expected, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        finite = torch.isfinite(y)
        assert torch.equal(torch.isfinite(x), finite)
        x, y = x[finite], y[finite]
        scale = max(1.0, float(y.abs().max())) if y.numel() else 1.0
        bound = 64 * terms * torch.finfo(y.dtype).eps * scale
        assert (x - y).abs().max() <= bound if y.numel() else True


@pytest.mark.parametrize("regime", ["normal", "no_decay", "strong_decay", "reset", "zero_keys"])
@pytest.mark.parametrize(("name", "gate", "impl"), CASES)
def test_agrees_with_the_reference(name, gate, regime, impl) -> None:
    spec, operands, state = instance(name, gate, regime)
    options = {"initial_state": state, "output_uncertainty": spec.has_variance}
    actual, expected = (run(spec, operands, e, **options) for e in (impl, "reference"))
    assert_same(everything(actual), everything(expected), 70 * 5)


@pytest.mark.parametrize("tokens", [0, 1, 2])
@pytest.mark.parametrize(("name", "gate", "impl"), CASES)
def test_short_sequences(name, gate, tokens, impl) -> None:
    spec, operands, state = instance(name, gate, tokens=tokens)
    for start in (None, state):
        actual, expected = (
            run(spec, operands, e, initial_state=start) for e in (impl, "reference")
        )
        assert_same(everything(actual), everything(expected), 10)


@pytest.mark.parametrize(("name", "gate", "impl"), CASES)
def test_packed_sequences(name, gate, impl) -> None:
    lengths = [1, 0, 66, 5, 0]
    cu = torch.tensor([0, *np.cumsum(lengths)])
    spec, operands, state = instance(name, gate, tokens=72, batch=1, sequences=len(lengths))
    for start in (None, state):
        options = {
            "initial_state": start,
            "cu_seqlens": cu,
            "output_uncertainty": spec.has_variance,
        }
        actual, expected = (run(spec, operands, e, **options) for e in (impl, "reference"))
        assert_same(everything(actual), everything(expected), 72 * 5)


@pytest.mark.parametrize(("name", "gate", "impl"), CASES)
def test_gradients(name, gate, impl) -> None:
    spec, operands, state = instance(name, gate, tokens=19, batch=1)
    rng = torch.Generator().manual_seed(1)

    def gradients(engine):
        ops = {k: None if x is None else x.clone().requires_grad_() for k, x in operands.items()}
        start = state.map(lambda x: x.clone().requires_grad_())
        results = everything(run(spec, ops, engine, initial_state=start))
        rng.manual_seed(1)
        loss = sum((x * torch.randn(x.shape, generator=rng, dtype=x.dtype)).sum() for x in results)
        loss.backward()
        leaves = [*ops.values(), *start]
        return [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves if x is not None]

    actual, expected = gradients(impl), gradients("reference")
    if spec.posterior.precision == "full":
        # H is symmetric: only the symmetric part of its gradient means anything.
        actual[-1], expected[-1] = (x + x.mT for x in (actual[-1], expected[-1]))
    assert_same(actual, expected, 19 * 5 * 5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("label", UNUSUAL)
def test_what_no_file_combines_agrees_with_the_reference(label, packed) -> None:
    drawn = Instance(B=1, T=9, H=1, G=2, K=4, V=3, start=not packed, seed=5)
    spec = UNUSUAL[label]
    operands, state = {"k": None} | drawn.operands(spec), drawn.state(spec)
    cu = torch.tensor([0, 4, 4, 9]) if packed else None
    options = {"initial_state": state, "cu_seqlens": cu, "output_uncertainty": spec.has_variance}
    actual, expected = (run(spec, operands, e, **options) for e in ("chunked", "reference"))
    assert_same(everything(actual), everything(expected), 9 * 4 * 3)


# One of each kernel class, and of what a program derives before and after it.
COMPILED = [
    "gated_deltanet",
    "metaplastic_gated_deltanet",
    "palimpsa",
    "longhorn",
    "mesanet",
    "mamba3",
    "rwkv7",
    "lightnet",
    "retnet",
    "precond_kda",
]


@pytest.mark.parametrize(
    ("name", "as_spec"),
    [
        # A name becomes its spec before anything is traced: one of them shows it.
        pytest.param(name, as_spec, marks=[pytest.mark.slow] * (as_spec and name != COMPILED[0]))
        for name in COMPILED
        for as_spec in (False, True)
    ],
)
def test_compiles_without_graph_breaks(name, as_spec) -> None:
    spec = glazoo.load(name)
    operands = {n: x.float() for n, x in draw(spec, torch.Generator().manual_seed(0), T=5).items()}
    named = spec if as_spec else name

    def f(ops):
        return run(named, {"k": None} | ops, "auto").output

    torch.compiler.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(operands), f(operands))
