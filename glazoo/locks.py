"""Marking a folder as in use."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["hold"]


def hold(folder: Path) -> int | None:
    """Mark a folder as somebody's until the handle is closed or the process ends.

    It is the folder that is locked and no file in it, so that it may be renamed meanwhile, and that
    nothing is left behind.

    Args:
        folder: a folder.

    Returns:
        The handle, for `os.close`; None if the folder is somebody's already.

    Raises:
        OSError: the folder cannot be opened.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except (ImportError, OSError):
        # Some file systems have no locks.
        pass
    return handle
