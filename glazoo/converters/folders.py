"""What lies where in a model's folder, and what a folder has room for.

A converted folder keeps every tensor of its source in files that are hard links to the source's (or
copies), adds one shard with the new tensors and an index over all, and has a `model_type` of its
own. The original config.json and index are kept in `glazoo/source`, next to `glazoo/manifest.json`
with the checksum of every file of the source.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from glazoo.converters.tensors import Shard, read_shard
from glazoo.errors import ConversionError, one_line
from glazoo.strictjson import dumps, loads

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
OWN = "glazoo"
"""Folder inside a converted one that `revert_checkpoint` reads."""
KEPT = f"{OWN}/source"
MANIFEST = f"{OWN}/manifest.json"
WEIGHTS = (
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
"""Ends of the names of files that hold weights."""
ADAPTER = "adapter_model*"
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


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Return the object that a JSON file holds; `what` names the file where it is missing.

    Raises:
        ConversionError: it is missing, unreadable, or no JSON object.
    """
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


def dump_json(data: Mapping[str, Any]) -> bytes:
    """Return the JSON file of an object."""
    return (dumps(data, indent=2) + "\n").encode()


def read_shards(folder: Path) -> tuple[dict[str, Any] | None, tuple[Shard, ...]]:
    """Return the index of a folder's shards, None for a single file, and the shards, headers only.

    Raises:
        ConversionError: there are none, one is damaged, or the index contradicts them.
    """
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
    index = read_json(listed, INDEX)
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


def other_files(folder: Path, taken: set[str]) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Return the files of a folder but for those taken at its top, relative to it, and the folders
    in it that are left out.

    Raises:
        ConversionError: something is neither a file nor a folder.
    """
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


def other_weights(folder: Path, paths: Sequence[Path]) -> list[Path]:
    """Return the files that hold weights, or list files of weights, that are neither the model's,
    nor an adapter's, nor those of a step after the model."""
    steps = _steps(folder)
    return [
        p
        for p in paths
        if (p.suffix in WEIGHTS or any(map(p.match, _LISTS)))
        and not p.match(ADAPTER)
        and (len(p.parts) == 1 or p.parts[0] not in steps)
    ]


def stored_names(folder: Path, paths: Sequence[Path], replaced: set[str]) -> dict[Path, str]:
    """Return the places of a source's further files in the converted folder.

    Weights in other formats would be mistaken for the converted model's, our own folder must not be
    overwritten, and the files in `replaced` get successors: they are kept aside. What belongs to
    such weights goes with them: the rest of their folder, and the files that are read with them.
    """
    aside = {p.parts[0] for p in paths if p.parts[0] == OWN} | replaced
    aside |= {p.parts[0] for p in other_weights(folder, paths)}
    for patterns in _TOGETHER:
        group = {p.name for p in paths if len(p.parts) == 1 and any(map(p.match, patterns))}
        if group & aside:
            aside |= group
    return {p: f"{KEPT}/{p.as_posix()}" if p.parts[0] in aside else p.as_posix() for p in paths}


def check_apart(src: Path, dst: Path) -> None:
    """Refuse a destination that is the source, or lies in it or around it.

    Raises:
        ConversionError: it does.
    """
    a, b = src.resolve(), dst.resolve()
    if a == b:
        raise ConversionError(f"{dst} is the source itself")
    if a in b.parents:
        raise ConversionError(f"{dst} lies inside the source {src}")
    if b in a.parents:
        raise ConversionError(f"{dst} contains the source {src}")


def snapshot(paths: Sequence[Path]) -> list[tuple[int, int, int]]:
    """Return of each file what changes when it is written or replaced."""
    found = [p.stat() for p in paths]
    return [(s.st_ino, s.st_size, s.st_mtime_ns) for s in found]


def check_space(dst: Path, files: Iterable[tuple[Path, bool]], new: int = 0) -> None:
    """Refuse a destination whose file system has no room.

    Args:
        dst: the folder to make.
        files: what is put there, each with whether it may be a hard link.
        new: bytes that are written besides.

    Raises:
        ConversionError: there is too little room.
    """
    found = [(path.stat(), link) for path, link in files]
    status, device = os.statvfs(dst.parent), dst.parent.stat().st_dev
    needed = new + sum(s.st_size for s, link in found if not (link and s.st_dev == device))
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise ConversionError(
            f"cannot write {dst}: {needed:,} bytes are needed and {free:,} are free on its file "
            "system"
        )
