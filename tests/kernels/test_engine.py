"""`impl="triton"` computes what the reference computes, for every spec whose class has kernels."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from budget import assert_within_budget, witnesses
from oracles import METAPLASTIC_ORACLES, ORACLES, gate_shapes, make_operands, make_state

import glazoo
from glazoo import kernels

FORMS = [(n, None) for n in ORACLES] + [
    (n, gate) for n in METAPLASTIC_ORACLES for gate in gate_shapes(n)
]


def form(name: str, gate: str | None) -> glazoo.Spec:
    spec = glazoo.load(name)
    return spec if gate is None else glazoo.metaplasticize(spec, gate=gate)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"H": 1, "HV": 2, "K": 16, "V": 16}
# What each core operation takes in the dtype of the tokens: its first operands, and options.
TOKENS = {
    "linear": 3,
    "delta": 4,
    "importance": 1,
    "whiten": 2,
    "whitened_linear": 3,
    "synapse": 3,
    "synapse_delta": 3,
    "solve": 2,
    "posterior_step": 3,
}
# One of each class, and of each way in which operands are derived.
EACH = [
    ("gated_deltanet", None),
    ("hgrn2", None),
    ("mamba2", "head"),
    ("mamba2", "value"),
    ("gated_deltanet", "head"),
    ("longhorn", "head"),
    ("comba", "value"),
    ("rwkv7", "head"),
    ("lightnet", None),
    ("mesanet", None),
]


class Case:
    """Operands and a state of a spec in float64; the tokens are numbers that float16 holds."""

    def __init__(self, name: str, gate: str | None, tokens: int) -> None:
        self.spec = form(name, gate)
        rng = np.random.default_rng(zlib.crc32(f"{name} {gate} {tokens}".encode()))
        operands = make_operands(name, rng, 1, tokens, **SIZES, gate=gate)
        start = make_state(name, rng, 1, **SIZES, gate=gate)
        parts = [*start[:3], *(start.lag or (None, None))]
        self.names = [n for n, x in operands.items() if x is not None]
        self.parts = [i for i, x in enumerate(parts) if x is not None]
        arrays = [operands[n] for n in self.names] + [parts[i] for i in self.parts]
        self.tensors = [torch.from_numpy(np.array(x)) for x in arrays]
        wide = {o.name for o in glazoo.lower(self.spec).operands if o.wide}
        self.tokens = {n for n in self.names if n not in wide}
        for i, n in enumerate(self.names):
            if n in self.tokens:
                self.tensors[i] = self.tensors[i].half().double()
        self.uncertainty = self.spec.has_variance

    def given(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Operands as a caller has them: tokens in dtype, gates and states in float32."""
        names = self.names + [""] * len(self.parts)
        return [
            x.to(DEVICE, dtype if n in self.tokens else torch.float32)
            for n, x in zip(names, self.tensors, strict=True)
        ]

    def run(self, impl: str, xs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        ops = {"k": None} | dict(zip(self.names, xs, strict=False))
        state: list[torch.Tensor | None] = [None] * len(glazoo.State._fields)
        for i, x in zip(self.parts, xs[len(self.names) :], strict=True):
            state[i] = x
        q, k, v = (ops.pop(n) for n in "qkv")
        result = glazoo.attention(
            self.spec,
            q,
            k,
            v,
            **ops,
            initial_state=glazoo.State(*state),
            output_final_state=True,
            output_uncertainty=self.uncertainty,
            impl=impl,
        )
        found = {"output": result.output, **result.final_state._asdict()}
        found["uncertainty"] = result.uncertainty if self.uncertainty else None
        return {name: x for name, x in found.items() if x is not None}

    def gradients(
        self, impl: str, xs: list[torch.Tensor], weights: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Gradients of every operand and state, of a fixed weighting of all results."""
        leaves = [x.detach().clone().requires_grad_() for x in xs]
        found = self.run(impl, leaves)
        loss = sum((x.to(w.dtype) * w.to(x.device)).sum() for x, w in pair(found, weights))
        grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
        names = self.names + [glazoo.State._fields[i] for i in self.parts]
        found = dict(zip(names, grads, strict=True))
        if self.spec.posterior.precision == "full":
            # A precision matrix is symmetric; how its gradient is split between an entry and its
            # mirror image is each engine's own choice.
            found["importance"] = found["importance"] + found["importance"].mT
        return found


def pair(found, weights):
    return [(found[name], weights[name]) for name in weights]


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, set, set]]:
    """Every call of a core operation: its name, the dtypes of its tokens and those of its gates."""
    calls: list[tuple[str, set, set]] = []

    def spy(name, function):
        def called(*args, **options):
            tokens = [*args[: TOKENS[name]], options.get("e"), options.get("evidence")]
            calls.append((name, dtypes(tokens), dtypes([*args[TOKENS[name] :]])))
            return function(*args, **options)

        return called

    for name in TOKENS:
        monkeypatch.setattr(kernels, name, spy(name, getattr(kernels, name)))
    return calls


def dtypes(xs) -> set[torch.dtype]:
    return {x.dtype for x in xs if x is not None}


def in_one_piece(spec: glazoo.Spec) -> bool:
    """Whether a token of decoding is one launch: importance over keys, one write, no removal."""
    imp, program = spec.importance, glazoo.lower(spec)
    return (
        imp is not None
        and program.kernel in ("linear", "delta")
        and imp.evidence == "key_squared"
        and spec.has_variance
        and spec.steps.count == 1
        and (spec.posterior.precision, spec.forgetting) == ("diagonal", "temper")
        and spec.posterior.gain != "flow"
        and not (spec.erase.strength == "own" and spec.erase.side != "prediction")
    )


# Of several tokens: those, a delta rule that decays by key, and one with a lag.
SEVERAL = [*EACH, ("kda", None), ("mamba3", None)]


@pytest.mark.parametrize(
    ("name", "gate", "tokens"),
    [
        pytest.param(*form, tokens, marks=[pytest.mark.slow] * (tokens > 1 and form not in SEVERAL))
        for form in FORMS
        for tokens in (1, 18)
    ],
)
def test_agrees_with_the_reference(name, gate, tokens, handed) -> None:
    case = Case(name, gate, tokens)
    truth = case.run("reference", case.tensors)
    noisy = witnesses(lambda *xs: case.run("reference", list(xs)).values(), case.tensors)
    seen = [dict(zip(truth, run, strict=True)) for run in noisy]
    for dtype in (torch.float32, torch.float16):
        handed.clear()
        actual = case.run("triton", case.given(dtype))
        # A normalised read divides sums that grow with the tokens beyond float16.
        narrow = torch.float32 if case.spec.read.normalizer != "none" else dtype
        assert handed
        for operation, of_tokens, of_gates in handed:
            assert of_tokens == {narrow}, operation
            assert of_gates <= {torch.float32}, operation
        if tokens == 1 and in_one_piece(case.spec):
            assert [operation for operation, *_ in handed][:1] == ["posterior_step"]
            assert len(handed) == 1 + (case.spec.read.normalizer != "none")
        for part, x in actual.items():
            assert x.dtype == (dtype if part == "output" else torch.float32), part
            witness = [run[part] for run in seen]
            assert_within_budget(x.cpu(), truth[part], narrow, witness=witness, name=part)


@pytest.mark.parametrize(
    ("name", "gate", "dtype"),
    [
        # In float16 every other tensor is still in float32.
        pytest.param(*x, dtype, marks=[pytest.mark.slow] * (wide and x != EACH[0]))
        for x in EACH
        for dtype, wide in ((torch.float32, True), (torch.float16, False))
    ],
    ids=str,
)
def test_gradients_agree_with_the_reference(name, gate, dtype) -> None:
    case = Case(name, gate, 5)
    generator = torch.Generator().manual_seed(0)
    weights = {
        part: torch.randn(x.shape, generator=generator).half().double()
        for part, x in case.run("reference", case.tensors).items()
    }
    truth = case.gradients("reference", case.tensors, weights)
    seen = witnesses(
        lambda *xs: case.gradients("reference", list(xs), weights).values(), case.tensors
    )
    given = case.given(dtype)
    found = case.gradients("triton", given, weights)
    for i, (part, x) in enumerate(found.items()):
        assert x.dtype == given[i].dtype, part
        witness = [run[i] for run in seen]
        assert_within_budget(x.cpu(), truth[part], dtype, witness=witness, name=f"d {part}")


WEIGHED = ("output", "importance")


def test_a_token_with_gradients_is_differentiated(handed) -> None:
    case = Case("gated_deltanet", "head", 1)
    given = case.given(torch.float32)
    # With the exact gain a token's own evidence reaches the importance behind it, not its output.
    weights = {name: torch.ones_like(case.run("reference", given)[name]) for name in WEIGHED}
    handed.clear()
    found = case.gradients("triton", given, weights)
    assert "posterior_step" not in [operation for operation, *_ in handed]
    for name in ("b", "beta", "k", "v"):
        assert found[name].abs().sum() > 0, name


def test_mixed_tokens_are_not_narrowed(handed) -> None:
    case = Case("gated_deltanet", None, 3)
    given = case.given(torch.float16)
    given[case.names.index("k")] = given[case.names.index("k")].float()
    case.run("triton", given)
    assert [of_tokens for _, of_tokens, _ in handed] == [{torch.float32}]


def test_bfloat16_is_widened_where_it_is_interpreted(handed) -> None:
    case = Case("gated_deltanet", None, 3)
    found = case.run("triton", case.given(torch.bfloat16))
    taken = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    assert [of_tokens for _, of_tokens, _ in handed] == [{taken}]
    assert found["output"].dtype == torch.bfloat16


def test_float64_is_refused() -> None:
    x = torch.zeros(1, 2, 1, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"impl='triton': got float64 operands"):
        glazoo.attention("linear_attention", x, x, x, impl="triton")
