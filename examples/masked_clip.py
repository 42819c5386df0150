"""Embed only the visible patches of real clips, and see what that saves.

    python examples/masked_clip.py [CLIP ...]

Hides 65 % and 90 % of the patches of every frame and embeds the rest in two ways: with
`vidl.ops.masked_patch_embed`, which never touches a hidden patch, and as most models do, with a
convolution over every patch and a gather afterwards. Both give the same tokens. Writes
demo/index.html with a picture of each clip and the times.
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
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, as most checkpoints want it


def read_clip(file, frames):
    """Pictures spread over a clip, the middle one of each of `frames` parts: uint8 [C, T, H, W]."""

    def decode():
        with av.open(str(file)) as container:
            yield from container.decode(video=0)

    count = sum(1 for _ in decode())  # what the header says is not always true
    if count == 0:
        raise ValueError("it has no frames")
    wanted = [int((i + 0.5) * count / frames) for i in range(frames)]
    seen = {i: to_square(frame.to_image()) for i, frame in enumerate(decode()) if i in wanted}
    return torch.stack([seen[i] for i in wanted], dim=1)


def to_square(picture):
    """Resize the short side and crop the centre: uint8 [C, SIDE, SIDE]."""
    scale = SIDE / min(picture.size)
    width, height = (max(SIDE, round(n * scale)) for n in picture.size)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    picture = picture.resize((width, height)).crop((left, top, left + SIDE, top + SIDE))
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(SIDE, SIDE, 3).permute(2, 0, 1)


def random_visible(B, frames, mask_ratio):
    """The patches that stay visible, others in each frame: ids in [0, frames * S), int64 [B, K]."""
    S = GRID * GRID
    keep = round(S * (1 - mask_ratio))
    order = torch.rand(B, frames, S).argsort(dim=-1)[..., :keep]
    return (order + S * torch.arange(frames)[:, None]).flatten(1)


def masked_embed(video, weight, bias, position, ids_keep):
    """The visible patches and no others, straight from uint8."""
    return ops.masked_patch_embed(video, weight, bias, position, ids_keep, mean=MEAN, std=STD)


def conv_and_gather(video, weight, bias, position, ids_keep):
    """What most models do: normalise and embed every patch, then throw most of them away."""
    frames = video.transpose(1, 2).flatten(0, 1) / 255  # [B * T, C, H, W]
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    tokens = F.conv2d((frames - mean) / std, weight, bias, stride=PATCH)
    tokens = tokens.flatten(2).transpose(1, 2).reshape(video.shape[0], -1, WIDTH) + position
    return tokens.gather(1, ids_keep[..., None].expand(-1, -1, WIDTH))


def milliseconds(calls, repetitions):
    """The median of each call; they take turns, so that a busy machine slows both alike."""
    times = [[] for _ in calls]
    for turn in range(repetitions + 1):
        for call, row in zip(calls, times, strict=True):
            begin = time.perf_counter()
            call()
            if turn:  # the first one warms up
                row.append((time.perf_counter() - begin) * 1e3)
    return [statistics.median(row) for row in times]


def compare(video, parameters, ids_keep, repetitions):
    """How far both ways differ, relative to the largest token, and how long each takes."""

    def forward(embed):
        with torch.no_grad():
            return embed(video, *parameters, ids_keep)

    def step(embed):  # the loss is any number that depends on every token
        loss = embed(video, *parameters, ids_keep).square().mean()
        return torch.autograd.grad(loss, parameters)

    stock, ours = forward(conv_and_gather), forward(masked_embed)
    yield f"largest difference {((ours - stock).abs().max() / stock.abs().max()).item():.1e}"
    for name, work in (("forward", forward), ("forward + backward", step)):
        calls = [functools.partial(work, embed) for embed in (conv_and_gather, masked_embed)]
        stock, ours = milliseconds(calls, repetitions)
        yield f"{name:18} conv + gather {stock:7.1f} ms  vidl {ours:7.1f} ms  {stock / ours:4.1f} x"


def picture(clip, masks):
    """Frames on top, and one row below for each mask, the hidden patches in grey."""
    rows = [clip]
    for ids_keep in masks:
        seen = torch.zeros(clip.shape[1] * GRID * GRID, dtype=torch.bool)
        seen[ids_keep] = True
        seen = seen.view(-1, GRID, GRID).repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
        rows.append(torch.where(seen, clip, torch.tensor(127, dtype=torch.uint8)))
    rows = [F.pad(row, (2, 2, 2, 2), value=255).permute(2, 1, 3, 0).flatten(1, 2) for row in rows]
    return Image.fromarray(torch.cat(rows).numpy())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("clips", nargs="*", type=Path, help="default: four of examples/clips")
    parser.add_argument("--frames", type=int, default=4, help="of each clip (default 4)")
    parser.add_argument("--masks", type=float, nargs="+", default=[0.65, 0.9], metavar="RATIO")
    parser.add_argument("--repetitions", type=int, default=10, help="of each timing (default 10)")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder (default demo)")
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
        except (OSError, ValueError, IndexError) as error:  # PyAV's own errors are among these
            print(f"cannot decode {file}: {error}", file=sys.stderr)
            return 1
    video = torch.stack(clips)  # [B, C, T, H, W] uint8

    torch.manual_seed(0)
    shapes = ((WIDTH, 3, PATCH, PATCH), (WIDTH,), (args.frames * GRID * GRID, WIDTH))
    parameters = [(0.02 * torch.randn(shape)).requires_grad_() for shape in shapes]
    masks = [random_visible(len(clips), args.frames, ratio) for ratio in args.masks]
    backend = library.choose("auto", "masked_patch_embed", "cpu", torch.float32)
    report = [
        f"{len(clips)} clips of {args.frames} frames, ViT-B/16, float32, on the CPU with "
        f"{torch.get_num_threads()} threads; vidl ran its backend '{backend}'"
    ]
    for ratio, ids_keep in zip(args.masks, masks, strict=True):
        print(f"timing with {ratio:.0%} hidden", file=sys.stderr)
        report += [
            f"{ratio:.0%} hidden: {line}"
            for line in compare(video, parameters, ids_keep, args.repetitions)
        ]
    print("\n".join(report))

    args.out.mkdir(parents=True, exist_ok=True)
    page = ['<!doctype html><meta charset="utf-8"><title>vidl: masked clips</title>']
    page += ["<style>body { font: 16px sans-serif; max-width: 60em; margin: auto }</style>"]
    page += ["<h1>Only the visible patches are embedded</h1>"]
    page += [f"<pre>{html.escape(chr(10).join(report))}</pre>"]
    for b, (file, clip) in enumerate(zip(files, clips, strict=True)):
        name = f"{b}-{file.stem}.png"
        picture(clip, [ids_keep[b] for ids_keep in masks]).save(args.out / name)
        caption = html.escape(captions.get(file.name, file.name))
        page += [f"<figure><img src='{name}'><figcaption>{caption}</figcaption></figure>"]
    (args.out / "index.html").write_text("\n".join(page))
    print(f"see {args.out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
