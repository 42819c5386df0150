"""Swap the kernels into a ViT of timm, prune it, train a step, and swap it back.

    python examples/swap_timm.py

The weights are random, so that nothing is downloaded; use `pretrained=True` or load your own.
"""

import timm
import torch

import vidl

torch.manual_seed(0)
model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
images, labels = torch.rand(4, 3, 224, 224), torch.randint(10, (4,))
baseline = model(images)

print(vidl.swap(model))
print("largest difference", f"{(model(images) - baseline).abs().max():.1e}")

print(vidl.prune(model, keep_rate=0.7, layers=[3, 6, 9], fuse="sum"))
print(f"{model.forward_features(images).shape[1]} of 197 tokens reach the last layer")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
loss = torch.nn.functional.cross_entropy(model(images), labels)
loss.backward()
optimizer.step()

vidl.unswap(model)
fresh = timm.create_model("vit_tiny_patch16_224", num_classes=10)
fresh.load_state_dict(model.state_dict())  # timm's own names
