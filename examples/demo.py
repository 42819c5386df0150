"""Pre-train SMAUG on real clips; show what it learns and what its sparsity saves.

    python examples/demo.py

Trains the tiny SMAUG on the 33 clips of this folder (examples/demo.yaml), evaluates retrieval on
these clips, draws which patches are masked, pruned and kept, and times training steps with and
without masks, pruning and kernels. Writes demo/index.html. Run it again to resume a stopped run.
"""

import argparse
import functools
import html
import json
import shutil
import sys
from pathlib import Path

import torch
from masked_clip import CLIPS, milliseconds, picture, read_clip
from sparse_clip import stages

from vidl import models
from vidl.data import annotations, crops
from vidl.data.dataset import TooManyBroken
from vidl.training import Config, checkpoints, measures, pretrain

HERE = Path(__file__).parent
FILE = HERE / "demo.yaml"
STYLE = """
body { font: 16px/1.4 sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse } td, th { padding: .2em .8em; text-align: right }
th:first-child, td:first-child { text-align: left } tr { border-bottom: 1px solid #ddd }
figure { margin: 1em 0 } svg { width: 100% } .note { color: #555 }
"""


def train(out, overrides):
    """Train; returns the run and its last retrieval result, or None if it was stopped."""
    config = Config.read(FILE, [f"run.folder={out / 'run'}", *overrides])
    evaluations = []

    def evaluate(training):
        evaluations.append((training, measures.search(training)))
        return measures.numbers(evaluations[-1][1])

    folder = Path(config.run.folder)
    done = checkpoints.newest(folder)
    if done is not None and done.name == f"step-{config.schedule.steps:08}":
        shutil.rmtree(folder)  # the run is finished: start a new one
    result = pretrain(config, evaluate)
    return evaluations[-1] if result["finished"] else None


def curve(folder):
    """The losses of a run by name: pairs of step and value."""
    curves = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name in record.get("losses", []):
            curves.setdefault(name, []).append((record["step"], record[name]))
    return curves


def plot(curves, width=720, height=260):
    """An SVG line plot of several losses, each relative to its first value."""
    colours = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")
    steps = max(step for points in curves.values() for step, _ in points)
    shares = {n: [(s, v / points[0][1]) for s, v in points] for n, points in curves.items()}
    top = max(1.0, max(v for points in shares.values() for _, v in points))
    left, bottom = 40, 24

    def place(step, share):
        x = left + (width - left - 90) * step / steps
        return f"{x:.1f},{(height - bottom) * (1 - share / top) + 4:.1f}"

    lines = []
    for share in (0, 0.5, 1):
        x, y = place(0, share).split(",")
        lines += [f"<line x1='{x}' x2='{width - 90}' y1='{y}' y2='{y}' stroke='#ddd'/>"]
        lines += [f"<text x='0' y='{float(y) + 4:.1f}'>{share:.0%}</text>"]
    for number, (name, points) in enumerate(shares.items()):
        colour = colours[number % len(colours)]
        path = " ".join(place(*point) for point in points)
        lines += [f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='1.5'/>"]
        text = f"{name} {curves[name][-1][1]:.2f}"
        y = 16 + 18 * number
        lines += [f"<text x='{width - 84}' y='{y}' fill='{colour}'>{text}</text>"]
    lines += [f"<text x='{width - 150}' y='{height}'>step {steps}</text>"]
    return f"<svg viewBox='0 0 {width} {height + 6}' font-size='12'>{''.join(lines)}</svg>"


def retrieval_table(result):
    """A result of `vidl.evaluation.retrieval` as HTML."""
    rows = ["<tr><th></th><th>R@1</th><th>R@5</th><th>R@10</th><th>median rank</th></tr>"]
    names = {"t2v": "text to video", "v2t": "video to text"}
    for suffix, rankings in (("", result.rankings), (", re-ranked", result.reranked)):
        for key, ranking in rankings.items():
            recalls = "".join(f"<td>{value:.0f} %</td>" for value in ranking.recall.values())
            cells = f"<td>{names[key]}{suffix}</td>{recalls}<td>{ranking.median:g}</td>"
            rows += [f"<tr>{cells}</tr>"]
    return f"<table>{''.join(rows)}</table>"


def pictures(training, out):
    """Draw the tokens that are left of some clips; yields pairs of a file and its caption."""
    model = training.whole_model().eval()
    size, side = model.recipe.image_size, model.recipe.grid[1]
    rows = {Path(row.media).name: row for row in annotations.load(HERE / "clips.json")}
    for name in CLIPS:
        clip = read_clip(rows[name].media, model.recipe.frames)  # [C, T, 224, 224]
        small = crops.resize(clip.permute(1, 2, 3, 0), size, size).permute(3, 0, 1, 2)
        ids, mask = training.tokenizer(rows[name].captions[:1], training.config.data.words)
        kept = stages(model, small, ids[:, : int(mask.sum())])
        file = out / f"{Path(name).stem}.png"
        picture(clip, kept, side).save(file)
        yield file.name, rows[name].captions[0]


def step_times(preset, repetitions):
    """Milliseconds of a training step per clip: {dense, masked, pruned} x {reference, vidl}."""
    variants = {}
    for backend in ("reference", "auto"):
        recipe = models.recipe("smaug", preset, backend=backend)
        for name, variant in recipe.variants().items():
            variants[name, backend] = models.Smaug(variant)
    batch, calls = 2, []
    for model in variants.values():
        inputs = model.recipe.example(batch, 24)
        calls.append(functools.partial(step, model, inputs))
    times = milliseconds(calls, repetitions)
    return {key: time / batch for key, time in zip(variants, times, strict=True)}


def step(model, inputs):
    model(**inputs)["loss"].backward()
    model.zero_grad()


def times_table(times):
    """The times as HTML, with the speedup over the dense reference."""
    base = times["dense", "reference"]
    rows = ["<tr><th>ms per clip</th><th>reference</th><th>vidl</th></tr>"]
    for name in dict.fromkeys(name for name, _ in times):
        cells = ""
        for backend in ("reference", "auto"):
            time = times[name, backend]
            cells += f"<td>{time:,.0f} &nbsp; ({base / time:.2f} x)</td>"
        rows += [f"<tr><td>{name}</td>{cells}</tr>"]
    return f"<table>{''.join(rows)}</table>"


def page(training, result, shown, preset, times):
    """The text of demo/index.html."""
    recipe = training.recipe
    tokens = " &rarr; ".join(f"{name}: {count}" for name, count in recipe.tokens().items())
    parts = ["<!doctype html><meta charset='utf-8'><title>vidl: SMAUG on real clips</title>"]
    parts += [f"<style>{STYLE}</style><h1>SMAUG, pre-trained on {result.clips} real clips</h1>"]
    record = training.record
    about = f"{training.step} steps of {training.config.data.batch_size} clips, "
    about += f"{record['seconds_per_step']:.2f} s per step on the CPU, of which "
    parts += [f"<p>{about}{record['data_wait']:.0%} is waiting for data. Tokens of a clip: "]
    parts += [f"{tokens}.</p>"]
    parts += ["<h2>Losses</h2><p class='note'>Relative to their first values: contrastive (vtc), "]
    parts += ["matching (vtm), masked words (mlm), masked pixels (mvm), with the last value.</p>"]
    parts += [plot(curve(training.folder)), "<h2>Retrieval</h2><p class='note'>On the training "]
    parts += ["clips: this shows that the model learns, not how well it generalises. "]
    parts += [f"Chance: R@1 {100 / result.clips:.0f} %.</p>", retrieval_table(result)]
    parts += ["<h2>Masked, pruned and kept patches</h2><p class='note'>From top to bottom: the "]
    parts += ["clip; the visible patches; the patches that each pruning layer keeps; the frames "]
    parts += ["that the caption selects. The model is the trained one.</p>"]
    for name, caption in shown:
        parts += [f"<figure><img src='{name}' width='600'>"]
        parts += [f"<figcaption>{html.escape(caption)}</figcaption></figure>"]
    parts += ["<h2>A training step</h2><p class='note'>Forward and backward of SMAUG, preset "]
    parts += [f"{preset}, float32, {torch.get_num_threads()} threads of this CPU; in "]
    parts += ["parentheses the speedup over the dense reference. The reference is the plain "]
    parts += ["PyTorch definition of each op, not the fastest PyTorch baseline, which "]
    parts += ["<code>vidl bench</code> compares with. No GPU was measured.</p>"]
    parts += [times_table(times)]
    return "\n".join(parts)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("overrides", nargs="*", help="override demo.yaml, e.g. schedule.steps=100")
    add("--repetitions", type=int, default=3, help="repetitions of each timing (default: 3)")
    add("--timed", default="small", help="preset of the timed steps (default: small)")
    add("--out", type=Path, default=Path("demo"), help="output folder (default: demo)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        trained = train(args.out, args.overrides)
    except (TooManyBroken, ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    if trained is None:
        return 1
    training, result = trained
    print(result)
    print("drawing clips", file=sys.stderr)
    shown = list(pictures(training, args.out))
    print("timing training steps: dense and sparse, reference and vidl", file=sys.stderr)
    times = step_times(args.timed, args.repetitions)
    for (name, backend), time in times.items():
        print(f"{name:18} {backend:10} {time:8.0f} ms per clip")
    (args.out / "index.html").write_text(page(training, result, shown, args.timed, times))
    print(f"wrote {args.out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
