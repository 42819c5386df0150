"""See what is left of a real clip at each stage of SMAUG.

    python examples/sparse_clip.py [CLIP]

Runs SMAUG's encoder on a clip and writes a picture: the frames on top; below them what the mask
leaves, what each pruning layer leaves of that, and the frames that the caption selects. Weights are
random unless --weights names a file of them, so untrained scores choose almost at random.
"""

import argparse
import sys
from pathlib import Path

import torch
from masked_clip import GRID, PATCH, picture, read_clip

from vidl import models


def stages(model, clip, words):
    """The patches that are left of a clip [C, T, H, W] at each stage of SMAUG, ids in all of it.

    What the mask leaves, what each pruning layer does, and that of the frames which the caption
    selects; words [1, L] are its ids.
    """
    T, rows, columns = model.recipe.grid
    S = rows * columns

    def in_clip(ids):
        """Ids in the whole clip, of ids in each of its frames [T, n]; -1 is a fused token."""
        ids = ids + torch.arange(T)[:, None] * S * (ids >= 0)
        return ids[ids >= 0]

    with torch.no_grad():
        mask = model.recipe.visual_mask(torch.tensor([0]), step=0)
        frames = model.encode_frames(clip[None], mask)
        clips = model.in_time(frames, 1)
        text = model.text.encode(words)
        chosen = model.selector(clips[:, :, 0], text[:, 0], clips).ids
    left = [] if mask is None else [mask.ids_keep[0]]
    left += [in_clip(ids) for ids in frames.kept.values()]
    selected = torch.zeros(T, dtype=torch.bool)
    selected[chosen[0]] = True
    last = left[-1] if left else torch.arange(T * S)
    return [*left, last[selected[last // S]]]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(__file__).parent / "clips" / "car_and_cyclist.mp4"
    parser.add_argument("clip", nargs="?", type=Path, default=default)
    parser.add_argument("--preset", default="base", help="of SMAUG (default base)")
    parser.add_argument("--weights", type=Path, help="a state_dict in a .pt file")
    parser.add_argument("--mask-ratio", type=float, default=0.65, help="default 0.65")
    parser.add_argument("--keep-rate", type=float, default=0.7, help="default 0.7")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder (default demo)")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    sizes = dict(image_size=GRID * PATCH, patch_size=PATCH)
    rates = dict(mask_ratio=args.mask_ratio, keep_rate=args.keep_rate)
    try:
        model = models.create("smaug", args.preset, **sizes, **rates).eval()
        clip = read_clip(args.clip, model.recipe.frames)
    except (OSError, ValueError, IndexError) as error:  # PyAV's own errors are among these
        print(f"cannot show {args.clip}: {error}", file=sys.stderr)
        return 1
    if args.weights:
        model.load_state_dict(torch.load(args.weights, weights_only=True))

    words = torch.tensor([[101, 1037, 2482, 102]])  # of bert-base-uncased: "a car"
    rows = stages(model, clip, words)
    for stage, count in model.recipe.tokens().items():
        print(f"{stage:>16}: {count:5} tokens")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"sparse-{args.clip.stem}.png"
    picture(clip, rows).save(file)
    print(f"see {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
