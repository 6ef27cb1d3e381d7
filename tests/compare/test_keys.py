"""Keys of a measurement without training, and what is written with them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from glazoo.compare.capacity import CapacityPlan, curve, written
from glazoo.compare.errors import CompareError
from glazoo.compare.keys import EVALUATION, SELECTION, principal_axes, recorded, take_keys
from glazoo.compare.probe import missed_values
from glazoo.zoo import load


def narrow(seed: int, heads: int = 2, tokens: int = 200, size: int = 8) -> np.ndarray:
    """Keys that live on few directions, which lie along no channel."""
    rng = np.random.default_rng(seed)
    turned = np.linalg.qr(rng.standard_normal((heads, size, size)))[0]
    channels = rng.standard_normal((heads, tokens, size)) / np.arange(1, size + 1)
    keys = np.einsum("htk,hjk->thj", channels, turned)
    return keys / np.linalg.norm(keys, axis=-1, keepdims=True)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "keys.npz"
    np.savez(path, layer_0=narrow(0), layer_3=narrow(1))
    return str(path)


def test_a_recorded_text_is_read_in_its_halves(file: str) -> None:
    found = recorded(file)
    assert found.keys.shape == (4, 2, 100, 8)
    assert torch.allclose(found.keys.square().sum(-1).mean((1, 2)), torch.ones(4))
    rows = {tuple(k): t for head in found.keys.flatten(1, 2).tolist() for t, k in enumerate(head)}
    for stream, places in ((SELECTION, range(100)), (EVALUATION, range(100, 200))):
        rng = torch.Generator().manual_seed(0)
        drawn = take_keys(file, 50, 30, 8, rng, stream=stream, rotated=False)
        at = torch.tensor([[rows[tuple(k)] for k in keys] for keys in drawn.tolist()])
        assert bool((at.diff(dim=1) == 1).all())
        assert int(at.min()) in places
        assert int(at.max()) in places
        assert len(set(at[:, 0].tolist())) > 10


def test_recorded_contexts_are_read_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "contexts.npz"
    np.savez(path, layer_0=np.stack([narrow(s, tokens=40) for s in range(6)]))
    found = recorded(str(path))
    assert found.keys.shape == (2, 6, 40, 8)
    rows = {
        tuple(k): (c, t)
        for head in found.keys.tolist()
        for c, context in enumerate(head)
        for t, k in enumerate(context)
    }
    for stream, contexts in ((SELECTION, {0, 1, 2}), (EVALUATION, {3, 4, 5})):
        rng = torch.Generator().manual_seed(0)
        drawn = take_keys(str(path), 50, 30, 8, rng, stream=stream, rotated=False)
        at = [[rows[tuple(k)] for k in keys] for keys in drawn.tolist()]
        assert all(len({c for c, _ in of}) == 1 for of in at)
        assert {of[0][0] for of in at} == contexts
        assert bool((torch.tensor([[t for _, t in of] for of in at]).diff(dim=1) == 1).all())


def test_rotated_keys_are_the_same_along_axes_of_the_first_half(file: str) -> None:
    found = recorded(file)
    own, turned = (
        take_keys(
            file, 6, 40, 8, torch.Generator().manual_seed(1), stream=SELECTION, rotated=rotated
        )
        for rotated in (False, True)
    )
    # Products of 8 terms of keys that are at most a few times as long as one.
    slack = 8 * 8 * torch.finfo(torch.float32).eps * float(own.square().sum(-1).max())
    assert float((own @ own.mT - turned @ turned.mT).abs().max()) < slack
    for keys, axes in zip(found.keys[:, 0], found.axes, strict=True):
        moment = (keys @ axes).mT @ (keys @ axes)
        assert bool((moment.diagonal().diff() <= 0).all())
        away = moment - moment.diagonal().diag()
        assert float(away.abs().max()) < 1e-4 * float(moment.abs().max())


def test_principal_axes_of_keys_along_one_direction() -> None:
    direction = torch.tensor([0.6, 0.0, 0.8])
    axes = principal_axes(torch.tensor([[1.0], [-2.0], [0.5]]) * direction)
    assert torch.allclose(axes[:, 0].abs(), direction, atol=1e-6)
    assert torch.allclose(axes.mT @ axes, torch.eye(3), atol=1e-6)


def test_turning_helps_where_keys_live_on_few_directions(file: str) -> None:
    errors = {}
    for name in ("deltanet", "metaplastic_deltanet", "metaplastic_deltanet_rotated"):
        plan = CapacityPlan(load(name), name, file, 0, 16, (8,), 12, 0, 0.25, "chunked")
        found = curve(plan)
        assert found.key_size == 8
        errors[name] = found.intervals[0]
    assert errors["metaplastic_deltanet_rotated"].high < errors["metaplastic_deltanet"].low
    assert errors["metaplastic_deltanet"].high < errors["deltanet"].low


def test_axes_do_not_change_a_memory_without_importance_along_them(file: str) -> None:
    """At b = 0 and at full precision there are no axes."""
    plan = CapacityPlan(load("mesanet"), "x", file, 0, 4, (6,), 3, 0, 0.25, "reference")
    y = curve(plan).errors
    data = np.load(file)
    turn = np.linalg.qr(np.random.default_rng(3).standard_normal((8, 8)))[0]
    other = Path(file).with_name("turned.npz")
    np.savez(other, **{n: data[n] @ turn for n in data.files})
    again = curve(
        CapacityPlan(load("mesanet"), "x", str(other), 0, 4, (6,), 3, 0, 0.25, "reference")
    )
    assert np.allclose(y, again.errors, atol=1e-4)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "holds nothing"),
        ({"a": np.zeros((3, 4))}, r"holds \[3, 4\]"),
        ({"a": np.ones((6, 1, 4)), "b": np.ones((6, 1, 5))}, "one T and one K"),
        ({"a": np.full((6, 1, 4), np.nan)}, "not finite"),
    ],
)
def test_files_of_other_things_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(CompareError, match=message):
        recorded(str(tmp_path / "x.npz"))


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("keys")
    np.save(tmp_path / "array.npy", np.zeros((2, 1, 2)))
    whole = tmp_path / "whole.npz"
    np.savez(whole, layer_0=narrow(0))
    (tmp_path / "cut.npz").write_bytes(whole.read_bytes()[:-40])
    for name in ("text.npz", "array.npy", "cut.npz"):
        with pytest.raises(CompareError, match="is no file of"):
            recorded(str(tmp_path / name))
    with pytest.raises(CompareError, match="cannot read"):
        recorded(str(tmp_path / "absent.npz"))


def test_keys_that_come_with_the_package() -> None:
    found = recorded("trained")
    assert found.keys.shape == (12, 2, 256, 32)
    assert 4 < found.directions < 6


def test_more_pairs_than_a_text_has_are_refused(file: str) -> None:
    plan = CapacityPlan(load("gla"), "gla", file, 0, 4, (101,), 1, 0, 0.25, "auto")
    with pytest.raises(CompareError, match="100 keys in a row"):
        curve(plan)


def test_what_tasks_write() -> None:
    rng = torch.Generator().manual_seed(0)
    keys, values = torch.eye(5).expand(3, -1, -1), torch.randn(3, 5, 2000, generator=rng)
    once = written("once", keys, values, rng)
    assert torch.equal(once[0], keys)
    assert torch.equal(once[1], values)

    k, v = written("noisy", keys, values, rng)
    assert k.shape == (3, 20, 5)
    assert torch.equal(k.sum(1), torch.full((3, 5), 4.0))
    noise = v - k @ values
    # Variance of 2000 draws of variance one, at six standard deviations.
    assert float((noise.square().mean(-1) - 1).abs().max()) < 6 * (2 / 2000) ** 0.5
    assert not torch.equal(k[0], k[1])

    k, v = written("rewrite", keys, values, rng)
    first, last = k[:, :5], k[:, 5:]
    assert torch.equal(first.sum(1), torch.ones(3, 5))
    assert torch.equal(v[:, 5:], last @ values)
    before = v[:, :5] - first @ values
    assert float((before.square().mean(-1) - 2).abs().max()) < 12 * (2 / 2000) ** 0.5


def test_missed_values_are_counted() -> None:
    v = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]]])
    right = 3 * v
    swapped = v[:, [1, 0, 2]]
    none = torch.zeros_like(v)
    outputs = torch.stack([right, swapped, none, torch.full_like(v, torch.nan), -v], 2)
    assert missed_values(outputs, v)[0].tolist() == pytest.approx([0, 2 / 3, 1, 1, 1])
