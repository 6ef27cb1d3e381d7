"""What a recurrence carries between calls, and what a call gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["Output", "OutputWithUncertainty", "State"]


class State(NamedTuple):
    """The recurrent state of N sequences; float64 for float64 inputs, float32 otherwise.

    `glazoo.lower(spec).state` says which parts a spec has and what each one means.
    """

    memory: Float[Tensor, "N HV K V"]
    """The mean side: the mean itself for specs that subtract a prediction, importance times mean
    for Hebbian ones."""
    importance: Tensor | None = None
    """The importance side, counted above the prior: [N, HV, K], [N, HV, K, V] or, for full
    precision, [N, HV, K, K]."""
    normalizer: Float[Tensor, "N HV K"] | None = None
    """Decayed sum of written keys, for specs that normalise their read."""
    lag_key: Float[Tensor, "N H K"] | None = None
    """Key of the last token, for specs whose first write repeats it."""
    lag_value: Float[Tensor, "N HV V"] | None = None
    """Value of the last token, for the same specs."""

    def sequence(self, n: int) -> State:
        """Return the state of one sequence, as a batch of one."""
        return self.map(lambda x: x[n : n + 1])

    @staticmethod
    def cat(states: Sequence[State]) -> State:
        """Joins the states of several batches of sequences."""
        import torch

        def part(i: int) -> Tensor | None:
            xs = [x for s in states if (x := s[i]) is not None]
            return torch.cat(xs) if xs else None

        memory = torch.cat([s.memory for s in states])
        return State(memory, *(part(i) for i in range(1, len(State._fields))))

    def map(self, f: Callable[[Tensor], Tensor]) -> State:
        """Applies a function to every part that exists: to move, cast, select or detach a state."""
        return State(f(self.memory), *(None if x is None else f(x) for x in self[1:]))


class Output(NamedTuple):
    """Result of `glazoo.attention`."""

    output: Float[Tensor, "B T HV V"]
    final_state: State | None


class OutputWithUncertainty(NamedTuple):
    """Result of `glazoo.attention(..., output_uncertainty=True)`."""

    output: Float[Tensor, "B T HV V"]
    final_state: State | None
    uncertainty: Tensor
    """Posterior variance of the output: [B, T, HV], or [B, T, HV, V] where importance is kept per
    synapse."""
