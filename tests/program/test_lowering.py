"""Lowering is a function of a spec's values, and its steps are data that add up."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import glazoo
from glazoo import Kernel
from glazoo.program.steps import OneToken
from glazoo.spec import Decay
from glazoo.theory.catalogue.axes import changed
from glazoo.theory.forms import forms
from glazoo.theory.instances import Instance, run

FORMS = {form.label: form.spec for form in forms()}


@pytest.mark.parametrize("label", FORMS)
def test_a_program_has_its_core_calls_and_the_state_of_its_steps(label: str) -> None:
    program = glazoo.lower(FORMS[label])
    # A precision matrix is solved, or a covariance kept, before a memory is written and read.
    matrices = (Kernel.FULL, Kernel.COVARIANCE)
    calls = [row.step.kernel for row in program.rows if row.step.kernel]
    assert calls[0] == program.kernel
    assert [kernel for kernel in calls[1:] if kernel not in matrices] == (
        calls[-1:] if program.kernel in matrices else []
    )
    assert {part.name for part in program.state} <= set(glazoo.State._fields)

    def inner(step):
        parts = getattr(step, "steps", None)
        return [step] if parts is None else [s for part in parts for s in inner(part)]

    assert [s for step in program.steps for s in inner(step)] == [row.step for row in program.rows]
    sizes = (64, 32)
    assert program.flops_per_token(*sizes) == sum(r.operations(*sizes) for r in program.rows) > 0


def test_the_name_plays_no_part() -> None:
    spec = FORMS["metaplastic_gated_deltaproduct[head]"]
    named, other = glazoo.lower(spec), glazoo.lower(changed(spec, name="another"))
    assert named.steps == other.steps
    assert named.recurrence == other.recurrence


def test_specs_of_one_name_have_programs_of_their_own() -> None:
    spec = glazoo.load("gla")
    bare = glazoo.lower(changed(spec, decay=Decay()))
    assert glazoo.lower(spec).role("decay") is not None
    assert bare.role("decay") is None
    assert glazoo.lower(spec).steps != bare.steps


def test_steps_cannot_be_changed() -> None:
    for row in glazoo.lower(FORMS["metaplastic_rwkv7[head]"]).rows:
        for field in dataclasses.fields(row.step):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(row.step, field.name, None)


@pytest.mark.parametrize(
    ("label", "operations"),
    [
        # 3 K V for the decayed write, 2 K V for the read, V for beta v.
        ("mamba2", 5 * 64 * 32 + 32),
        # 2 K V more for the prediction, K more for beta k.
        ("gated_deltanet", 7 * 64 * 32 + 32 + 64),
        ("palimpsa", 10 * 64 * 32 + 32),
        # Twice per token, after one split.
        ("gated_deltaproduct", 2 * (7 * 64 * 32 + 32 + 64)),
    ],
)
def test_operations_of_a_token(label: str, operations: int) -> None:
    assert glazoo.lower(FORMS[label]).flops_per_token(64, 32) == operations


def test_a_program_says_which_engine_runs_it_here(monkeypatch) -> None:
    from glazoo.program import lowering

    program, other = glazoo.lower(FORMS["mamba2"]), glazoo.lower(FORMS["mesanet"])
    for there, engine in ((object(), "compiled"), (None, "chunked")):
        monkeypatch.setattr(lowering, "find_spec", lambda name, there=there: there)
        assert program.describe()["auto"] == {"cpu": engine, "cuda": "chunked"}
    assert (program.describe()["token"], other.describe()["token"]) == ("one piece", "steps")


class Fused:
    """The chunked engine with a token of decoding that only counts how often it is asked for."""

    def __init__(self) -> None:
        from glazoo.engines import chunked

        self.chunked, self.asked = chunked, 0

    def __getattr__(self, name: str):
        return getattr(self.chunked, name)

    def posterior_step(self, q, k, v, beta, b, g=None, **options):
        self.asked += 1
        memory = v.new_ones(v.shape[0], v.shape[2], k.shape[3], v.shape[3])
        return 2 * v, (memory, memory[..., 0]), None


@pytest.mark.parametrize("label", ["metaplastic_gated_deltanet[head]", "metaplastic_mamba2[head]"])
def test_a_token_of_decoding_is_one_step_where_the_engine_has_it(label: str, monkeypatch) -> None:
    from glazoo import api, engines
    from glazoo.engines import lowered

    # Not what a call like these has prepared, nor what would be.
    monkeypatch.setattr(api, "_KNOWN", {})
    monkeypatch.setattr(engines, "_TOKENS", {})
    core, plain = Fused(), lowered.run
    monkeypatch.setattr(lowered, "run", lambda call, _: plain(call, core))
    spec = FORMS[label]
    assert any(isinstance(step, OneToken) for step in glazoo.lower(spec).steps)
    one = Instance(T=1, K=4, V=3, start=True)
    ops, state = one.operands(spec), one.state(spec)
    assert torch.equal(run(glazoo.attention, spec, ops, initial_state=state).output, 2 * ops["v"])
    assert core.asked == 1
    # Not for several tokens, packed ones, or what gradients are wanted of.
    run(glazoo.attention, spec, Instance(T=2, K=4, V=3).operands(spec))
    run(glazoo.attention, spec, ops, cu_seqlens=torch.tensor([0, 1]))
    run(glazoo.attention, spec, ops | {"v": ops["v"].requires_grad_()})
    assert core.asked == 1
