"""Where the keys of a measurement without training come from: drawn, or recorded of a model."""

from __future__ import annotations

import functools
import zipfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from glazoo.compare.errors import CompareError

__all__ = [
    "EVALUATION",
    "KEY_KINDS",
    "SELECTION",
    "KeyKind",
    "Recorded",
    "draw_keys",
    "principal_axes",
    "recorded",
    "take_keys",
]

KeyKind = Literal["random", "clustered", "anisotropic"]

KEY_KINDS: tuple[KeyKind, ...] = get_args(KeyKind)
"""random: uniform on the unit sphere; clustered: four groups, keys of a group have a mean cosine of
1/2; anisotropic: the variance of key channel i falls as 1/i."""

SELECTION, EVALUATION = 0, 1
"""Streams of random numbers: gates are chosen on the one and errors measured on the other. Of a
recorded text they are the first and the second half."""

_CLUSTERS = 4


def draw_keys(
    kind: KeyKind, seeds: int, pairs: int, size: int, generator: torch.Generator
) -> Float[Tensor, "S N K"]:
    """Draws unit keys, a set per seed, all from one generator."""
    x = torch.randn(seeds, pairs, size, generator=generator)
    if kind == "clustered":
        centers = torch.randn(seeds, _CLUSTERS, size, generator=generator)
        member = torch.randint(0, _CLUSTERS, (seeds, pairs), generator=generator)
        x = x + centers.gather(1, member[..., None].expand(-1, -1, size))
    elif kind == "anisotropic":
        x = x * torch.arange(1, size + 1).float().rsqrt()
    return F.normalize(x, dim=-1)


def principal_axes(keys: Float[Tensor, "... T K"]) -> Float[Tensor, "... K K"]:
    """Return the eigenvectors of E[k k^T], columns, the largest eigenvalue first."""
    x = keys.double()
    vectors: Tensor = torch.linalg.eigh(x.mT @ x).eigenvectors
    return vectors.flip(-1).float()


@dataclass(frozen=True, eq=False)
class Recorded:
    """Keys of the heads of a trained model, in the order of texts.

    Every head's are scaled so that their mean square is one.
    """

    keys: Float[Tensor, "L C T K"]
    """C contexts of T tokens; of a single text, its two halves."""
    axes: Float[Tensor, "L K K"]
    """Principal axes of every head's keys in the first half of the contexts."""

    @property
    def longest(self) -> int:
        """How many keys in a row a context has."""
        return self.keys.shape[2]

    @property
    def size(self) -> int:
        """Key channels."""
        return self.keys.shape[3]

    @property
    def directions(self) -> float:
        """Participation ratio (tr M)^2 / |M|^2 of M = E[k k^T], mean over heads."""
        x = self.keys.double().flatten(1, 2)
        moment = x.mT @ x
        trace = moment.diagonal(dim1=-2, dim2=-1).sum(-1)
        return float((trace.square() / moment.square().sum((-2, -1))).mean())

    def draw(
        self, seeds: int, pairs: int, generator: torch.Generator, *, stream: int, rotated: bool
    ) -> Float[Tensor, "S N K"]:
        """Takes consecutive keys, a random head and place per seed, along their own or principal
        axes."""
        heads = torch.randint(len(self.keys), (seeds,), generator=generator)
        first = torch.randint(self.longest - pairs + 1, (seeds,), generator=generator)
        half = self.keys.shape[1] // 2
        context = torch.full_like(heads, stream * half)
        if half > 1:
            context += torch.randint(half, (seeds,), generator=generator)
        at = first[:, None] + torch.arange(pairs)
        keys = self.keys[heads[:, None], context[:, None], at]
        return keys @ self.axes[heads] if rotated else keys


@functools.lru_cache(maxsize=4)
def recorded(name: str) -> Recorded:
    """Reads keys that `glazoo inspect --save-keys` wrote, `layer_N`, [T, H, K]; or those of C >= 2
    texts, which start anew, [C, T, H, K].

    Args:
        name: a file, or `trained`, the keys that come with the package: of the Gated DeltaNet that
            `benchmarks/language_model.py` trains on prose, 512 tokens of its held-out text.

    Raises:
        CompareError: the file cannot be read, or holds something else.
    """
    packaged = name == "trained"
    path = Path(str(files("glazoo.compare") / "trained_keys.npz")) if packaged else Path(name)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            layers = [torch.from_numpy(data[n]).float() for n in data.files]
    except OSError as e:
        raise CompareError(
            f"keys: cannot read {name!r}: {e.strerror or e}; accepted are "
            f"{', '.join(KEY_KINDS)}, trained, and a file of `glazoo inspect --save-keys`"
        ) from e
    except (ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as e:
        raise CompareError(f"keys: {name} is no file of `glazoo inspect --save-keys`: {e}") from e
    found = [_in_contexts(x) for x in layers]
    shapes = {None if x is None else (*x.shape[:2], x.shape[3]) for x in found}
    if len(shapes) != 1 or None in shapes:
        got = ", ".join(str(list(x.shape)) for x in layers) or "nothing"
        raise CompareError(
            f"keys: {name} holds {got}; accepted are keys [T, H, K] of every layer, with one T and "
            "one K, or those of several texts, [C, T, H, K]"
        )
    keys = torch.cat([x.permute(2, 0, 1, 3) for x in found if x is not None])
    if not bool(torch.isfinite(keys).all()):
        raise CompareError(f"keys: {name} holds numbers that are not finite")
    scale = keys.square().sum(-1).mean((1, 2)).clamp(min=1e-30).rsqrt()
    keys = keys * scale[:, None, None, None]
    return Recorded(keys, principal_axes(keys[:, : keys.shape[1] // 2].flatten(1, 2)))


def _in_contexts(x: Tensor) -> Float[Tensor, "C T H K"] | None:
    """Return a layer's keys by contexts, the halves of a single text; None if these are no keys."""
    if x.dim() == 3:
        x = x[: len(x) // 2 * 2].unflatten(0, (2, -1)) if len(x) > 1 else x[None]
    return x if x.dim() == 4 and x.numel() and len(x) > 1 else None


def take_keys(
    kind: str,
    seeds: int,
    pairs: int,
    size: int,
    generator: torch.Generator,
    *,
    stream: int,
    rotated: bool,
) -> Float[Tensor, "S N K"]:
    """Return keys of any kind, drawn or recorded, a set per seed.

    Args:
        kind: one of `KEY_KINDS`, or what `recorded` takes.
        seeds: sets of keys.
        pairs: keys of a set.
        size: key channels; recorded keys have their own.
        generator: of all that is random.
        stream: `SELECTION` or `EVALUATION`.
        rotated: give recorded keys along their principal axes. Turning the keys of a memory is what
            turning its importance's axes is; drawn keys have no axes that all draws share but their
            own.
    """
    if kind in KEY_KINDS:
        return draw_keys(kind, seeds, pairs, size, generator)
    return recorded(kind).draw(seeds, pairs, generator, stream=stream, rotated=rotated)
