"""Conformance of a spec file, or of somebody's own implementation, with the theory.

Three lines check a spec file on this installation's engines:

    from glazoo.theory import conformance

    conformance.check("my_variant.toml")

and three check an implementation of a variant against everything that the theory says of it:

    def op(spec, q, k, v, *, g, scale=None, initial_state=None, output_final_state=False,
           output_uncertainty=False, cu_seqlens=None):
        if cu_seqlens is not None or output_uncertainty:
            raise NotImplementedError("packed sequences and uncertainty")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        start = None if initial_state is None else initial_state.memory
        y, last = my_kernel(scale * q, k, v, g, start)
        return glazoo.Output(y, glazoo.State(last))

    conformance.check("gla", op=op)

The implementation has the signature of `glazoo.attention`, less `impl`; it raises
NotImplementedError for what it does not do, which is then left out and listed. Its dtype is up to
the caller: `dtype="float32"` for kernels that know no float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from glazoo.spec import Spec
from glazoo.theory.entry import Op
from glazoo.theory.forms import forms
from glazoo.theory.results import Result, failures, passed
from glazoo.theory.verify import run

__all__ = ["ConformanceError", "check"]


class ConformanceError(AssertionError):
    """Statements that do not hold; the message has a runnable program for each."""

    def __init__(self, message: str, results: Sequence[Result]) -> None:
        super().__init__(message)
        self.results = tuple(results)


def check(
    spec: str | Path | Spec,
    *,
    op: Op | None = None,
    impl: str | None = None,
    statements: Sequence[str] | None = None,
    examples: int = 8,
    dtype: str = "float64",
    seed: int = 0,
) -> list[Result]:
    """Checks everything that the theory claims of a spec; works in any test framework.

        def test_my_variant():
            conformance.check("my_variant.toml")

    Args:
        spec: name, path of a spec file, or a spec. Of a frozen one, the metaplastic forms are
            checked too, unless `op` is given.
        op: an implementation of this spec; default: the engines of this installation.
        impl: one engine; default: all.
        statements: identifiers of the statements to check; default: all that apply.
        examples: instances per statement.
        dtype: "float64" or "float32".
        seed: decides all instances.

    Returns:
        The results; those with verdict "skipped" say what the implementation does not do.

    Raises:
        ConformanceError: a statement does not hold, or none could be checked.
        ValueError: an option is not accepted.
        SpecError: the spec is not valid.
    """
    form = forms([spec])[0]
    results = run(
        [*(statements or ()), spec],
        examples=examples,
        dtype=dtype,
        impl=impl,
        seed=seed,
        op=op,
        only_source=op is not None,
    )
    if not passed(results):
        texts = failures(results) or ["nothing could be checked"]
        count = sum(r.verdict == "failed" for r in results)
        raise ConformanceError(
            f"{form.label}: {count} statements do not hold\n\n" + "\n".join(texts), results
        )
    return results
