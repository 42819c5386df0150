"""Embed only the visible patches of real clips, and measure the speedup.

    python examples/masked_clip.py [CLIP ...]

Masks 65 % and 90 % of the patches of every frame and embeds the visible patches twice: with
`vidl.ops.masked_patch_embed`, which never reads a masked patch, and with the usual baseline, a
convolution over all patches followed by a gather. Both give the same tokens. Writes demo/index.html
with a picture of each clip and the times.
"""

import argparse
import functools
import html
import json
import statistics
import sys
import time
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from PIL import Image

from vidl import ops
from vidl.kernels import library

SIDE, PATCH, WIDTH = 224, 16, 768  # ViT-B/16
GRID = SIDE // PATCH
CLIPS = ("fruit_conveyor.mp4", "sign_eat.mp4", "worker.mp4", "car_and_cyclist.mp4")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, as most checkpoints expect


def read_clip(file, frames):
    """The middle frames of `frames` equal segments of a clip: uint8 [C, T, H, W]."""

    def decode():
        with av.open(str(file)) as container:
            yield from container.decode(video=0)

    count = sum(1 for _ in decode())  # the header is not always right
    if count == 0:
        raise ValueError("no frames")
    wanted = [int((i + 0.5) * count / frames) for i in range(frames)]
    pictures = {i: to_square(frame.to_image()) for i, frame in enumerate(decode()) if i in wanted}
    return torch.stack([pictures[i] for i in wanted], dim=1)


def to_square(picture):
    """Resize the short side and crop the centre: uint8 [C, SIDE, SIDE]."""
    scale = SIDE / min(picture.size)
    width, height = (max(SIDE, round(n * scale)) for n in picture.size)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    picture = picture.resize((width, height)).crop((left, top, left + SIDE, top + SIDE))
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(SIDE, SIDE, 3).permute(2, 0, 1)


def random_visible(B, frames, mask_ratio):
    """Random visible patches, drawn per frame: ids in [0, frames * P), int64 [B, K]."""
    P = GRID * GRID
    keep = round(P * (1 - mask_ratio))
    order = torch.rand(B, frames, P).argsort(dim=-1)[..., :keep]
    return (order + P * torch.arange(frames)[:, None]).flatten(1)


def masked_embed(video, weight, bias, position, ids_keep):
    """Embed the visible patches directly from uint8."""
    return ops.masked_patch_embed(video, weight, bias, position, ids_keep, mean=MEAN, std=STD)


def conv_and_gather(video, weight, bias, position, ids_keep):
    """The usual baseline: normalise and embed all patches, then select the visible ones."""
    frames = video.transpose(1, 2).flatten(0, 1) / 255  # [B * T, C, H, W]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    tokens = F.conv2d((frames - mean) / std, weight, bias, stride=PATCH)
    tokens = tokens.flatten(2).transpose(1, 2).reshape(video.shape[0], -1, WIDTH) + position
    return tokens.gather(1, ids_keep[..., None].expand(-1, -1, WIDTH))


def milliseconds(calls, repetitions):
    """The median time of each call; calls alternate, so a busy machine slows all alike."""
    times = [[] for _ in calls]
    for turn in range(repetitions + 1):
        for call, row in zip(calls, times, strict=True):
            begin = time.perf_counter()
            call()
            if turn:  # the first one warms up
                row.append((time.perf_counter() - begin) * 1e3)
    return [statistics.median(row) for row in times]


def compare(video, parameters, ids_keep, repetitions):
    """The largest difference of both, relative to the largest token, and their times."""

    def forward(embed):
        with torch.no_grad():
            return embed(video, *parameters, ids_keep)

    def step(embed):  # any scalar that depends on every token
        loss = embed(video, *parameters, ids_keep).square().mean()
        return torch.autograd.grad(loss, parameters)

    base, ours = forward(conv_and_gather), forward(masked_embed)
    yield f"largest difference {((ours - base).abs().max() / base.abs().max()).item():.1e}"
    for name, work in (("forward", forward), ("forward + backward", step)):
        calls = [functools.partial(work, embed) for embed in (conv_and_gather, masked_embed)]
        base, ours = milliseconds(calls, repetitions)
        yield f"{name:18} conv + gather {base:7.1f} ms  vidl {ours:7.1f} ms  {base / ours:4.1f} x"


def picture(clip, masks, grid=GRID):
    """The frames, and below them one row per mask with masked patches in grey.

    A mask is given by the ids of its visible patches; a frame has `grid` x `grid` patches.
    """
    patch = clip.shape[-1] // grid
    rows = [clip]
    for ids_keep in masks:
        seen = torch.zeros(clip.shape[1] * grid * grid, dtype=torch.bool)
        seen[ids_keep] = True
        seen = seen.view(-1, grid, grid).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
        rows.append(torch.where(seen, clip, torch.tensor(127, dtype=torch.uint8)))
    rows = [F.pad(row, (2, 2, 2, 2), value=255).permute(2, 1, 3, 0).flatten(1, 2) for row in rows]
    return Image.fromarray(torch.cat(rows).numpy())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("clips", nargs="*", type=Path, help="default: four of examples/clips")
    add("--frames", type=int, default=4, help="frames of each clip (default: 4)")
    add("--masks", type=float, nargs="+", default=[0.65, 0.9], metavar="RATIO", help="mask ratios")
    add("--repetitions", type=int, default=10, help="repetitions of each timing (default: 10)")
    add("--out", type=Path, default=Path("demo"), help="output folder (default: demo)")
    args = parser.parse_args(argv)

    here = Path(__file__).parent
    captions = {
        row["video"]: row["caption"][0] for row in json.loads((here / "clips.json").read_text())
    }
    files = args.clips or [here / "clips" / name for name in CLIPS]
    clips = []
    for number, file in enumerate(files, 1):
        print(f"decoding {number}/{len(files)}: {file.name}", file=sys.stderr)
        try:
            clips.append(read_clip(file, args.frames))
        except (OSError, ValueError, IndexError) as error:  # includes PyAV's errors
            print(f"cannot decode {file}: {error}", file=sys.stderr)
            return 1
    video = torch.stack(clips)  # [B, C, T, H, W] uint8

    torch.manual_seed(0)
    shapes = ((WIDTH, 3, PATCH, PATCH), (WIDTH,), (args.frames * GRID * GRID, WIDTH))
    parameters = [(0.02 * torch.randn(shape)).requires_grad_() for shape in shapes]
    masks = [random_visible(len(clips), args.frames, ratio) for ratio in args.masks]
    backend = library.choose("auto", "masked_patch_embed", "cpu", torch.float32)
    report = [
        f"{len(clips)} clips of {args.frames} frames, ViT-B/16, float32, CPU, "
        f"{torch.get_num_threads()} threads; vidl backend: {backend}"
    ]
    for ratio, ids_keep in zip(args.masks, masks, strict=True):
        print(f"timing with {ratio:.0%} masked", file=sys.stderr)
        report += [
            f"{ratio:.0%} masked: {line}"
            for line in compare(video, parameters, ids_keep, args.repetitions)
        ]
    print("\n".join(report))

    args.out.mkdir(parents=True, exist_ok=True)
    page = ['<!doctype html><meta charset="utf-8"><title>vidl: masked clips</title>']
    page += ["<style>body { font: 16px sans-serif; max-width: 60em; margin: auto }</style>"]
    page += ["<h1>Embedding visible patches only</h1>"]
    page += [f"<pre>{html.escape(chr(10).join(report))}</pre>"]
    for b, (file, clip) in enumerate(zip(files, clips, strict=True)):
        name = f"{b}-{file.stem}.png"
        picture(clip, [ids_keep[b] for ids_keep in masks]).save(args.out / name)
        caption = html.escape(captions.get(file.name, file.name))
        page += [f"<figure><img src='{name}'><figcaption>{caption}</figcaption></figure>"]
    (args.out / "index.html").write_text("\n".join(page))
    print(f"wrote {args.out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
