"""Run captions of different lengths through transformers' BERT without computing padding.

    python examples/swap_bert.py

The weights are random, so that nothing is downloaded; use `from_pretrained` in their place.
"""

import time

import torch
from transformers import BertConfig, BertModel

import vidl

torch.manual_seed(0)
model = BertModel(BertConfig(num_hidden_layers=6, attention_probs_dropout_prob=0.0)).eval()
ids = torch.randint(1000, 30000, (16, 32))
mask = (torch.arange(32) < torch.randint(8, 21, (16, 1))).long()


def run() -> torch.Tensor:
    start = time.perf_counter()
    hidden = model(ids, mask).last_hidden_state[mask.bool()]
    print(f"{len(hidden)} words of {ids.numel()} rows: {time.perf_counter() - start:.3f} s")
    return hidden


with torch.inference_mode():
    run(), (baseline := run()), print(vidl.swap(model))
    print("largest difference", f"{(run() - baseline).abs().max():.1e}")
