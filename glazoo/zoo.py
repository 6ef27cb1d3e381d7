"""Finding and loading specs."""

from __future__ import annotations

import difflib
import functools
import tomllib
from importlib import resources
from pathlib import Path

from pydantic import ValidationError

from glazoo.spec import FORMS, Spec, SpecError, metaplasticize

__all__ = ["completions", "load", "names", "schema"]

_PREFIX = "metaplastic_"


@functools.cache
def names() -> tuple[str, ...]:
    """Return the names of the shipped variants, in alphabetical order."""
    folder = resources.files("glazoo.specs")
    return tuple(
        sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))
    )


def completions(incomplete: str) -> list[str]:
    """Return the names that start so, for shells; of metaplastic forms the default ones, and only
    where their prefix is there already."""
    if not incomplete.startswith(_PREFIX):
        return [n for n in names() if n.startswith(incomplete)]
    source = incomplete.removeprefix(_PREFIX)
    found = (n for n in names() if n.startswith(source) and not _shipped(n).metaplastic)
    return [_PREFIX + n for n in found]


def load(name_or_path: str | Path | Spec) -> Spec:
    """Return a spec by its name or from a TOML file.

    Args:
        name_or_path: a shipped variant's name or alias; `metaplastic_<name>` for the metaplastic
            counterpart of a shipped one, and `_isotropic`, `_full`, `_rotated`, `_diffuse` after
            that for its other forms; the path of a TOML file (a `Path`, or a string that ends
            in `.toml`); a `Spec` is given back as it is.

    Returns:
        The validated spec.

    Raises:
        SpecError: unknown name (the nearest one is suggested), missing or unreadable file, misspelt
            key, or values that contradict each other.
    """
    if isinstance(name_or_path, Spec):
        return name_or_path
    if isinstance(name_or_path, Path) or name_or_path.endswith(".toml"):
        return _read(Path(name_or_path))
    return _shipped(name_or_path)


@functools.cache
def _aliases() -> dict[str, str]:
    """Return the names of shipped variants by their aliases."""
    return {alias: name for name in names() for alias in _shipped(name).aliases}


@functools.cache
def _shipped(name: str) -> Spec:
    if name in names():
        return _parse(
            (resources.files("glazoo.specs") / f"{name}.toml").read_text("utf-8"), f"{name}.toml"
        )
    source, aliases = name.removeprefix(_PREFIX), _aliases()
    if name in aliases:
        return _shipped(aliases[name])
    form: dict[str, str] = {}
    while source not in names() and source not in aliases:
        source, _, last = source.rpartition("_")
        if last not in FORMS or FORMS[last] in form:
            break
        form[FORMS[last]] = last
    else:
        if name.startswith(_PREFIX):
            return metaplasticize(_shipped(source), **form)  # type: ignore[arg-type]
    known = [*names(), *aliases, *(_PREFIX + n for n in names() if not _shipped(n).metaplastic)]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names())}"
    raise SpecError(
        f"there is no variant {name!r}; {hint} (a spec file is given by a path that ends in .toml)"
    )


def _read(path: Path) -> Spec:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not UTF-8 text"
        raise SpecError(f"cannot read the spec file {path}: {reason}") from e
    return _parse(text, str(path))


def _parse(text: str, where: str) -> Spec:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise SpecError(f"{where}: not a TOML file: {e}") from e
    try:
        return Spec.model_validate(data)
    except ValidationError as e:
        raise SpecError(f"{where}: " + "; ".join(_explain(err) for err in e.errors())) from e


def _explain(error: object) -> str:
    """Turns one validation error into a line that names the key, what came, and what is
    accepted."""
    assert isinstance(error, dict)
    loc = [str(p) for p in error["loc"]]
    where = ".".join(loc) or "spec"
    if error["type"] == "extra_forbidden":
        model: object = Spec
        for part in loc[:-1]:
            model = _field_model(model, part)
        fields = list(getattr(model, "model_fields", {}))
        near = difflib.get_close_matches(loc[-1], fields, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"accepted are {', '.join(fields)}"
        return f"unknown key {where}; {hint}"
    if error["type"] == "missing":
        return f"{where} is missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    value = error.get("input")
    shown = f", got {value!r}" if isinstance(value, str | int | float | bool) else ""
    return f"{where}: {message}{shown}"


def _field_model(model: object, field: str) -> object:
    """Return the model class behind a field of a model, through optional types."""
    info = getattr(model, "model_fields", {}).get(field)
    annotation = getattr(info, "annotation", None)
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if hasattr(candidate, "model_fields"):
            return candidate
    return object


def schema() -> dict[str, object]:
    """Return the JSON Schema of a spec file."""
    return Spec.model_json_schema()
