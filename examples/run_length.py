"""Run-length tokens: embed only the patches of real clips that change.

    python examples/run_length.py [CLIP ...]

Compares every tubelet of a clip with the previous one (Run-Length Tokenization, arXiv 2411.05222)
and embeds only those that differ. Prints how many tokens each clip keeps, and writes a picture of
each clip with the removed patches in grey below it.
"""

import argparse
import sys
from pathlib import Path

import torch
from masked_clip import CLIPS, GRID, MEAN, PATCH, STD, WIDTH, picture, read_clip

from vidl import nn, ops

TUBELET = 2


def frames_of(ids):
    """The ids of the single-frame patches of tubelets."""
    P = GRID * GRID
    return torch.cat([(ids // P * TUBELET + frame) * P + ids % P for frame in range(TUBELET)])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("clips", nargs="*", type=Path, help="default: four of examples/clips")
    add("--frames", type=int, default=16, help="frames of each clip, even (default: 16)")
    add("--threshold", type=float, default=0.1, help="default: 0.1, as in the paper")
    add("--out", type=Path, default=Path("demo"), help="output folder (default: demo)")
    args = parser.parse_args(argv)
    if args.frames < TUBELET or args.frames % TUBELET:
        parser.error(f"need an even number of frames, got {args.frames}")

    files = args.clips or [Path(__file__).parent / "clips" / name for name in CLIPS]
    clips = []
    for file in files:
        try:
            clips.append(read_clip(file, args.frames))
        except (OSError, ValueError, IndexError) as error:  # includes PyAV's errors
            print(f"cannot decode {file}: {error}", file=sys.stderr)
            return 1
    video = torch.stack(clips)  # [B, C, T, H, W] uint8

    differences = ops.frame_difference(video, (TUBELET, PATCH, PATCH), std=STD)
    slices = args.frames // TUBELET
    ids, cu_seqlens, lengths = ops.run_length_ids(differences, slices, args.threshold)
    embed = nn.MaskedPatchEmbed(PATCH, 3, WIDTH, TUBELET, mean=MEAN, std=STD)
    with torch.no_grad():
        tokens = embed(video, ids, cu_seqlens)

    args.out.mkdir(parents=True, exist_ok=True)
    offsets, N = cu_seqlens.tolist(), slices * GRID * GRID
    for b, file in enumerate(files):
        own = slice(offsets[b], offsets[b + 1])
        kept, longest = offsets[b + 1] - offsets[b], lengths[own].max().item()
        name = args.out / f"run-length-{b}-{file.stem}.png"
        picture(clips[b], [frames_of(ids[own])]).save(name)
        print(f"{file.name}: {kept} of {N} tokens ({kept / N:.0%}), longest run {longest}")
        print(f"  wrote {name}")
    print(f"embedded {list(tokens.shape)} instead of {[len(files) * N, WIDTH]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
