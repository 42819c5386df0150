"""Pre-train transformers' VideoMAE with 90% masking: original, swapped, and from indices.

    python examples/swap_videomae.py

The weights are random, so that nothing is downloaded; use `from_pretrained` in their place.
"""

import torch
from transformers import VideoMAEConfig, VideoMAEForPreTraining

import vidl
from vidl.masking import visual_mask

torch.manual_seed(0)
small = dict(image_size=64, hidden_size=192, num_attention_heads=3, num_hidden_layers=4)
decoder = dict(decoder_hidden_size=96, decoder_num_attention_heads=3, decoder_num_hidden_layers=2)
model = VideoMAEForPreTraining(VideoMAEConfig(**small, **decoder))
clips = torch.randint(0, 256, (2, 16, 3, 64, 64), dtype=torch.uint8)
mask = visual_mask(0, 0, torch.arange(2), (8, 4, 4), 0.9, kind="tube")
mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
baseline = model((clips / 255 - mean) / std, bool_masked_pos=mask.masked()).loss

print(vidl.swap(model))
loss = model(clips, bool_masked_pos=mask.ids_keep).loss  # uint8 clips, and no boolean mask
loss.backward()
print(f"loss {loss:.5f}, baseline {baseline:.5f}; {mask.ids_keep.shape[1]} of 128 patches embedded")
vidl.unswap(model)  # optional: save_pretrained writes the original model anyway
