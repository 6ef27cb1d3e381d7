"""Saving models into folders that hold other files already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from glazoo.errors import ConversionError

__all__ = ["SavesWhole", "refuse_incomplete_gates"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def _mark(path: Path) -> tuple[int, int, int] | None:
    if not path.is_file():
        return None
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def refuse_incomplete_gates(
    folder: object, info: Mapping[str, Any], missing: Iterable[str] | None = None
) -> None:
    """Refuses a checkpoint that lacks tensors of importance gates, or has some that the model has
    no place for.

    Args:
        folder: where it was loaded from.
        info: what transformers says of the loading.
        missing: names of the tensors that must not be absent. Default: those of gates.

    Raises:
        ConversionError: it is not complete.
    """
    if missing is None:
        missing = (k for k in info["missing_keys"] if ".metaplastic." in k)
    for kind, keys in (
        ("lacks", sorted(missing)),
        ("has unknown", sorted(k for k in info["unexpected_keys"] if ".metaplastic." in k)),
        ("has misshapen", sorted(str(k) for k in info["mismatched_keys"])),
    ):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ConversionError(
                f"{folder} {kind} tensors: {', '.join(keys[:3])}{more}; it is not a complete "
                "metaplastic checkpoint"
            )


class SavesWhole:
    """Mixed into a model's class: what `save_pretrained` leaves in a folder is one checkpoint,
    whatever weights were there before."""

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        """Saves the model, into the folder that it was loaded from too."""
        folder = Path(save_directory)
        adapters = getattr(self, "_hf_peft_config_loaded", False)
        weights = is_main_process and not adapters and not kwargs.get("distributed_checkpoint")
        # A conversion links shards to the source's files. Writing over one would change the source:
        # take the link away first. What replaces it is a file of its own.
        for path in folder.glob("*.safetensors") if weights else ():
            if path.stat().st_nlink > 1:
                path.unlink()
        single, index = folder / _SINGLE, folder / _INDEX
        before = {path: _mark(path) for path in (single, index)}
        result = super().save_pretrained(  # type: ignore[misc]
            save_directory, is_main_process, *args, **kwargs
        )
        # transformers removes old shards, but not the index over them, and not a single file, which
        # loaders prefer to the shards that were just written.
        for old, new in ((single, index), (index, single)):
            kept = before[old] is not None and before[old] == _mark(old)
            if weights and kept and before[new] != _mark(new):
                old.unlink()
        return result
