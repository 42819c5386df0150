"""Show which patches of a real clip are left at each stage of SMAUG.

    python examples/sparse_clip.py [CLIP]

Runs SMAUG's encoder on a clip and writes a picture: the frames; below them the visible patches, the
patches that each pruning layer keeps, and the frames that the caption selects. Without --weights
the weights are random, so pruning and selection are almost random.
"""

import argparse
import sys
from pathlib import Path

import torch
from masked_clip import GRID, PATCH, picture, read_clip

from vidl import models


def stages(model, clip, words):
    """The patches of a clip [C, T, H, W] that are left at each stage of SMAUG.

    Returns a list of ids in the clip: the visible patches, those that each pruning layer keeps, and
    those of the frames that the caption, ids [1, L], selects.
    """
    T, rows, columns = model.recipe.grid
    P = rows * columns

    def in_clip(ids):
        """From ids within each frame, [T, N], to ids in the clip; -1 is a fused token."""
        ids = ids + torch.arange(T)[:, None] * P * (ids >= 0)
        return ids[ids >= 0]

    with torch.no_grad():
        mask = model.recipe.visual_mask(torch.tensor([0]), step=0)
        frames = model.encode_frames(clip[None], mask)
        clips = model.in_time(frames, 1)
        text = model.text.encode(words)
        chosen = model.selector(clips[:, :, 0], text[:, 0], clips).ids
    kept = [] if mask is None else [mask.ids_keep[0]]
    kept += [in_clip(ids) for ids in frames.kept.values()]
    selected = torch.zeros(T, dtype=torch.bool)
    selected[chosen[0]] = True
    last = kept[-1] if kept else torch.arange(T * P)
    return [*kept, last[selected[last // P]]]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    default = Path(__file__).parent / "clips" / "car_and_cyclist.mp4"
    add("clip", nargs="?", type=Path, default=default)
    add("--preset", default="base", help="preset of SMAUG (default: base)")
    add("--weights", type=Path, help="file of a state_dict from torch.save")
    add("--mask-ratio", type=float, default=0.65, help="default: 0.65")
    add("--keep-rate", type=float, default=0.7, help="default: 0.7")
    add("--out", type=Path, default=Path("demo"), help="output folder (default: demo)")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    sizes = dict(image_size=GRID * PATCH, patch_size=PATCH)
    rates = dict(mask_ratio=args.mask_ratio, keep_rate=args.keep_rate)
    try:
        model = models.create("smaug", args.preset, **sizes, **rates).eval()
        clip = read_clip(args.clip, model.recipe.frames)
    except (OSError, ValueError, IndexError) as error:  # includes PyAV's errors
        print(f"cannot show {args.clip}: {error}", file=sys.stderr)
        return 1
    if args.weights:
        model.load_state_dict(torch.load(args.weights, weights_only=True))

    words = torch.tensor([[101, 1037, 2482, 102]])  # "a car" in bert-base-uncased
    rows = stages(model, clip, words)
    for stage, count in model.recipe.tokens().items():
        print(f"{stage:>16}: {count:5} tokens")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"sparse-{args.clip.stem}.png"
    picture(clip, rows).save(file)
    print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
