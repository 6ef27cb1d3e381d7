"""The folder of a comparison: what was asked, and one line per finished run."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from glazoo.compare.errors import CompareError
from glazoo.compare.files import make_folder, write_json
from glazoo.locks import hold
from glazoo.strictjson import dumps, loads

__all__ = ["Store"]

_CONFIG, _RUNS = "config.json", "runs.jsonl"


class Store:
    """Results of one comparison on disk; a finished run is never lost.

    A run is a line that is written and flushed to the disk when it is done, so that whatever stops
    the comparison costs at most the runs in progress. Only one process at a time may hold a folder.

    Args:
        folder: where; made if it is not there.
        config: what all runs of this folder share. More variants, seeds, learning rates or state
            budgets may be added to a folder later; a different task or training may not.

    Raises:
        CompareError: the folder holds results of another config, its files are damaged, it cannot
            be written to, or another process works in it.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder = make_folder(folder)
        self._lock = hold(self.folder)
        if self._lock is None:
            raise CompareError(
                f"another process is working in {self.folder}: wait for it, or give another --out"
            )
        try:
            self._check_config(config)
            self.results = self._load()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets other processes work in the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _check_config(self, config: dict[str, Any]) -> None:
        path = self.folder / _CONFIG
        wanted = loads(dumps(config))
        if not path.exists():
            if (self.folder / _RUNS).exists():
                raise CompareError(
                    f"{self.folder} has results but no {_CONFIG}: give another --out"
                )
            write_json(path, wanted)
            return
        try:
            found = loads(path.read_text("utf-8"))
        except (OSError, ValueError) as e:
            raise CompareError(f"cannot read {path}: {e}") from e
        different = _differences(found, wanted)
        if different:
            raise CompareError(
                f"{self.folder} holds results of another config ({'; '.join(different)}): "
                "give another --out, or the options that it was made with"
            )

    def _load(self) -> dict[str, dict[str, Any]]:
        """Reads the finished runs; a last line that was cut off while it was written is dropped."""
        path = self.folder / _RUNS
        if not path.exists():
            return {}
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            try:
                with path.open("r+b") as f:
                    f.truncate(whole)
            except OSError as e:
                raise CompareError(f"cannot repair {path}: {e.strerror or e}") from e
        out = {}
        for i, line in enumerate(data[:whole].splitlines(), 1):
            try:
                result = loads(line)
                out[result["key"]] = result
            except (ValueError, TypeError, KeyError) as e:
                raise CompareError(
                    f"{path}: line {i} is damaged ({e}): delete that line and repeat the command, "
                    "which makes this run again"
                ) from e
        return out

    def add(self, result: dict[str, Any]) -> None:
        """Stores a finished run.

        Raises:
            CompareError: it cannot be written, for example because the disk is full; earlier runs
                are safe.
        """
        line = dumps(result).encode() + b"\n"
        path = self.folder / _RUNS
        try:
            with path.open("ab", buffering=0) as f:
                start = f.tell()
                try:
                    written = f.write(line)
                    if written != len(line):
                        raise OSError(28, "No space left on device")
                    os.fsync(f.fileno())
                except OSError:
                    # Half a line left behind would be dropped at the next start anyway.
                    with contextlib.suppress(OSError):
                        f.truncate(start)
                    raise
        except OSError as e:
            raise CompareError(
                f"cannot write {path}: {e.strerror or e}; the {len(self.results)} runs stored "
                "before are safe. Make room and repeat the command: it goes on where it stopped"
            ) from e
        self.results[result["key"]] = result


def _differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Lists the values that differ, by their path."""
    if isinstance(a, dict) and isinstance(b, dict):
        out = []
        for key in sorted({*a, *b}):
            out += _differences(a.get(key), b.get(key), f"{where}.{key}" if where else key)
        return out
    return [] if a == b else [f"{where}: {a!r} there, {b!r} here"]
