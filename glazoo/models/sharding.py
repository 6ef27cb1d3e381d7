"""FSDP2 for models some of whose parameters stay float32.

A unit of FSDP2 has one dtype for all its parameters and one policy, which casts them: a bfloat16
layer with float32 gates is refused at its first forward pass, and a policy that computes in
bfloat16 narrows gates that are float32. Here the parameters that stay wide become units of their
own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from glazoo.layers.parts import KeepsWide

__all__ = ["fully_shard", "teach_accelerate"]


def fully_shard(module: Any, **options: Any) -> Any:
    """Shards a module as torch's `fully_shard` does, and keeps its wide parameters wide.

    In place of `torch.distributed.fsdp.fully_shard`, layer by layer and on the model last:
    importance gates, decay rates and the like are sharded as units of their own, whose parameters
    and inputs no mixed precision casts. For modules without them it is torch's function.

    Args:
        module: the module to shard, or a list of them.
        options: those of torch's `fully_shard`.

    Returns:
        The module, now an `FSDPModule` too.
    """
    from torch.distributed.fsdp import fully_shard as shard

    return _wide_first(shard)(module, **options)


def _wide_first(shard: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap torch's `fully_shard` so that it shards the wide parameters below a module first."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

    @functools.wraps(shard)
    def sharding(module: Any, **options: Any) -> Any:
        modules = [module] if isinstance(module, nn.Module) else list(module)
        policy = options.get("mp_policy") or MixedPrecisionPolicy()
        dtypes = {p.dtype for m in modules for p in m.parameters()}
        # In one dtype, and computed in it, there is nothing to keep apart.
        if len(dtypes) > 1 or policy.param_dtype not in {None, *dtypes}:
            for wide in [w for m in modules for w in _topmost(m)]:
                _shard_wide(wide, shard, options, policy)
        # A module that stays wide itself is done.
        left = [m for m in modules if not isinstance(m, FSDPModule)]
        if len(left) == len(modules):
            return shard(module, **options)
        if left:
            shard(left, **options)
        return module

    return sharding


def _topmost(module: nn.Module) -> Iterator[KeepsWide]:
    """Return the modules with wide parameters that are in no other one and not sharded yet."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, FSDPModule):
        return
    if isinstance(module, KeepsWide):
        yield module
        return
    for child in module.children():
        yield from _topmost(child)


def _narrow(module: nn.Module) -> Iterator[nn.Module]:
    """Return the largest parts below a module that have parameters, none of them wide."""
    from torch.distributed.fsdp import FSDPModule

    for child in module.children():
        if isinstance(child, FSDPModule) or next(child.parameters(), None) is None:
            continue
        if any(isinstance(m, KeepsWide) for m in child.modules()):
            yield from _narrow(child)
        else:
            yield child


def _shard_wide(
    wide: KeepsWide, shard: Callable[..., Any], options: dict[str, Any], policy: Any
) -> None:
    """Shard a module in two units: what stays wide, and the rest."""
    inside = {"output_dtype": None, "cast_forward_inputs": False}
    # The layer around it casts what comes in; within, tensors go as they do without FSDP.
    if narrow := list(_narrow(wide)):
        shard(narrow, **{**options, "mp_policy": dataclasses.replace(policy, **inside)})
    # Gradients are reduced as they are.
    inside |= {"param_dtype": None, "reduce_dtype": None}
    shard(wide, **{**options, "mp_policy": dataclasses.replace(policy, **inside)})


@functools.cache
def teach_accelerate() -> None:
    """Makes accelerate, and `Trainer` with it, and transformers shard with `fully_shard` of here.

    accelerate looks torch's function up while it prepares a model, transformers when it is
    imported. Where a release does otherwise, wide parameters that got narrow are refused in their
    forward pass.
    """
    try:
        from accelerate import accelerator
    except ImportError:
        pass
    else:
        prepare = accelerator.fsdp2_prepare_model

        @functools.wraps(prepare)
        def fsdp2_prepare_model(*args: Any, **kwargs: Any) -> Any:
            with _instead():
                return prepare(*args, **kwargs)

        accelerator.fsdp2_prepare_model = fsdp2_prepare_model
    try:
        from transformers.distributed import fsdp
    except ImportError:
        return
    if hasattr(fsdp, "fully_shard"):
        fsdp.fully_shard = fully_shard


@contextlib.contextmanager
def _instead() -> Iterator[None]:
    """Let who looks torch's `fully_shard` up find the one that keeps wide parameters wide."""
    import torch.distributed.fsdp as owner

    original = owner.fully_shard
    owner.fully_shard = _wide_first(original)
    try:
        yield
    finally:
        owner.fully_shard = original
