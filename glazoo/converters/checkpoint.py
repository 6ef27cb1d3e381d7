"""Converting checkpoint folders, shard by shard, and giving their sources back.

A converted folder keeps every tensor of its source in files that are hard links to the source's (or
copies), adds one shard with the new tensors and an index over all, and has a `model_type` of its
own. The original config.json and index are kept in `glazoo/source`, next to `glazoo/manifest.json`
with the checksum of every file of the source.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch

from glazoo.converters.card import CARD, model_card
from glazoo.converters.casting import Cast, Dtype, plan_cast, with_dtype
from glazoo.converters.files import Progress, Staging, checksum, leftover_warnings
from glazoo.converters.imports.layouts import layout_of
from glazoo.converters.report import AddedTensor, ConversionReport, FileRecord, RevertReport
from glazoo.converters.tensors import NewTensor, Shard, read_shard, write_shard
from glazoo.converters.tokenizers import TOKENIZER_CONFIG, settled
from glazoo.errors import ConversionError, one_line
from glazoo.families import Family, Found, families, find_family
from glazoo.families.settings import FORMAT_VERSION, READABLE, Settings
from glazoo.models.remote import REMOTE_CODE, REMOTE_MODULE, remote_map, without_model_code
from glazoo.program import lower
from glazoo.strictjson import dumps, loads
from glazoo.versions import installed, untested

__all__ = ["Checkpoint", "convert_checkpoint", "inspect_checkpoint", "revert_checkpoint"]

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
OWN = "glazoo"
"""Folder inside a converted one that `revert_checkpoint` reads."""
KEPT = f"{OWN}/source"
MANIFEST = f"{OWN}/manifest.json"

_OTHER_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
)
_ADAPTER = "adapter_model*"
_LISTS = ("*.index.json", "*.index.*.json")
_TOGETHER = (
    ("*.onnx", "*.onnx_data*", "*.onnx.data*"),
    ("openvino_*.bin", "openvino_*.xml"),
    ("consolidated*", "params.json"),
    (
        *("optimizer*", "scheduler*", "scaler*", "rng_state*"),
        *("training_args*", "trainer_state.json", "latest", "zero_to_fp32.py"),
    ),
)
"""Patterns of files that are read together. One that holds weights takes the others with it."""
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


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        data = loads(path.read_bytes())
    except FileNotFoundError:
        raise ConversionError(f"{path.parent} has no {what}") from None
    except OSError as e:
        raise ConversionError(f"cannot read {one_line(e)}") from e
    except ValueError as e:
        raise ConversionError(f"{path.name} is not valid JSON: {e}") from e
    if not isinstance(data, dict):
        raise ConversionError(f"{path.name} holds {type(data).__name__}, expected a JSON object")
    return data


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
    raw = _read_json(folder / CONFIG, CONFIG)
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

    index, shards = _read_shards(folder)
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
    joined = _joined(model, found)
    warnings += _check_model(family, model, joined, shapes, packed)
    others, skipped = _other_files(
        folder, {CONFIG, *([INDEX] if index else []), *(s.path.name for s in shards)}
    )
    extra = [str(p) for p in _aside(folder, others)]
    if extra:
        warnings.append(
            f"other weight files are kept out of the converted model's way, in {KEPT}: "
            f"{', '.join(extra)}"
        )
    if adapters := [p.name for p in others if len(p.parts) == 1 and p.match(_ADAPTER)]:
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


def _read_shards(folder: Path) -> tuple[dict[str, Any] | None, tuple[Shard, ...]]:
    single, listed = folder / SINGLE, folder / INDEX
    if not listed.exists():
        if single.exists():
            return None, (read_shard(single),)
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        if pickles:
            raise ConversionError(
                f"{folder} holds pickled weights only ({pickles[0]}): load it and save_pretrained "
                "it as safetensors first"
            )
        raise ConversionError(f"{folder} has neither {SINGLE} nor {INDEX}")
    index = _read_json(listed, INDEX)
    weight_map = index.get("weight_map")
    if not (
        isinstance(weight_map, dict)
        and weight_map
        and all(isinstance(file, str) for file in weight_map.values())
    ):
        raise ConversionError(f"{INDEX} has no weight_map from tensor names to files")
    names = sorted(set(weight_map.values()))
    if stray := next((n for n in names if Path(n).name != n or n in ("", ".", "..")), None):
        raise ConversionError(f"{INDEX} names a file outside the folder: {stray!r}")
    if single.exists() and SINGLE not in names:
        raise ConversionError(
            f"{folder} holds both {SINGLE} and {INDEX}: loaders take the former and ignore the "
            "shards; remove one of them"
        )
    shards = tuple(read_shard(folder / name) for name in names)
    homes: dict[str, str] = {}
    for shard in shards:
        for key in shard.tensors:
            if key in homes:
                raise ConversionError(f"tensor {key} is in both {homes[key]} and {shard.path.name}")
            homes[key] = shard.path.name
    for key, name in weight_map.items():
        if homes.get(key) != name:
            raise ConversionError(f"{INDEX} names tensor {key} in {name}, which does not hold it")
    if unlisted := next((key for key in homes if key not in weight_map), None):
        raise ConversionError(
            f"{homes[unlisted]} holds tensor {unlisted}, which {INDEX} does not name"
        )
    return index, shards


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
        _without_text_prefix(family, key).rpartition(".")[0]
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
    joined = _joined(model, found)
    infos = {key: info for shard in shards for key, info in shard.tensors.items()}
    # Names as in a text model, and as the files have them.
    plain = {_without_text_prefix(family, key): key for key in infos}
    leaves: set[str] = set()
    for layer, mixer in found.items():
        expected = {
            _without_text_prefix(family, key): shape
            for key, shape in _mixer_shapes(model, mixer).items()
        }
        where = _common_prefix(expected)
        here = {key: infos[stored] for key, stored in plain.items() if key.startswith(f"{where}.")}
        spelled = {plain[key][: len(plain[key]) - len(key) + len(where)] for key in here}
        twice = [
            k for k in infos if _without_text_prefix(family, k) in here and k not in plain.values()
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


def _mixer_shapes(model: Any, mixer: Found) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a mixer, by the names that files have for them, with their shapes."""
    own = f"{mixer.path}."
    state = {key: t for key, t in model.state_dict().items() if key.startswith(own)}
    stored, known = _stored(model, state)
    return {key: tuple(t.shape) for key, t in (stored if known else state).items()}


def _common_prefix(names: Iterable[str]) -> str:
    """Return the dotted name that all of several names begin with."""
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(p[0] for p in itertools.takewhile(lambda p: len(set(p)) == 1, parts))


def _joined(model: Any, found: Mapping[int, Found]) -> tuple[str, ...]:
    """Return the ends of the names of tensors that loaders lay end to end: only their lengths
    together count, as some savers cut what they loaded into equal parts."""
    mixer = next(iter(found.values()))
    files = _mixer_shapes(model, mixer)
    ends: list[str] = []
    for key, t in model.state_dict().items():
        if not key.startswith(f"{mixer.path}.") or key in files:
            continue
        try:
            parts, known = _stored(model, {key: t})
        except Exception:  # a tensor that files hold as a part of another
            continue
        if known and len(parts) > 1:
            ends += [f".{name.rpartition('.')[0].rpartition('.')[2]}.weight" for name in parts]
    return tuple(ends)


def _check_joined(
    names: Sequence[str], here: Sequence[tuple[int, ...]], expected: Sequence[tuple[int, ...]]
) -> None:
    lengths = [sum(shape[0] for shape in shapes if shape) for shapes in (here, expected)]
    if lengths[0] != lengths[1] or any(a[1:] != b[1:] for a, b in zip(here, expected, strict=True)):
        raise ConversionError(
            f"{names[0]} and its like have shapes {', '.join(str(list(s)) for s in here)}, "
            f"config.json says {', '.join(str(list(s)) for s in expected)}"
        )


def _check_model(
    family: Family,
    model: Any,
    joined: tuple[str, ...],
    shapes: Mapping[str, tuple[int, ...]],
    packed: set[str],
) -> list[str]:
    """Compare all tensors but those of packed modules with those of the model, built without data;
    return warnings."""
    tied = set(model.all_tied_weights_keys)
    expected, renamed = _stored_shapes(model)
    shapes = {_without_text_prefix(family, key): shape for key, shape in shapes.items()}
    expected = {_without_text_prefix(family, key): shape for key, shape in expected.items()}
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


def _without_text_prefix(family: Family, key: str) -> str:
    """Return a name as it is in a text model, if multimodal checkpoints may hold it under
    another."""
    return key if family.multimodal else re.sub(r"^model\.language_model\.", "model.", key)


def _stored_shapes(model: Any) -> tuple[dict[str, tuple[int, ...]], bool]:
    """Return the shapes of a model's tensors by the names that files have for them, and whether
    that could be worked out."""
    state, known = _stored(model, model.state_dict())
    return {key: tuple(t.shape) for key, t in state.items()}, known


def _stored(model: Any, state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], bool]:
    """Return a model's tensors by the names that files have for them, and whether that could be
    worked out."""
    try:
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(model, state), True
    except (ImportError, AttributeError, TypeError):
        # Not a public function: another transformers may lack it or take other arguments.
        return {}, False


def _other_files(folder: Path, taken: set[str]) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    files: list[Path] = []
    skipped: list[str] = []
    for here, folders, names in os.walk(folder):
        where = Path(here).relative_to(folder)
        for name in sorted(folders):
            # Version control and download caches are no part of the model. Linked folders may lead
            # anywhere.
            if name.startswith(".") or (Path(here) / name).is_symlink():
                skipped.append(f"{where / name}/")
                folders.remove(name)
        folders.sort()
        for name in sorted(names):
            relative = where / name
            if relative.parent == Path() and name in taken:
                continue
            if not (folder / relative).is_file():
                raise ConversionError(f"{folder / relative} is a broken link or no regular file")
            files.append(relative)
    return tuple(files), tuple(skipped)


def _steps(folder: Path) -> set[str]:
    """Return the folders of what runs after the model, as sentence-transformers lists it."""
    try:
        listed = loads((folder / "modules.json").read_text())
        return {Path(x["path"]).parts[0] for x in listed if x["path"]}
    except (OSError, ValueError, TypeError, KeyError):
        return set()


def _aside(folder: Path, paths: Sequence[Path]) -> list[Path]:
    """Return the files that hold weights, or list files of weights, that are neither the model's,
    nor an adapter's, nor those of a step after the model."""
    steps = _steps(folder)
    return [
        p
        for p in paths
        if (p.suffix in _OTHER_WEIGHTS or any(map(p.match, _LISTS)))
        and not p.match(_ADAPTER)
        and (len(p.parts) == 1 or p.parts[0] not in steps)
    ]


def _stored_names(folder: Path, paths: Sequence[Path], replaced: set[str]) -> dict[Path, str]:
    """Return the places of a source's further files in the converted folder.

    Weights in other formats would be mistaken for the converted model's, our own folder must not be
    overwritten, and the files in `replaced` get successors: they are kept aside. What belongs to
    such weights goes with them: the rest of their folder, and the files that are read with them.
    """
    aside = {p.parts[0] for p in paths if p.parts[0] == OWN} | replaced
    aside |= {p.parts[0] for p in _aside(folder, paths)}
    for patterns in _TOGETHER:
        group = {p.name for p in paths if len(p.parts) == 1 and any(map(p.match, patterns))}
        if group & aside:
            aside |= group
    return {p: f"{KEPT}/{p.as_posix()}" if p.parts[0] in aside else p.as_posix() for p in paths}


def _check_apart(src: Path, dst: Path) -> None:
    a, b = src.resolve(), dst.resolve()
    if a == b:
        raise ConversionError(f"{dst} is the source itself")
    if a in b.parents:
        raise ConversionError(f"{dst} lies inside the source {src}")
    if b in a.parents:
        raise ConversionError(f"{dst} contains the source {src}")


def _snapshot(paths: Sequence[Path]) -> list[tuple[int, int, int]]:
    found = [p.stat() for p in paths]
    return [(s.st_ino, s.st_size, s.st_mtime_ns) for s in found]


def _check_space(dst: Path, needed: int) -> None:
    status = os.statvfs(dst.parent)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise ConversionError(
            f"cannot write {dst}: {needed:,} bytes are needed and {free:,} are free on its file "
            "system"
        )


def _needed_bytes(files: Sequence[Path], dst: Path, *, link: bool) -> int:
    """Counts the bytes that will be copied rather than linked."""
    device = dst.parent.stat().st_dev
    stats = [f.stat() for f in files]
    return sum(s.st_size for s in stats if not (link and s.st_dev == device))


def _added(
    checkpoint: Checkpoint, settings: Settings
) -> tuple[list[NewTensor], tuple[AddedTensor, ...]]:
    starts = {
        "b_down": f"uniform, seed {settings.seed}",
        "b_up": "zero",
        "b_scale": f"{settings.plasticity:g}",
        "ip_log": "zero (prior 1)",
    }
    new: list[NewTensor] = []
    reported: list[AddedTensor] = []
    source = checkpoint.family.source_spec(checkpoint.config, checkpoint.found)
    spec = settings.metaplastic_spec(source)
    for layer in settings.layers:
        # Without data: every tensor is made when it is written.
        with torch.device("meta"):
            gate = checkpoint.found[layer].gate(
                spec, plasticity=settings.plasticity, seed=settings.seed
            )
        for name, p in gate.named_parameters():
            key, shape = f"{checkpoint.prefixes[layer]}.metaplastic.{name}", tuple(p.shape)
            new.append(NewTensor(key, shape, functools.partial(gate.start, name)))
            reported.append(AddedTensor(key, shape, "float32", starts[name]))
    return new, tuple(reported)


def convert_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    plasticity: float = 0.0,
    gate: str | None = None,
    rank: int | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    gain: str | None = None,
    dtype: Dtype | None = None,
    link: bool = True,
    remote_code: bool = True,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Converts a checkpoint folder into its metaplastic counterpart.

        b_t = kappa r_t 2 sigmoid(b_up b_down h_t) ;
        kappa = `plasticity`, b_up = 0, I_p = 1 at the start

    with r_t the write gate or, for the exact gain, the precision whose rate it is.

    `AutoModelForCausalLM.from_pretrained(dst)` loads the result after `import glazoo.models`;
    without glazoo, transformers refuses its model_type. No tensor of the source is rewritten unless
    `dtype` asks for it, and memory does not grow with the model.

    Args:
        src: the source folder; it is not changed.
        dst: the folder to make. It appears complete or not at all.
        plasticity: kappa, from 0, which computes what the source computes, to 1; sources that
            subtract no prediction accept more.
        gate: "head", the default, for one importance vector over keys per head; "value" for one
            importance per synapse.
        rank: rank of the importance gate's projection; default a sixteenth of the hidden size, at
            most 128.
        layers: indices of the layers to convert; default all that can be.
        seed: seed of the gate's inner projection.
        gain: learning rate of a delta rule: "first_order", beta k / I, or "exact", that of the
            posterior for the precision beta / (1 - beta k.k). Both are the source at kappa = 0.
            Default: "exact" where the family has it.
        dtype: write the source's weights in this dtype: "float32", "bfloat16" or "float16". The
            added tensors are float32 always, and what the family or the checkpoint keeps in float32
            on purpose stays. A narrower dtype cannot be undone: `revert_checkpoint` then gives the
            weights back as they were cast. Default: they stay as they are.
        link: hard-link the source's weights where the file system allows it. A link shares its
            content with the source: a program that rewrites one file in place changes both. False
            copies.
        remote_code: write a small module too, so that loaders with `trust_remote_code` need no
            `import glazoo.models`; glazoo must be installed all the same. Without it, programs that
            load models by themselves cannot load this one.
        dry_run: check and report only; reads config.json, the index and headers.
        force: replace a model's folder that is already at `dst`.
        progress: called as `progress(file, done_bytes, total_bytes)`.

    Returns:
        What was done.

    Raises:
        ConversionError: one line with the reason; nothing is left behind.

    Reference: arXiv:2602.09075, MetaMamba2.
    """
    begun = time.monotonic()
    source, destination = Path(src), Path(os.path.abspath(dst))
    checkpoint = inspect_checkpoint(source)
    family, config, found = checkpoint.family, checkpoint.config, checkpoint.found
    settings = family.settings(
        config,
        checkpoint.architecture,
        found,
        plasticity=plasticity,
        gate=gate,
        rank=rank,
        layers=layers,
        seed=seed,
        gain=gain,
    )
    _check_apart(source, destination)
    for layer in settings.layers:
        if layer in checkpoint.quantised:
            raise ConversionError(checkpoint.quantised[layer])
    from glazoo.converters.rehearsal import rehearse

    rehearse(family.build(checkpoint.architecture, config), family, settings, found)
    cast = None
    if dtype is not None:
        if checkpoint.raw_config.get("quantization_config") is not None:
            raise ConversionError(
                f"dtype: {source} is quantised, and its scales belong to its weights: leave the "
                "dtype as it is"
            )
        cast = plan_cast(dtype, checkpoint.shards, family, checkpoint.architecture, config)
    new, added = _added(checkpoint, settings)
    tokenizer, more = settled(source, family.model_type, family.converted_model_type)
    newer = untested(installed(("torch", "transformers")))
    warnings = [*checkpoint.warnings, *more, *newer.values()]
    try:
        Staging.check(destination, force=force)
        files = _convert_files(
            checkpoint,
            settings,
            new,
            destination,
            cast=cast,
            tokenizer=tokenizer,
            link=link,
            remote_code=remote_code,
            dry_run=dry_run,
            force=force,
            progress=progress,
        )
        warnings += leftover_warnings(destination)
    except OSError as e:
        raise ConversionError(f"cannot convert {source}: {one_line(e)}") from e
    shards = checkpoint.shards
    before, after = _state_bytes(checkpoint, settings)
    return ConversionReport(
        source=str(source),
        destination=str(dst),
        dry_run=dry_run,
        family=family.model_type,
        architecture=family.converted_architecture(checkpoint.architecture),
        spec=settings.metaplastic_spec(family.source_spec(config, found)).name,
        gate=settings.gate,
        gain=settings.gain,
        rank=settings.rank,
        plasticity=settings.plasticity,
        seed=settings.seed,
        layers=settings.layers,
        mixers=tuple(found[layer] for layer in settings.layers),
        skipped_layers=_skipped_layers(checkpoint, settings),
        base_parameters=sum(math.prod(t.shape) for s in shards for t in s.tensors.values()),
        added_parameters=sum(math.prod(t.shape) for t in new),
        base_bytes=sum(
            t.nbytes for s in shards for t in (cast.tensors(s) if cast else s.tensors).values()
        ),
        added_bytes=sum(t.nbytes for t in new),
        state_bytes_source=before,
        state_bytes_converted=after,
        added=added,
        files=files,
        skipped_files=checkpoint.skipped,
        warnings=tuple(warnings),
        seconds=time.monotonic() - begun,
        dtype=dtype if cast is not None and any(map(cast.changes, shards)) else None,
        kept_wide=() if cast is None else cast.kept,
        largest_change=None if cast is None or dry_run else cast.largest,
    )


def _skipped_layers(checkpoint: Checkpoint, settings: Settings) -> dict[int, str]:
    kinds = checkpoint.family.layer_kinds(checkpoint.config)
    return {
        i: "not asked for" if i in checkpoint.prefixes else f"{kind}: no convertible mixer"
        for i, kind in enumerate(kinds)
        if i not in settings.layers
    }


def _state_bytes(checkpoint: Checkpoint, settings: Settings) -> tuple[int, int]:
    """Counts the recurrent state of one sequence, in float32, of the source and of the converted
    model."""
    spec = checkpoint.family.source_spec(checkpoint.config, checkpoint.found)
    programs = lower(spec), lower(settings.metaplastic_spec(spec))
    before = after = 0
    for layer, mixer in checkpoint.found.items():
        plain, converted = (
            4 * mixer.heads * program.state_floats(mixer.key, mixer.value) for program in programs
        )
        before += plain
        after += converted if layer in settings.layers else plain
    return before, after


def _convert_files(
    checkpoint: Checkpoint,
    settings: Settings,
    new: list[NewTensor],
    destination: Path,
    *,
    cast: Cast | None,
    tokenizer: dict[str, Any] | None,
    link: bool,
    remote_code: bool,
    dry_run: bool,
    force: bool,
    progress: Progress | None,
) -> tuple[FileRecord, ...]:
    folder = checkpoint.folder
    n = len(checkpoint.shards) + 1
    # Renamed, single files too: a model.safetensors beside an index would be loaded instead of it.
    moves = {
        shard.path.name: f"model-{i:05d}-of-{n:05d}.safetensors"
        for i, shard in enumerate(checkpoint.shards, 1)
    }
    last = f"model-{n:05d}-of-{n:05d}.safetensors"
    replaced = {CARD, REMOTE_CODE, *([TOKENIZER_CONFIG] if tokenizer is not None else [])}
    kept = [CONFIG, *([INDEX] if checkpoint.index is not None else [])]
    originals: list[tuple[str, str, bool]] = [
        *((name, stored, link) for name, stored in moves.items()),
        *((name, f"{KEPT}/{name}", False) for name in kept),
        # Small files that people edit in place are copied always.
        *(
            (p.as_posix(), stored, link and p.suffix in _OTHER_WEIGHTS)
            for p, stored in _stored_names(folder, checkpoint.others, replaced).items()
        ),
    ]
    clashes = {stored for _, stored, _ in originals} & {CONFIG, INDEX, MANIFEST, last}
    if clashes or len({stored for _, stored, _ in originals}) != len(originals):
        raise ConversionError(
            f"files of {folder} would overwrite those of the conversion: {sorted(clashes)}"
        )
    paths = [folder / name for name, _, _ in originals]
    # Files that are written anew rather than taken over, by their names in the source.
    anew = {s.path.name: s for s in checkpoint.shards if cast is not None and cast.changes(s)}
    lengths = [
        cast.size(anew[name])
        if cast is not None and name in anew
        else (folder / name).stat().st_size
        for name, _, _ in originals
    ]
    if dry_run:
        return tuple(
            FileRecord(name, stored, length, None, "planned")
            for (name, stored, _), length in zip(originals, lengths, strict=True)
        )
    added_bytes = sum(t.nbytes for t in new)
    taken = [(folder / n, may_link) for n, _, may_link in originals if n not in anew]
    copied = [p for p, may_link in taken if not may_link]
    linked = [p for p, may_link in taken if may_link]
    cast_bytes = sum(n for n, (name, _, _) in zip(lengths, originals, strict=True) if name in anew)
    _check_space(
        destination,
        added_bytes
        + cast_bytes
        + _needed_bytes(copied, destination, link=False)
        + _needed_bytes(linked, destination, link=True),
    )
    weight_map = {key: moves[name] for key, name in checkpoint.weight_map.items()}
    weight_map |= {t.name: last for t in new}
    expected = {
        s.path.name: cast.tensors(s) if cast is not None else dict(s.tensors)
        for s in checkpoint.shards
    }
    base_bytes = sum(t.nbytes for tensors in expected.values() for t in tensors.values())
    index = dict(checkpoint.index or {})
    head = dict(index.get("metadata") or {})
    head["total_size"] = base_bytes + added_bytes
    if isinstance(head.get("total_parameters"), int):
        head["total_parameters"] += sum(math.prod(t.shape) for t in new)
    index |= {"metadata": head, "weight_map": dict(sorted(weight_map.items()))}
    family = checkpoint.family
    config = family.converted_config(
        checkpoint.raw_config, checkpoint.config, checkpoint.architecture, settings
    )
    if cast is not None:
        config = with_dtype(config, cast.dtype)
    named = without_model_code(config.pop("auto_map", None)) or {}
    if remote_code:
        named |= remote_map(family)
    if named:
        config["auto_map"] = named
    old_card = folder / CARD
    text = old_card.read_text("utf-8", errors="replace") if old_card.is_file() else None
    card = model_card(
        folder,
        settings,
        family,
        text,
        remote_code=remote_code,
        dtype=cast.dtype if cast is not None and anew else None,
    )

    before = _snapshot(paths)
    records: list[FileRecord] = []
    total = sum(lengths) + added_bytes
    with Staging(destination, force=force, total=total, progress=progress) as stage:
        for (name, stored, may_link), length in zip(originals, lengths, strict=True):
            if cast is not None and name in anew:
                write = functools.partial(cast.write, shard=anew[name])
                records.append(FileRecord(name, stored, length, stage.make(stored, write), "cast"))
                continue
            digest, how = stage.take(folder / name, stored, link=may_link)
            records.append(FileRecord(name, stored, length, digest, how))
        stage.write(last, lambda f: write_shard(f, new))
        stage.write(INDEX, _dump(index))
        manifest = {
            "format_version": FORMAT_VERSION,
            "settings": settings.to_block(),
            "files": [{k: v for k, v in asdict(r).items() if k != "how"} for r in records],
        }
        if cast is not None and anew:
            manifest["dtype"] = cast.dtype
        stage.write(MANIFEST, _dump(manifest))
        stage.write(CARD, card.encode())
        if tokenizer is not None:
            stage.write(TOKENIZER_CONFIG, _dump(tokenizer))
        if remote_code:
            stage.write(REMOTE_CODE, REMOTE_MODULE.encode())
        stage.write(CONFIG, _dump(config))
        # Read once more as loaders will, and compared with what was checked before the first byte
        # was written.
        for old, shard in zip([*moves.values()], checkpoint.shards, strict=True):
            if dict(read_shard(stage.folder / old).tensors) != expected[shard.path.name]:
                raise ConversionError(f"{shard.path.name} changed while it was being converted")
        read_shard(stage.folder / last)
        if _snapshot(paths) != before:
            raise ConversionError(f"{folder} changed while it was being converted")
    return tuple(records)


def _dump(data: Mapping[str, Any]) -> bytes:
    return (dumps(data, indent=2) + "\n").encode()


def revert_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    link: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> RevertReport:
    """Restore, byte for byte, the folder that a converted one was made from.

    If the conversion was asked to cast the weights, they come back as they were cast, under their
    old names, and configuration and index say so.

    Args:
        src: a folder that `convert_checkpoint` wrote; it is not changed.
        dst: the folder to make. It appears complete or not at all.
        link: hard-link weights where the file system allows it.
        force: replace a model's folder that is already at `dst`.
        progress: called as `progress(file, done_bytes, total_bytes)`.

    Returns:
        The files that were given back.

    Raises:
        ConversionError: `src` was not written by `convert_checkpoint`, or one of the source's files
            in it was changed.
    """
    begun = time.monotonic()
    source, destination = Path(src), Path(os.path.abspath(dst))
    if not source.is_dir():
        raise ConversionError(f"{source}: there is no such folder")
    if not (source / MANIFEST).is_file():
        raise ConversionError(
            f"{source} has no {MANIFEST}: only folders that `glazoo convert` wrote can be reverted"
        )
    _check_apart(source, destination)
    entries = _manifest_entries(source)
    dtype = _read_json(source / MANIFEST, MANIFEST).get("dtype")
    records: list[FileRecord] = []
    try:
        Staging.check(destination, force=force)
        for name, stored, length, _ in entries:
            path = source / stored
            if not path.is_file():
                raise ConversionError(f"{stored}: this file of the source is missing from {source}")
            if path.stat().st_size != length:
                raise ConversionError(
                    f"{stored} was changed since the conversion: {name} cannot be given back"
                )
        weights = [s for _, s, _, _ in entries if Path(s).suffix in _OTHER_WEIGHTS]
        rest = [s for _, s, _, _ in entries if Path(s).suffix not in _OTHER_WEIGHTS]
        _check_space(
            destination,
            _needed_bytes([source / s for s in weights], destination, link=link)
            + _needed_bytes([source / s for s in rest], destination, link=False),
        )
        total = sum(length for _, _, length, _ in entries)
        with Staging(destination, force=force, total=total, progress=progress) as stage:
            for name, stored, length, expected in entries:
                may_link = link and stored in weights
                how: Literal["linked", "copied", "cast"]
                if dtype is not None and stored in (f"{KEPT}/{CONFIG}", f"{KEPT}/{INDEX}"):
                    content = _recast(source / stored, entries, source, dtype)
                    stage.write(name, content)
                    digest, how, length = checksum(source / stored), "cast", len(content)
                else:
                    digest, how = stage.take(source / stored, name, link=may_link)
                if digest != expected:
                    raise ConversionError(
                        f"{stored} was changed since the conversion: {name} cannot be given back"
                    )
                records.append(FileRecord(name, stored, length, digest, how))
        warnings = leftover_warnings(destination)
    except OSError as e:
        raise ConversionError(f"cannot revert {source}: {one_line(e)}") from e
    return RevertReport(
        source=str(source),
        destination=str(dst),
        files=tuple(records),
        seconds=time.monotonic() - begun,
        dtype=dtype,
        warnings=tuple(warnings),
    )


def _recast(
    kept: Path, entries: Sequence[tuple[str, str, int, str]], source: Path, dtype: str
) -> bytes:
    """Return the source's configuration or index as it is for weights in another dtype."""
    data = _read_json(kept, kept.name)
    if kept.name == CONFIG:
        return _dump(with_dtype(data, dtype))
    names = {*data["weight_map"].values()}
    total = sum(read_shard(source / s).data_bytes for n, s, _, _ in entries if n in names)
    return _dump({**data, "metadata": {**(data.get("metadata") or {}), "total_size": total}})


def _manifest_entries(source: Path) -> list[tuple[str, str, int, str]]:
    manifest = _read_json(source / MANIFEST, MANIFEST)
    if manifest.get("format_version") not in READABLE:
        raise ConversionError(
            f"{MANIFEST} has format_version {manifest.get('format_version')!r}, this glazoo reads "
            f"{', '.join(map(str, READABLE))}"
        )
    try:
        entries = [
            (str(f["path"]), str(f["stored"]), int(f["bytes"]), str(f["sha256"]))
            for f in manifest["files"]
        ]
    except (KeyError, TypeError, ValueError) as e:
        raise ConversionError(f"{MANIFEST} is damaged: {e}") from e
    for name, stored, _, _ in entries:
        for path in map(PurePosixPath, (name, stored)):
            if path.is_absolute() or ".." in path.parts or not path.parts:
                raise ConversionError(
                    f"{MANIFEST} is damaged: it names a file outside the folder, {path}"
                )
    return entries
