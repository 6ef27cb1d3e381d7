"""A page on which a browser runs programs: what memories recall of a task, token by token.

The page holds the recurrence that `glazoo show` prints, as data, and a small interpreter of its
notation; it needs no server.
"""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any

from glazoo.compare.probe import Gates, key_scale_matters
from glazoo.program import Operand, Program, lower
from glazoo.spec import FORMS, Spec, SpecError, metaplasticize
from glazoo.zoo import load, names

__all__ = ["SIZES", "data", "page", "script"]

SIZES = {"key": 8, "value": 8}
"""Channels of a head's keys, before feature maps, and of its values: what a picture can show."""

_GATES = {f.name for f in fields(Gates)}


def script(which: Sequence[str | Path | Spec] | None = None, *, pages: str | None = None) -> str:
    """Return the page's program: what it draws is where `<div id="glazoo-explore">` stands.

    Args:
        which: names, paths of spec files, or specs, each with its metaplastic forms; default: all
            that are shipped.
        pages: the address of a variant's own page, with `{}` for its name; default: none.

    Returns:
        JavaScript that needs nothing else, for a file or a `<script>` element.

    Raises:
        SpecError: a name or a file is no spec, or two specs have one name.
    """
    folder = resources.files("glazoo.explore")
    code = [(folder / f"{name}.js").read_text("utf-8") for name in ("recurrence", "task", "page")]
    style = (folder / "page.css").read_text("utf-8")
    given = {"DATA": data(which, pages=pages), "STYLE": style}
    # A script ends at the first "</script", also at one inside of a string.
    known = (f"const {k} = {json.dumps(v)};".replace("<", r"\u003c") for k, v in given.items())
    return "\n".join(["(() => {", '"use strict";', *known, *code, "})();", ""])


def page(which: Sequence[str | Path | Spec] | None = None) -> str:
    """Return a page of its own in HTML, with nothing outside of it.

    Args:
        which: as `script` takes them.

    Returns:
        The text of an HTML file.

    Raises:
        SpecError: a name or a file is no spec, or two specs have one name.
    """
    text = (resources.files("glazoo.explore") / "page.html").read_text("utf-8")
    return text.replace("{{ script }}", script(which))


def data(
    which: Sequence[str | Path | Spec] | None = None, *, pages: str | None = None
) -> dict[str, Any]:
    """Return what the page knows, as plain data: sizes, presets, and every variant's programs.

    Args:
        which: as `script` takes them.
        pages: as `script` takes it.

    Raises:
        SpecError: a name or a file is no spec, or two specs have one name.
    """
    specs: dict[str, Spec] = {}
    for item in names() if which is None else which:
        spec = load(item)
        if specs.setdefault(spec.name, spec) != spec:
            raise SpecError(
                f"two different specs are named {spec.name!r}; give one of them another name"
            )
    titles = Counter(spec.title for spec in specs.values())
    variants = [
        {
            "name": spec.name,
            "title": spec.title if titles[spec.title] == 1 else f"{spec.title} ({spec.name})",
            "summary": spec.summary,
            "page": None if pages is None else pages.format(spec.name),
            "forms": [_program(label, lower(form)) for label, form in _forms(spec)],
        }
        for spec in specs.values()
    ]
    presets = (resources.files("glazoo.explore") / "presets.toml").read_text("utf-8")
    return {"sizes": SIZES, "variants": variants} | tomllib.loads(presets)


def _forms(spec: Spec) -> Iterator[tuple[str, Spec]]:
    """Yield a spec and those of its metaplastic forms that are other programs."""
    yield "as it is", spec
    if spec.metaplastic:
        return
    seen = set()
    options: dict[str, dict[str, Any]] = {"metaplastic": {}, "per synapse": {"gate": "value"}}
    for label, form in (options | {word: {option: word} for word, option in FORMS.items()}).items():
        try:
            made = metaplasticize(spec, **form)
        except SpecError:
            continue
        recurrence = lower(made).recurrence
        if recurrence not in seen:
            seen.add(recurrence)
            yield label, made


def _program(label: str, program: Program) -> dict[str, Any]:
    """Return what a browser needs to run a program with constant gates."""
    spec = program.spec
    tied = spec.key == "one_minus_decay"
    relative = spec.read.scale == "rsqrt_key"
    return {
        "label": label,
        "name": spec.name,
        "recurrence": program.recurrence,
        "operands": [_operand(o, spec) for o in program.operands],
        "state": [
            {
                "name": part.name,
                "symbol": part.symbol,
                "shape": part.shape[2:],
                "meaning": part.meaning,
                # Nothing counted is minus infinity as a logarithm, for which JSON has no number.
                "start": None if spec.log_evidence and part.name == "importance" else 0,
            }
            for part in program.state
        ],
        "scale": None if relative else spec.scale(1),
        "substeps": spec.substeps,
        "feature": "one_minus_decay" if tied else spec.layer.k.feature_map,
        "importance": spec.importance is not None,
        "own_scale": key_scale_matters(program),
    }


def _operand(operand: Operand, spec: Spec) -> dict[str, Any]:
    """Return where an operand stands in the recurrence and what it is, by its role."""
    dims, role = operand.shapes[-1], operand.role
    imp = spec.importance
    # A share of the precision matrix: the numbers that suit a prior are none.
    share = role == "prior" and imp is not None and imp.prior.shape == "relative"
    fill: str | float
    if role in ("key", "erase_key"):
        fill = "key"
    elif role in ("query", "value", "noise", "basis"):
        fill = role
    elif role == "decay" and spec.key == "one_minus_decay":
        fill = "lost_key"
    elif role in _GATES and not share:
        fill = role
    elif isinstance(operand.default, float):
        fill = operand.default
    else:
        # No bonus of the token just written, no lagged tap, no forgetting of importance; what is
        # solved is read as it is.
        fill = 1.0 if role in ("tap", "mix") else 0.0
    return {
        "name": operand.name,
        "symbol": "I_p" if role == "prior" else operand.symbol or operand.name,
        "index": "i" if "nT" in dims else "t" if "T" in dims else "",
        "size": dims[-1] if dims and dims[-1] in ("K", "V") else "",
        "fill": fill,
        "idle": operand.idle,
    }
