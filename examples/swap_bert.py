"""Captions of many lengths through transformers' BERT: the same answers, and no work at padding.

    python examples/swap_bert.py

The weights are random: put `from_pretrained` where the machine may download.
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
    run(), (stock := run()), print(vidl.swap(model))
    print("largest difference", f"{(run() - stock).abs().max():.1e}")
