"""The model class that vLLM runs, on its interfaces of version 0.32.

The model is transformers' own, with its weights read by transformers. What is replaced are the
places where it keeps something of the tokens before: recurrent layers, whose states are in slots of
vLLM's hybrid cache, and softmax attention, which vLLM computes on its pages of keys and values.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_outputs import BaseModelOutputWithPast
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.v1.attention.backends.linear_attn import (
    LinearAttentionBackend,
    LinearAttentionMetadata,
    LinearAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

import glazoo.models
from glazoo.families import CACHES
from glazoo.families.interception import packing
from glazoo.families.packing import Packed
from glazoo.models.modeling import SoftmaxAttention
from glazoo.serving.states import Layout, Requests, Slots, layouts, recurrent, serve

__all__ = ["ServedModel"]

_ATTENTION = "glazoo_vllm"
"""Name of vLLM's attention among transformers' implementations."""


@dataclass
class _Metadata(LinearAttentionMetadata):
    requests: Requests | None = None


class _Builder(LinearAttentionMetadataBuilder):
    def build(self, common_prefix_len: int, common: Any, fast_build: bool = False) -> _Metadata:
        made = super().build(common_prefix_len, common, fast_build)
        bounds = common.query_start_loc_cpu.tolist()
        # Known on the host, where it says this much of every request: no wait for the device.
        seen = getattr(common, "seq_lens_cpu_upper_bound", None)
        seen = (common.seq_lens if seen is None else seen).tolist()
        new = (b - a for a, b in itertools.pairwise(bounds))
        continued = [total > n for total, n in zip(seen, new, strict=False)]
        return _Metadata(
            **vars(made), requests=Requests(bounds, continued, made.state_indices_tensor)
        )


class _Backend(LinearAttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "GLAZOO"

    @staticmethod
    def get_builder_cls() -> type[_Builder]:
        return _Builder


class _VllmSlots(Slots, MambaBase):
    """The slots of one layer in vLLM's cache."""

    def __init__(
        self, layout: Layout, index: int, prefix: str, page: int, vllm_config: VllmConfig
    ) -> None:
        super().__init__(layout, index)
        self.prefix, self._page = prefix, page
        self.kv_cache = ()
        context = vllm_config.compilation_config.static_forward_context
        if prefix in context:
            raise ValueError(f"{prefix}: vLLM has a layer of that name already")
        context[prefix] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.LINEAR

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return self.layout.shapes

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return self.layout.dtypes

    def get_attn_backend(self) -> type[_Backend]:
        return _Backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> Any:
        spec = super().get_kv_cache_spec(vllm_config)
        # All layers' pages have one size, whatever each of them keeps.
        page = max(self._page, vllm_config.cache_config.mamba_page_size_padded or 0)
        object.__setattr__(spec, "page_size_padded", page)
        return spec

    def current(self) -> Requests | None:
        metadata = get_forward_context().attn_metadata
        if isinstance(metadata, dict):
            metadata = metadata.get(self.prefix)
        if metadata is None or not len(self.kv_cache):
            return None
        self.tensors = self.kv_cache
        requests: Requests | None = metadata.requests
        return requests


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute softmax attention as vLLM does, under the interface of transformers' functions.

    Args:
        module: the attention module, whose layer of vLLM's `_attention` has made.
        query: [1, H, T, d].
        key: [1, HKV, T, d].
        value: [1, HKV, T, dv].
    """
    size, value_size = query.shape[-1], value.shape[-1]
    layer: Any = module.vllm_attention
    if isinstance(layer, functools.partial):
        heads, kv_heads = query.shape[1], key.shape[1]
        scale = size**-0.5 if scaling is None else scaling
        window = kwargs.get("sliding_window")
        module.vllm_attention = layer(
            num_heads=heads,
            head_size=size,
            scale=scale,
            num_kv_heads=kv_heads,
            per_layer_sliding_window=window,
        )
        return value.new_zeros(1, query.shape[2], heads, value_size), None
    # Its pages hold keys and values of one size.
    value = nn.functional.pad(value, (0, size - value_size))
    q, k, v = (x[0].transpose(0, 1).flatten(1) for x in (query, key, value))
    output = layer(q, k, v).view(1, query.shape[2], query.shape[1], size)
    return output[..., :value_size], None


class _PagedAttention(SoftmaxAttention):
    """Softmax attention of our own models on vLLM's pages."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        if cache is not None:
            cache.update(k, v, self.layer_idx)
        output, _ = _attend(self, q, k, v, None)
        return output.transpose(1, 2)


class _Hidden(nn.Module):
    """Stands below a head for the model, gives what that gave before, and has what that has."""

    value: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # In a list, so that it is no submodule: its parameters are the model's already.
        self._model = [model]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattribute__("_model")[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _Output(last_hidden_state=self.value)


class _Output(BaseModelOutputWithPast):
    def __getattr__(self, name: str) -> None:
        return None


def _refuse(vllm_config: VllmConfig) -> None:
    """Refuse what these models do not do, before any weight is read."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    asked = {
        "tensor_parallel_size": parallel.tensor_parallel_size > 1,
        "pipeline_parallel_size": parallel.pipeline_parallel_size > 1,
        "quantization": vllm_config.quant_config is not None,
        "speculative_config": vllm_config.speculative_config is not None,
        "enable_lora": vllm_config.lora_config is not None,
        "enable_prefix_caching": vllm_config.cache_config.mamba_cache_mode != "none",
        "enforce_eager=False": not model.enforce_eager,
    }
    if found := [name for name, given in asked.items() if given]:
        raise ValueError(
            f"{', '.join(found)}: not supported for glazoo's models in vLLM; accepted are one GPU "
            "or CPU, unquantised weights, no prefix cache and enforce_eager=True "
            "(--enforce-eager)"
        )


def _class(config: Any) -> Any:
    (architecture,) = config.architectures
    return getattr(glazoo.models, architecture)


def _layouts(vllm_config: VllmConfig) -> dict[int, Layout]:
    """Find what every recurrent layer keeps of a request, from the configuration alone."""
    config, dtype = vllm_config.model_config.hf_config, vllm_config.model_config.dtype
    found: dict[int, Layout] | None = vars(config).get("_glazoo_layouts")
    if found is None:
        # An engine of another device is none of the states' business.
        own = copy.deepcopy(config)
        if hasattr(own, "impl"):
            own.impl = "chunked"
        with torch.device("meta"):
            model = _class(config)._from_config(own, dtype=dtype)
        found = layouts(model)
        vars(config)["_glazoo_layouts"] = found
    return found


def _largest(vllm_config: VllmConfig) -> Layout:
    return max(_layouts(vllm_config).values(), key=lambda layout: layout.size)


class ServedModel(nn.Module, HasInnerState, IsHybrid):
    """Any of glazoo's causal language models in vLLM.

    Args:
        vllm_config: vLLM's configuration.
        prefix: prefix of the layers' names.

    Raises:
        ValueError: the configuration asks for what is not supported, or the model keeps a state
            that is in no recurrent layer.
    """

    is_hybrid: ClassVar[Any] = True
    has_inner_state: ClassVar[Any] = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        _refuse(vllm_config)
        self.config = vllm_config.model_config.hf_config
        AttentionInterface.register(_ATTENTION, _attend)
        model = vllm_config.model_config
        cls = _class(self.config)
        self.model = cls.from_pretrained(
            model.model,
            revision=model.revision,
            dtype=model.dtype,
            attn_implementation=_ATTENTION,
        ).eval()
        self.model.requires_grad_(False)
        self.model.to(vllm_config.device_config.device)
        found = _layouts(vllm_config)
        page = max(layout.size for layout in found.values())
        slots = {
            index: _VllmSlots(layout, index, f"{prefix}layers.{index}.state", page, vllm_config)
            for index, layout in found.items()
        }
        self._attention(vllm_config, prefix)
        serve(self.model, slots)
        # The same parameters, and something else below the head.
        self._head = [copy.copy(self.model)]
        head = self._head[0]
        head._modules = dict(self.model._modules)
        head._modules[self.model.base_model_prefix] = self._below = _Hidden(self.model.base_model)

    def _attention(self, vllm_config: VllmConfig, prefix: str) -> None:
        """Give every softmax attention a layer of vLLM's, by running the model once: its functions
        say what they are called with."""
        named = {m: n for n, m in self.model.named_modules()}
        for module, name in named.items():
            module.vllm_attention = functools.partial(
                Attention,
                cache_config=vllm_config.cache_config,
                prefix=f"{prefix}{name}.attn",
            )
            if type(module) is SoftmaxAttention:
                module.__class__ = _PagedAttention
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
        with torch.no_grad():
            output = self.model(input_ids=ids, use_cache=True)
        cache: Any = next(x for name in CACHES if (x := output.get(name)) is not None)
        for module in named:
            if isinstance(module.vllm_attention, functools.partial):
                del module.vllm_attention
        paged = sum(hasattr(module, "vllm_attention") for module in named)
        stateful = recurrent(self.model)
        for index, layer in enumerate(cache.layers):
            states = [*getattr(layer, "recurrent_states", {}).values()]
            states += getattr(layer, "conv_states", {}).values()
            if index not in stateful and any(x is not None for x in states):
                raise ValueError(
                    f"{type(self.model).__name__}: layer {index} keeps a state, but calls no scan "
                    "function that is known, so that it cannot be served"
                )
            paged -= getattr(layer, "keys", None) is not None
        if paged:
            raise ValueError(
                f"{type(self.model).__name__}: its softmax attention does not go through "
                "transformers' attention functions, so that it cannot be served"
            )

    @classmethod
    def get_mamba_state_shape_from_config(
        cls, vllm_config: VllmConfig
    ) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of what the layer that keeps most keeps of a request."""
        return _largest(vllm_config).shapes

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """Return the dtypes of the same."""
        return _largest(vllm_config).dtypes

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        """Refuses: states are copied for a prefix cache, which there is none of."""
        raise NotImplementedError("glazoo's models have no prefix cache in vLLM")

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings of tokens, [T, D]."""
        embedded: Tensor = self.model.get_input_embeddings()(input_ids)
        return embedded

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Run the model on the tokens of all requests of a step, end to end.

        Args:
            input_ids: [T].
            positions: [T], of every token in its request.
            inputs_embeds: [T, D] instead of `input_ids`.

        Returns:
            [T, D], what the head takes.
        """
        first = positions == 0
        given: dict[str, Any] = (
            {"input_ids": None if input_ids is None else input_ids[None]}
            if inputs_embeds is None
            else {"inputs_embeds": inputs_embeds[None]}
        )
        # The requests are told apart below: by slots, and by vLLM's pages.
        with packing(Packed(first[None])):
            output = self.model.base_model(
                **given, position_ids=positions[None], use_cache=False, return_dict=True
            )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Return the logits of tokens, [T, vocabulary]: the head and whatever it does with them."""
        self._below.value = hidden_states[None]
        head = self._head[0]
        forward = getattr(type(head).forward, "__wrapped__", type(head).forward)
        ids = torch.zeros(1, hidden_states.shape[0], dtype=torch.long, device=hidden_states.device)
        logits: Tensor = forward(head, input_ids=ids, use_cache=False, return_dict=True).logits
        return logits[0]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Return the names of all parameters: transformers has read them already, which knows how
        each family's checkpoints are renamed."""
        return {name for name, _ in self.named_parameters()}
