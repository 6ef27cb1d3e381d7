# %% [markdown]
# # Convert a model
#
# A Mamba2 of transformers becomes its metaplastic form: the same function at first, with importance
# gates that can be trained. Here it is tiny and random; a folder of a real one works alike.

# %%
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM

import glazoo
import glazoo.models  # registers the converted architectures
from glazoo.converters import convert_checkpoint, inspect_model, revert_checkpoint

torch.manual_seed(0)
special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
sizes = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}
config = Mamba2Config(vocab_size=64, num_hidden_layers=2, chunk_size=8, **sizes, **special)
source = Mamba2ForCausalLM(config).eval()
source.save_pretrained("mamba2")
tokens = torch.randint(64, (1, 20))

# %% [markdown]
# In memory, in place. Nothing changes until the gates are trained.

# %%
model = glazoo.metaplasticize(AutoModelForCausalLM.from_pretrained("mamba2").eval())
with torch.no_grad():
    torch.testing.assert_close(model(tokens).logits, source(tokens).logits)
gates = {name: p for name, p in model.named_parameters() if ".metaplastic." in name}
print(f"{len(gates)} new tensors, {sum(p.numel() for p in gates.values())} numbers to train")

# %% [markdown]
# As a folder, shard by shard, without loading the model. `plasticity` opens the gates a little.
# `glazoo convert mamba2 metaplastic --plasticity 0.1` is the same from the command line, and
# `--verify` compares source and conversion.

# %%
report = convert_checkpoint("mamba2", "metaplastic", plasticity=0.1)
print(report.to_markdown())
converted = AutoModelForCausalLM.from_pretrained("metaplastic").eval()
print(converted.generate(tokens, max_new_tokens=5, do_sample=False)[0, -5:])
for gate in inspect_model("metaplastic").gates:
    print(f"layer {gate.layer}: plasticity {', '.join(f'{x:.2f}' for x in gate.kappa)}")

# %% [markdown]
# And back, byte for byte.

# %%
revert_checkpoint("metaplastic", "again")
weights = [(Path(folder) / "model.safetensors").read_bytes() for folder in ("mamba2", "again")]
assert weights[0] == weights[1]
