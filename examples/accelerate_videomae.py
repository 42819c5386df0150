"""Pre-train transformers' VideoMAE with accelerate on the clips of this folder, 90 % masked.

    python examples/accelerate_videomae.py [STEPS]
    accelerate launch examples/accelerate_videomae.py     # several GPUs

The weights are random, so that nothing is downloaded; use `from_pretrained` in their place.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
from transformers import VideoMAEConfig, VideoMAEForPreTraining

from vidl.data.video import as_clip, read_clip
from vidl.masking import visual_mask
from vidl.swapping.trainers import Swapped

SIDE, FRAMES, GRID = 64, 16, (8, 4, 4)  # 128 patches of 2 x 16 x 16 pixels


def load(file: Path) -> torch.Tensor:
    """A clip, [T, 3, H, W] uint8."""
    clip = as_clip(read_clip(file, FRAMES)).transpose(0, 1)
    return torch.nn.functional.interpolate(clip.float(), (SIDE, SIDE), mode="area").byte()


def main(steps: int = 20) -> None:
    accelerator = Accelerator()
    torch.manual_seed(0)
    encoder = dict(image_size=SIDE, hidden_size=96, num_attention_heads=3, num_hidden_layers=4)
    decoder = dict(decoder_hidden_size=96, decoder_num_attention_heads=3)
    config = VideoMAEConfig(**encoder, **decoder, decoder_num_hidden_layers=1)
    model = VideoMAEForPreTraining(config)
    clips = torch.stack([load(file) for file in sorted(Path(__file__).parent.glob("clips/*.mp4"))])
    dataset = TensorDataset(torch.arange(len(clips)), clips)
    with Swapped(model) as swapped:  # before accelerate wraps the model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        loader = DataLoader(dataset, batch_size=8, shuffle=True, drop_last=True)
        wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        step = 0
        while step < steps:
            for numbers, batch in loader:
                mask = visual_mask(0, step, numbers, GRID, 0.9, kind="tube")
                loss = wrapped(batch, bool_masked_pos=mask.ids_keep).loss
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
