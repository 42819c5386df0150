"""Run transformers' TimeSformer with divided space-time attention in groups, and train a step.

    python examples/swap_timesformer.py

The weights are random, so that nothing is downloaded; use `from_pretrained` in their place.
"""

import torch
from transformers import TimesformerConfig, TimesformerForVideoClassification

import vidl

torch.manual_seed(0)
small = dict(hidden_size=192, num_attention_heads=3, num_hidden_layers=2, intermediate_size=384)
config = TimesformerConfig(image_size=64, patch_size=16, num_frames=4, num_labels=5, **small)
model = TimesformerForVideoClassification(config).eval()
clips, labels = torch.rand(2, 4, 3, 64, 64), torch.tensor([0, 3])
baseline = model(clips, labels=labels)

print(vidl.swap(model))
swapped = model(clips, labels=labels)
print("largest difference", f"{(swapped.logits - baseline.logits).abs().max():.1e}")
swapped.loss.backward()
weights = model(clips, output_attentions=True).attentions[0]  # still available on request
print("attention weights of a layer", tuple(weights.shape))
vidl.unswap(model)
