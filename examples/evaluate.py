# %% [markdown]
# # Evaluate a converted model with lm-eval
#
# Any task of lm-eval takes a converted model as it takes its source. This one is made here, so that
# nothing is fetched; with a network, name `piqa` and others instead. Needs
# `pip install 'glazoo[eval]'`.

# %%
import json
from pathlib import Path

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from transformers import Mamba2Config, Mamba2ForCausalLM

import glazoo
from glazoo.training import byte_tokenizer

rows = [
    {"question": f"{i} and {i} make", "choices": [str(2 * i), "nothing"], "gold": 0}
    for i in range(8)
]
Path("sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
task = {
    "task": "sums",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(Path("sums.jsonl").absolute())}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "question",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}

# %%
torch.manual_seed(0)
tokenizer = byte_tokenizer()
end = tokenizer.eos_token_id
special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": tokenizer.pad_token_id}
sizes = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}
config = Mamba2Config(vocab_size=len(tokenizer), num_hidden_layers=2, **sizes, **special)
model = Mamba2ForCausalLM(config).eval()


# %%
def accuracy() -> float:
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", max_length=128)
    results = lm_eval.simple_evaluate(wrapped, tasks=[task], bootstrap_iters=0)
    return float(results["results"]["sums"]["acc,none"])


before = accuracy()
glazoo.metaplasticize(model)
after = accuracy()
print(f"accuracy of the source {before:.2f}, converted {after:.2f}")
assert before == after
