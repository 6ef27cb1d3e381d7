"""What a mixer's intercepted functions belong to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glazoo.families import interception
from glazoo.families.calls import CALLS


class Seeing:
    """Stands for a mixer, and keeps what its scan is given."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor | None]] = []

    def scan(self, _x: Any, hidden: Tensor, mask: Tensor | None, _packed: Any) -> None:
        self.seen.append((hidden, mask))


def call() -> None:
    x = torch.zeros(1, 2, 1, 4)
    interception._scan(CALLS["chunk_simple_gla"])(x, x, x)


def test_a_mixer_inside_another_leaves_the_outer_one_its_input() -> None:
    outer, inner = Seeing(), Seeing()
    wide, narrow, mask = torch.zeros(1, 2, 8), torch.zeros(1, 2, 3), torch.ones(1, 2)
    with interception.running(outer, wide, mask):  # type: ignore[arg-type]
        with interception.running(inner, narrow, None):  # type: ignore[arg-type]
            call()
        call()
    assert [(x.shape, m is None) for x, m in inner.seen] == [(narrow.shape, True)]
    assert [(x.shape, m is None) for x, m in outer.seen] == [(wide.shape, False)]


def test_an_inner_scan_does_not_stand_for_the_outer_one() -> None:
    x = torch.zeros(1, 2, 8)
    with (
        pytest.raises(RuntimeError, match="Seeing did not call its scan on this path"),
        interception.running(Seeing(), x, None),  # type: ignore[arg-type]
        interception.running(Seeing(), x, None),  # type: ignore[arg-type]
    ):
        call()
