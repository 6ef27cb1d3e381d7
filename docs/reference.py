"""The pages that are made: variants, statements, commands, Python, the language of specs."""

from __future__ import annotations

import ast
import functools
import html
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typeset
from pydantic import BaseModel

import glazoo
from glazoo.program import Program
from glazoo.spec import FORMS, Posterior, Spec, SpecError
from glazoo.theory import ENTRIES
from glazoo.theory.entry import Entry, Kind

__all__ = ["TABLES", "api", "commands", "fields", "statements", "variant", "variants"]

_KINDS = {
    Kind.EXACT: "Identities",
    Kind.LIMIT: "Limits",
    Kind.INEQUALITY: "Inequalities",
    Kind.INVARIANCE: "Invariances",
}


def variants(picture: str) -> str:
    """Return the catalogue of variants with the map of the field."""
    rows = []
    for name in glazoo.names():
        program = _program(name)
        spec, p = program.spec, program.spec.posterior
        axes = p.precision, p.correction, p.gain.replace("_", " ")
        decay, state = _gate(spec.decay), f"{_floats(program):,}"
        rows.append(
            (
                f"[{_cell(spec.title)}]({name}.md)",
                f"`{name}`",
                *axes,
                decay,
                str(program.kernel),
                state,
            )
        )
    head = "variant", "name", "precision", "correction", "gain", "decay", "kernel class", "state"
    return f"""---
hide: [toc]
---

# Variants

{len(rows)} variants stand on a few axes; the picture has them where their specs say. `glazoo list`
prints the same table, `glazoo show NAME` one of them. Every variant with frozen precision has
metaplastic forms further to the right, which are on its page.

<div class="picture">{picture}</div>

- **Precision**: {_doc(Posterior, "precision")}
- **Correction**: {_doc(Posterior, "correction")}
- **Gain**: {_doc(Posterior, "gain")}

State in numbers per value head, at the head sizes of each spec.

{_table(*head, rows=rows)}
"""


def variant(name: str) -> str:
    """Return the page of one variant."""
    program = _program(name)
    spec, imp = program.spec, program.spec.importance
    p, sizes = spec.posterior, spec.layer.heads
    source = (resources.files("glazoo.specs") / f"{name}.toml").read_text("utf-8")
    axes = [
        ("precision", p.precision, _doc(Posterior, "precision")),
        ("correction", p.correction, _doc(Posterior, "correction")),
        ("gain", p.gain.replace("_", " "), _doc(Posterior, "gain")),
        ("decay", _gate(spec.decay), _doc(Spec, "decay")),
        ("write gate", _gate(spec.write), _doc(Spec, "write")),
    ]
    if imp is not None:
        kind = type(imp)
        axes.append(("beta", p.beta, _doc(Posterior, "beta")))
        axes.append(("importance gate", _gate(imp.gate), _doc(kind, "gate")))
        axes.append(("forgetting", imp.forgetting, _doc(kind, "forgetting")))
        axes.append(("basis", imp.basis, _doc(kind, "basis")))
    operands = [
        (
            f"`{o.name}`" + ("" if o.required else " (optional)"),
            f"`{o.shown()}`",
            o.domain,
            o.meaning,
        )
        for o in program.operands
    ]
    state = [
        (x.name, typeset.mathml(typeset.formula(x.symbol)), f"`[{', '.join(x.shape)}]`", x.meaning)
        for x in program.state
    ]
    K, V, floats = sizes.key_size, sizes.value_size, _floats(program)
    operations, by_entry = program.flops_per_token(K, V), typeset.mathml(r"\odot")
    return f"""# {spec.title}

{spec.summary}.

{_reference(spec)}

```console
$ glazoo show {name}
```

<p><a href="../explore.html?memory={name}">Watch it remember</a>, in this browser.</p>

## Recurrence

Per head and token. Vectors are columns; {by_entry}, fractions and squares of
vectors act entry by entry.
{_formulas(program)}

## Where it stands

{_table("axis", "here", "what it says", rows=axes)}

## Operands

What `glazoo.attention("{name}", ...)` takes.

{_table("operand", "shape", "values", "meaning", rows=operands)}

## State and cost

Kernel class `{program.kernel}`. At K = {K} and V = {V}, the spec's own sizes, per value head:
{floats:,} numbers ({4 * floats:,} bytes in float32) and {operations:,} operations a token.

{_table("state", "symbol", "shape", "meaning", rows=state)}

## Elsewhere

{_elsewhere(spec)}

## Metaplastic forms

{_forms(spec)}

## Statements

{_claims(spec)}

## Spec

```toml
{source.strip()}
```
"""


def _formulas(program: Program) -> str:
    block = typeset.recurrence(program.recurrence)
    return f'\n<div class="formulas">{block}</div>\n'


def _reference(spec: Spec) -> str:
    r = spec.reference
    text = r.paper
    if r.arxiv:
        text += f", [arXiv:{r.arxiv}](https://arxiv.org/abs/{r.arxiv})"
    return text + (f" ({_plain(r.equation)})" if r.equation else "") + "."


def _elsewhere(spec: Spec) -> str:
    rows = [f"- Also called {', '.join(f'`{x}`' for x in spec.aliases)}."] if spec.aliases else []
    packages = {
        "fla": "flash-linear-attention",
        "transformers": "transformers",
        "pth": "",
        "bin": "",
    }
    found: dict[str, list[str]] = {}
    for kind, table in _kinds():
        package, _, family = kind.partition(".")
        if table.get("spec") == spec.name and packages[package]:
            found.setdefault(packages[package], []).append(f"`{family}`")
    rows += [f"- In {package}, `model_type` {', '.join(x)}." for package, x in found.items()]
    calls = [f"`{x}`" for x, call in _calls().items() if call.spec == spec.name]
    if calls:
        which = ", ".join(calls)
        rows.append(f"- Models that call {which} compute it, and [convert](../convert.md).")
    return "\n".join(rows) or "No other package's model of it is known to the converters."


@functools.cache
def _kinds() -> tuple[tuple[str, dict[str, Any]], ...]:
    from glazoo.converters.exchange.maps import KINDS

    return tuple((kind, entry.table) for kind, entry in KINDS.items())


@functools.cache
def _calls() -> dict[str, Any]:
    from glazoo.families.calls import CALLS

    return dict(CALLS)


def _call_table() -> str:
    """Return the functions by which mixers are known, with the specs that they compute."""
    found: dict[str, list[str]] = {}
    for name, call in _calls().items():
        found.setdefault(call.spec, []).append(f"`{name}`")
    rows = ((", ".join(names), f"[{spec}](variants/{spec}.md)") for spec, names in found.items())
    return _table("function", "spec", rows=rows)


def _import_table() -> str:
    """Return the checkpoints of other packages that are imported."""
    sources = {"fla": "flash-linear-attention", "pth": "RWKV's `.pth`", "bin": "rwkv.cpp's `.bin`"}
    rows = []
    for kind, table in _kinds():
        package, _, family = kind.partition(".")
        if package in sources:
            spec = table["spec"]
            rows.append((sources[package], f"`{family}`", f"[{spec}](variants/{spec}.md)"))
    return _table("saved by", "model", "spec", rows=rows)


def _refused_table() -> str:
    """Return the models of other packages that nothing here computes."""
    from glazoo.converters.exchange.maps import REFUSED

    return _table("model", "why not", rows=((f"`{k}`", _plain(why)) for k, why in REFUSED.items()))


TABLES = {"calls": _call_table, "imports": _import_table, "refused": _refused_table}
"""Tables that pages by hand name."""


def _forms(spec: Spec) -> str:
    if spec.metaplastic:
        return "It carries an importance itself, so that there is nothing to convert."
    text = [
        "Each is this variant at `b = 0`, and takes an importance gate `b` as well "
        "([what importance does](../theory/index.md))."
    ]
    for form in ("", *FORMS):
        name = "_".join(x for x in ("metaplastic", spec.name, form) if x)
        try:
            program = glazoo.lower(
                glazoo.metaplasticize(spec, **({FORMS[form]: form} if form else {}))
            )
        except SpecError as e:
            text.append(f"- `{name}` is refused: {_plain(str(e))}.")
            continue
        p, imp = program.spec.posterior, program.spec.importance
        assert imp is not None
        what = f"{p.gain.replace('_', ' ')} gain, forgetting by {imp.forgetting}, "
        what += f"class {program.kernel}, {_floats(program):,} numbers"
        text.append(f'??? note "`{program.spec.name}`: {what}"\n\n    {_formulas(program).strip()}')
    return "\n\n".join(text)


def _claims(spec: Spec) -> str:
    claimed = [e for e in ENTRIES if e.applies(spec)]
    links = ", ".join(f"[{e.id}](../theory/statements.md#{_anchor(e)})" for e in claimed)
    return f"""`glazoo verify` checks {len(claimed)} statements of it.

??? note "All {len(claimed)}"

    {links}"""


def statements() -> str:
    """Return the catalogue of what `glazoo verify` checks."""
    text = [
        f"""# Every statement

{len(ENTRIES)} statements. `glazoo verify` checks each on random instances of every variant for
which it is claimed, by the axes of its spec. Both sides are computed in float64 and compared by a
budget that follows from the number of roundings; of a limit, the exponent is compared with which
its error falls. [What they say together](index.md)."""
    ]
    for kind, title in _KINDS.items():
        entries = [e for e in ENTRIES if e.kind is kind]
        text.append(f"## {title}\n\n{len(entries)} statements.")
        text += map(_statement, entries)
    return "\n\n".join(text) + "\n"


def _statement(e: Entry) -> str:
    specs = [name for name in glazoo.names() if e.applies(glazoo.load(name))]
    forms = sum(e.applies(form) for form in _counterparts())
    if len(specs) == len(glazoo.names()):
        named = "all variants"
    else:
        named = ", ".join(f"[{name}](../variants/{name}.md)" for name in specs)
    claimed = [named] if named else []
    if forms:
        claimed.append(f"{forms} of {len(_counterparts())} metaplastic forms")
    condition = "" if e.condition == "-" else f"\n| if | {_cell(e.condition)} |"
    rate = "" if e.rate is None else f"\n| error falls as | the power {e.rate:g} |"
    return f"""### {e.id}

<pre class="statement"><code>{html.escape(e.statement)}</code></pre>

| | |
| --- | --- |
| left | {_cell(e.left)} |
| right | {_cell(e.right)} |{condition}{rate}
| source | {_arxiv(_cell(e.source))} |
| claimed for | {"; ".join(claimed) or "what an engine or a spec of your own brings"} |"""


def _anchor(e: Entry) -> str:
    """Return the identifier of a statement's heading."""
    return e.id.replace("'", "")


@functools.cache
def _counterparts() -> tuple[Spec, ...]:
    """Return the metaplastic form of every variant that has one."""
    return tuple(
        glazoo.metaplasticize(spec)
        for spec in map(glazoo.load, glazoo.names())
        if not spec.metaplastic
    )


def _arxiv(text: str) -> str:
    return re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def commands() -> str:
    """Return the reference of the command line, from the program that reads it."""
    import typer
    from typer import Context

    from glazoo.cli import app

    group: Any = typer.main.get_command(app)
    top = Context(group, info_name="glazoo")
    text = [
        "# Command line",
        "`glazoo COMMAND --help` prints the same; `glazoo --install-completion` makes bash, zsh or "
        "fish complete commands, options and variants.",
    ]
    for name in group.list_commands(top):
        _, command, _ = group.resolve_command(top, [name])
        context = Context(command, info_name=name, parent=top)
        rows = []
        for param in command.get_params(context):
            record = param.get_help_record(context)
            if record is not None:
                rows.append((f"`{record[0]}`", _plain(record[1])))
        about = "\n\n".join(_plain(" ".join(x.split())) for x in (command.help or "").split("\n\n"))
        usage = " ".join(command.get_usage(context).removeprefix("Usage: ").split())
        text.append(
            f"## glazoo {name}\n\n{about}\n\n```text\n{usage}\n```\n\n"
            + _table("what", "meaning", rows=rows)
        )
    return "\n\n".join(text) + "\n"


_API = {
    "glazoo": "",
    "glazoo.layers": "Layers. One spec, one `GatedLinearAttention`.",
    "glazoo.models": "Models in transformers' conventions; needs the extra `models`.",
    "glazoo.converters": "Folders on disk; needs the extra `models`.",
    "glazoo.theory": "Statements that a machine checks.",
    "glazoo.theory.conformance": "Your own spec or kernel; needs the extra `verify`.",
}


def api() -> str:
    """Return the page of the Python interface; the tool fills in signatures and docstrings."""
    text = ["# Python"]
    for module, about in _API.items():
        text.append(f"## {module}\n\n{about}")
        text += (f"::: {name}" for name in _public(module))
    return "\n\n".join(text) + "\n"


def _public(module: str) -> Iterator[str]:
    """Yield where what a module offers has its docstring, without importing what it needs."""
    tree = _tree(module)
    homes = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                # A wrapper offered under the name of what it wraps: that has the docstring.
                if name.asname and name.asname in _functions(node.module):
                    homes[name.asname] = node.module
    for part in tree.body:
        if isinstance(part, ast.Assign) and ast.unparse(part.targets[0]) == "__all__":
            for offered in ast.literal_eval(part.value):
                yield f"{homes.get(offered, module)}.{offered}"


def _functions(module: str) -> set[str]:
    return {x.name for x in _tree(module).body if isinstance(x, ast.FunctionDef)}


def _tree(module: str) -> ast.Module:
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return ast.parse(Path(spec.origin).read_text("utf-8"))


def fields() -> str:
    """Return the language of specs, from its model."""
    text = [
        """# Spec files

A variant is one TOML file ([how to write one](write.md)). These are its tables and keys;
`glazoo schema` prints them as JSON Schema. A misspelt key or a contradiction is an error that says
what is accepted."""
    ]
    done: set[type] = set()
    waiting: list[tuple[str, type[BaseModel]]] = [("", Spec)]
    while waiting:
        path, model = waiting.pop(0)
        if model in done:
            continue
        done.add(model)
        about = " ".join((model.__doc__ or "").split("\n\n")[0].split())
        rows = []
        for name, info in model.model_fields.items():
            inner = _models(info.annotation)
            waiting += [(f"{path}.{name}".strip("."), x) for x in inner]
            of = ", ".join(f"[{x.__name__}](#{x.__name__.lower()})" for x in inner)
            default = (
                "required"
                if info.is_required()
                else _value(info.get_default(call_default_factory=True))
            )
            rows.append(
                (
                    f"`{name}`",
                    of or _accepted(info.annotation),
                    default,
                    _plain(info.description or ""),
                )
            )
        title = model.__name__
        where = f"`[{path}]`. " if path else ""
        text.append(
            f"## {title}\n\n{where}{_plain(about)}\n\n"
            + _table("key", "values", "default", "meaning", rows=rows)
        )
    return "\n\n".join(text) + "\n"


def _models(annotation: Any) -> list[type[BaseModel]]:
    candidates = (annotation, *getattr(annotation, "__args__", ()))
    return [x for x in candidates if isinstance(x, type) and issubclass(x, BaseModel)]


def _accepted(annotation: Any) -> str:
    if isinstance(annotation, type):
        return annotation.__name__
    parts = []
    for x in getattr(annotation, "__args__", ()):
        parts.append(_accepted(x) if isinstance(x, type) or hasattr(x, "__args__") else f"`{x}`")
    return ", ".join(x for x in parts if x not in ("NoneType", "`Ellipsis`"))


def _value(value: Any) -> str:
    if value is None or isinstance(value, BaseModel) or value == ():
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _program(name: str) -> Program:
    return glazoo.lower(glazoo.load(name))


def _floats(program: Program) -> int:
    sizes = program.spec.layer.heads
    return program.state_floats(sizes.key_size, sizes.value_size)


def _gate(gate: Any) -> str:
    return "none" if gate.shape == "none" else f"per {gate.shape}, {gate.source}"


def _doc(model: type[BaseModel], name: str) -> str:
    return _plain(model.model_fields[name].description or "")


def _plain(text: str) -> str:
    """Return text that Markdown leaves as it is."""
    return re.sub(r"([\\*_\[\]|`])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _cell(text: str) -> str:
    return _plain(text)


def _table(*head: str, rows: Iterable[Sequence[str]]) -> str:
    def lines() -> Iterator[str]:
        yield "| " + " | ".join(head) + " |"
        yield "| " + " | ".join("---" for _ in head) + " |"
        for row in rows:
            yield "| " + " | ".join(row) + " |"

    return "\n".join(lines())
