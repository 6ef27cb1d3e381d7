"""Extreme gates, keys and importances: finite results and gradients that match the loop."""

import sys
from types import ModuleType

import pytest
import torch
from budget import unit
from chunked_cases import CORES, Case, compare, each_core, make, with_gradients
from torch import Tensor

from glazoo.engines import chunked
from glazoo.kernels import loops

DTYPES = (torch.float64, torch.float32)
# Those whose tokens come with a key and a log decay.
KEYED = [(core, operation) for core, operation in CORES if operation != "riccati"]
GATED = [
    pytest.param(core, operation, gate, id=f"{core.__name__}-{operation}-{gate}")
    for core, operation in KEYED
    for gate in ("head", "key")
    if (operation, gate) != ("solve", "key")
]


def pattern(case: Case, kind: str) -> None:
    """Replaces the log decay: "none", "all", "mixed" and "burst" of forgetting."""
    g = case.operands["g"]
    generator = torch.Generator().manual_seed(3)
    if kind == "none":
        g.zero_()
    elif kind == "all":
        g.fill_(-torch.inf)
    elif kind == "strong":
        g.fill_(-80.0)
    elif kind == "mixed":
        choices = torch.tensor([0.0, -1e-4, -1.0, -30.0, -80.0, -torch.inf], dtype=g.dtype)
        g.copy_(choices[torch.randint(0, 6, g.shape, generator=generator)])
    elif kind == "burst":
        # strong forgetting first: what follows must not lose its small decays to cancellation
        g[:, :60] = -80.0
        g[:, 60:] = -1e-3


# Every kind in float32, where they are harder; in float64 the one with most of them in a row.
KINDS = [
    pytest.param(kind, dtype, marks=[pytest.mark.slow] * (wide and kind != "mixed"))
    for kind in ("none", "all", "strong", "mixed", "burst")
    for dtype, wide in ((torch.float64, True), (torch.float32, False))
]


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize(("core", "operation", "gate"), GATED)
def test_decays(core: ModuleType, operation: str, gate: str, kind: str, dtype: torch.dtype) -> None:
    case = make(operation, tokens=80, keys=3, values=2, share=2, gate=gate, states=1)
    pattern(case, kind)
    case = case.cast(dtype)
    found = with_gradients(core, case)
    compare(found, loops, case, dtype)
    forgotten = torch.isinf(case.operands["g"])
    assert (found["dg"][forgotten] == 0).all()


@pytest.mark.parametrize(("core", "operation", "gate"), GATED)
def test_strong_decays_have_small_gradients(core: ModuleType, operation: str, gate: str) -> None:
    """A gradient that is tiny because its decay is tiny is not drowned in rounding noise."""
    case = make(operation, tokens=80, keys=3, values=2, gate=gate)
    case.operands["g"].fill_(-60.0)
    case = case.cast(torch.float32)
    truth = with_gradients(loops, case.double())["dg"]
    found = with_gradients(core, case)["dg"].double()
    assert float(truth.abs().max()) < 1e-20
    assert float((found - truth).abs().max()) <= 1e-3 * float(truth.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [1e-6, 1e3])
@each_core(*sorted({operation for _, operation in KEYED}))
def test_keys_of_any_norm(
    core: ModuleType, operation: str, norm: float, dtype: torch.dtype
) -> None:
    """With write gates that keep the recurrence stable: the erase key carries 1 / norm^2."""
    case = make(operation, tokens=80, keys=4, values=2, share=2, states=1, gate="head")
    case.operands["k"] *= norm
    if operation == "delta":
        case.operands["e"] /= norm
    if operation == "synapse_delta":
        case.operands["beta"] /= max(norm, 1.0) ** 2
    case = case.cast(dtype)
    compare(with_gradients(core, case), loops, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prior", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("evidence", [0.0, 1e-6, 1e6])
@each_core("synapse", "synapse_delta")
def test_importance_of_any_size(
    core: ModuleType, operation: str, prior: float, evidence: float, dtype: torch.dtype
) -> None:
    options = {"uncertainty": True}
    if operation == "synapse_delta":
        # the exact gain is stable for every importance; the first-order one is not
        options["rule"] = ("exact", "full")
    case = make(operation, tokens=40, keys=4, values=2, share=2, states=1, **options)
    case.operands["prior"] *= prior
    case.operands["b"] *= evidence
    case.operands["j"] *= evidence
    case = case.cast(dtype)
    compare(with_gradients(core, case), loops, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prior", [1e-3, 1.0, 1e6])
def test_solve_with_any_prior(prior: float, dtype: torch.dtype) -> None:
    case = make("solve", tokens=40, keys=4, share=2, states=1)
    case.operands["prior"] *= prior
    case = case.cast(dtype)
    compare(with_gradients(chunked, case), loops, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_solve_before_anything_is_seen_and_of_nothing(dtype: torch.dtype) -> None:
    """Systems that are solved at once, right-hand sides of zero, and a row of repeated keys."""
    case = make("solve", tokens=100, keys=4, share=2)
    x = case.operands
    x["beta"][:, :40] = 0
    x["q"][:, 30:50] = 0
    x["k"][:, 70:] = x["k"][:, 70:71]
    case = case.cast(dtype)
    compare(with_gradients(chunked, case), loops, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ill_conditioned_systems_are_factored(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where conjugate gradients do not converge in about K steps, and only there."""
    case = make("solve", tokens=80, keys=8, share=2, states=1)
    case.operands["beta"][:, 40:] *= 1e5
    case.operands["k"][..., 4:] *= 1e-3
    systems = sys.modules["glazoo.engines.chunked.solve"]._Systems
    left: list[Tensor] = []

    def factor(self: object, y: Tensor, which: Tensor, x: Tensor) -> None:
        left.append(which)
        whole(self, y, which, x)

    whole = systems._factor
    monkeypatch.setattr(systems, "_factor", factor)
    case = case.cast(dtype)
    compare(with_gradients(chunked, case), loops, case, dtype)
    assert any(bool(x.any()) for x in left)
    assert not all(bool(x.all()) for x in left)


def test_solve_stays_finite_where_rounding_makes_the_system_indefinite() -> None:
    """Keys of norm 1e3 in a plane and a prior of 1e-6: Lambda is far below the rounding of H."""
    case = make("solve", tokens=80, keys=6, gate="head")
    case.operands["k"][..., 2:] = 0
    case.operands["k"] *= 1e3
    case.operands["prior"].fill_(1e-6)
    for name, value in with_gradients(chunked, case.cast(torch.float32)).items():
        assert torch.isfinite(value).all(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("noise", [False, True])
def test_riccati_of_any_size_with_zeros(noise: bool, size: float, dtype: torch.dtype) -> None:
    """Strong decays, resets, and tokens that add nothing, many in a row, next to huge ones."""
    case = make("riccati", tokens=150, keys=3, gate="key", strength=80, states=1, noise=noise)
    x, generator = case.operands, torch.Generator().manual_seed(3)
    x["c"] *= 1 / size
    for name in ("a", "c", "d", "u"):
        x[name] = x[name].clone()
    silent = torch.rand(1, 150, 1, 3, generator=generator) < 0.5
    x["u"] *= torch.where(silent, 0, size)
    x["u"][:, 40:80] = 0
    # Half of them in a row.
    x["d" if noise else "a"][:, 20:100:2] = 0
    x["d" if noise else "a"][:, 100:120] = 0
    case = case.cast(dtype)
    compare(with_gradients(chunked, case), loops, case, dtype)


def test_riccati_keeps_zero() -> None:
    case = make("riccati", tokens=100, keys=3, gate="key").cast(torch.float32)
    case.operands["u"][:, :70] = 0
    out = with_gradients(chunked, case)["out"]
    assert (out[:, :70] == 0).all()
    assert (out[:, 70] > 0).any()


def test_weak_decays_over_many_chunks_do_not_drift() -> None:
    """The decay over a chunk is that of the summed logarithm, not a product of rounded decays."""
    tokens = 4096
    for gate in ("head", "key"):
        case = make("linear", tokens=tokens, keys=1, values=1, gate=gate, states=1)
        case.operands["g"].fill_(-1e-4)
        case.operands["w"].zero_()
        found = with_gradients(chunked, case.cast(torch.float32))["final s"]
        start = case.operands["s"].float().double()
        truth = start * torch.exp(case.operands["g"].float().double().sum(1).view(-1, 1))
        # two roundings per chunk, of the decay and of the product
        allowed = 2 * tokens / 64 * unit(torch.float32)
        assert float(((found - truth) / truth).abs().max()) <= allowed
