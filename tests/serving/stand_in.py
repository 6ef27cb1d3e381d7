"""A stand-in for vLLM: the interfaces of version 0.32 that glazoo.serving uses, and a small server
on them, which lays requests end to end, hands out slots, and computes softmax attention itself."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONTEXT = SimpleNamespace(attn_metadata=None, common=None)
"""What vLLM's forward context is during a step."""


class MambaAttentionBackendEnum(enum.Enum):
    LINEAR = "LinearAttentionBackend"


@dataclasses.dataclass(frozen=True)
class MambaSpec:
    block_size: int
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    page_size_padded: int | None
    mamba_type: MambaAttentionBackendEnum

    @property
    def page_size_bytes(self) -> int:
        pairs = zip(self.shapes, self.dtypes, strict=True)
        page = sum(prod(shape) * dtype.itemsize for shape, dtype in pairs)
        if self.page_size_padded is not None:
            assert self.page_size_padded >= page
            return self.page_size_padded
        return page


class MambaBase:
    """As vLLM's: pages of raw bytes are cut into a layer's states."""

    kv_cache: tuple[Tensor, ...]

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        pages = kv_cache.squeeze(dim=(1, 2))
        states, offset = [], 0
        for shape, dtype in zip(self.get_state_shape(), self.get_state_dtype(), strict=True):
            size = prod(shape) * dtype.itemsize
            states.append(pages[:, offset : offset + size].view(dtype).view(-1, *shape))
            offset += size
        self.kv_cache = tuple(states)

    def get_kv_cache_spec(self, vllm_config: Any) -> MambaSpec:
        return MambaSpec(
            shapes=tuple(self.get_state_shape()),
            dtypes=self.get_state_dtype(),
            block_size=vllm_config.cache_config.mamba_block_size,
            page_size_padded=vllm_config.cache_config.mamba_page_size_padded,
            mamba_type=self.mamba_type,
        )


class Attention(nn.Module):
    """Softmax attention over what each request has seen; keys and values by the request's name."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        cache_config: Any = None,
        per_layer_sliding_window: int | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.shape, self.scale = (num_heads, num_kv_heads or num_heads, head_size), scale
        assert per_layer_sliding_window is None
        self.seen: dict[Any, tuple[Tensor, Tensor]] = {}

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads, kv_heads, size = self.shape
        q, k, v = (
            x.unflatten(1, (n, size)).transpose(0, 1)
            for x, n in ((query, heads), (key, kv_heads), (value, kv_heads))
        )
        common, parts = CONTEXT.common, []
        if common is None:
            return torch.zeros_like(query)
        for name, first, stop, total in common.rows():
            new = stop - first
            old = self.seen.get(name) if total > new else None
            own = [x[:, first:stop] for x in (k, v)]
            if old is not None:
                own = [torch.cat(x, 1) for x in zip(old, own, strict=True)]
            self.seen[name] = tuple(own)
            mask = torch.ones(new, total, dtype=torch.bool).tril(total - new)
            parts.append(
                F.scaled_dot_product_attention(
                    q[:, first:stop], *own, mask, scale=self.scale, enable_gqa=True
                )
            )
        return torch.cat(parts, 1).transpose(0, 1).flatten(1)


@dataclasses.dataclass
class Common:
    """CommonAttentionMetadata."""

    names: Sequence[Any]
    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    block_table_tensor: Tensor

    @property
    def query_start_loc(self) -> Tensor:
        return self.query_start_loc_cpu

    @property
    def seq_lens_cpu_upper_bound(self) -> Tensor:
        return self.seq_lens

    def rows(self) -> Iterator[tuple[Any, int, int, int]]:
        bounds = self.query_start_loc_cpu.tolist()
        yield from zip(self.names, bounds, bounds[1:], self.seq_lens.tolist(), strict=False)


@dataclasses.dataclass
class LinearAttentionMetadata:
    num_prefills: int
    num_prefill_tokens: int
    num_decodes: int
    num_decode_tokens: int
    query_start_loc: Tensor
    seq_lens: Tensor
    state_indices_tensor: Tensor


class LinearAttentionMetadataBuilder:
    def __init__(
        self, kv_cache_spec: MambaSpec, layer_names: list[str], vllm_config: Any, device: Any
    ) -> None:
        self.kv_cache_spec = kv_cache_spec

    def build(
        self, common_prefix_len: int, common_attn_metadata: Common, fast_build: bool = False
    ) -> LinearAttentionMetadata:
        lengths = common_attn_metadata.query_start_loc.diff()
        decodes = int((lengths == 1).sum())
        return LinearAttentionMetadata(
            num_prefills=len(lengths) - decodes,
            num_prefill_tokens=int(lengths.sum()) - decodes,
            num_decodes=decodes,
            num_decode_tokens=decodes,
            query_start_loc=common_attn_metadata.query_start_loc,
            seq_lens=common_attn_metadata.seq_lens,
            state_indices_tensor=common_attn_metadata.block_table_tensor[:, 0],
        )


class LinearAttentionBackend:
    @staticmethod
    def get_builder_cls() -> type[LinearAttentionMetadataBuilder]:
        return LinearAttentionMetadataBuilder


class Registry:
    """ModelRegistry: architectures by name, classes by where they are."""

    def __init__(self) -> None:
        self.models: dict[str, str] = {}

    def register_model(self, model_arch: str, model_cls: str) -> None:
        assert isinstance(model_arch, str)
        assert model_cls.count(":") == 1
        self.models[model_arch] = model_cls

    def load(self, model_arch: str) -> type[Any]:
        module, name = self.models[model_arch].split(":")
        found: type[Any] = getattr(importlib.import_module(module), name)
        return found


def _modules(registry: Registry) -> dict[str, dict[str, Any]]:
    linear = (LinearAttentionBackend, LinearAttentionMetadata, LinearAttentionMetadataBuilder)
    return {
        "vllm": {"ModelRegistry": registry},
        "vllm.config": {"VllmConfig": SimpleNamespace},
        "vllm.forward_context": {"get_forward_context": lambda: CONTEXT},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.attention": {"Attention": Attention},
        "vllm.model_executor.layers.mamba": {},
        "vllm.model_executor.layers.mamba.abstract": {"MambaBase": MambaBase},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.interfaces": {
            "HasInnerState": type("HasInnerState", (), {}),
            "IsHybrid": type("IsHybrid", (), {}),
        },
        "vllm.v1": {},
        "vllm.v1.attention": {},
        "vllm.v1.attention.backends": {},
        "vllm.v1.attention.backends.linear_attn": {x.__name__: x for x in linear},
        "vllm.v1.attention.backends.registry": {
            "MambaAttentionBackendEnum": MambaAttentionBackendEnum
        },
    }


@contextmanager
def installed() -> Iterator[Registry]:
    """vLLM's modules, as far as they are used, and its registry of models."""
    registry, made = Registry(), {}
    for name, content in _modules(registry).items():
        made[name] = ModuleType(name)
        vars(made[name]).update(content, __path__=[])
    # Not by a copy of sys.modules, which would import again what is imported meanwhile.
    others = {
        name: sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] == "vllm"
    }
    sys.modules.update(made)
    try:
        yield registry
    finally:
        for name in (*made, "glazoo.serving.vllm"):
            sys.modules.pop(name, None)
        sys.modules.update(others)


def configuration(folder: Any, config: Any, dtype: torch.dtype, **changes: Any) -> Any:
    """A VllmConfig, as far as models read one."""
    made = SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(folder), revision=None, dtype=dtype, hf_config=config, enforce_eager=True
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        cache_config=SimpleNamespace(
            mamba_cache_mode="none", mamba_block_size=64, mamba_page_size_padded=None
        ),
        compilation_config=SimpleNamespace(static_forward_context={}),
        device_config=SimpleNamespace(device=torch.device("cpu")),
        quant_config=None,
        speculative_config=None,
        lora_config=None,
    )
    for path, value in changes.items():
        section, _, name = path.partition("__")
        setattr(getattr(made, section), name, value) if name else setattr(made, section, value)
    return made


class Server:
    """A model behind vLLM's interfaces, with slots whose content nobody clears."""

    def __init__(self, model: Any, config: Any, slots: int) -> None:
        self.model = model
        layers = {
            name: layer
            for name, layer in config.compilation_config.static_forward_context.items()
            if isinstance(layer, MambaBase)
        }
        specs = {name: layer.get_kv_cache_spec(config) for name, layer in layers.items()}
        (page,) = {spec.page_size_bytes for spec in specs.values()}
        self.builders = {}
        for name, layer in layers.items():
            # Whatever was in the memory before: a state that is read without need is found out.
            raw = torch.randint(-128, 127, (slots, 1, 1, page), dtype=torch.int8)
            layer.bind_kv_cache(raw)
            builder = layer.get_attn_backend().get_builder_cls()
            self.builders[name] = builder(specs[name], [name], config, torch.device("cpu"))
        self.free, self.slot = list(range(slots)), dict[Any, int]()
        self.tokens: dict[Any, list[int]] = {}

    def step(self, new: dict[Any, list[int]]) -> dict[Any, Tensor]:
        """Run some more tokens of some requests; give the logits of each of them."""
        for name in new:
            if name not in self.slot:
                self.slot[name] = self.free.pop(0)
        bounds, ids, positions, lengths = [0], [], [], []
        for name, more in new.items():
            before = self.tokens.setdefault(name, [])
            positions += range(len(before), len(before) + len(more))
            before += more
            ids += more
            lengths.append(len(before))
            bounds.append(bounds[-1] + len(more))
        CONTEXT.common = Common(
            list(new),
            torch.tensor(bounds, dtype=torch.int32),
            torch.tensor(lengths, dtype=torch.int32),
            torch.tensor([[self.slot[name]] for name in new], dtype=torch.int32),
        )
        CONTEXT.attn_metadata = {
            name: builder.build(0, CONTEXT.common) for name, builder in self.builders.items()
        }
        try:
            hidden = self.model(torch.tensor(ids), torch.tensor(positions))
        finally:
            CONTEXT.attn_metadata = CONTEXT.common = None
        logits = self.model.compute_logits(hidden)
        return {name: logits[a:b] for name, a, b in zip(new, bounds, bounds[1:], strict=False)}

    def finish(self, name: Any) -> None:
        """Give a request's slot to the next one."""
        self.free.insert(0, self.slot.pop(name))
        del self.tokens[name]
