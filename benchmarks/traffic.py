"""Bytes that a forward and a backward pass move: of kernels, and of the operations around them.

    python benchmarks/census.py --traffic                 every class, K/V = 128/128, bfloat16

Everything is per token and value head of a long sequence: the difference between two lengths,
so that states outside of the sequence count nothing. Of eager operations: what they read
and write, each tensor once, on meta tensors. Of kernels: what every program reads and writes, each
address once a program, from the launches that the host code asks for, run in Triton's interpreter.
What several programs read counts as often, though a cache may have it.
"""

import ast
import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

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


def operands(
    spec: glazoo.Spec,
    tokens: int,
    size: tuple[int, int] = (KEYS, VALUES),
    heads: int = HEADS,
    device: str = "meta",
) -> dict[str, Tensor]:
    """Operands as layers give them: tokens in bfloat16, gates in float32, with gradients but for
    decays that are the same for all tokens."""
    keys, values = size
    sizes = {"B": 1, "T": tokens, "H": heads, "HV": heads, "K": keys, "V": values, "1": 1}
    found = {}
    for x in lower(spec).operands:
        axes = x.shapes[-1 if x.role == "decay" else 0]
        found[x.name] = torch.empty(
            [sizes[axis] for axis in axes],
            dtype=torch.float32 if x.wide else torch.bfloat16,
            device=device,
            requires_grad=x.role != "decay" or "T" in axes,
        )
    return found


def record(
    run: Callable[..., Tensor],
    given: Mapping[str, Tensor],
    recorder: contextlib.AbstractContextManager[list[Any]],
) -> dict[str, Recording]:
    """Launches and eager operations of what gives an output, and of the gradients of operands."""
    eager = Eager()
    with recorder as launches, eager:
        y = run(**given)
        at = len(launches), len(eager.operations)
        inputs = [x for x in given.values() if x.requires_grad]
        torch.autograd.grad(y, inputs, torch.empty_like(y), allow_unused=True)
    return {
        "forward": Recording(launches[: at[0]], eager.operations[: at[1]]),
        "backward": Recording(launches[at[0] :], eager.operations[at[1] :]),
    }


def of_spec(
    spec: glazoo.Spec,
    tokens: int,
    target: str,
    size: tuple[int, int] = (KEYS, VALUES),
    heads: int = HEADS,
) -> dict[str, Recording]:
    """The same of a recurrence on our kernels."""

    def run(**given: Tensor) -> Tensor:
        return glazoo.attention(spec, impl="triton", **given)[0]

    return record(run, operands(spec, tokens, size, heads), record_launches(target))


def of_case(case: str, tokens: int, target: str) -> dict[str, Recording]:
    """The same of one of CASES."""
    return of_spec(CASES[case](), tokens, target)


def eager_bytes(case: str, target: str = "sm_90") -> dict[str, float]:
    """Eager bytes of a case by direction."""
    few, many = (of_case(case, tokens, target) for tokens in TOKENS)
    return {
        x: marginal(*(sum(n for _, n in of[x].eager) for of in (few, many))) for x in DIRECTIONS
    }


def marginal(few: float, many: float) -> float:
    """What a token and head of a long sequence adds."""
    return (many - few) / ((TOKENS[1] - TOKENS[0]) * HEADS)


class Block(NamedTuple):
    """A part of a kernel's source that runs more or less often than what it is in: the body of a
    loop, what follows a condition or its `else`."""

    file: str
    header: int
    """The line of the loop or condition."""
    first: int
    last: int
    loops: bool
    left: int
    """Where the block returns, the last line of the function; else 0."""

    def times(self, touched: "Touched", line: int) -> float:
        """How often a line of the file runs for each time that this condition is reached."""
        part = touched.run[self] / touched.reached[self]
        if self.first <= line <= self.last:
            return part
        return 1.0 - part if self.last < line <= self.left else 1.0


class Touched:
    """The addresses that programs touch, each once a program, and how often blocks run."""

    def __init__(self) -> None:
        self.bytes = 0
        self.programs = 0
        self.reached: collections.Counter[Block] = collections.Counter()
        self.run: collections.Counter[Block] = collections.Counter()
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


def _statement(source: str) -> ast.stmt:
    return ast.parse(source).body[0]


class _Counting(ast.NodeTransformer):
    """Lets a kernel's source count its blocks in `builder`, which interpreted code knows."""

    def __init__(self, file: str, lines_before: int, blocks: list[Block]) -> None:
        self.file, self.before, self.blocks = file, lines_before, blocks
        self.end = 0

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.end = (node.end_lineno or 0) + self.before
        self.generic_visit(node)
        return node

    def _block(self, node: Any, body: list[ast.stmt]) -> int:
        last = max(x.end_lineno or 0 for x in body)
        at = (x + self.before for x in (node.lineno, body[0].lineno, last))
        left = self.end if isinstance(body[-1], ast.Return) else 0
        self.blocks.append(Block(self.file, *at, not isinstance(node, ast.If), left))
        return len(self.blocks) - 1

    def visit_block(self, node: Any) -> list[ast.stmt]:
        parts = [(x, self._block(node, x)) for x in (node.body, node.orelse) if x]
        self.generic_visit(node)
        for body, block in parts:
            body.insert(0, _statement(f"interpreter_builder.run_block({block})"))
        reached = (f"interpreter_builder.reach_block({block})" for _, block in parts)
        return [*map(_statement, reached), node]

    def visit_For(self, node: ast.For) -> list[ast.stmt]:
        counted = self.visit_block(node)
        if ast.unparse(node.iter).startswith(("range(", "tl.range(")):
            # A tensor where it is compiled, whose methods a kernel may call.
            name = ast.unparse(node.target)
            node.body.insert(
                0, _statement(f"{name} = interpreter_semantic.to_tensor({name}, False)")
            )
        return counted

    visit_While = visit_If = visit_block


@contextlib.contextmanager
def touching() -> Iterator[Touched]:
    """Inside, Triton's interpreter counts what programs read and write, and runs what is compiled
    elsewhere."""
    builder, touched = interpreter.interpreter_builder, Touched()
    blocks: list[Block] = []

    def seen(name: str, kind: str, mask_at: int) -> Any:
        function = getattr(builder, name)

        def call(*arguments: Any) -> Any:
            touched.touch(kind, arguments[0], arguments[mask_at])
            return function(*arguments)

        return mock.patch.object(builder, name, call)

    def located(*at: int) -> None:
        touched.end()
        touched.programs += 1
        place(*at)

    def transform(rewriter: Any, source: str) -> Any:
        before = rewriter.def_file_lineno - 1
        tree = rewriter.ast_transformer.visit(ast.parse(source))
        tree = _Counting(rewriter.filename, before, blocks).visit(tree)
        return ast.increment_lineno(ast.fix_missing_locations(tree), before)

    def call(kernel: Any, *arguments: Any, **named: Any) -> Any:
        return interpreter.InterpretedFunction(kernel.fn).rewrite()(*arguments, **named)

    place = builder.set_grid_idx
    precisions = {"allowed_dot_input_precisions": ("ieee", "tf32", "tf32x3", "bf16x3", "bf16x6")}
    patches = (
        (builder, "set_grid_idx", located),
        # Value by value in Python, and no address depends on them.
        (interpreter.ScanOps, "generic_scan", _scanned),
        (interpreter.ReduceOps, "generic_reduce", _reduced),
        # Nor on products.
        (builder, "options", dataclasses.replace(builder.options, **precisions)),
        (interpreter.FunctionRewriter, "_transform_ast", transform),
        (interpreter.InterpretedFunction, "rewritten_fn", {}),
        # Where kernels are compiled, the functions that they call are, too.
        (triton.JITFunction, "__call__", call),
    )
    counts = {
        "run_block": lambda i: touched.run.update([blocks[i]]),
        "reach_block": lambda i: touched.reached.update([blocks[i]]),
    }
    with contextlib.ExitStack() as stack:
        # What the language's own functions use of it; a launch sees to what kernels use.
        stack.callback(interpreter._patch_lang(triton.language.cdiv.fn).restore)
        for of, name, value in patches:
            stack.enter_context(mock.patch.object(of, name, value))
        for name, value in counts.items():
            stack.enter_context(mock.patch.object(builder, name, value, create=True))
        stack.enter_context(seen("create_masked_load", "read", 1))
        stack.enter_context(seen("create_masked_store", "write", 2))
        yield touched
    touched.end()


def touched_by(launch: Launch) -> Touched:
    """Return what the programs of a launch read, write and run."""
    # Contents decide no address: whole numbers that do, such as places in packed sequences, are in
    # no launch here. What is given by two names has one address.
    held: dict[int, Tensor] = {}

    def room(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        zeros = held.setdefault(storage._cdata, torch.zeros(storage.nbytes(), dtype=torch.uint8))
        return zeros.view(x.dtype).as_strided(x.shape, x.stride(), x.storage_offset())

    arguments = {
        name: room(x) if isinstance(x, Tensor) else x for name, x in launch.arguments.items()
    }
    if "RECIP" in arguments:
        arguments["RECIP"] = 0
    kernel = interpreter.InterpretedFunction(launch.kernel.fn)
    # The interpreter replaces what a module calls by the language's name, not what it imports.
    known = kernel.fn.__globals__
    semantic = {"_semantic": interpreter.interpreter_semantic}
    imported = {
        name: functools.partial(x, **semantic)
        for name, x in known.items()
        if triton.language.core.is_builtin(x)
    }
    with (
        touching() as touched,
        mock.patch.dict(known, imported),
        np.errstate(all="ignore"),
    ):
        kernel[launch.grid](**arguments)
    return touched


def traffic(case: str, target: str = "sm_90") -> dict[str, Traffic]:
    """Bytes of a case by direction."""
    few, many = (of_case(case, tokens, target) for tokens in TOKENS)

    def of(x: Recording) -> tuple[int, int]:
        return sum(touched_by(y).bytes for y in x.launches), sum(n for _, n in x.eager)

    return {
        x: Traffic(*(marginal(*pair) for pair in zip(of(few[x]), of(many[x]), strict=True)))
        for x in DIRECTIONS
    }
