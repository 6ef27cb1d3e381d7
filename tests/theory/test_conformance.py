"""A third party's view: a spec file of one's own, and an implementation of one's own."""

import pytest
import torch

import glazoo
from glazoo import SpecError
from glazoo.theory import conformance
from glazoo.theory.results import passed

# A decay per key channel, a write gate per value channel, the exact gain: nothing shipped.
OWN = """
name = "own"
title = "Own"
summary = "A test"
reference = { paper = "None", equation = "none" }

[posterior]
precision = "diagonal"
correction = "diagonal"
gain = "exact"

[decay]
shape = "key"
parameterization = "log_sigmoid"
divisor = 16.0

[write]
shape = "value"
parameterization = "sigmoid"

[importance]
gate = { shape = "value", parameterization = "sigmoid" }
prior = { shape = "key" }
"""


def test_a_spec_file_in_one_line(tmp_path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(OWN)
    results = conformance.check(path, examples=2)
    assert {r.verdict for r in results} == {"passed"}
    assert {r.spec for r in results} == {"own"}
    ids = {r.id for r in results}
    assert {"one-hot-keys-are-exact-inference", "packed-is-separate"} <= ids


def test_the_metaplastic_forms_of_a_frozen_file_are_checked_too(tmp_path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(
        (OWN[: OWN.index("[importance]")]).replace('precision = "diagonal"', 'precision = "frozen"')
    )
    results = conformance.check(str(path), examples=1, impl="reference")
    assert {r.spec for r in results} == {"own", "metaplastic_own[head]", "metaplastic_own[value]"}
    assert any(r.id == "metaplastic-at-zero-is-its-source" for r in results)


def test_a_broken_file_is_refused(tmp_path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(OWN.replace('gain = "exact"', 'gian = "exact"'))
    with pytest.raises(SpecError, match=r"unknown key posterior\.gian; did you mean 'gain'"):
        conformance.check(path)


def gla(spec, q, k, v, *, g, scale=None, initial_state=None, output_final_state=False,
        output_uncertainty=False, cu_seqlens=None):  # fmt: skip
    """An independent GLA: dense, H = HV or grouped, one tensor expression per token."""
    if cu_seqlens is not None or output_uncertainty:
        raise NotImplementedError("packed sequences and uncertainty")
    groups = v.shape[2] // q.shape[2]
    q, k = (x.repeat_interleave(groups, 2) for x in (q, k))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    state = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    if initial_state is not None:
        state = initial_state.memory
    outputs = [torch.zeros_like(v[:, :0])]
    for t in range(v.shape[1]):
        state = g[:, t, :, :, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, scale * q[:, t])[:, None])
    return glazoo.Output(torch.cat(outputs, 1), glazoo.State(state))


def test_an_own_implementation() -> None:
    results = conformance.check("gla", op=gla, examples=4)
    assert {r.spec for r in results} == {"gla"}
    assert {r.id for r in results if r.verdict == "skipped"} == {
        "packed-is-separate",
        "engine-uncertainty-is-reference",
    }
    passed = {r.id for r in results if r.verdict == "passed"}
    assert {"engine-is-reference", "engine-gradients-are-reference"} <= passed
    assert {"hebbian-is-a-weighted-sum", "segmented-is-whole", "decay-is-a-gauge"} <= passed


def test_an_own_implementation_that_forgets_its_scale() -> None:
    def op(*args, scale=None, **options):
        return gla(*args, scale=1.0, **options)

    statement = ["scale-multiplies-the-query"]
    with pytest.raises(conformance.ConformanceError, match="gla: 1 statements do not hold") as e:
        conformance.check("gla", op=op, statements=statement)
    assert "replay('scale-multiplies-the-query'" in str(e.value)
    assert [r.verdict for r in e.value.results] == ["failed"]
    assert isinstance(e.value, AssertionError)


def test_float32_kernels() -> None:
    def op(*args, **options):
        return glazoo.api.attention(*args, impl="reference", **options)

    results = conformance.check("gated_deltanet", op=op, dtype="float32", examples=2)
    assert {r.verdict for r in results if r.kind != "limit"} == {"passed"}


def test_nothing_checked_is_no_conformance() -> None:
    def op(*args, **options):
        raise NotImplementedError("anything")

    with pytest.raises(conformance.ConformanceError, match="nothing could be checked"):
        conformance.check("gla", op=op)


def test_the_documented_example_is_this_signature() -> None:
    """The example in the module's text runs, with a kernel in place of the reader's."""
    text = conformance.__doc__
    assert text is not None
    start, end = text.index("    def op("), text.index('    conformance.check("gla", op=op)')
    code = "\n".join(line[4:] for line in text[start:end].splitlines())

    def my_kernel(q, k, v, g, start):
        state = None if start is None else glazoo.State(start)
        y, last = gla(None, q, k, v, g=g, scale=1.0, initial_state=state)
        return y, last.memory

    names = {"glazoo": glazoo, "my_kernel": my_kernel}
    exec(code, names)
    results = conformance.check("gla", op=names["op"], examples=2)
    assert passed(results)
