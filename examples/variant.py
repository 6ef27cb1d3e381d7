# %% [markdown]
# # Write a variant
#
# A variant is one TOML file: where it stands on the axes of the posterior, and how its gates are
# shaped. Engines, layers, models and the metaplastic form follow from it.

# %%
from pathlib import Path

import torch

import glazoo
from glazoo.layers import GatedLinearAttention

Path("my_variant.toml").write_text("""
name = "my_variant"
title = "My variant"
summary = "Gated delta rule with the exact gain and one decay per key channel"
reference = { paper = "none yet" }

[posterior]
precision = "frozen"
correction = "full"
gain = "exact"

[decay]
shape = "key"

[write]
shape = "head"
""")
spec = glazoo.load("my_variant.toml")

# %% [markdown]
# What it says, as formulas: compare them with the paper's, line by line. A file that contradicts
# itself is an error that says what is accepted.

# %%
for line in glazoo.lower(spec).recurrence:
    print(line)

# %% [markdown]
# It runs on every engine, and as a layer; its metaplastic form starts as the same function.

# %%
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 12, 2, 8).unbind(0)
k = torch.nn.functional.normalize(k, dim=-1)
g, beta = -torch.rand(1, 12, 2, 8), torch.rand(1, 12, 2)
slow = glazoo.attention(spec, q, k, v, g=g, beta=beta, impl="reference").output
torch.testing.assert_close(glazoo.attention(spec, q, k, v, g=g, beta=beta).output, slow)

layer = GatedLinearAttention(spec, 32, num_heads=2, head_k_dim=8, head_v_dim=8)
x = torch.randn(1, 12, 32)
before = layer(x).output
glazoo.metaplasticize(layer)
torch.testing.assert_close(layer(x).output, before)
print(glazoo.metaplasticize(spec).name)

# %% [markdown]
# Every statement of the theory that its axes claim, on random instances. This takes a while:
#
#     from glazoo.theory import conformance
#     conformance.check("my_variant.toml", examples=2)
