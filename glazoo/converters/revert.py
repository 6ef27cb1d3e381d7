"""Giving back the folders that converted ones were made from."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

from glazoo.converters.casting import with_dtype
from glazoo.converters.files import Progress, Staging, checksum, leftover_warnings
from glazoo.converters.folders import (
    CONFIG,
    INDEX,
    KEPT,
    MANIFEST,
    WEIGHTS,
    check_apart,
    check_space,
    dump_json,
    read_json,
)
from glazoo.converters.report import FileRecord, RevertReport
from glazoo.converters.tensors import read_shard
from glazoo.errors import ConversionError, one_line
from glazoo.families.settings import READABLE

__all__ = ["revert_checkpoint"]


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
    check_apart(source, destination)
    entries = _manifest_entries(source)
    dtype = read_json(source / MANIFEST, MANIFEST).get("dtype")
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
        may_link = {s: link and Path(s).suffix in WEIGHTS for _, s, _, _ in entries}
        check_space(destination, [(source / s, may_link[s]) for _, s, _, _ in entries])
        total = sum(length for _, _, length, _ in entries)
        with Staging(destination, force=force, total=total, progress=progress) as stage:
            for name, stored, length, expected in entries:
                how: Literal["linked", "copied", "cast"]
                if dtype is not None and stored in (f"{KEPT}/{CONFIG}", f"{KEPT}/{INDEX}"):
                    content = _recast(source / stored, entries, source, dtype)
                    stage.write(name, content)
                    digest, how, length = checksum(source / stored), "cast", len(content)
                else:
                    digest, how = stage.take(source / stored, name, link=may_link[stored])
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
    data = read_json(kept, kept.name)
    if kept.name == CONFIG:
        return dump_json(with_dtype(data, dtype))
    names = {*data["weight_map"].values()}
    total = sum(read_shard(source / s).data_bytes for n, s, _, _ in entries if n in names)
    return dump_json({**data, "metadata": {**(data.get("metadata") or {}), "total_size": total}})


def _manifest_entries(source: Path) -> list[tuple[str, str, int, str]]:
    manifest = read_json(source / MANIFEST, MANIFEST)
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
