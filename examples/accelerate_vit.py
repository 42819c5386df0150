"""Fine-tune timm's ViT with token pruning and accelerate: does a frame show sign language?

    python examples/accelerate_vit.py [STEPS]
    accelerate launch examples/accelerate_vit.py     # several GPUs

The weights are random, so that nothing is downloaded; use `pretrained=True` in their place.
"""

import sys
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, TensorDataset

import vidl
from vidl.data.video import read_clip
from vidl.swapping.trainers import Swapped

SIDE, FRAMES, LAYERS = 64, 4, [1, 2, 3]


def main(steps: int = 20) -> None:
    accelerator = Accelerator()
    torch.manual_seed(0)
    sizes = dict(img_size=SIDE, patch_size=8, embed_dim=96, num_heads=3, depth=4)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **sizes)
    files = sorted(Path(__file__).parent.glob("clips/*.mp4"))
    frames = [read_clip(file, FRAMES).movedim(-1, 1).float() / 255 for file in files]
    images = torch.cat([interpolate(frame, (SIDE, SIDE), mode="area") for frame in frames])
    labels = torch.tensor([file.name.startswith("sign") for file in files]).long()
    dataset = TensorDataset(images, labels.repeat_interleave(FRAMES))

    def prune(model: torch.nn.Module) -> vidl.swapping.Report:
        return vidl.prune(model, keep_rate=0.7, layers=LAYERS, fuse="sum")  # EViT

    with Swapped(model, prune) as swapped:  # before accelerate wraps the model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        loader = DataLoader(dataset, batch_size=32, shuffle=True, drop_last=True)
        wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        step = 0
        while step < steps:
            for batch, wanted in loader:
                loss = cross_entropy(wrapped(batch), wanted)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                if step == 1 or step >= steps:
                    accelerator.print(f"step {step}: loss {loss.item():.4f}")
                if step >= steps:
                    break
    accelerator.print(swapped.savings)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
