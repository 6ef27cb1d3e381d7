"""Fixtures of the converters' tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from converters.converting import make_model
from transformers.utils import logging

from glazoo import versions
from glazoo.versions import TESTED


@pytest.fixture(autouse=True)
def _quiet_transformers() -> Iterator[None]:
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(level)
    if bars:
        logging.enable_progress_bar()


@pytest.fixture(autouse=True)
def _versions_are_not_the_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    # Whatever is installed is what is tested here: no conversion is to warn of it.
    monkeypatch.setattr(versions, "TESTED", {k: (x, "9999") for k, (x, _) in TESTED.items()})


MakeSource = Callable[..., Path]


@pytest.fixture
def make_source(tmp_path: Path) -> MakeSource:
    """Saves a random model with the files that usually lie beside the weights."""

    def make(
        name: str = "source", *, sharded: bool = True, dtype: Any = None, **changes: Any
    ) -> Path:
        folder = tmp_path / name
        model = make_model(**changes)
        if dtype is not None:
            model = model.to(dtype)
        model.save_pretrained(folder, max_shard_size="20KB" if sharded else "1GB")
        (folder / "tokenizer.json").write_text('{"version": "1.0"}')
        (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}')
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        (folder / "LICENSE").write_text("terms")
        (folder / "notes").mkdir()
        (folder / "notes" / "eval.md").write_text("# numbers")
        return folder

    return make


@pytest.fixture
def source(make_source: MakeSource) -> Path:
    """A sharded source folder."""
    return make_source()
