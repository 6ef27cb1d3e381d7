"""Planning and writing the files of a conversion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from glazoo.converters.card import CARD, model_card
from glazoo.converters.casting import Cast, with_dtype
from glazoo.converters.files import Progress, Staging
from glazoo.converters.folders import (
    CONFIG,
    INDEX,
    KEPT,
    MANIFEST,
    WEIGHTS,
    check_space,
    dump_json,
    snapshot,
    stored_names,
)
from glazoo.converters.report import FileRecord
from glazoo.converters.source import Checkpoint
from glazoo.converters.tensors import NewTensor, Shard, read_shard, write_shard
from glazoo.converters.tokenizers import TOKENIZER_CONFIG
from glazoo.errors import ConversionError
from glazoo.families.settings import FORMAT_VERSION, Settings
from glazoo.models.remote import REMOTE_CODE, REMOTE_MODULE, remote_map, without_model_code

__all__ = ["PlannedFile", "plan_files", "write_files"]


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file of the source, and what a conversion does with it."""

    name: str
    stored: str
    """Its name in the converted folder."""
    bytes: int
    """Its size there."""
    link: bool
    """Whether it may be a hard link."""
    cast: Shard | None
    """The shard, where its weights are cast and it is written anew."""


def _shard_names(checkpoint: Checkpoint) -> tuple[dict[str, str], str]:
    """Return the names of a source's shards in the converted folder, and that of the added one."""
    n = len(checkpoint.shards) + 1
    # Renamed, single files too: a model.safetensors beside an index would be loaded instead of it.
    *names, last = (f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1))
    return dict(zip((s.path.name for s in checkpoint.shards), names, strict=True)), last


def plan_files(
    checkpoint: Checkpoint, cast: Cast | None, *, retokenized: bool, link: bool
) -> tuple[PlannedFile, ...]:
    """Return what becomes of every file of a source.

    Args:
        checkpoint: the source.
        cast: what is written in another dtype.
        retokenized: whether the tokenizer's configuration is written anew.
        link: whether weights may be hard links.

    Raises:
        ConversionError: a file of the source has the name of one that is written.
    """
    folder = checkpoint.folder
    moves, last = _shard_names(checkpoint)
    replaced = {CARD, REMOTE_CODE, *([TOKENIZER_CONFIG] if retokenized else [])}
    kept = [CONFIG, *([INDEX] if checkpoint.index is not None else [])]
    originals: list[tuple[str, str, bool]] = [
        *((name, stored, link) for name, stored in moves.items()),
        *((name, f"{KEPT}/{name}", False) for name in kept),
        # Small files that people edit in place are copied always.
        *(
            (p.as_posix(), stored, link and p.suffix in WEIGHTS)
            for p, stored in stored_names(folder, checkpoint.others, replaced).items()
        ),
    ]
    clashes = {stored for _, stored, _ in originals} & {CONFIG, INDEX, MANIFEST, last}
    if clashes or len({stored for _, stored, _ in originals}) != len(originals):
        raise ConversionError(
            f"files of {folder} would overwrite those of the conversion: {sorted(clashes)}"
        )
    anew = {s.path.name: s for s in checkpoint.shards if cast is not None and cast.changes(s)}

    def size(name: str) -> int:
        if cast is not None and name in anew:
            return cast.size(anew[name])
        return (folder / name).stat().st_size

    return tuple(
        PlannedFile(name, stored, size(name), may_link, anew.get(name))
        for name, stored, may_link in originals
    )


def write_files(
    checkpoint: Checkpoint,
    settings: Settings,
    files: Sequence[PlannedFile],
    new: Sequence[NewTensor],
    destination: Path,
    *,
    cast: Cast | None,
    tokenizer: dict[str, Any] | None,
    remote_code: bool,
    force: bool,
    progress: Progress | None,
) -> tuple[FileRecord, ...]:
    """Write the converted folder.

    Args:
        checkpoint: the source.
        settings: what is added to it.
        files: what `plan_files` gave.
        new: the added tensors.
        destination: the folder to make.
        cast: what is written in another dtype.
        tokenizer: a new configuration of the tokenizer, None where the source's serves.
        remote_code: whether to write a module for loaders that trust remote code.
        force: replace a model's folder that is already there.
        progress: called as `progress(file, done_bytes, total_bytes)`.

    Returns:
        What was done with every file of the source.

    Raises:
        ConversionError: there is no room, or the source changed meanwhile.
        OSError: a file cannot be read.
    """
    folder, family = checkpoint.folder, checkpoint.family
    moves, last = _shard_names(checkpoint)
    added_bytes = sum(t.nbytes for t in new)
    check_space(
        destination,
        [(folder / f.name, f.link) for f in files if f.cast is None],
        added_bytes + sum(f.bytes for f in files if f.cast is not None),
    )
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
    weight_map = {key: moves[name] for key, name in checkpoint.weight_map.items()}
    weight_map |= {t.name: last for t in new}
    index |= {"metadata": head, "weight_map": dict(sorted(weight_map.items()))}
    old_card = folder / CARD
    dtype = cast.dtype if cast is not None and any(f.cast is not None for f in files) else None
    card = model_card(
        folder,
        settings,
        family,
        old_card.read_text("utf-8", errors="replace") if old_card.is_file() else None,
        remote_code=remote_code,
        dtype=dtype,
    )
    config = _config(checkpoint, settings, cast, remote_code=remote_code)
    paths = [folder / f.name for f in files]
    before = snapshot(paths)
    records: list[FileRecord] = []
    total = sum(f.bytes for f in files) + added_bytes
    with Staging(destination, force=force, total=total, progress=progress) as stage:
        for f in files:
            digest: str
            how: Literal["linked", "copied", "cast"]
            if cast is not None and f.cast is not None:
                digest, how = stage.make(f.stored, partial(cast.write, shard=f.cast)), "cast"
            else:
                digest, how = stage.take(folder / f.name, f.stored, link=f.link)
            records.append(FileRecord(f.name, f.stored, f.bytes, digest, how))
        stage.write(last, lambda f: write_shard(f, new))
        stage.write(INDEX, dump_json(index))
        manifest = {
            "format_version": FORMAT_VERSION,
            "settings": settings.to_block(),
            "files": [{k: v for k, v in asdict(r).items() if k != "how"} for r in records],
        }
        if dtype is not None:
            manifest["dtype"] = dtype
        stage.write(MANIFEST, dump_json(manifest))
        stage.write(CARD, card.encode())
        if tokenizer is not None:
            stage.write(TOKENIZER_CONFIG, dump_json(tokenizer))
        if remote_code:
            stage.write(REMOTE_CODE, REMOTE_MODULE.encode())
        stage.write(CONFIG, dump_json(config))
        # Read once more as loaders will, and compared with what was checked before the first byte
        # was written.
        for name, stored in moves.items():
            if dict(read_shard(stage.folder / stored).tensors) != expected[name]:
                raise ConversionError(f"{name} changed while it was being converted")
        read_shard(stage.folder / last)
        if snapshot(paths) != before:
            raise ConversionError(f"{folder} changed while it was being converted")
    return tuple(records)


def _config(
    checkpoint: Checkpoint, settings: Settings, cast: Cast | None, *, remote_code: bool
) -> dict[str, Any]:
    """Return the converted model's config.json."""
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
    return config
