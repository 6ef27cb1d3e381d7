"""The memory read through a full precision matrix, in the interpreter, against float64 loops."""

import functools
import sys

import pytest
import torch
from kernel_cases import decay, make_gate, per_head
from synapse_cases import assert_matches, spread_prior, values_and_gradients, walk_two

from glazoo.kernels.full import full

# The package's attribute of that name is the function.
module = sys.modules["glazoo.kernels.full"]

pytestmark = pytest.mark.usefixtures("poison")
PACKED = torch.tensor([0, 0, 17, 17, 18, 21])


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(module, "BORDER", 32)


def full_loop(q, k, w, beta, prior, g=None, h=None, j=None, *, cu_seqlens=None, uncertainty=False):
    """G = a G + k w^T, Hm = a Hm + beta k k^T, o = G^T (Hm + Lambda)^-1 q; h is G, j is Hm."""
    HV, K = w.shape[2], k.shape[3]
    q, k = per_head(q, HV), per_head(k, HV)
    prior = torch.diag_embed(spread_prior(prior).squeeze(2).expand(HV, K))
    if h is None:
        sequences = w.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        h = w.new_zeros(sequences, HV, K, w.shape[3])
        j = w.new_zeros(sequences, HV, K, K)

    def step(i, t, memory, matrix):
        key = k[i, t][..., None]
        a = decay(g, i, t, memory)
        memory = a * memory + key * w[i, t][:, None]
        matrix = a * matrix + beta[i, t][:, None, None] * key * key.mT
        x = torch.linalg.solve(matrix + prior, q[i, t])
        u = (q[i, t] * x).sum(1)
        return memory, matrix, ((memory * x[..., None]).sum(1), u[:, None].expand(w.shape[2:]))

    (o, u), memory, matrix = walk_two(w, None, h, j, cu_seqlens, step)
    found = {"output": o, "final G": memory, "final H": matrix}
    return found | {"uncertainty": u[..., 0]} if uncertainty else found


def operands(B, T, H, HV, K, V, *, gate="head", resets=False, sequences=None, state=True):
    torch.manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    found = {"q": normal(B, T, H, K), "k": normal(B, T, H, K) / K**0.5, "w": normal(B, T, HV, V)}
    found["beta"] = torch.rand(B, T, HV, dtype=torch.float64)
    found["prior"] = 0.5 + torch.rand(HV, K, dtype=torch.float64)
    found["g"] = make_gate(gate, (B, T, HV, K), resets, False)
    root = normal(sequences or B, HV, K, K)
    found["h"] = normal(sequences or B, HV, K, V) if state else None
    found["j"] = root @ root.mT / K if state else None
    return found


def run(q, k, w, beta, prior, g=None, h=None, j=None, **options):
    state = None if h is None else (h, j)
    o, (h, j), u = full(q, k, w, beta, g, prior=prior, initial_state=state, **options)
    found = {"output": o, "final G": h, "final H": j}
    return found if u is None else found | {"uncertainty": u}


def symmetric(function):
    """The initial matrix as a symmetric function of a leaf: only then do its gradients mean the
    same."""

    def of_leaf(j=None, **x):
        return function(j=None if j is None else (j + j.mT) / 2, **x)

    return of_leaf


def check(given, dtype=torch.float32, **options):
    kernel, loop = (symmetric(functools.partial(x, **options)) for x in (run, full_loop))
    assert_matches(kernel, loop, given, dtype)


@pytest.mark.parametrize("gate", ["none", "head"])
def test_matches_the_loop(gate):
    check(operands(1, 35, 1, 2, 5, 3, gate=gate), uncertainty=True)


def test_resets_exactly():
    check(operands(1, 20, 1, 1, 4, 4, resets=True))


def test_packed():
    check(operands(1, 21, 1, 1, 4, 4, sequences=5), cu_seqlens=PACKED)


def test_half_precision():
    check(operands(1, 9, 1, 1, 8, 8), torch.float16)


@pytest.mark.parametrize(("T", "K", "V"), [(1, 4, 5), (3, 40, 20)])
def test_sizes(T, K, V):
    check(operands(2, T, 1, 1, K, V, state=False))


def test_compile_as_one_graph():
    function = functools.partial(run, uncertainty=True)
    compiled = torch.compile(
        lambda **x: function(**x), fullgraph=True, backend="aot_eager", dynamic=True
    )
    given = {k: x.float() for k, x in operands(1, 3, 1, 2, 4, 3).items()}
    expected, weights = values_and_gradients(function, given)
    found, _ = values_and_gradients(compiled, given, weights)
    for name, x in expected.items():
        torch.testing.assert_close(x, found[name])


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"beta": lambda x: x[..., None]}, {}, r"beta: got shape \(1, 5, 2, 1\)"),
        ({"g": lambda x: x[..., None].expand(1, 5, 2, 4)}, {}, "g: got shape"),
        ({"j": lambda x: x[..., :1]}, {}, "initial_state: got shape"),
        ({}, {"solver": "cholesky"}, "solver: got 'cholesky'"),
    ],
)
def test_misuse_is_named(changes, options, message):
    given = {k: x.float() for k, x in operands(1, 5, 1, 2, 4, 3).items()}
    given = {k: changes.get(k, lambda x: x)(x) for k, x in given.items()}
    with pytest.raises(ValueError, match=message):
        run(**given, **options)
