"""What a recurrent layer keeps between calls, as a layer of transformers' caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from glazoo.layers import LayerState
from glazoo.models.configuration import RECURRENT

__all__ = ["CACHE", "RecurrentCacheLayer", "recurrent_layer"]

CACHE = next(n for n in ("cache", "past_key_values") if hasattr(BaseModelOutputWithPast, n))
"""Name of the cache in outputs of the installed transformers."""

Again = Callable[[int], LayerState]
"""Gives the state after the first so many tokens of a call."""


class RecurrentCacheLayer(CacheLayerMixin):
    """The state of one recurrent layer: a few tensors of fixed size, sequences first.

    Importing this module makes `DynamicCache(config=...)` and `generate` use it for the layers of
    type `gated_linear_attention`.
    """

    _layer_type = RECURRENT
    is_compileable = False
    supports_early_init = False

    def __init__(self, **_: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state: LayerState = {}
        self.tokens = 0
        self.record_past = False
        self._past: list[tuple[int, LayerState, Again]] = []
        self.device: torch.device | None = None

    def store(self, state: LayerState, tokens: int, again: Again) -> None:
        """Replaces the state, after `tokens` more tokens.

        Args:
            state: the new state.
            tokens: how many tokens it has seen beyond the old one.
            again: gives the state after the first so many of them.
        """
        if self.record_past:
            self._past.append((tokens, self.state, again))
        self.state = state
        self.tokens += tokens
        self.is_initialized = True
        first = next(iter(state.values()))
        self.device, self.batch_size = first.device, first.shape[0]

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        # What was recorded is of other sequences, or elsewhere.
        self._past.clear()
        self.state = {name: fn(x) for name, x in self.state.items()}
        if self.state:
            self.batch_size = next(iter(self.state.values())).shape[0]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Does nothing: the state comes with the first call."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Refuses keys and values of softmax attention."""
        raise ValueError("cache: a recurrent layer's cache holds no keys and values")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and offset that a mask over all tokens has."""
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of tokens seen, padding included."""
        return self.tokens

    def get_max_length(self) -> int:
        """Return -1: the state does not grow."""
        return -1

    def offload(self) -> None:
        """Moves the state to the CPU."""
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Moves the state back to where it was."""
        if self.device is not None:
            device = self.device
            self._map(lambda x: x.to(device, non_blocking=True))

    def reset(self) -> None:
        """Forgets everything."""
        self.state, self.tokens, self.is_initialized = {}, 0, False
        self._past.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Puts the sequences into the order of a beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence."""
        self._map(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the named sequences."""
        self._map(lambda x: x.index_select(0, indices.to(x.device)))

    def activate_past_recording(self) -> None:
        """Keeps what it takes to go back, from now on and until the next `crop`."""
        self.record_past = True

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether `crop` can go back: only over tokens that were seen while it was recorded."""
        return self.record_past

    def crop(self, tokens_to_remove: int) -> None:
        """Goes back over the last -`tokens_to_remove` tokens.

        Nothing can be taken out of a state: the state before them is brought back, and the tokens
        of the same call that stay are read again.

        Raises:
            ValueError: they were not recorded, or the number is positive.
        """
        back = -tokens_to_remove
        if back < 0 or back > sum(tokens for tokens, _, _ in self._past):
            raise ValueError(
                f"cache: a recurrent state cannot be cropped by {back} tokens; it goes "
                "back over tokens that were seen after activate_past_recording(), by a negative "
                "number of them"
            )
        while back > 0:
            tokens, before, again = self._past.pop()
            kept = max(0, tokens - back)
            self.state = again(kept) if kept else before
            self.tokens -= tokens - kept
            back -= tokens - kept
        self._past.clear()


# The state has one size whatever the length, so that a static cache holds the same.
STATIC_LAYER_TYPE_MAPPING[RECURRENT] = RecurrentCacheLayer


def recurrent_layer(cache: Cache, index: int) -> RecurrentCacheLayer:
    """Return the cache of a recurrent layer.

    Raises:
        ValueError: the cache was made for another model.
    """
    layer = cache.layers[index] if index < len(cache.layers) else None
    if not isinstance(layer, RecurrentCacheLayer):
        kind = "no layer" if layer is None else type(layer).__name__
        raise ValueError(
            f"cache: it has {kind} where layer {index} needs a recurrent state; make it "
            "with DynamicCache(config=model.config), or take it from an output of this model"
        )
    return layer
