"""The specs that the catalogue runs over: every variant and its metaplastic forms."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glazoo.spec import Erase, Gate, Spec, SpecError, Steps, metaplasticize
from glazoo.theory.catalogue.axes import changed
from glazoo.zoo import load, names

__all__ = ["Form", "forms"]


@dataclass(frozen=True, slots=True)
class Form:
    """A spec with a label for tables and a Python expression for snippets."""

    label: str
    expression: str
    spec: Spec


def forms(
    which: Sequence[str | Path | Spec] | None = None, *, metaplastic: bool = True
) -> tuple[Form, ...]:
    """Return variants and, for those that have them, their metaplastic forms: of all of them those
    with an importance over keys, with both gate shapes and every gain; of one source of each kind,
    the plainest, those of every precision, basis and forgetting, too.

    Sources that decay are of one kind if both or neither subtract a prediction, and their decays
    have one shape.

    Args:
        which: names, paths of spec files, or specs; default: all that are shipped.
        metaplastic: whether to give the metaplastic forms.

    Returns:
        One form per spec.
    """
    items = names() if which is None else which
    given = [(item, load(item)) for item in items]
    plainest: dict[Any, Spec] = {}
    for _, spec in sorted(given, key=lambda x: _peculiarities(x[1])):
        if spec.decay.shape != "none" and spec.posterior.gain == "first_order":
            plainest.setdefault((spec.hebbian, spec.decay.shape), spec)
    out: list[Form] = []
    for item, spec in given:
        expression = _literal(spec) if isinstance(item, Spec) else f"glazoo.load({str(item)!r})"
        source = Form(spec.name, expression, spec)
        out.append(source)
        if metaplastic and not spec.metaplastic:
            out += _narrow(source)
            if spec in plainest.values():
                out += _wide(source)
    return tuple(out)


def _peculiarities(spec: Spec) -> tuple[bool, int]:
    """Count what sets a source apart from others of its kind."""
    read = spec.read
    return spec.metaplastic, sum(
        (
            spec.erase != Erase(),
            spec.steps != Steps(),
            read.when != "post",
            read.normalizer != "none",
            spec.key != "operand",
            spec.decay.source == "fixed",
            spec.posterior.correction == "diagonal",
            spec.posterior.gain != "first_order",
        )
    )


def _literal(spec: Spec) -> str:
    return f"glazoo.Spec.model_validate_json({spec.model_dump_json(exclude_defaults=True)!r})"


def _gains(spec: Spec) -> tuple[Any, ...]:
    """Return the gains of a source's metaplastic forms; None is the default one."""
    default = metaplasticize(spec).posterior
    return (None, "first_order") if default.beta == "rate" else (None,)


def _made(source: Form, words: Sequence[str], **options: Any) -> Form:
    spec = metaplasticize(source.spec, **options)
    gain = options["gain"]
    words = [*words, *([] if gain is None else [gain.replace("_", " ")])]
    given = ", ".join(f"{name}={value!r}" for name, value in options.items() if value is not None)
    return Form(
        f"{spec.name}[{', '.join(words)}]" if words else spec.name,
        f"glazoo.metaplasticize({source.expression}, {given})",
        spec,
    )


def _narrow(source: Form) -> Iterator[Form]:
    # A flow has one strength for all value channels.
    gates = ("head",) if source.spec.posterior.gain == "flow" else ("head", "value")
    for gate, gain in itertools.product(gates, _gains(source.spec)):
        yield _made(source, [gate], gate=gate, gain=gain)


_OVER = (("diagonal", "own"), ("diagonal", "rotated"), ("isotropic", "own"), ("full", "own"))


def _wide(source: Form) -> Iterator[Form]:
    """Yield the forms of every precision, basis and forgetting that a source has."""
    for over, forgetting in itertools.product(_OVER, ("temper", "diffuse")):
        diffuse = forgetting == "diffuse"
        if over == _OVER[0] and not diffuse:
            continue
        options = {"precision": over[0], "basis": over[1], "forgetting": forgetting}
        # A matrix is kept in other ways for other gains.
        for gain in _gains(source.spec)[: 2 if over[0] == "full" else 1]:
            try:
                yield _made(source, (), gain=gain, **options)
            except SpecError:
                break
    yield from _others(source)


def _others(source: Form) -> Iterator[Form]:
    """Yield forms that forget in ways which do not keep their source: by noise of their own, and
    with the prior."""
    head = Gate(shape="head", parameterization="softplus")
    noise = {"forgetting": "diffuse", "noise": head.model_copy(update={"shape": "key"})}
    own: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("noise", {}, noise),
        ("noise", {"basis": "rotated"}, noise),
        ("noise", {"precision": "isotropic"}, noise | {"noise": head}),
        ("noise", {"precision": "full"}, noise),
    ]
    if source.spec.decay.shape == "head":
        discount = {"forgetting": "discount"}
        own += [("discount", options, discount) for _, options, _ in own[:3]]
    for label, options, update in own:
        try:
            made = metaplasticize(source.spec, **options)
            assert made.importance is not None
            importance = made.importance.model_copy(update=update)
            spec = changed(made, importance=importance)
        except ValueError:
            continue
        yield Form(f"{spec.name}[{label}]", _literal(spec), spec)
