"""The specs that the catalogue runs over: every variant and its metaplastic forms."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from glazoo.spec import Spec, metaplasticize
from glazoo.zoo import load, names

__all__ = ["Form", "forms"]


@dataclass(frozen=True, slots=True)
class Form:
    """A spec with a label for tables and a Python expression for snippets."""

    label: str
    expression: str
    spec: Spec


_GATES: tuple[Literal["head", "value"], ...] = ("head", "value")


def forms(
    which: Sequence[str | Path | Spec] | None = None, *, metaplastic: bool = True
) -> tuple[Form, ...]:
    """Return variants and, for those that have them, their metaplastic forms with both gate shapes
    and every gain.

    Args:
        which: names, paths of spec files, or specs; default: all that are shipped.
        metaplastic: whether to give the metaplastic forms.

    Returns:
        One form per spec.
    """
    out: list[Form] = []
    for item in names() if which is None else which:
        spec = load(item)
        if isinstance(item, Spec):
            expression = f"glazoo.Spec.model_validate_json({spec.model_dump_json()!r})"
        else:
            expression = f"glazoo.load({str(item)!r})"
        out.append(Form(spec.name, expression, spec))
        if spec.metaplastic or not metaplastic:
            continue
        default = metaplasticize(spec).posterior
        gains: list[Any] = [default.gain] + ["first_order"] * (default.beta == "rate")
        gains = [None] if default.gain == "flow" else gains
        gates = _GATES[:1] if default.gain == "flow" else _GATES
        for gate, gain in itertools.product(gates, gains):
            usual = gain in (None, default.gain)
            label = gate if usual else f"{gate}, {gain.replace('_', ' ')}"
            out.append(
                Form(
                    f"metaplastic_{spec.name}[{label}]",
                    f"glazoo.metaplasticize({expression}, gate={gate!r}, gain={gain!r})",
                    metaplasticize(spec, gate=gate, gain=gain),
                )
            )
    return tuple(out)
