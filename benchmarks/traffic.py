"""Bytes that a forward and a backward pass move: of kernels, and of the operations around them.

    python benchmarks/census.py --traffic                 every class, K/V = 128/128, bfloat16

Everything is per token and value head of a long sequence: the difference between two lengths,
so that states outside of the sequence count nothing. Of eager operations: what they read
and write, each tensor once, on meta tensors. Of kernels: what every program reads and writes, each
address once a program, from the launches that the host code asks for, run in Triton's interpreter.
What several programs read counts as often, though a cache may have it.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import glazoo
from glazoo.kernels.common import Launch, record_launches
from glazoo.program import lower

HEADS, KEYS, VALUES = 1, 128, 128
# Whole chunks of every kernel of linear, delta and importance.
TOKENS = 64, 128
DIRECTIONS = ("forward", "backward")
# A name of every class and gate, and the spec that stands for it.
CASES: dict[str, Callable[[], glazoo.Spec]] = {
    "linear/none": lambda: glazoo.load("linear_attention"),
    "linear/head": lambda: glazoo.load("mamba2"),
    "linear/key": lambda: glazoo.load("gla"),
    "delta/none": lambda: glazoo.load("deltanet"),
    "delta/head": lambda: glazoo.load("gated_deltanet"),
    "delta/key": lambda: glazoo.load("kda"),
    "synapse/head": lambda: glazoo.load("meta_mamba2"),
    "synapse_delta/head": lambda: _metaplastic("gated_deltanet", gate="value"),
    "metaplastic linear/head": lambda: _metaplastic("mamba2"),
    "metaplastic linear/key": lambda: _metaplastic("gla"),
    "metaplastic delta/head": lambda: _metaplastic("gated_deltanet"),
    "metaplastic delta/head, first order": lambda: _metaplastic(
        "gated_deltanet", gain="first_order"
    ),
    "metaplastic delta/key": lambda: _metaplastic("kda"),
}


def _metaplastic(name: str, **form: Any) -> glazoo.Spec:
    return glazoo.metaplasticize(glazoo.load(name), **form)


class Traffic(NamedTuple):
    """Bytes per token and value head."""

    kernels: float
    eager: float

    @property
    def total(self) -> float:
        return self.kernels + self.eager


@dataclasses.dataclass
class Recording:
    """What one direction asked for."""

    launches: list[Launch]
    eager: list[tuple[str, int]]
    """Names of operations and their bytes."""


# They write, if anything, memory that nobody has asked for: what fills it is counted.
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# They read no entry of what they are given.
_FILLS = {"zero_", "fill_", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones"}


def _bytes(tree: Any) -> int:
    found = {id(x): x for x in tree_leaves(tree) if isinstance(x, Tensor)}
    return sum(_held(x) for x in found.values())


def _held(x: Tensor) -> int:
    """Bytes of a tensor's entries, those that an expanded axis repeats once."""
    sizes = [n for n, stride in zip(x.shape, x.stride(), strict=True) if stride or not n]
    return int(np.prod(sizes, dtype=np.int64)) * x.element_size()


class Eager(TorchDispatchMode):
    """Lists every operation that is no view with its bytes, also those inside of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "glazoo":
            # The host code itself, which records its launches: the shapes alone know of none.
            with self:
                key = torch._C.DispatchKey.CompositeExplicitAutograd
                return func._op_dk(key, *args, **kwargs)
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if not (func.is_view or name in _ALLOCATIONS):
            # What is written over is not read.
            read = 0 if name in _FILLS else _bytes((args[name == "copy_" :], kwargs))
            self.operations.append((name, read + _bytes(result)))
        return result


def operands(spec: glazoo.Spec, tokens: int, device: str = "meta") -> dict[str, Tensor]:
    """Operands as layers give them: tokens in bfloat16, gates in float32, all with gradients."""
    sizes = {"B": 1, "T": tokens, "H": HEADS, "HV": HEADS, "K": KEYS, "V": VALUES, "1": 1}
    return {
        x.name: torch.empty(
            [sizes[axis] for axis in x.shapes[-1 if x.role == "decay" else 0]],
            dtype=torch.float32 if x.wide else torch.bfloat16,
            device=device,
            requires_grad=True,
        )
        for x in lower(spec).operands
    }


def record(
    run: Callable[[], Tensor], inputs: Sequence[Tensor], target: str
) -> dict[str, Recording]:
    """Launches and eager operations of what gives an output, and of the gradients of inputs."""
    eager = Eager()
    with record_launches(target) as launches, eager:
        y = run()
        at = len(launches), len(eager.operations)
        torch.autograd.grad(y, inputs, torch.empty_like(y), allow_unused=True)
    return {
        "forward": Recording(launches[: at[0]], eager.operations[: at[1]]),
        "backward": Recording(launches[at[0] :], eager.operations[at[1] :]),
    }


def of_case(case: str, tokens: int, target: str) -> dict[str, Recording]:
    """The same of one of CASES."""
    spec = CASES[case]()
    given = operands(spec, tokens)

    def run() -> Tensor:
        return glazoo.attention(spec, impl="triton", **given)[0]

    return record(run, list(given.values()), target)


def eager_bytes(case: str, target: str = "sm_90") -> dict[str, float]:
    """Eager bytes of a case by direction."""
    few, many = (of_case(case, tokens, target) for tokens in TOKENS)
    return {
        x: _marginal(*(sum(n for _, n in of[x].eager) for of in (few, many))) for x in DIRECTIONS
    }


def _marginal(few: float, many: float) -> float:
    return (many - few) / ((TOKENS[1] - TOKENS[0]) * HEADS)


class Touched:
    """The addresses that programs touch, each once a program."""

    def __init__(self) -> None:
        self.bytes = 0
        self._program: dict[tuple[str, int], list[Any]] = {}

    def end(self) -> None:
        """Count a program's."""
        for (_, size), addresses in self._program.items():
            self.bytes += size * len(np.unique(np.concatenate(addresses)))
        self._program.clear()

    def touch(self, kind: str, pointers: Any, mask: Any) -> None:
        """Count the addresses that a mask leaves."""
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        data = pointers.data
        kept = data.ravel() if mask is None else data[np.broadcast_to(mask.data, data.shape)]
        self._program.setdefault((kind, size), []).append(kept)


def _scanned(_: Any, given: Any) -> Any:
    """Tensors of the shape of a scan."""
    return list(given)


def _reduced(of: Any, given: Any) -> Any:
    """Tensors of the shape of a reduction."""
    first = [x.handle.data.take([0], of.axis) for x in given]
    kept = first if of.keep_dims else [x.squeeze(of.axis) for x in first]
    return [of.to_tensor(x, y.dtype) for x, y in zip(kept, given, strict=True)]


@contextlib.contextmanager
def touching() -> Iterator[Touched]:
    """Inside, Triton's interpreter counts what programs read and write."""
    from triton.runtime import interpreter

    builder, touched = interpreter.interpreter_builder, Touched()

    def seen(name: str, kind: str, mask_at: int) -> Any:
        function = getattr(builder, name)

        def call(*arguments: Any) -> Any:
            touched.touch(kind, arguments[0], arguments[mask_at])
            return function(*arguments)

        return mock.patch.object(builder, name, call)

    def located(*at: int) -> None:
        touched.end()
        place(*at)

    place = builder.set_grid_idx
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(builder, "set_grid_idx", located))
        # Value by value in Python, and no address depends on them.
        stack.enter_context(mock.patch.object(interpreter.ScanOps, "generic_scan", _scanned))
        stack.enter_context(mock.patch.object(interpreter.ReduceOps, "generic_reduce", _reduced))
        stack.enter_context(seen("create_masked_load", "read", 1))
        stack.enter_context(seen("create_masked_store", "write", 2))
        yield touched
    touched.end()


def kernel_bytes(launch: Launch) -> int:
    """Return the bytes that the programs of a launch read and write."""
    # Contents decide no address: whole numbers that do, such as places in packed sequences, are in
    # no launch here.
    arguments = {
        name: torch.zeros(x.shape, dtype=x.dtype) if isinstance(x, Tensor) else x
        for name, x in launch.arguments.items()
    }
    if "RECIP" in arguments:
        arguments["RECIP"] = 0
    with touching() as touched, np.errstate(all="ignore"):
        launch.kernel[launch.grid](**arguments)
    return touched.bytes


def traffic(case: str, target: str = "sm_90") -> dict[str, Traffic]:
    """Bytes of a case by direction."""
    return marginal(lambda tokens: of_case(case, tokens, target))


def marginal(recorded: Callable[[int], dict[str, Recording]]) -> dict[str, Traffic]:
    """Bytes by direction of what is recorded for a number of tokens."""
    few, many = (recorded(tokens) for tokens in TOKENS)

    def of(x: Recording) -> tuple[int, int]:
        return sum(map(kernel_bytes, x.launches)), sum(n for _, n in x.eager)

    return {
        x: Traffic(*(_marginal(*pair) for pair in zip(of(few[x]), of(many[x]), strict=True)))
        for x in DIRECTIONS
    }
