"""Operators from one record: registration with torch of a forward pass and all its derivatives.

An operation is a NamedTuple of its operands and options and a few functions of it; schemas, fake
implementations, the operator of its gradients, and what differentiates and batches both follow:

- a first derivative in reverse mode is the operator NAME_backward, as fast as it is written;
- what has no formula of its own (forward mode, further derivatives) differentiates `loop`,
  the same operation in ordinary tensor operations: slower, and never silently zero;
- `torch.vmap` runs the operators once per entry of the batch.

Steps, which update states in place, come from the same records and refuse to be differentiated.

All of this happens in the dispatcher, so that it holds in eager mode, in graphs that torch.compile
traces, and under the transforms of `torch.func` in any order.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, peek_interpreter_stack
from torch._functorch.autograd_function import (  # type: ignore[attr-defined]
    enable_single_level_autograd_function,
)
from torch._functorch.eager_transforms import enable_inplace_requires_grad
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from .loops import without_autocast

# A copy of this package under another name, from the kernels hub, has operators of its own.
_NAMESPACE = (__package__ or "glazoo").partition(".")[0]
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")
_KINDS = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
}


def wants_derivative(*operands: object) -> bool:
    """Return whether a derivative with respect to an operand may be asked for, in either mode."""
    if not torch.is_grad_enabled() and not _transformed():
        return False
    given = [x for x in operands if isinstance(x, Tensor)]
    return _requires_grad(given) or (_transformed() and _has_tangent(given))


def _transformed() -> bool:
    """Return whether tensors of a caller in Python may carry tangents; asking every one takes
    longer."""
    return (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or peek_interpreter_stack() is not None
    )


_PLAIN = {Tensor, torch.nn.Parameter, type(None), bool, int, float, str}


def plain(inputs: Iterable[object]) -> bool:
    """Return whether nothing looks at the operators that run, nor stands in for a tensor."""
    return (
        not _transformed()
        and not torch._C._len_torch_dispatch_stack()
        and _PLAIN.issuperset(map(type, inputs))
    )


def _requires_grad(tensors: Iterable[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _has_tangent(tensors: Iterable[Tensor]) -> bool:
    traced, outside = torch.compiler.is_compiling(), forward_ad._current_level < 0

    def tangent(x: Tensor) -> Tensor | None:
        # The level that Python knows of is not that of a graph which is being traced.
        if traced or is_functorch_wrapped_tensor(x):
            return forward_ad.unpack_dual(x, level=0).tangent
        return None if outside else forward_ad.unpack_dual(x).tangent

    return any(tangent(x) is not None for x in tensors)


def _below(op: Any, inputs: Sequence[Any]) -> Any:
    """Call an operator as one without derivatives."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*inputs)


def _define(
    name: str, arguments: Sequence[str], outputs: Sequence[str], run: Any, fake: Any
) -> Any:
    """An operator that `run` computes, whose results have the shapes that `fake` gives."""
    returns = ", ".join(f"Tensor {x}" for x in outputs)
    schema = f"{name}({', '.join(arguments)}) -> ({returns})"
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(getattr(torch.ops, _NAMESPACE), name).default

    def guarded(*inputs: Any) -> Any:
        with without_autocast(next(x for x in inputs if isinstance(x, Tensor))):
            return run(*inputs)

    _LIBRARY.impl(name, guarded, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return op


def _fields(record: Any) -> list[tuple[str, str]]:
    """Names of a record's operands and options, and their kinds in a schema."""
    kinds = typing.get_type_hints(record)
    return [(x, _KINDS[kinds[x]]) for x in record._fields]


def _batch(name: str, op: Any) -> None:
    """Under torch.vmap the operator runs once per entry of the batch."""

    def rule(info: Any, in_dims: Any, *inputs: Any) -> Any:
        pairs = list(zip(inputs, in_dims, strict=True))
        rows = [
            op(*(x.select(d, i) if isinstance(d, int) else x for x, d in pairs))
            for i in range(info.batch_size)
        ]
        found = [torch.stack(x) for x in zip(*rows, strict=True)]
        return tuple(found), (0,) * len(found)

    torch.library.register_vmap(f"{_NAMESPACE}::{name}", rule, lib=_LIBRARY)


def _differentiate(
    name: str, op: Any, plain: Any, backward: Any, results: int, reads: Sequence[int], keeps: bool
) -> None:
    """Give an operator derivatives: `backward` in reverse mode, `plain`'s in forward mode.

    backward: maps inputs, the outputs that it `reads`, the gradients of the first `results`
    outputs and which inputs need one, to gradients of the inputs. keeps: whether the last input
    says that there will be a backward pass.
    """

    class Derivative(_SingleLevelFunction):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            # Under several transforms of torch.func there are derivatives below these, too.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return _below(op, inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*output[results:])
            ctx.options = [None if isinstance(x, Tensor) else x for x in inputs]
            tensors = [x if isinstance(x, Tensor) else None for x in inputs]
            ctx.save_for_backward(*tensors, *(output[i] for i in reads))

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            # Once: checkpointing computes them anew for every time that they are asked for.
            saved, count = ctx.saved_tensors, len(ctx.options)
            inputs = [y if x is None else x for x, y in zip(saved, ctx.options, strict=False)]
            kept = saved[count:]
            return backward(inputs, kept, grads[:results], ctx.needs_input_grad)

    def kernel(*inputs: Any) -> Any:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if _has_tangent(tensors):
            return plain(*inputs)
        if not _requires_grad(tensors):
            return _below(op, inputs)
        with enable_single_level_autograd_function():
            last = True if keeps else inputs[-1]
            return Derivative.apply(*inputs[:-1], last)  # type: ignore[attr-defined]

    _LIBRARY.impl(name, kernel, "Autograd")


def _gradients(
    function: Any, inputs: Any, wanted: Sequence[bool], grads: Any, in_kernel: bool
) -> dict[int, Tensor]:
    """Gradients of the wanted inputs by place, through plain operations.

    in_kernel: whether the dispatcher is at work, which no transform of torch.func can enter.
    """
    chosen = [i for i, need in enumerate(wanted) if need]
    given = [i for i, y in enumerate(grads) if y is not None]
    if not given:
        return {i: torch.zeros_like(inputs[i]) for i in chosen}

    def of(*leaves: Tensor) -> tuple[Tensor, ...]:
        values = dict(enumerate(inputs)) | dict(zip(chosen, leaves, strict=True))
        found = function(*values.values())
        return tuple(found[i] for i in given)

    given_grads = tuple(grads[i] for i in given)
    if not in_kernel:
        pulled: Any = torch.func.vjp(of, *(inputs[i] for i in chosen))
        return dict(zip(chosen, pulled[1](given_grads), strict=True))
    again = torch.is_grad_enabled()
    with torch.enable_grad(), enable_inplace_requires_grad(True):
        # What is added is zero, and a leaf of its own for every operand, which keeps its tangent.
        zeros = [torch.zeros_like(inputs[i]).requires_grad_() for i in chosen]
        found = of(*(inputs[i] + x for i, x in zip(chosen, zeros, strict=True)))
        pairs = [(y, dy) for y, dy in zip(found, given_grads, strict=True) if y.requires_grad]
        if not pairs:
            return {i: torch.zeros_like(inputs[i]) for i in chosen}
        of_zeros = torch.autograd.grad(
            [y for y, _ in pairs],
            zeros,
            [dy for _, dy in pairs],
            create_graph=again,
            materialize_grads=True,
        )
    return dict(zip(chosen, of_zeros, strict=True))


def register(
    name: str,
    record: Any,
    *,
    results: Sequence[str],
    kept: Sequence[str] = (),
    forward: Callable[[Any, bool], Sequence[Tensor]],
    allocate: Callable[[Any, bool], Sequence[Tensor]],
    gradients: Callable[..., Sequence[Tensor | None]],
    reads: Sequence[str] = (),
) -> Callable[..., Any]:
    """Register an operation and give the function that calls it.

    Args:
        name: of the operator, glazoo::NAME.
        record: a NamedTuple class of operands (Tensor or Tensor | None) and options, in order; its
            method `loop` gives the results in differentiable operations.
        results: names of its results.
        kept: names of further outputs, for the backward pass alone.
        forward: maps a record, and whether there will be a backward pass, to all outputs.
        allocate: gives outputs of the same shapes and dtypes, whatever is in them.
        gradients: maps a record, the gradients of the results (None where nothing depends on one),
            a record of what is wanted, and the outputs that it reads, to the gradients of all
            operands in order; those that are not wanted may be None.
        reads: names of the results that `gradients` reads besides what is kept.

    Returns:
        A function of the record's values (the record unpacked) that gives the results.
    """
    fields = _fields(record)
    operands = [i for i, (_, kind) in enumerate(fields) if kind.startswith("Tensor")]
    outputs = [*results, *kept]
    seen = [outputs.index(x) for x in (*reads, *kept)]
    count = len(results)
    arguments = [f"{kind} {field}" for field, kind in fields]

    def run(*inputs: Any) -> Any:
        return tuple(forward(record(*inputs[:-1]), inputs[-1]))

    def fake(*inputs: Any) -> Any:
        return tuple(allocate(record(*inputs[:-1]), inputs[-1]))

    op = _define(name, [*arguments, "bool keep"], outputs, run, fake)

    # Of the backward operator: gradients of results, operands and options, what was kept, and
    # which gradients are wanted.
    first, last = count, count + len(fields)
    back = f"{name}_backward"

    def split(inputs: Sequence[Any]) -> tuple[Any, Any, Any]:
        return inputs[:first], record(*inputs[first:last]), record(*inputs[-1])

    def shaped(x: Any, wanted: Any, make: Any) -> tuple[Tensor, ...]:
        some = next(y for y in x if isinstance(y, Tensor))
        return tuple(make(i) if wanted[i] else some.new_empty(0) for i in operands)

    def run_backward(*inputs: Any) -> Any:
        grads, x, wanted = split(inputs)
        found = dict(zip(operands, gradients(x, grads, wanted, *inputs[last:-1]), strict=True))

        def made(i: int) -> Tensor:
            y = found[i]
            return torch.zeros_like(x[i]) if y is None else y.to(x[i].dtype).contiguous()

        return shaped(x, wanted, made)

    def fake_backward(*inputs: Any) -> Any:
        _, x, wanted = split(inputs)
        return shaped(
            x, wanted, lambda i: torch.empty_like(x[i], memory_format=torch.contiguous_format)
        )

    backward = _define(
        back,
        [
            *(f"Tensor? grad_{x}" for x in results),
            *arguments,
            *(f"Tensor kept_{outputs[i]}" for i in seen),
            "bool[] wanted",
        ],
        [f"grad_{record._fields[i]}" for i in operands],
        run_backward,
        fake_backward,
    )

    def plain_forward(*inputs: Any) -> Any:
        x, keep = record(*inputs[:-1]), inputs[-1]
        extra = (_below(op, inputs) if keep else allocate(x, False))[count:]
        return *x.loop(), *extra

    def pull(inputs: Any, kept: Any, grads: Any, needs: Any) -> Any:
        wanted = needs[: len(fields)]
        found = iter(backward(*grads, *inputs[:-1], *kept, list(wanted)))
        made = {i: next(found) for i in operands}
        return *(made.get(i) if wanted[i] else None for i in range(len(fields))), None

    def plain_backward(*inputs: Any, in_kernel: bool = True) -> Any:
        grads, x, wanted = split(inputs)
        found = _gradients(lambda *values: record(*values).loop(), x, wanted, grads, in_kernel)
        return shaped(x, wanted, found.__getitem__)

    def pull_backward(inputs: Any, kept: Any, grads: Any, needs: Any) -> Any:
        again = functools.partial(plain_backward, in_kernel=False)
        found = _gradients(again, inputs, needs, grads, in_kernel=False)
        return tuple(found.get(i) for i in range(len(inputs)))

    _differentiate(name, op, plain_forward, pull, count, seen, keeps=True)
    _differentiate(back, backward, plain_backward, pull_backward, len(operands), (), keeps=False)
    _batch(name, op)
    _batch(back, backward)
    return lambda *values: op(*values, False)[:count]


def register_step(
    name: str,
    record: Any,
    *,
    results: Sequence[str],
    updates: Sequence[str] = (),
    step: Callable[[Any], Sequence[Tensor]],
    allocate: Callable[[Any], Sequence[Tensor]],
) -> Callable[..., Any]:
    """Register a step of decoding, which has no derivatives, and give the function that calls it.

    Args:
        name: of the operator, glazoo::NAME.
        record: a NamedTuple class of operands and options, as `register` takes it.
        results: names of its results.
        updates: names of the operands that it updates in place, none of them None.
        step: maps a record to the results.
        allocate: gives results of the same shapes and dtypes, whatever is in them.

    Returns:
        A function of the record's values (the record unpacked) that gives the results.
    """
    arguments = [
        f"Tensor({chr(ord('a') + updates.index(x))}!) {x}" if x in updates else f"{kind} {x}"
        for x, kind in _fields(record)
    ]
    schema = f"({', '.join(arguments)}) -> ({', '.join(f'Tensor {x}' for x in results)})"

    def of(function: Callable[[Any], Sequence[Tensor]]) -> Callable[..., Any]:
        def called(*inputs: Any) -> Any:
            found = tuple(function(record(*inputs)))
            return found if len(found) > 1 else found[0]

        return called

    direct = of(step)
    op = torch.library.custom_op(
        f"{_NAMESPACE}::{name}", direct, mutates_args=updates, schema=schema
    )
    op.register_fake(of(allocate))

    def call(*inputs: Any) -> Any:
        if _transformed() and _has_tangent(x for x in inputs if isinstance(x, Tensor)):
            raise NotImplementedError(
                f"{name}: an operand carries a tangent, and a step of decoding has no derivatives; "
                f"call the operation that takes any number of tokens"
            )
        if not updates and plain(inputs):
            # What a token of decoding costs is its calls, and the dispatcher's are most of them.
            return direct(*inputs)
        return op(*inputs)

    return call
