"""What test_training.py runs in two processes: `glazoo train` under FSDP2, on CPUs.

accelerate has FSDP for accelerators only. Here it is told that two CPUs are some: everything after
that, the sharding, the optimizer, the checkpoints and the saved folder, is as on GPUs.
"""

from __future__ import annotations

import os
import runpy
from typing import Any

import torch
from accelerate import state
from accelerate.utils import DistributedType

_make = state.AcceleratorState.__init__


def _told(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    _make(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = DistributedType.FSDP
        state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP


if __name__ == "__main__":
    assert os.environ["WORLD_SIZE"] == "2"
    torch.set_num_threads(1)
    state.AcceleratorState.__init__ = _told
    runpy.run_module("glazoo.train", run_name="__main__")
