"""Writing a folder that is complete or absent."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, BinaryIO, Literal

from glazoo.errors import ConversionError, one_line
from glazoo.locks import hold

__all__ = [
    "Leftover",
    "Progress",
    "Staging",
    "Terminated",
    "checksum",
    "leftover_warnings",
    "leftovers",
    "remove_leftovers",
    "size_text",
]

Progress = Callable[[str, int, int], None]
"""Called as `progress(file, done_bytes, total_bytes)` while a folder is written; the total does not
change."""

_BLOCK = 4 << 20
_CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS}


class Terminated(SystemExit):
    """SIGTERM, as an exception, so that what was begun is cleaned up."""


def checksum(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """Return a file's SHA-256, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(_BLOCK):
            digest.update(block)
            if on_bytes is not None:
                on_bytes(len(block))
    return digest.hexdigest()


def size_text(n: int) -> str:
    """Return a number of bytes for people."""
    value, unit = float(n), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{n} B" if unit == "B" else f"{value:.1f} {unit}"


@dataclass(frozen=True, slots=True)
class Leftover:
    """A folder that a killed run has left beside its destination."""

    path: Path
    destination: Path
    only_copy: bool
    """Whether it holds what stood at the destination, which nothing has replaced."""
    bytes: int
    """Size of the files that no other folder shares."""

    def __str__(self) -> str:
        what = f"{self.path} ({size_text(self.bytes)})"
        if not self.only_copy:
            return what
        return f"{what}, which holds what stood at {self.destination}: move it back, or delete it"


_LEFT = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|replaced)-[^.]*")


def leftovers(folder: Path, name: str | None = None) -> list[Leftover]:
    """Return what killed runs have left in a folder, of one destination or of all.

    Raises:
        OSError: the folder cannot be read.
    """
    found = []
    for path in sorted(folder.iterdir()):
        match = _LEFT.fullmatch(path.name)
        if match is None or name not in (None, match["name"]) or not path.is_dir():
            continue
        lock = hold(path)
        if lock is None:
            # A run that is still going.
            continue
        os.close(lock)
        destination = folder / match["name"]
        only = match["kind"] == "replaced" and not destination.exists()
        files = [p.lstat() for p in path.rglob("*") if p.is_file()]
        size = sum(s.st_size for s in files if s.st_nlink == 1)
        found.append(Leftover(path, destination, only, size))
    return found


def leftover_warnings(destination: Path) -> list[str]:
    """Says what killed runs have left beside a destination, and what removes it.

    Raises:
        OSError: the folder around it cannot be read.
    """
    removal = f"; glazoo doctor {destination.parent} --remove-leftovers removes it"
    return [
        f"a killed run has left {x}" + ("" if x.only_copy else removal)
        for x in leftovers(destination.parent, destination.name)
    ]


def remove_leftovers(folder: Path, name: str | None = None) -> list[Leftover]:
    """Removes what killed runs have left in a folder, but for what is nowhere else; returns what
    was removed.

    Raises:
        OSError: something cannot be removed.
    """
    gone = [x for x in leftovers(folder, name) if not x.only_copy]
    for leftover in gone:
        shutil.rmtree(leftover.path)
    return gone


class _Signals:
    """Turns SIGINT and SIGTERM into exceptions, except while held; then they wait."""

    def __init__(self) -> None:
        self._old: dict[int, Any] = {}
        self._held = 0
        self._pending: int | None = None

    def __enter__(self) -> _Signals:
        # Python delivers signals to the main thread only, and only it may install handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                old = signal.getsignal(number)
                if old not in (signal.SIG_IGN, None):
                    self._old[number] = old
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._held:
            self._pending = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise Terminated(128 + number)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    def deliver(self) -> None:
        """Raises what came in while signals were held."""
        if self._pending is not None:
            number, self._pending = self._pending, None
            self._handle(number, None)


def _sync_folder(path: Path) -> None:
    # Some file systems refuse to open or sync a folder; the rename is then as durable as they make
    # it.
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class Staging:
    """A folder that appears under its name only when it is complete.

    Everything is written into a hidden sibling, which is renamed at the end. An exception, SIGINT
    or SIGTERM before that removes the sibling; what stood at the destination stays until the new
    folder is complete.

    Args:
        destination: the folder to appear.
        force: replace what is there, if it is a model's folder.
        total: bytes that will be reported to `progress`.
        progress: called while files are written.
    """

    def __init__(
        self, destination: Path, *, force: bool, total: int, progress: Progress | None
    ) -> None:
        self.destination = destination
        self.force = force
        self._total = total
        self._done = 0
        self._progress = progress
        self._signals = _Signals()
        self._folder: Path | None = None
        self._mark: int | None = None

    @property
    def folder(self) -> Path:
        """Where files are written now."""
        assert self._folder is not None
        return self._folder

    @staticmethod
    def check(destination: Path, *, force: bool) -> None:
        """Refuses a destination that cannot be written or must not be replaced.

        Raises:
            ConversionError: with the reason.
        """
        parent = destination.parent
        if not parent.is_dir():
            raise ConversionError(f"{destination}: its parent folder {parent} does not exist")
        if destination.is_symlink():
            raise ConversionError(f"{destination} is a symbolic link: name the folder itself")
        if destination.exists():
            if not destination.is_dir():
                raise ConversionError(f"{destination} exists and is not a folder")
            if not force:
                raise ConversionError(f"{destination} exists already; --force replaces it")
            if any(destination.iterdir()) and not (destination / "config.json").is_file():
                raise ConversionError(
                    f"{destination} has no config.json: it is not a model's folder, and is not "
                    "replaced"
                )
        if not os.access(parent, os.W_OK | os.X_OK):
            raise ConversionError(f"{destination}: {parent} is not writable")

    def __enter__(self) -> Staging:
        self.check(self.destination, force=self.force)
        self._signals.__enter__()
        try:
            with self._signals.hold():
                prefix = f".{self.destination.name}.partial-"
                self._folder = Path(tempfile.mkdtemp(prefix=prefix, dir=self.destination.parent))
                # mkdtemp makes it private; a model's folder has the rights that any new folder has.
                mask = os.umask(0)
                os.umask(mask)
                self._folder.chmod(0o777 & ~mask)
                self._mark = hold(self._folder)
            self._signals.deliver()
        except BaseException as e:
            self._discard()
            self._signals.__exit__()
            if isinstance(e, OSError):
                raise ConversionError(f"cannot write {self.destination}: {one_line(e)}") from e
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                try:
                    self._signals.deliver()
                    self._commit()
                except OSError as e:
                    raise ConversionError(f"cannot write {self.destination}: {one_line(e)}") from e
        finally:
            self._discard()
            self._signals.__exit__()
        # What came in while the folder was being renamed: it is complete, but nobody is waiting.
        if kind is None:
            self._signals.deliver()
        if isinstance(error, OSError):
            raise ConversionError(f"cannot write {self.destination}: {one_line(error)}") from error

    def _discard(self) -> None:
        with self._signals.hold():
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
                self._folder = None
            if self._mark is not None:
                os.close(self._mark)
                self._mark = None

    def _commit(self) -> None:
        for folder, _, _ in os.walk(self.folder):
            _sync_folder(Path(folder))
        parent = self.destination.parent
        with self._signals.hold():
            aside: Path | None = None
            if self.destination.exists():
                # Checked again: it may have appeared meanwhile.
                self.check(self.destination, force=self.force)
                prefix = f".{self.destination.name}.replaced-"
                aside = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
                self.destination.rename(aside / self.destination.name)
            try:
                self.folder.rename(self.destination)
            except OSError:
                if aside is not None:
                    (aside / self.destination.name).rename(self.destination)
                    aside.rmdir()
                raise
            self._folder = None
            _sync_folder(parent)
            if aside is not None:
                shutil.rmtree(aside, ignore_errors=True)

    def _advance(self, name: str, n: int) -> None:
        self._done += n
        if self._progress is not None:
            self._progress(name, self._done, self._total)

    def _target(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, name: str, content: Callable[[BinaryIO], None] | bytes) -> Path:
        """Writes a new file and syncs it."""
        path = self._target(name)
        with path.open("xb") as f:
            if isinstance(content, bytes):
                f.write(content)
            else:
                content(f)
            f.flush()
            os.fsync(f.fileno())
        self._advance(name, path.stat().st_size)
        return path

    def make(self, name: str, content: Callable[[BinaryIO], None]) -> str:
        """Writes a new large file and syncs it; gives its SHA-256."""
        path = self._target(name)
        with path.open("xb") as f:
            content(f)
            f.flush()
            os.fsync(f.fileno())
        return checksum(path, lambda n: self._advance(name, n))

    def take(
        self, source: Path, name: str, *, link: bool
    ) -> tuple[str, Literal["linked", "copied"]]:
        """Puts a file of the source into the folder, by a hard link or a copy.

        Args:
            source: the file; links are followed, as caches keep their files behind them.
            name: where it goes.
            link: whether to try a hard link first. Another file system, or one without links, gets
                a copy.

        Returns:
            SHA-256 of the content, and what was done.
        """
        source = source.resolve(strict=True)
        path = self._target(name)
        if link:
            try:
                os.link(source, path)
            except OSError as e:
                if e.errno not in _CANNOT_LINK:
                    raise
            else:
                return checksum(path, lambda n: self._advance(name, n)), "linked"
        digest = hashlib.sha256()
        with source.open("rb") as f, path.open("xb") as out:
            while block := f.read(_BLOCK):
                digest.update(block)
                out.write(block)
                self._advance(name, len(block))
            out.flush()
            os.fsync(out.fileno())
        return digest.hexdigest(), "copied"
