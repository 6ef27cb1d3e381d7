"""Writing results so that nothing that was there is lost."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from glazoo.compare.errors import CompareError
from glazoo.strictjson import dumps

__all__ = ["make_folder", "write_bytes", "write_csv", "write_json", "write_text"]


def make_folder(path: Path) -> Path:
    """Makes a folder for results and checks that it can be written to.

    Raises:
        CompareError: something else is there, or the folder cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as e:
        raise CompareError(f"cannot write results to {path}: {e.strerror or e}") from e
    return path


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all: what was there stays until the new one is complete.

    Raises:
        CompareError: it cannot be written, for example because the disk is full.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise CompareError(f"cannot write {path}: {e.strerror or e}") from e


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, data: Any) -> None:
    """Writes plain data as JSON, whole or not at all."""
    write_text(path, dumps(data, indent=1) + "\n")


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows that share their keys as CSV, whole or not at all."""
    rows = list(rows)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, buffer.getvalue())
