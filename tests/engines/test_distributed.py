"""Tokens that are spread over processes give what one process gives of all, gradients included."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from budget import assert_within_budget, witnesses
from oracles import METAPLASTIC_ORACLES, ORACLES, gate_shapes
from program.unusual import UNUSUAL
from ranks import LENGTHS, Case, gradients, results_of, spread, weighted, weights_of
from torch import Tensor

import glazoo
from glazoo import distributed
from glazoo.theory.instances import run

# One of every core operation and of every way in which steps look at the token before.
SOME = (
    "gla",
    "gated_deltanet",
    "gated_deltanet head",
    "mamba2 value",
    "mesanet",
    "longhorn",
    "kdn",
    "mamba3",
    "mlstm",
    "lightnet",
    "gka",
    "bayesian_layer",
    "rwkv7",
    "gated_deltaproduct head",
)
ALL = [
    *ORACLES,
    *(f"{name} {gate}" for name in METAPLASTIC_ORACLES for gate in gate_shapes(name)),
    *UNUSUAL,
]


def cases(labels: Any, worlds: Any) -> list[Case]:
    return [
        Case(label, lengths, packed, regime)
        for label in labels
        for world in worlds
        for lengths in LENGTHS[world]
        for packed in (False, True)
        for regime in ("normal", "reset")
    ]


FEW = [
    # Of each one of the splits and regimes, in turn; of all together every one.
    *(cases([label], (2, 3))[5 * i % 16] for i, label in enumerate(SOME)),
    *(cases([label], (2, 3))[(5 * i + 7) % 16] for i, label in enumerate(SOME)),
    Case("gated_deltanet head", (12,), packed=True),
    Case("gla", (5, 0, 7), packed=False, start=False),
    Case("gated_deltanet", (5, 7), packed=True, start=False),
    Case("gated_deltanet head", (5, 7), packed=False, apart=True),
    Case("longhorn", (1, 5, 6), packed=True, apart=True),
    Case("gated_deltanet", (1, 5, 6), packed=True, dtype=torch.float32),
    Case("mamba2 value", (5, 7), packed=False, dtype=torch.float32),
]
MANY = cases(ALL, (2, 3))


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spread(FEW, tmp_path_factory.mktemp("few"))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spread(MANY, tmp_path_factory.mktemp("many"))


def truth(case: Case, ops: dict[str, Tensor], start: Any) -> dict[str, Tensor]:
    """What the reference gives of all tokens at once."""
    results = results_of(glazoo.attention, case, ops, start, impl="reference")
    tokens, finals = weights_of(results, case)
    begin = case.lengths[0] if case.apart else 0
    loss = weighted([x[:, begin:] for x in results[0]], [w[:, begin:] for w in tokens])
    found = gradients(loss + weighted(results[1], finals), ops, start)
    for i, x in enumerate(results[0]):
        found[f"output {i}"] = x.detach()
    for i, x in enumerate(results[1]):
        found[f"final {i}"] = x.detach()
    return found


def put_together(case: Case, found: list[dict[str, Any]]) -> dict[str, Tensor]:
    """One result of those of all processes."""
    parts = [x[str(case)] for x in found if str(case) in x]
    assert len(parts) == len(case.lengths)
    out = {}
    for name, first in parts[0].items():
        every = [part[name] for part in parts]
        if name.startswith("output"):
            out[name] = torch.cat(every, 1)
        elif name.startswith("final"):
            assert all(torch.equal(x, first) for x in every)
            out[name] = first
        else:
            out[name] = torch.stack(every).sum(0)
    return out


def check(case: Case, found: list[dict[str, Any]]) -> None:
    actual, (ops, start) = put_together(case, found), case.leaves()
    expected = truth(case, ops, start)
    assert actual.keys() == expected.keys()
    eps, terms = torch.finfo(torch.float64).eps, sum(case.lengths) * 5 * 5
    for name, y in expected.items():
        x = actual[name]
        if name == "gradient of initial importance" and case.spec.posterior.precision == "full":
            # H is symmetric: only the symmetric part of its gradient means anything.
            x, y = x + x.mT, y + y.mT
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        finite = y.isfinite()
        assert torch.equal(x.isfinite(), finite), name
        x, y = x[finite], y[finite]
        scale = max(1.0, float(y.abs().max())) if y.numel() else 1.0
        # Two evaluations of the same sums differ by one rounding per term.
        assert ((x - y).abs() <= 64 * terms * eps * scale).all(), name


@pytest.mark.parametrize("case", [c for c in FEW if c.dtype == torch.float64], ids=str)
def test_processes_give_what_one_gives(few: list[dict[str, Any]], case: Case) -> None:
    check(case, few)


@pytest.mark.slow
@pytest.mark.parametrize("case", MANY, ids=str)
def test_processes_give_what_one_gives_for_every_form(
    many: list[dict[str, Any]], case: Case
) -> None:
    check(case, many)


@pytest.mark.parametrize("case", [c for c in FEW if c.dtype == torch.float32], ids=str)
def test_processes_lose_no_digits(few: list[dict[str, Any]], case: Case) -> None:
    ops, start = case.leaves()
    names = [*ops, *(n for n, x in start._asdict().items() if x is not None)]
    tensors = [*ops.values(), *(x for x in start if x is not None)]

    def reference(*given: Tensor) -> list[Tensor]:
        known = {n: x.detach().requires_grad_() for n, x in zip(names, given, strict=True)}
        parts = {n: known.pop(n) for n in names if n not in ops}
        return list(truth(case, known, glazoo.State(**parts)).values())

    expected = reference(*(x.detach().double() for x in tensors))
    runs = witnesses(reference, [x.detach().double() for x in tensors])
    for i, (name, x) in enumerate(
        (name, put_together(case, few)[name]) for name in truth(case, ops, start)
    ):
        assert_within_budget(x, expected[i], witness=[r[i] for r in runs], name=name)


def test_what_differs_is_refused_everywhere(few: list[dict[str, Any]]) -> None:
    last = {
        "batch": "q: got B = [1, 1, 2] on the processes",
        "dtype": "operands but for B and T: got g [4, 4] float64, k [2, 4] float64, q [2, 4] ",
        "bounds": "cu_seqlens: got [0, 9, 9, 21, 30, 30, 36] on process 2",
        "unpacked": "cu_seqlens: got None on process 2",
        "gradient": "whether gradients are asked for: got True on process 2",
        "state": "initial_state: got memory [6, 4, 4, 3] float64 on process 2",
        "final": "options: got output_final_state=True, output_uncertainty=False on process 2",
        "spec": "spec: got simple_gla (",
    }
    for rank, found in enumerate(few):
        assert found["mismatches"].keys() == last.keys()
        for name, message in found["mismatches"].items():
            if rank == 2:
                assert message.startswith(last[name])
            if name != "batch":
                others = [0, 1] if rank == 2 else [2]
                assert f"on process {rank} and something else on {others}" in message


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of this one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"impl": "reference"}, "impl: got 'reference', accepted are auto, chunked"),
        ({"impl": "fla"}, "impl: got 'fla', accepted are auto, chunked"),
        ({"cu_seqlens": torch.tensor([0, 5])}, r"0 = c_0 <= .* = T = 12"),
        ({"removal": torch.ones(1, 12, 4, 4)}, "removal: 'gla' does not take it"),
        ({"keys": torch.ones(1)}, "keys: 'gla' does not take it"),
        ({"g": torch.ones(1, 12, 4, 4)}, "g: got values from 1 to 1"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    case = Case("gla", (12,), packed=True)
    ops = {name: x.detach().float() for name, x in case.leaves()[0].items()}
    with pytest.raises(ValueError, match=message):
        run(distributed.attention, case.spec, ops | options)


def test_there_must_be_a_group(tmp_path: Path) -> None:
    ops, _ = Case("gla", (12,), packed=True).leaves()
    with pytest.raises(ValueError, match="start the processes with torchrun"):
        run(distributed.attention, glazoo.load("gla"), ops)
