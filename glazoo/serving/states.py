"""The states of recurrent layers in slots that a server hands out, one for each request.

A server lays the tokens of many requests end to end, [1, T, D], and says where each begins and in
which slot its state is. Here a layer runs on them: requests of one more token as one batch, whose
states are taken by their slots; longer pieces, which begin a prompt or go on with one, each for
itself. The layer is called as transformers' models call it, with a cache, so that what it keeps is
found and not described: the tensors that its part of a cache holds after a call.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache

from glazoo.families import CACHES
from glazoo.families.base import Family
from glazoo.families.interception import once, packing
from glazoo.families.mixer import MetaplasticMixer
from glazoo.layers import GatedLinearAttention
from glazoo.models.modeling import GlazooBlock

__all__ = ["Layout", "Requests", "Slots", "layouts", "recurrent", "serve"]


class Requests(NamedTuple):
    """The requests of one step, whose tokens lie end to end."""

    bounds: Sequence[int]
    """First token of each request, and their number last: N + 1 of them."""
    continued: Sequence[bool]
    """Whether each has a state from an earlier step."""
    slots: Tensor
    """[N], int: where the state of each is."""


class Layout:
    """What a recurrent layer keeps of a request: tensors of fixed shapes."""

    def __init__(self, fresh: Any, layer: Any) -> None:
        self._fresh = fresh
        leaves, self._structure = pytree.tree_flatten(dict(vars(layer)))
        self._layer = layer
        self._leaves = [None if isinstance(x, Tensor) else x for x in leaves]
        self._places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        tensors = [leaves[i] for i in self._places]
        self.shapes = tuple(tuple(x.shape[1:]) for x in tensors)
        """Shape of every tensor for one request."""
        self.dtypes = tuple(x.dtype for x in tensors)
        """Their dtypes."""

    @property
    def size(self) -> int:
        """Bytes of one request."""
        pairs = zip(self.shapes, self.dtypes, strict=True)
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in pairs)

    def fresh(self) -> Any:
        """Return a cache's layer that has seen nothing."""
        return copy.deepcopy(self._fresh)

    def layer(self, tensors: Sequence[Tensor]) -> Any:
        """Return a cache's layer that holds these tensors, [N, ...] each."""
        leaves = list(self._leaves)
        for i, x in zip(self._places, tensors, strict=True):
            leaves[i] = x
        made = copy.copy(self._layer)
        vars(made).update(pytree.tree_unflatten(leaves, self._structure))
        return made

    def tensors(self, layer: Any) -> list[Tensor]:
        """Return the tensors that a cache's layer holds.

        Raises:
            ValueError: they are not those of this layout.
        """
        found = [x for x in pytree.tree_leaves(dict(vars(layer))) if isinstance(x, Tensor)]
        if tuple(tuple(x.shape[1:]) for x in found) != self.shapes:
            raise ValueError(
                f"{type(layer).__name__}: it holds tensors of shapes "
                f"{[list(x.shape[1:]) for x in found]} for a request, but had "
                f"{[list(x) for x in self.shapes]} in the first call: a layer whose state grows "
                "cannot be served"
            )
        return found


def recurrent(model: nn.Module) -> dict[int, nn.Module]:
    """Return the modules of a model that keep a state, by layer.

    Args:
        model: a `GlazooForCausalLM`, or a model of a converted class.
    """
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        own = isinstance(module, GlazooBlock) and isinstance(module.mixer, GatedLinearAttention)
        if own or isinstance(module, MetaplasticMixer):
            found[int(module.layer_idx)] = module  # type: ignore[arg-type]
    family: Family | None = getattr(type(model), "glazoo_family", None)
    # Mixers that were left as they are keep a state as well.
    others = {} if family is None else family.mixers(model)
    return {**others, **found}


def _names(module: nn.Module) -> tuple[str, ...]:
    """Return what a module takes by position, after its input."""
    taken: tuple[str, ...] | None = getattr(module, "taken", None)
    return taken or tuple(inspect.signature(module.forward).parameters)[1:]


def _cached(names: Sequence[str], cache: Cache) -> dict[str, Any]:
    """Return the arguments by which a module gets a cache."""
    given: dict[str, Any] = {next(n for n in CACHES if n in names): cache}
    return given | ({"use_cache": True} if "use_cache" in names else {})


class _Alone(Cache):
    """A cache of one layer, in its place among others."""

    def __init__(self, layer: Any, index: int) -> None:
        super().__init__(layers=[layer] * (index + 1))
        self.index = index


def layouts(model: nn.Module) -> dict[int, Layout]:
    """Find what every recurrent layer of a model keeps of a request, by running it once.

    Args:
        model: a model on the meta device, in the dtype that it is served in.

    Returns:
        The layout of every layer that keeps a state.

    Raises:
        ValueError: a layer that keeps a state is none that can be served.
    """
    config: Any = model.config
    found: dict[int, Layout] = {}
    values: Tensor | None = None
    for index, module in sorted(recurrent(model).items()):
        cache = DynamicCache(config=config)
        fresh = copy.deepcopy(cache.layers[index])
        weight = next(module.parameters())
        x = torch.empty(
            1, 2, config.get_text_config().hidden_size, device="meta", dtype=weight.dtype
        )
        names = _names(module)
        given = _cached(names, cache)
        if "first_values" in names:
            given["first_values"] = values
        with torch.no_grad(), packing(None):
            result = module(x, **given)
        if "first_values" in names:
            values = result[1]
        found[index] = Layout(fresh, cache.layers[index])
    return found


class Slots:
    """The slots of one layer, as the server keeps them."""

    def __init__(self, layout: Layout, index: int) -> None:
        self.layout, self.index = layout, index
        self.tensors: Sequence[Tensor] = ()
        """[slots, ...] each; set by the server."""

    def current(self) -> Requests | None:
        """Return the requests of this step; None where the server only measures memory."""
        raise NotImplementedError

    def run(
        self,
        function: Callable[..., Any],
        names: Sequence[str],
        x: Tensor,
        given: Mapping[str, Any],
        requests: Requests,
    ) -> Any:
        """Run a layer on the tokens of all requests, and keep their states.

        Args:
            function: the layer's own forward pass.
            names: what it takes.
            x: [1, T, D], the tokens end to end, and any number of others behind them.
            given: its other arguments; what has an axis of tokens is cut as x is.
            requests: which tokens are whose.

        Returns:
            What the layer returns; behind the tokens of the requests, zeros.
        """
        tokens = x.shape[1]
        firsts = requests.bounds[:-1]
        lengths = [b - a for a, b in zip(firsts, requests.bounds[1:], strict=True)]
        alone = [n == 1 and c for n, c in zip(lengths, requests.continued, strict=True)]
        single = [i for i, one in enumerate(alone) if one]
        pieces = [[i] for i, n in enumerate(lengths) if n and not alone[i]]
        parts: list[tuple[Tensor, Any]] = []
        for group in [single, *pieces] if single else pieces:
            length = lengths[group[0]]
            start = torch.tensor([firsts[i] for i in group], device=x.device)
            at = start[:, None] + torch.arange(length, device=x.device)

            def cut(y: Any, at: Tensor = at) -> Any:
                per_token = isinstance(y, Tensor) and tuple(y.shape[:2]) == (1, tokens)
                return y[0, at] if per_token else y

            slots = requests.slots[torch.tensor(group, device=requests.slots.device)].long()
            if requests.continued[group[0]]:
                layer = self.layout.layer([s[slots] for s in self.tensors])
            else:
                layer = self.layout.fresh()
            cache = _Alone(layer, self.index)
            own = pytree.tree_map(cut, dict(given)) | _cached(names, cache)
            parts.append((at, function(cut(x), **own)))
            kept = self.layout.tensors(cache.layers[self.index])
            for target, y in zip(self.tensors, kept, strict=True):
                target[slots] = y.to(target.dtype)

        return _joined(parts, tokens)


def _joined(parts: Sequence[tuple[Tensor, Any]], tokens: int) -> Any:
    """Lay results [N, L, ...] of several calls end to end again, by where their tokens stand."""
    flat = [pytree.tree_flatten(result) for _, result in parts]
    joined: list[Any] = []
    for leaves in zip(*(leaves for leaves, _ in flat), strict=True):
        whole: Tensor | None = None
        for (at, _), y in zip(parts, leaves, strict=True):
            # What has no axis of tokens is a state, which is in its slot already.
            if isinstance(y, Tensor) and y.shape[:2] == at.shape:
                if whole is None:
                    whole = y.new_zeros(1, tokens, *y.shape[2:])
                whole[0, at] = y
        joined.append(whole)
    return pytree.tree_unflatten(joined, flat[0][1])


class _Served(nn.Module):
    """What serving adds to a layer: its states are in slots."""

    served_slots: Slots
    served_names: tuple[str, ...]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer on the tokens of all requests."""
        given = {**dict(zip(self.served_names, args, strict=False)), **kwargs}
        # The bounds and masks of rows: here every call has whole rows.
        for name in (*CACHES, "attention_mask", "causal", "cu_seqlens", "padding"):
            if name in given:
                given[name] = None
        if "use_cache" in given:
            given["use_cache"] = False
        requests = self.served_slots.current()
        with packing(None):
            if requests is None:
                return super().forward(hidden_states, **given)
            run, names = self.served_slots.run, self.served_names
            return run(super().forward, names, hidden_states, given, requests)


@once
def _served_class(base: type[nn.Module]) -> type[nn.Module]:
    return type(f"Served{base.__name__}", (_Served, base), {"__module__": __name__})


def serve(model: nn.Module, slots: Mapping[int, Slots]) -> None:
    """Make the recurrent layers of a model keep their states in slots, in place.

    Args:
        model: the model.
        slots: those of every layer that `recurrent` finds.
    """
    for index, module in recurrent(model).items():
        module.served_names = _names(module)  # type: ignore[assignment]
        module.served_slots = slots[index]  # type: ignore[assignment]
        module.__class__ = _served_class(type(module))
