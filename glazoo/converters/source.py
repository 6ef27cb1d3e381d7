"""Reading and checking the folder of a model that is to be converted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glazoo.converters.folders import (
    ADAPTER,
    CONFIG,
    INDEX,
    KEPT,
    MANIFEST,
    other_files,
    other_weights,
    read_json,
    read_shards,
)
from glazoo.converters.imports.layouts import layout_of
from glazoo.converters.spelling import (
    common_prefix,
    joined_ends,
    mixer_shapes,
    stored_shapes,
    without_text_prefix,
)
from glazoo.converters.tensors import Shard
from glazoo.errors import ConversionError, one_line
from glazoo.families import Family, Found, families, find_family
from glazoo.models.remote import without_model_code

__all__ = ["Checkpoint", "check_model", "inspect_checkpoint"]


_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A source folder that was checked: it is of a supported family, complete, and its shapes agree
    with its config."""

    folder: Path
    family: Family
    config: Any
    """The family's configuration object."""
    raw_config: dict[str, Any]
    architecture: str
    index: dict[str, Any] | None
    """The index file's content; None for a single file."""
    shards: tuple[Shard, ...]
    found: Mapping[int, Found]
    """The model's mixers by layer."""
    prefixes: dict[int, str]
    """Name of each layer's mixer, as the files spell it."""
    quantised: dict[int, str]
    """Layers whose mixer holds quantised tensors, each with the refusal that names one."""
    others: tuple[Path, ...]
    """Every further file, relative to the folder."""
    skipped: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def weight_map(self) -> dict[str, str]:
        """File of every tensor."""
        return {key: shard.path.name for shard in self.shards for key in shard.tensors}

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers with a mixer."""
        return tuple(sorted(self.prefixes))


def inspect_checkpoint(src: str | Path) -> Checkpoint:
    """Reads and checks a source folder: config.json, the index and the headers of its shards, no
    tensors.

    Args:
        src: a folder with config.json and safetensors weights.

    Returns:
        What was found.

    Raises:
        ConversionError: it is of no supported family, converted already, incomplete, damaged, or
            contradicts itself.
    """
    folder = Path(src)
    if not folder.is_dir():
        raise ConversionError(f"{folder}: there is no such folder")
    try:
        return _inspect(folder)
    except OSError as e:
        raise ConversionError(f"cannot read {one_line(e)}") from e


def _inspect(folder: Path) -> Checkpoint:
    raw = read_json(folder / CONFIG, CONFIG)
    if "metaplastic" in raw or (folder / MANIFEST).exists():
        raise ConversionError(f"{folder} is converted already")
    if (layout := layout_of(raw)) is not None:
        raise ConversionError(
            f"{folder} is a checkpoint of {layout}: import it first (glazoo convert --import)"
        )
    if "model_type" not in raw:
        raise ConversionError(
            f"{folder / CONFIG} has no model_type; supported are: {', '.join(sorted(families()))}"
        )
    family = find_family(raw["model_type"])
    names = raw.get("architectures") or [family.architectures[0]]
    usable = isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)
    if not (usable and family.own_model(names[0]) is not None):
        raise ConversionError(
            f"architectures {names!r} is not supported for model_type {family.model_type!r}; "
            f"supported are its models, one: {', '.join(family.architectures)} for example"
        )
    try:
        config = family.source_config().from_json_file(folder / CONFIG)
    except ConversionError:
        raise
    except Exception as e:
        reason = " ".join(str(e).split())
        raise ConversionError(
            f"config.json is not a valid {family.model_type} configuration: {reason}"
        ) from e

    index, shards = read_shards(folder)
    warnings = []
    named = raw.get("auto_map")
    if named != without_model_code(named):
        warnings.append(
            f"the folder brings code of its own (auto_map) for {family.model_type}, which "
            "transformers has: its class is converted, and that entry is left out"
        )
    shapes = {key: info.shape for shard in shards for key, info in shard.tensors.items()}
    model = family.build(names[0], config)
    found = family.examine(model)
    known = {name for name, _ in model.named_parameters()}
    if own := next((k for k in shapes if ".metaplastic." in k and k not in known), None):
        raise ConversionError(f"{folder} is converted already: it holds {own}")
    prefixes, quantised = _check_mixers(family, model, found, shards)
    packed = _packed_modules(folder, family, raw, shards)
    if packed:
        count = sum(t.dtype not in _FLOATS for s in shards for t in s.tensors.values())
        warnings.append(
            f"the checkpoint is quantised ({_quant_method(raw)}): its {count} quantised tensors "
            "stay as they are"
        )
    joined = joined_ends(model, found)
    warnings += check_model(family, model, joined, shapes, packed)
    others, skipped = other_files(
        folder, {CONFIG, *([INDEX] if index else []), *(s.path.name for s in shards)}
    )
    extra = [str(p) for p in other_weights(folder, others)]
    if extra:
        warnings.append(
            f"other weight files are kept out of the converted model's way, in {KEPT}: "
            f"{', '.join(extra)}"
        )
    if adapters := [p.name for p in others if len(p.parts) == 1 and p.match(ADAPTER)]:
        warnings.append(
            f"an adapter lies beside the weights ({adapters[0]}): where peft is installed, loaders "
            "apply it to the converted model as they do to the source"
        )
    if any(shard.metadata.get("format") != "pt" for shard in shards):
        warnings.append("some shards lack the metadata format = pt, which older loaders demand")
    return Checkpoint(
        folder=folder,
        family=family,
        config=config,
        raw_config=raw,
        architecture=names[0],
        index=index,
        shards=shards,
        found=found,
        prefixes=prefixes,
        quantised=quantised,
        others=others,
        skipped=skipped,
        warnings=tuple(warnings),
    )


def _quant_method(raw: Mapping[str, Any]) -> str:
    found = raw.get("quantization_config")
    return str(found.get("quant_method", "of no method")) if isinstance(found, dict) else "unknown"


def _packed_modules(
    folder: Path, family: Family, raw: Mapping[str, Any], shards: Sequence[Shard]
) -> set[str]:
    """Return the modules whose tensors a quantised checkpoint holds in a form of its own."""
    if raw.get("quantization_config") is None:
        return set()
    packed = {
        without_text_prefix(family, key).rpartition(".")[0]
        for shard in shards
        for key, info in shard.tensors.items()
        if info.dtype not in _FLOATS
    }
    if not packed:
        raise ConversionError(
            f"{folder}: config.json says that it is quantised ({_quant_method(raw)}), but no "
            "tensor is: remove quantization_config, or convert the checkpoint that it belongs to"
        )
    return packed


def _within(key: str, modules: set[str]) -> bool:
    """Return whether a tensor belongs to one of the modules or to a part of it."""
    return any(key[: at.start()] in modules for at in re.finditer(r"\.", key)) if modules else False


def _check_mixers(
    family: Family, model: Any, found: Mapping[int, Found], shards: Sequence[Shard]
) -> tuple[dict[int, str], dict[int, str]]:
    """Compare every mixer's tensors with the model's; return the mixers' names by layer, as the
    files spell them, and why those with quantised tensors cannot be converted."""
    prefixes: dict[int, str] = {}
    quantised: dict[int, str] = {}
    joined = joined_ends(model, found)
    infos = {key: info for shard in shards for key, info in shard.tensors.items()}
    # Names as in a text model, and as the files have them.
    plain = {without_text_prefix(family, key): key for key in infos}
    leaves: set[str] = set()
    for layer, mixer in found.items():
        expected = {
            without_text_prefix(family, key): shape
            for key, shape in mixer_shapes(model, mixer).items()
        }
        where = common_prefix(expected)
        here = {key: infos[stored] for key, stored in plain.items() if key.startswith(f"{where}.")}
        spelled = {plain[key][: len(plain[key]) - len(key) + len(where)] for key in here}
        twice = [
            k for k in infos if without_text_prefix(family, k) in here and k not in plain.values()
        ]
        if len(spelled) > 1 or twice:
            others = sorted({*spelled, *(k[: k.rindex(where[-8:]) + 8] for k in twice)})
            raise ConversionError(f"layer {layer} has two mixers: {' and '.join(others)}")
        prefixes[layer] = prefix = spelled.pop() if spelled else where
        odd = next((plain[key] for key, t in here.items() if t.dtype not in _FLOATS), None)
        if odd is not None:
            quantised[layer] = (
                f"{odd} is stored as {infos[odd].dtype}: a mixer that is quantised cannot be "
                f"converted, its tensors have to be {', '.join(_FLOATS)}. Convert the "
                "checkpoint that was not quantised, or one whose quantisation leaves the "
                "mixers out, or leave this layer as it is (--layers)"
            )
            continue
        names = {key: f"{prefix}{key.removeprefix(where)}" for key in {*expected, *here}}
        if absent := next((key for key in expected if key not in here), None):
            raise ConversionError(f"{names[absent]} is missing from the checkpoint")
        _check_joined(
            [names[key] for key in expected if key.endswith(joined)],
            [here[key].shape for key in expected if key.endswith(joined)],
            [shape for key, shape in expected.items() if key.endswith(joined)],
        )
        for key, shape in expected.items():
            if here[key].shape != shape and not key.endswith(joined):
                raise ConversionError(
                    f"{names[key]} has shape {list(here[key].shape)}, config.json says "
                    f"{list(shape)}"
                )
        if unknown := sorted(names[key] for key in here if key not in expected):
            raise ConversionError(f"{unknown[0]} is unknown to {family.model_type}")
        leaves = {key.removeprefix(where) for key in expected}
        pattern = where.replace(f".{layer}.", ".{}.", 1)
    # Mixers of layers that the model has not. It has those that are metaplastic already.
    stray = plain.keys() - model.state_dict().keys()
    for layer in range(len(family.layer_kinds(model.config)) + 1):
        other = pattern.format(layer)
        if layer not in found and all(f"{other}{leaf}" in stray for leaf in leaves):
            raise ConversionError(
                f"the checkpoint has a mixer in layer {layer}, config.json has not"
            )
    return prefixes, quantised


def _check_joined(
    names: Sequence[str], here: Sequence[tuple[int, ...]], expected: Sequence[tuple[int, ...]]
) -> None:
    lengths = [sum(shape[0] for shape in shapes if shape) for shapes in (here, expected)]
    if lengths[0] != lengths[1] or any(a[1:] != b[1:] for a, b in zip(here, expected, strict=True)):
        raise ConversionError(
            f"{names[0]} and its like have shapes {', '.join(str(list(s)) for s in here)}, "
            f"config.json says {', '.join(str(list(s)) for s in expected)}"
        )


def check_model(
    family: Family,
    model: Any,
    joined: tuple[str, ...],
    shapes: Mapping[str, tuple[int, ...]],
    packed: set[str],
) -> list[str]:
    """Compare all tensors but those of packed modules with those of the model, built without data;
    return warnings."""
    tied = set(model.all_tied_weights_keys)
    expected, renamed = stored_shapes(model)
    shapes = {without_text_prefix(family, key): shape for key, shape in shapes.items()}
    expected = {without_text_prefix(family, key): shape for key, shape in expected.items()}
    warnings = []
    if not renamed:
        warnings.append(
            "the files' names for tensors could not be worked out from the installed transformers: "
            "only the mixers' tensors were checked"
        )
        return warnings
    for key, shape in expected.items():
        if _within(key, packed):
            continue
        if key not in shapes:
            if key not in tied:
                raise ConversionError(f"{key} is missing from the checkpoint")
        elif shapes[key] != shape and not key.endswith(joined):
            raise ConversionError(
                f"{key} has shape {list(shapes[key])}, config.json says {list(shape)}"
            )
    unused = sorted(key for key in set(shapes) - set(expected) if not _within(key, packed))
    if unused:
        warnings.append(f"{len(unused)} tensors belong to no module, {unused[0]} for example")
    return warnings
