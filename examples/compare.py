# %% [markdown]
# # Compare memories
#
# A variant is an associative memory of fixed size: write pairs of keys and values, then read each
# value back by its key. No training. `glazoo capacity` does this with gates that are chosen for
# every variant and with intervals over seeds, `glazoo compare` trains models.

# %%
import torch

import glazoo

SEEDS, KEYS, VALUES = 8, 16, 8
VARIANTS = ("linear_attention", "deltanet", "mesanet", "palimpsa")


def pairs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return unit keys [B, T, 1, K] and values [B, T, 1, V], the same for every variant."""
    torch.manual_seed(count)
    keys = torch.nn.functional.normalize(torch.randn(SEEDS, count, 1, KEYS), dim=-1)
    return keys, torch.randn(SEEDS, count, 1, VALUES)


# %% [markdown]
# Which operands a variant takes, with their shapes and domains, is data. Here nothing decays, and
# everything is written as strongly as the variant allows.


# %%
def read_back(name: str, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return what a memory gives for every key once all pairs are written."""
    spec, count = glazoo.load(name), keys.shape[1]
    sizes = {"B": SEEDS, "T": 2 * count, "H": 1, "HV": 1, "K": KEYS, "V": VALUES}
    still = torch.arange(2 * count) >= count  # the second half reads and writes nothing
    k, v = torch.cat([keys, keys], 1), torch.cat([values, torch.zeros_like(values)], 1)
    gates = {}
    for operand in glazoo.lower(spec).operands:
        if operand.required and operand.name not in ("q", "k", "v"):
            gate = torch.zeros([sizes[d] for d in operand.shapes[0]])
            if operand.name in ("beta", "b"):
                gate[:, ~still] = 1.0
            gates[operand.name] = gate
    return glazoo.attention(spec, k, k, v, **gates).output[:, still]


# %% [markdown]
# The share of the values that is not recovered: 0 is a perfect memory. A linear memory can hold as
# many pairs as it has key channels at most.

# %%
print(f"{'pairs':>16}" + "".join(f"{count:8d}" for count in (4, 8, 16, 32)))
errors = {}
for name in VARIANTS:
    for count in (4, 8, 16, 32):
        k, v = pairs(count)
        found = read_back(name, k, v)
        # Reads differ in scale between variants: the best one factor is given to all.
        found = found * ((found * v).sum() / (found * found).sum())
        errors[name, count] = float((found - v).square().mean() / v.square().mean())
    print(f"{name:>16}" + "".join(f"{errors[name, count]:8.3f}" for count in (4, 8, 16, 32)))
