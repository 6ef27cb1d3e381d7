"""What test_sharding.py runs in two processes: one model, sharded and not; writes what it measured
to the folder of its argument."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from converters.converting import open_gates
from converters.tiny import tiny_model
from layer_cases import VOCABULARY
from layer_cases import model as spec_model
from torch import Tensor
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from glazoo import metaplasticize
from glazoo.layers import ImportanceGate
from glazoo.models import fully_shard

NAMES = ("mamba2", "qwen3_next", "layers")
NARROW = torch.bfloat16


def build(name: str, kappa: float = 0.5) -> Any:
    """A float32 model with open gates: converted, or of layers of several kinds."""
    if name == "layers":
        made: Any = spec_model(["metaplastic_hgrn2", "palimpsa", "attention"])
        with torch.no_grad():
            for key, p in made.named_parameters():
                if key.endswith("metaplastic.b_scale"):
                    p.fill_(kappa)
        return made.train()
    made = metaplasticize(tiny_model(name))
    open_gates(made)
    with torch.no_grad():
        for key, p in made.named_parameters():
            if key.endswith("b_scale"):
                p.fill_(kappa)
    return made.train()


def loss_of(model: Any, x: Tensor) -> Tensor:
    loss: Tensor = model(x, labels=x, use_cache=False).loss
    return loss.float()


def gates(model: Any) -> dict[str, Tensor]:
    """Gradients of the importance gates, whole and in float32."""
    found = {}
    for key, p in model.named_parameters():
        if p.grad is not None and ".metaplastic." in key:
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            found[key] = grad.float()
    return found


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Distance over size, of all tensors as one."""
    assert found.keys() == expected.keys()
    assert found
    parts = [(found[key] - g, g) for key, g in expected.items()]
    return (
        float(sum(d.square().sum() for d, _ in parts) / sum(g.square().sum() for _, g in parts))
        ** 0.5
    )


def sharded(model: Any, **options: Any) -> Any:
    for layer in model.base_model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def prepared(model: Any, precision: str, *, efficient: bool) -> Any:
    """What accelerate makes of a model under FSDP2, which it has for accelerators only: it is told
    that this is one."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=efficient,
    )
    plugin.set_mixed_precision(precision)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    found, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return found


def first_kind(model: Any, x: Tensor, *, wrapped: Any = (), ignored: Any = ()) -> float:
    """Loss under FSDP1, with gates as units that no policy casts."""
    narrow = MixedPrecision(param_dtype=NARROW, _module_classes_to_ignore=ignored)
    whole = FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({type(model.base_model.layers[0]), *wrapped}),
        mixed_precision=narrow if ignored else None,
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    loss = loss_of(whole, x)
    loss.backward()
    return float(loss.detach())


def measure(name: str, x: Tensor, mine: slice) -> dict[str, Any]:
    halves = x.chunk(2)

    def means(model: Any) -> tuple[float, dict[str, Tensor]]:
        """Loss of this process' half, and the mean gradients of both, without sharding."""
        found = []
        for half in halves:
            loss = loss_of(model, half)
            loss.backward()
            found.append(float(loss.detach()))
        grads = {key: g / 2 for key, g in gates(model).items()}
        return found[dist.get_rank()], grads

    def run(model: Any) -> tuple[float, dict[str, Tensor]]:
        loss = loss_of(model, x[mine])
        loss.backward()
        return float(loss.detach()), gates(model)

    wide, wide_grads = means(build(name))
    stored, stored_grads = means(build(name).to(NARROW))
    policy = MixedPrecisionPolicy(param_dtype=NARROW, reduce_dtype=torch.float32)
    found: dict[str, Any] = {
        "float32": wide,
        "bfloat16": stored,
        "rounding": error(stored_grads, wide_grads),
    }
    for case, model, expected in (
        ("plain", sharded(build(name)), wide_grads),
        ("stored", sharded(build(name).to(NARROW)), stored_grads),
        ("policy", sharded(build(name), mp_policy=policy), wide_grads),
        ("accelerate", prepared(build(name).to(NARROW), "bf16", efficient=False), wide_grads),
        ("efficient", prepared(build(name).to(NARROW), "bf16", efficient=True), wide_grads),
    ):
        loss, grads = run(model)
        found[case] = {"loss": loss, "gates": error(grads, expected)}
    if name == "mamba2":
        found["FSDP1"] = {
            "stored": first_kind(build(name).to(NARROW), x[mine], wrapped=[ImportanceGate]),
            "policy": first_kind(build(name), x[mine], ignored=[ImportanceGate]),
        }
    with torch.no_grad():
        closer = sharded(build(name, kappa=0.5009), mp_policy=policy)
        logits = [
            m(x[mine], use_cache=False).logits
            for m in (closer, sharded(build(name), mp_policy=policy))
        ]
    found["apart"] = float((logits[0] - logits[1]).abs().max())
    return found


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    x = torch.randint(1, VOCABULARY, (4, 19), generator=torch.Generator().manual_seed(3))
    mine = slice(2 * rank, 2 * rank + 2)
    found = {name: measure(name, x, mine) for name in NAMES}
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(found), "utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
