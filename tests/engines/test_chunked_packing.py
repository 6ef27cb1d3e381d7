"""Packed sequences, segments with carried states, and independence between sequences."""

import itertools
from dataclasses import replace
from types import ModuleType

import torch
from chunked_cases import (
    STATES,
    Case,
    call,
    cases,
    compare,
    each_core,
    make,
    with_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glazoo.engines import chunked
from glazoo.engines.chunked.common import GATHER, groups
from glazoo.kernels import loops

TOKENWISE = ("q", "k", "w", "v", "e", "g", "b", "beta", "a", "c", "d", "u")


def cut(case: Case, start: int, stop: int, state: dict[str, Tensor | None]) -> Case:
    """Tokens start..stop of a case with the given initial state."""
    part = {
        name: x[:, start:stop] if x is not None and name in TOKENWISE else x
        for name, x in case.operands.items()
    }
    return replace(case, operands={**part, **state})


class Unpacked:
    """The loops, one sequence of a pack after the other."""

    def __getattr__(self, operation: str) -> object:
        def run(*operands: Tensor | None, cu_seqlens: Tensor, **options: object) -> tuple:
            states = options.pop("initial_state")
            names = [key for key in ("e",) if options.get(key) is not None]
            parts = []
            for i, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
                own = dict(options)
                for name in names:
                    own[name] = options[name][:, start:stop]
                if isinstance(states, Tensor):
                    own["initial_state"] = states[i : i + 1]
                elif states is not None:
                    own["initial_state"] = tuple(x[i : i + 1] for x in states)
                tokens = [None if x is None else x[:, start:stop] for x in operands]
                parts.append(getattr(loops, operation)(*tokens, **own))
            outs, finals, *doubts = zip(*parts, strict=True)
            out = torch.cat(outs, dim=1)
            if isinstance(finals[0], Tensor):
                final: object = torch.cat(finals)
            else:
                final = tuple(torch.cat(x) for x in zip(*finals, strict=True))
            if not doubts:
                return out, final
            return out, final, None if doubts[0][0] is None else torch.cat(doubts[0], dim=1)

        return run


@each_core()
@given(data=st.data())
@settings(max_examples=10)
def test_a_pack_is_its_sequences(core: ModuleType, operation: str, data: st.DataObject) -> None:
    """Values, gradients and states; sequences of no token keep their state."""
    case = data.draw(cases(operation, longest=90, packed=True))
    tokens = next(iter(case.operands.values())).shape[1]
    inner = data.draw(st.lists(st.integers(0, tokens), max_size=5))
    borders = torch.tensor([0, *sorted(inner), tokens])
    if data.draw(st.booleans()):
        options = dict(case.options)
        x = case.operands
        values = next(x[name] for name in ("w", "v", "b", "u", "beta") if name in x)
        made = make(
            operation,
            heads=values.shape[2],
            keys=x["k" if "k" in x else "u"].shape[3],
            values=values.shape[-1],
            states=len(inner) + 1,
            **options,
        )
        case.operands.update({name: made.operands[name] for name in STATES[operation]})
    dtype = data.draw(st.sampled_from((torch.float64, torch.float32)))
    case = case.cast(dtype)
    found = with_gradients(core, case, cu_seqlens=borders)
    compare(found, Unpacked(), case, dtype, cu_seqlens=borders)


@each_core()
def test_long_and_short_sequences_together(core: ModuleType, operation: str) -> None:
    """Lengths that are views, that are gathered alone and that share a batch."""
    lengths = [700, 1, 0, 5, 6, 7, 70, 66, 1, 1, 0]
    if operation in ("synapse_delta", "solve"):
        lengths[0] = 530
    borders = torch.tensor([0, *itertools.accumulate(lengths)])
    case = make(
        operation, tokens=sum(lengths), keys=2, values=2, share=2, states=len(lengths), gate="head"
    )
    found = with_gradients(core, case, cu_seqlens=borders)
    compare(found, Unpacked(), case, torch.float64, cu_seqlens=borders)


@each_core()
def test_all_sequences_empty(core: ModuleType, operation: str) -> None:
    case = make(operation, tokens=0, states=3)
    found = with_gradients(core, case, cu_seqlens=torch.tensor([0, 0, 0, 0]))
    for name in STATES[operation]:
        assert torch.equal(found[f"final {name}"], case.operands[name])


@each_core()
@given(cuts=st.lists(st.integers(0, 150), max_size=4), seed=st.integers(0, 99))
@settings(max_examples=8)
def test_segments_with_carried_states(
    core: ModuleType, operation: str, cuts: list[int], seed: int
) -> None:
    """Cutting a sequence and carrying the state changes no value and no gradient."""
    case = make(operation, tokens=150, states=1, share=2, keys=3, gate="head", seed=seed)

    def segmented(names: list[str], operands: list[Tensor]) -> list[Tensor]:
        made = replace(case, operands=dict(zip(names, operands, strict=True)))
        state = {name: made.operands[name] for name in STATES[operation]}
        outs = []
        for start, stop in itertools.pairwise([0, *sorted(cuts), 150]):
            found = call(core, cut(made, start, stop, state))
            outs.append(found["out"])
            state = {name: found[f"final {name}"] for name in STATES[operation]}
        return [torch.cat(outs, dim=1), *state.values()]

    def whole(names: list[str], operands: list[Tensor]) -> list[Tensor]:
        made = replace(case, operands=dict(zip(names, operands, strict=True)))
        return list(call(core, made).values())

    results = []
    for function in (segmented, whole):
        leaves = [case.operands[name].detach().requires_grad_() for name in case.names]
        found = function(case.names, leaves)
        gradients = torch.autograd.grad([x.square().sum() for x in found], leaves)
        results.append([*found, *gradients])
    # Both orders of the same float64 operations: a small multiple of the rounding of 150 steps.
    for x, y in zip(*results, strict=True):
        scale = float(y.detach().abs().max())
        assert float((x - y).detach().abs().max()) <= 150 * torch.finfo(torch.float64).eps * scale


@each_core()
def test_sequences_do_not_see_each_other(core: ModuleType, operation: str) -> None:
    """Another sequence of the pack, and a token after, change no bit."""
    borders = torch.tensor([0, 40, 40, 110])
    case = make(operation, tokens=110, share=2).cast(torch.float32)
    before = call(core, case, cu_seqlens=borders)["out"]
    changed = {
        name: x.clone() if x is not None and name in TOKENWISE else x
        for name, x in case.operands.items()
    }
    for name in TOKENWISE:
        if changed.get(name) is not None:
            changed[name][:, 60:] *= 0.5
    after = call(core, replace(case, operands=changed), cu_seqlens=borders)["out"]
    assert torch.equal(before[:, :60], after[:, :60])
    assert not torch.equal(before[:, 60:], after[:, 60:])


@given(lengths=st.lists(st.one_of(st.integers(0, 3), st.integers(0, 2000)), max_size=60))
def test_padding_of_a_pack_is_bounded(lengths: list[int]) -> None:
    """Batches of short sequences hold every token once and pad at most by a factor of two."""
    borders = torch.tensor([0, *itertools.accumulate(lengths)])
    tokens = sum(lengths)
    padded, seen = 0, torch.zeros(1, tokens)
    for group in groups(borders, 1, tokens, 64):
        padded += group.rows * group.length
        assert group.rows == 1 or group.rows * group.length <= GATHER
        room = group.room(seen)
        room.copy_(group.take(seen) + 1)
        group.put(seen, room)
    assert padded <= 2 * tokens
    assert torch.equal(seen, torch.ones(1, tokens))


def test_many_tiny_sequences() -> None:
    lengths = [200] + [1] * 2000
    borders = torch.tensor([0, *itertools.accumulate(lengths)])
    case = make("linear", tokens=sum(lengths), keys=2, values=2, states=len(lengths), gate="key")
    found = call(chunked, case, cu_seqlens=borders)
    truth = call(Unpacked(), case, cu_seqlens=borders)
    for name, value in truth.items():
        assert torch.allclose(found[name], value, rtol=1e-12, atol=1e-12)
