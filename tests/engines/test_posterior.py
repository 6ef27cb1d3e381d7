"""The elementwise operations of importance and forgetting: values, gradients, edges."""

import pytest
import torch

from glazoo.program.elementwise import forgetting, over


def _leaves(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.rand(s, generator=generator, dtype=torch.float64) + 0.1 for s in shapes]
    return [x.requires_grad_() for x in made]


def test_over_matches_its_formula_and_gradient() -> None:
    x, importance, prior = _leaves((2, 3, 2, 4), (2, 3, 2, 4), (2, 4))
    assert torch.equal(over(x, importance, prior), x * (1 / (importance + prior)))
    assert torch.autograd.gradcheck(over, (x, importance, prior))


@pytest.mark.parametrize("width", [1, 4])
def test_forgetting_matches_its_formula_and_gradient(width: int) -> None:
    importance, g, prior = _leaves((2, 3, 2, 4), (2, 3, 2, width), (2, 4))
    f, before = forgetting(importance, -g, prior)
    expected = (-g).exp() * importance + prior
    torch.testing.assert_close(before, expected)
    torch.testing.assert_close(f, -g + ((importance + prior) / expected).log())
    assert bool((f <= 0).all())
    assert bool((f >= -g).all())
    assert torch.autograd.gradcheck(lambda j, d, p: forgetting(j, -d, p), (importance, g, prior))


@pytest.mark.parametrize("width", [1, 4])
def test_forgetting_of_everything_and_of_nothing(width: int) -> None:
    importance, prior = _leaves((1, 2, 1, 4), (1, 4))
    g = torch.tensor([0.0, -torch.inf], dtype=torch.float64).view(1, 2, 1, 1)
    g = g.expand(1, 2, 1, width).clone().requires_grad_()
    f, before = forgetting(importance, g, prior)
    assert torch.equal(f[:, 0], torch.zeros_like(f[:, 0]))
    assert bool((f[:, 1] == -torch.inf).all())
    assert torch.equal(before[:, 1], prior.expand_as(before[:, 1]))
    for grad in torch.autograd.grad(f.exp().sum() + before.sum(), (importance, g, prior)):
        assert bool(grad.isfinite().all())


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    x, importance, prior = _leaves((1, 1, 1, 2), (1, 1, 1, 2), (1, 2))
    (first,) = torch.autograd.grad(over(x, importance, prior).sum(), importance, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(first.sum(), x)
