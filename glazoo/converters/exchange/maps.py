"""What the mixers of other packages call their options and tensors: `mixers.toml`, read.

One reader serves both, configurations in files and live mixers: they differ in where an option's
value is found.
"""

from __future__ import annotations

import json
import operator
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from torch import Tensor

from glazoo.errors import ConversionError

__all__ = [
    "KINDS",
    "MODELS",
    "REFUSED",
    "SILENT",
    "SPELLINGS",
    "Config",
    "Entry",
    "KeyMap",
    "Live",
    "Options",
    "entries",
    "read",
]

Table = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of theirs, as ours stacked along their first axis."""

    theirs: str
    """Key in their mixer's state dict."""
    ours: tuple[str, ...]
    """Keys in our layer's state dict, in the order of their rows."""
    groups: str | None = None
    """Stacked within every group of rows instead of as wholes: "key_heads" interleaves the rows per
    key head."""
    shape: tuple[int, ...] | None = None
    """Their shape where it is not ours; -1 as in `reshape`."""
    flat: bool = False
    """Whether theirs has the numbers of ours in any shape."""
    transposed: bool = False
    """Whether the last two axes of theirs are swapped."""
    map: str | None = None
    """Name of what makes ours of their numbers."""
    spare: bool = False
    """Whether it means nothing where our layer has no such tensor."""
    beside: str | None = None
    """Key of ours without which theirs has another name, that of the next entry of the same
    tensor."""
    optional: bool = False
    """Whether an option leaves it out."""


@dataclass(frozen=True, slots=True)
class KeyMap:
    """The map of one mixer class."""

    kind: str
    """Name of the map: package and family."""
    table: Table
    """Its options, sizes and model, as `mixers.toml` explains them."""
    entries: tuple[Entry, ...]
    """One entry per tensor. Tensors of entries that neither side has are left out; all others must
    be there."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to build our layer for one of their mixers."""

    sizes: dict[str, int]
    """hidden_size, num_heads, num_key_heads, head_k_dim, head_v_dim."""
    changes: dict[str, Any]
    """Values of the spec that differ, by dotted path."""
    values: dict[str, Any]
    """Values of the options, by their names."""


class Config:
    """Options in a configuration file, which remembers what was asked for.

    Args:
        raw: the file.
        within: name of the part of a file that `raw` is.
        defaults: defaults that replace those of the table.
        tensors: the checkpoint's, for what a configuration does not say.
    """

    says = " is"

    def __init__(
        self,
        raw: Mapping[str, Any],
        within: str = "",
        defaults: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.raw, self.where, self.defaults = raw, f"config.json: {within}", defaults or {}
        self.tensors = tensors or {}
        self.read: set[str] = set()

    def find(self, name: str, row: Table, default: Any) -> tuple[str, Any]:
        """Return an option's name and value."""
        name = row.get("file", name)
        self.read.add(name)
        value = self.raw.get(name, self.defaults.get(name))
        if value is None and "present" in row:
            value = row["present"] in self.tensors
        if value is None and "tensor" in row:
            value = self._measured(*row["tensor"].split())
        given = value is not None or name in self.raw
        return name, value if given else default

    def _measured(self, name: str, axis: str | None = None) -> int | None:
        """Return the size of a tensor along an axis, or the number of layers that have it."""
        if axis is None:
            count = 0
            while name.replace("N", str(count)) in self.tensors:
                count += 1
            return count
        found = self.tensors.get(name)
        return int(found.shape[int(axis)]) if found is not None and found.ndim > int(axis) else None

    def accepted(self, row: Table) -> list[Any] | None:
        """Return the only values that an option may have, or None."""
        return [row["fixed"]] if "fixed" in row else row.get("accepted")

    def check_all_read(self, ignored: str = "") -> None:
        """Refuses options that nobody asked for, but for those that are off."""
        known = self.read.union(ignored.split())
        for name, value in self.raw.items():
            if name not in known and value is not None and value is not False:
                raise ConversionError(
                    f"{self.where}{name} is {value!r}, and what it asks for is unknown; accepted "
                    "are the fields of flash-linear-attention's own configuration"
                )


class Live:
    """Options of a live mixer."""

    says = ": got"

    def __init__(self, mixer: Any) -> None:
        self.mixer, self.where = mixer, f"{type(mixer).__name__}."

    def find(self, name: str, row: Table, default: Any) -> tuple[str, Any]:
        """Return an attribute's name and value, of functions and modules the name."""
        paths = row.get("live", f"{name}|").split("|")
        for path in filter(None, paths):
            try:
                value = operator.attrgetter(path)(self.mixer)
            except AttributeError:
                continue
            if value is None or isinstance(value, bool | int | float | str | tuple | list):
                return path, value
            return path, getattr(value, "__name__", type(value).__name__).lower()
        if paths[-1]:
            raise ConversionError(f"{self.where}{paths[0]} is missing")
        return name, default

    def accepted(self, row: Table) -> list[Any] | None:
        """Return the only values that an option may have, or None."""
        return row.get("accepted")


def _word(value: object) -> str:
    return value if isinstance(value, str) else str(value).lower()


def _among(value: object, accepted: list[Any]) -> bool:
    # Nothing is as good as off.
    return value in accepted or (value is None and not any(accepted))


def _default(row: Table) -> Any:
    if "default" in row:
        return row["default"]
    return row.get("fixed", next(iter(row.get("accepted", ())), None))


def _size(rows: str | list[str], at: Mapping[str, Any], source: Config | Live) -> int:
    """Return a product of options, of several the first whose options are all given, or an
    attribute."""
    first, text = (rows, rows) if isinstance(rows, str) else rows
    if first.startswith(".") and isinstance(source, Live):
        return int(source.find("", {"live": first[1:]}, None)[1])
    for product in text.split(" or "):
        name, *rest = product.split()
        if any(at[factor] is None for factor in (name, *rest[1::2])):
            continue
        total, parts, multiples = float(at[name]), 1.0, "whole numbers"
        for sign, other in zip(rest[::2], rest[1::2], strict=True):
            if sign == "*":
                total *= at[other]
            else:
                parts, multiples = float(at[other]), f"multiples of {other} = {at[other]}"
        if abs(total - round(total)) > 1e-6 or parts < 1 or round(total) % parts:
            raise ConversionError(
                f"{source.where}{name} gives {total:g} channels, accepted are {multiples}"
            )
        return round(round(total) / parts)
    raise ConversionError(f"{source.where}{text} is needed")


def read(table: Table, source: Config | Live) -> Options:
    """Reads the options of a mixer or a model.

    Args:
        table: a map's table, or another with its `fields`, `sizes` and `set`.
        source: where their values are.

    Returns:
        What they are here.

    Raises:
        ConversionError: an option has a value that nothing here has.
    """
    values: dict[str, Any] = {}
    changes = dict(table.get("set", {}))
    fields: dict[str, Table] = table["fields"]

    def refuse(name: str, value: str, accepted: list[Any]) -> None:
        known = " and ".join(map(repr, accepted)) or "None"
        verb = "is" if len(accepted) < 2 else "are"
        raise ConversionError(f"{source.where}{name}{source.says} {value}, accepted {verb} {known}")

    for key, row in fields.items():
        name, value = source.find(key, row, _default(row))
        if value is None and "else" in row:
            value = values[row["else"]]
        if "if" in row and not values[row["if"]]:
            values[key] = None
            continue
        values[key] = value = list(value) if isinstance(value, tuple) else value
        accepted = source.accepted(row)
        if accepted is not None and not _among(value, accepted):
            refuse(name, repr(value), accepted)
        if "values" in row:
            word = "false" if value is None and "none" not in row["values"] else _word(value)
            if word not in row["values"]:
                refuse(name, repr(value), list(row["values"]))
            value = row["values"][word]
            if isinstance(value, dict):
                changes |= value
                continue
        changes |= dict.fromkeys(row.get("into", "").split(), value)
        changes |= {} if value is None else row.get("set", {})
    for key, row in fields.items():
        for other, accepted in row.get("needs", {}).get(_word(values[key]), {}).items():
            if not _among(values[other], accepted):
                refuse(key, f"{values[key]!r} with {other} = {values[other]!r}", accepted)
    sizes: dict[str, int] = {}
    for name, product in table.get("sizes", {}).items():
        sizes[name] = _size(product, values | sizes, source)
    for key, row in fields.items():
        if "same" in row:
            same, value = sizes[row["same"]], values[key]
            if value is not None and set(value if isinstance(value, list) else [value]) != {same}:
                refuse(key, repr(value), [same])
        if "times" in row:
            changes[row["into"]] = values[key] * sizes[row["times"]]
    return Options(sizes, changes, values)


def _expanded(data: Any) -> Any:
    """Writes out the names that stand for several."""
    if not isinstance(data, dict):
        return data
    out = {}
    for key, value in data.items():
        several = re.search(r"\{(.+?)\}", key)
        for word in several[1].split(",") if several else [""]:
            name = key.replace(several[0], word) if several else key
            inner = json.loads(json.dumps(value).replace("*", word)) if several else value
            out[name] = _expanded(inner)
    return out


def _whole(own: Table, parts: Mapping[str, Table]) -> Table:
    """Joins a table and the parts that it names; what it says itself counts."""
    out: Table = {"fields": {}, "sizes": {}, "tensors": {}}
    for table in [*(_whole(parts[name], parts) for name in own.get("like", "").split()), own]:
        for section, value in table.items():
            if section not in ("fields", "sizes", "tensors"):
                out[section] = value
                continue
            rows = out[section]
            for name, row in value.items():
                rows[name] = rows.get(name, {}) | row if section == "fields" else row
    return out


def _entry(key: str, row: Any) -> Entry:
    data = {"ours": row} if isinstance(row, str) else dict(row)
    if "shape" in data:
        data["shape"] = tuple(data["shape"])
    ours = tuple(data.pop("ours").split())
    return Entry(key.removesuffix("?"), ours, optional=key.endswith("?"), **data)


def entries(table: Table) -> tuple[Entry, ...]:
    """Return the rows of a table's tensors."""
    return tuple(_entry(key, row) for key, row in table["tensors"].items())


def _maps(tables: Table) -> dict[str, KeyMap]:
    found = {}
    for package in ("transformers", "fla", "pth", "bin"):
        for family, own in tables[package].items():
            kind, table = f"{package}.{family}", _whole(own, tables["parts"])
            found[kind] = KeyMap(kind, table, entries(table))
    return found


_TABLES = _expanded(
    tomllib.loads((resources.files(__package__) / "mixers.toml").read_text("utf-8"))
)
KINDS: dict[str, KeyMap] = _maps(_TABLES)
"""Maps by kind."""
MODELS = {name: _whole(own, _TABLES["parts"]) for name, own in _TABLES["models"].items()}
"""Tables of what is around mixers, by its name."""
SPELLINGS: dict[str, str] = _TABLES["spellings"]
"""Other beginnings of names, which stand for those of `MODELS["rwkv"]`."""
SILENT: dict[str, str] = _TABLES["silent"]
"""What has no effect: beginnings of names, where the tensor `zero` is."""
REFUSED: dict[str, str] = _TABLES["refused"]
"""Models of flash-linear-attention that cannot be imported, by `model_type`, with the reason."""
