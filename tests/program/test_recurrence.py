"""The recurrence that is printed is the one that runs: its text, evaluated, is the reference."""

from __future__ import annotations

import numpy as np
import pytest
from program.unusual import UNUSUAL
from program.written import evaluate, given

import glazoo
from glazoo.theory.forms import forms
from glazoo.theory.instances import Instance, run
from glazoo.theory.maps import explicit

FORMS = {form.label: form.spec for form in forms()} | UNUSUAL


def printed(spec, lines, ops, state, head):
    """Evaluates lines for the first sequence and one value head; gives outputs and state."""
    return evaluate(lines, *given(spec, ops, state, head))


def compare(spec, lines, regime) -> None:
    """Both are float64 evaluations of one recurrence: a rounding per operation of the chain."""
    instance = Instance(B=1, T=5, H=1, G=2, K=4, V=3, regime=regime, start=True, seed=3)
    program = glazoo.lower(spec)
    ops, state = explicit(program, instance.operands(spec)), instance.state(spec)
    truth = run(
        glazoo.attention,
        spec,
        ops,
        impl="reference",
        initial_state=state,
        output_uncertainty=spec.has_variance,
    )
    for head in range(instance.HV):
        values, last = printed(spec, lines, ops, state, head)
        found = [("y", np.stack([v["y_t"] for v in values])[..., 0], truth.output[0, :, head])]
        if spec.has_variance:
            doubt = truth.uncertainty[0, :, head].reshape(instance.T, -1)
            found.append(("var", np.stack([v["var_t"] for v in values])[..., 0], doubt))
        for part in program.state:
            x = getattr(truth.final_state, part.name)[0]
            x = x[head // instance.G if "H" in part.shape else head]
            found.append((part.name, last[part.symbol], x if x.ndim == 2 else x[:, None]))
        for name, actual, expected in found:
            wanted = expected.numpy()
            assert actual.shape == wanted.shape, name
            scale = max(1.0, float(np.abs(wanted).max()))
            bound = 64 * instance.T * instance.K * np.finfo(np.float64).eps * scale
            np.testing.assert_allclose(actual, wanted, rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("regime", ["normal", "mixed"])
@pytest.mark.parametrize("label", FORMS)
def test_the_printed_recurrence_is_the_reference(label: str, regime: str) -> None:
    spec = FORMS[label]
    compare(spec, glazoo.lower(spec).recurrence, regime)


@pytest.mark.parametrize("label", ["metaplastic_kda[head]", "metaplastic_rwkv7[value]", "mamba3"])
def test_another_recurrence_is_noticed(label: str) -> None:
    """Every line matters: with a sum as a difference, or another function, nothing agrees."""
    spec = FORMS[label]
    lines = glazoo.lower(spec).recurrence
    changed = 0
    for n, line in enumerate(lines):
        for old, new in ((" + ", " - "), (" - ", " + "), ("exp(", "abs(")):
            if old in line:
                changed += 1
                wrong = (*lines[:n], line.replace(old, new, 1), *lines[n + 1 :])
                with pytest.raises(AssertionError):
                    compare(spec, wrong, "normal")
    assert changed >= 3


def test_what_has_no_meaning_is_an_error() -> None:
    with pytest.raises(AssertionError, match="has no meaning from ' \\?"):
        evaluate(("y_t = 1 ? 2",), {}, {}, [({}, [])])
