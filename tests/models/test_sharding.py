"""FSDP2: wide parameters stay float32, in memory and in what computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from converters.tiny import tiny_model
from layer_cases import model as spec_model
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as torch_fully_shard

from glazoo import metaplasticize
from glazoo.models import fully_shard

NARROW = torch.bfloat16
POLICY = MixedPrecisionPolicy(param_dtype=NARROW)


def converted() -> Any:
    return metaplasticize(tiny_model("mamba2"))


def of_layers() -> Any:
    return spec_model(["metaplastic_hgrn2", "palimpsa", "attention"])


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of this one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: Any, shard: Callable[..., Any] = fully_shard, **options: Any) -> Any:
    for layer in model.base_model.layers:
        shard(layer, **options)
    return shard(model, **options)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("build", [converted, of_layers])
def test_narrowed_parameters_are_refused(build: Callable[[], Any]) -> None:
    ids = torch.arange(1, 10)[None]
    with pytest.raises(ValueError, match=r"is torch\.bfloat16, but computes in float32 or wider"):
        sharded(build(), torch_fully_shard, mp_policy=POLICY)(ids)


@torch.no_grad()
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("build", [converted, of_layers])
def test_layers_in_two_dtypes_are_sharded(build: Callable[[], Any]) -> None:
    ids = torch.arange(1, 10)[None]
    expected = build().to(NARROW)(ids).logits
    dtypes = {key: p.dtype for key, p in build().to(NARROW).named_parameters()}
    assert set(dtypes.values()) == {NARROW, torch.float32}
    found = sharded(build().to(NARROW))
    assert torch.equal(found(ids).logits, expected)
    assert {key: p.dtype for key, p in found.named_parameters()} == dtypes


@pytest.mark.usefixtures("alone")
def test_units_are_split_only_where_something_is_cast() -> None:
    units = [m for m in sharded(converted()).modules() if isinstance(m, FSDPModule)]
    assert len(units) == 3
    gate = converted().backbone.layers[0].mixer.metaplastic
    # A list, and a wide module itself, as a caller may wrap it.
    plain = torch.nn.Linear(3, 3)
    modules = [gate, plain]
    assert fully_shard(modules, mp_policy=POLICY) is modules
    assert isinstance(gate, FSDPModule)
    assert isinstance(plain, FSDPModule)
    assert fully_shard(gate) is gate


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes measured, each."""
    pytest.importorskip("accelerate", reason="one of the cases is accelerate's")
    tests, folder = Path(__file__).parents[1], tmp_path_factory.mktemp("measured")
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(tests), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, str(tests / "models" / "sharding.py"), str(folder)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text("utf-8")) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba2", "qwen3_next", "layers"])
def test_two_processes_compute_what_one_does(measured: list[dict[str, Any]], name: str) -> None:
    eps = torch.finfo(torch.float32).eps
    for found in (m[name] for m in measured):
        for case, dtype in (("plain", "float32"), ("stored", "bfloat16")):
            assert abs(found[case]["loss"] - found[dtype]) <= 16 * eps * found[dtype], case
            assert found[case]["gates"] < 64 * eps, case


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba2", "qwen3_next", "layers"])
@pytest.mark.parametrize("case", ["policy", "accelerate", "efficient"])
def test_mixed_precision_leaves_gates_alone(
    measured: list[dict[str, Any]], name: str, case: str
) -> None:
    for found in (m[name] for m in measured):
        # As close to the float32 model as the bfloat16 one is; accelerate rounds the loss too.
        near = 2 * abs(found["bfloat16"] - found["float32"])
        near += torch.finfo(NARROW).eps * found["float32"]
        assert abs(found[case]["loss"] - found["float32"]) <= near
        assert found[case]["gates"] <= 2 * found["rounding"]
        # Two plasticities that bfloat16 does not tell apart.
        assert found["apart"] > 0


@pytest.mark.slow
def test_the_first_kind_of_sharding_takes_gates_as_units(measured: list[dict[str, Any]]) -> None:
    eps = torch.finfo(torch.float32).eps
    for found in (m["mamba2"] for m in measured):
        losses = found["FSDP1"]
        assert abs(losses["stored"] - found["bfloat16"]) <= 16 * eps * found["bfloat16"]
        near = torch.finfo(NARROW).eps * found["float32"]
        assert abs(losses["policy"] - found["float32"]) <= near
