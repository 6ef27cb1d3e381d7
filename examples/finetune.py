# %% [markdown]
# # Fine-tune a converted model with PEFT and trl
#
# LoRA on the source's input projections, the importance gates beside it, packed documents. Needs
# `pip install 'glazoo[train,ecosystem]'`.

# %%
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Mamba2Config, Mamba2ForCausalLM
from trl import SFTConfig, SFTTrainer

import glazoo
from glazoo.training import byte_tokenizer

torch.manual_seed(0)
tokenizer = byte_tokenizer()
config = Mamba2Config(
    vocab_size=len(tokenizer),
    hidden_size=32,
    num_heads=4,
    head_dim=16,
    state_size=8,
    n_groups=1,
    num_hidden_layers=2,
    chunk_size=8,
    bos_token_id=tokenizer.eos_token_id,
    eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id,
)
model = glazoo.metaplasticize(Mamba2ForCausalLM(config))

# %% [markdown]
# `modules_to_save` trains the gates in full and saves them with the adapter.

# %%
lora = LoraConfig(r=4, target_modules=["in_proj"], modules_to_save=["metaplastic"])
documents = Dataset.from_dict({"text": [f"{i} times {i} is {i * i}." for i in range(200)]})
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir="tuned",
        max_steps=4,
        per_device_train_batch_size=4,
        max_length=64,
        packing=True,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
    ),
    train_dataset=documents,
    processing_class=tokenizer,
    peft_config=lora,
)
trainer.train()
trainer.save_model("tuned")

# %%
moved = [
    name
    for name, p in trainer.model.named_parameters()
    if name.endswith("b_scale") and p.requires_grad and bool((p != 0).any())
]
print(f"plasticity has moved in {len(moved)} layers")
assert len(moved) == config.num_hidden_layers
