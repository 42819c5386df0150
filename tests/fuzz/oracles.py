"""The ops in float64, written from their docstrings alone, and the size of their rounding errors.

An oracle gives the true results and gradients of a case, and the unit of each number: the sum of
the absolute values of the terms that a computation in one pass adds up. A rounding error of n units
in the last place is about n eps times this unit, however much the terms cancel. A unit of NaN means
that the number may be anything (in groups with a NaN or an infinity); a unit of zero that it is
exact.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fuzz.attention import Numbers, attention, gradients, token_scores
from fuzz.cases import Case, patch_of, samples_of
from torch import Tensor


def truth(case: Case) -> Numbers:
    """What `case.run` should return."""
    exact = case.double()
    inputs = {
        name: x.requires_grad_(name in case.leaves) if x is not None else None
        for name, x in exact.inputs.items()
    }
    return {
        name: (value.detach(), unit.detach())
        for name, (value, unit) in ORACLES[case.op](case, inputs, case.options).items()
    }


def _embed(case: Case, inputs: dict[str, Any], options: dict[str, Any]) -> Numbers:
    results = {"out": _tokens(inputs, **options)}
    # The op is linear: the terms of a sum are the absolute values of its factors.
    sizes = {
        name: x.detach().abs().requires_grad_(x.requires_grad)
        if x is not None and x.is_floating_point() else x
        for name, x in inputs.items()
    }  # fmt: skip
    mean = options.get("mean")
    mean = mean and [-abs(m) for m in mean]
    units = {"out": _tokens(sizes, mean, options.get("std"))}
    results |= gradients(case, results, inputs)
    units |= gradients(case, units, sizes, units=True)
    return {name: (x, units[name]) for name, x in results.items()}


def _tokens(
    inputs: dict[str, Any], mean: list[float] | None = None, std: list[float] | None = None
) -> Tensor:
    video, weight, bias = inputs["video"], inputs["weight"], inputs["bias"]
    time, space, ids = inputs["time"], inputs["space"], inputs["ids_keep"]
    weight = weight[:, :, None] if weight.ndim == 4 else weight
    patch, C = weight.shape[2:], weight.shape[0]
    N = math.prod(video.shape[2:]) // math.prod(patch)
    samples = [list(range(N))] * len(video)
    if ids is not None:
        samples = samples_of(ids, inputs["cu_seqlens"])
    rows = []
    for sample, listed in zip(video, samples, strict=True):
        for n in listed:
            pixels = patch_of(sample, patch, n)
            if video.dtype == torch.uint8:
                pixels = torch.stack(
                    [
                        (x.double() / 255 - (mean[c] if mean else 0)) / (std[c] if std else 1)
                        for c, x in enumerate(pixels)
                    ]
                )
            row = (weight * pixels).sum((1, 2, 3, 4))
            row = row if bias is None else row + bias
            if time is not None:
                row = row + time[n // len(space)] + space[n % len(space)]
            elif space is not None:
                row = row + space[n]
            rows.append(row)
    shape = (len(video), N) if ids is None else ids.shape
    empty = (weight.sum() + (0 if bias is None else bias.sum())) * 0
    return (torch.stack(rows) if rows else empty.expand(0, C)).reshape(*shape, C)


def _loss(case: Case, inputs: dict[str, Any], options: dict[str, Any]) -> Numbers:
    prediction, video, ids = inputs["prediction"], inputs["video"], inputs["ids_masked"]
    side = options["patch_size"]
    patch = (options["tubelet_size"], *((side, side) if isinstance(side, int) else side))
    rows = prediction.reshape(-1, prediction.shape[-1])
    losses, units, grad_units, m = [], [], [], 0
    for sample, listed in zip(video, samples_of(ids, inputs["cu_seqlens"]), strict=True):
        for n in listed:
            target, size = _target(patch_of(sample, patch, n), video.dtype, options)
            wrong = rows[m] - target
            losses.append(wrong.square().mean())
            size = size + rows[m].abs()
            units.append((wrong.square() + 2 * wrong.abs() * size).mean())
            grad_units.append(2 * size / target.numel())
            m += 1
    out = torch.stack(losses) if losses else rows.sum() * 0 + rows.new_zeros(0)
    unit = torch.stack(units) if units else out
    grad_unit = torch.stack(grad_units) if grad_units else rows
    if options["reduction"] == "mean":
        count = max(m, 1)
        out, unit = out.sum() / count, unit.sum() / count
        grad_unit = grad_unit * case.grad("out", out).abs() / count
    else:
        grad_unit = grad_unit * case.grad("out", out).abs()[:, None]
        out, unit = out.reshape(ids.shape), unit.reshape(ids.shape)
    results = {"out": (out, unit)}
    for name, x in gradients(case, {"out": out}, inputs).items():
        results[name] = (x, grad_unit.reshape(prediction.shape))
    return results


def _target(pixels: Tensor, dtype: torch.dtype, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The target of a patch [C, t, h, w] in the order (t, h, w, C), and its units."""
    C = pixels.shape[0]
    mean = options.get("mean") or [0.0] * C
    std = options.get("std") or [1.0] * C
    channels, sizes = [], []
    for c, x in enumerate(pixels.double()):
        if dtype == torch.uint8 and options["target"] == "mae":
            channels.append((x / 255 - mean[c]) / std[c])
            sizes.append((x / 255 + abs(mean[c])) / std[c])
        elif dtype == torch.uint8:
            channels.append(x / 255)
            sizes.append(x / 255)
        elif options["target"] == "videomae":
            channels.append(x * std[c] + mean[c])
            sizes.append(x.abs() * std[c] + abs(mean[c]))
        else:
            channels.append(x)
            sizes.append(x.abs())
    target, size = torch.stack(channels), torch.stack(sizes)
    if options["norm_pix"]:
        axes = (0, 1, 2, 3) if options["target"] == "mae" else (1, 2, 3)
        count = target.numel() if len(axes) == 4 else target[0].numel()
        center = target.sum(axes, keepdim=True) / count
        var = (target - center).square().sum(axes, keepdim=True) / (count - 1)
        mae = options["target"] == "mae"
        divisor = (var + 1e-6).sqrt() if mae else var.sqrt() + 1e-6
        # Sums may be of differences from any one pixel.
        size = size + size.amax(axes, keepdim=True)
        target, size = (target - center) / divisor, size / divisor
    return target.permute(1, 2, 3, 0).flatten(), size.permute(1, 2, 3, 0).flatten()


@dataclass
class _Sample:
    """What a sample keeps: rows of x by their number, and the fused token of the others."""

    taken: list[int]  # rows of x
    kept: list[int]  # positions without the prefix
    scores: list[int]  # the place of the score of each position
    dropped: list[int]  # rows of x that are fused
    weights: list[int]  # the places of their scores


def _select(case: Case, inputs: dict[str, Any], options: dict[str, Any]) -> Numbers:
    x, scores, offsets = inputs["x"], inputs["scores"], inputs["cu_seqlens"]
    fuse, prefix, nd = options["fuse"], options["prefix"], scores.ndim
    samples = _samples(inputs, options)
    rest = x.shape[nd:]
    flat = x.reshape(math.prod(x.shape[:nd]), math.prod(rest))
    weights = scores.reshape(-1)
    # [rows, C] each: the values, and their units. Copies are exact.
    tokens, units = [flat[:0]], [flat[:0].detach()]
    unit_x, unit_w = torch.zeros_like(flat).detach(), torch.zeros_like(weights).detach()
    inverse = torch.full_like(weights, -1, dtype=torch.int64)
    counts = [len(s.taken) + bool(fuse) for s in samples]
    grad = case.grad("tokens", x.new_empty(sum(counts), flat.shape[1])).abs()
    for s, end in zip(samples, itertools.accumulate(counts), strict=True):
        inverse[[s.scores[n] for n in s.kept]] = torch.arange(len(s.kept))
        tokens.append(flat[s.taken])
        units.append(torch.zeros_like(tokens[-1]).detach())
        if not fuse:
            continue
        w, rows = weights[s.weights], flat[s.dropped]
        size = rows.detach().abs()
        total, unit = (w[:, None] * rows).sum(0), (w.detach().abs()[:, None] * size).sum(0)
        mass, condition = 1.0, 1.0
        if fuse == "mean":
            mass = float(w.detach().sum())
            total = total / w.sum() if mass else total * 0
            condition = 1 + float(w.detach().abs().sum()) / abs(mass) if mass else 0.0
        mass = abs(mass) if mass else 1.0
        unit = unit / mass * condition
        tokens.append(total[None])
        units.append(unit[None])
        unit_x[s.dropped] = w.detach().abs()[:, None] / mass * grad[end - 1] * condition
        center = unit if fuse == "mean" else 0
        unit_w[s.weights] = ((size + center) / mass * grad[end - 1]).sum(1) * condition
    K = _kept(scores.shape[-1], options)
    shape = (*scores.shape[:-1], prefix + K + bool(fuse)) if offsets is None else (sum(counts),)
    out = torch.cat(tokens).reshape(*shape, *rest)
    ids = torch.tensor([n for s in samples for n in s.kept], dtype=torch.int64)
    ids = ids if offsets is not None else ids.reshape(*scores.shape[:-1], K)
    results = {
        "tokens": (out, torch.cat(units).reshape(out.shape)),
        "ids_keep": _exact(ids),
        "inverse": _exact(inverse.reshape(scores.shape)),
        "cu_seqlens": _exact(torch.tensor([0, *itertools.accumulate(counts)])),
    }
    grads = gradients(case, {"tokens": out}, inputs)
    for name, unit in (("grad x", unit_x), ("grad scores", unit_w)):
        if name in grads:
            results[name] = (grads[name], unit.reshape(grads[name].shape))
    return results


def _exact(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, torch.zeros(x.shape)


def _samples(inputs: dict[str, Any], options: dict[str, Any]) -> list[_Sample]:
    scores, offsets, prefix = inputs["scores"], inputs["cu_seqlens"], options["prefix"]
    ranks = (scores if inputs["rank_by"] is None else inputs["rank_by"]).reshape(-1).tolist()
    weights = scores.reshape(-1).tolist()
    if offsets is None:  # the prefix has no scores
        N = scores.shape[-1]
        B = math.prod(scores.shape[:-1])
        first = [(b * (prefix + N), b * N, N) for b in range(B)]
    else:
        steps = offsets.tolist()
        first = [(a, a + prefix, b - a - prefix) for a, b in zip(steps, steps[1:], strict=False)]
    samples = []
    for row, place, N in first:
        keys = ranks[place : place + N]
        best = sorted(
            range(N), key=lambda n, of=keys: (math.isnan(of[n]), 0 if of[n] != of[n] else -of[n], n)
        )
        kept = best[: _kept(N, options)]
        kept = kept if options["order"] == "score" else sorted(kept)
        dropped = [n for n in range(N) if n not in kept and math.isfinite(weights[place + n])]
        samples.append(
            _Sample(
                [*range(row, row + prefix), *(row + prefix + n for n in kept)],
                kept,
                list(range(place, place + N)),
                [row + prefix + n for n in dropped],
                [place + n for n in dropped],
            )
        )
    return samples


def _kept(N: int, options: dict[str, Any]) -> int:
    keep, rounding = options["keep"], options["rounding"]
    if isinstance(keep, int):
        return keep
    if rounding == "ceil":
        return math.ceil(keep * N)
    if rounding == "drop_floor":
        return N - int(round(1 - keep, 15) * N)
    return int(N * keep) if rounding == "floor" else min(N, max(1, int(N * keep)))


def _difference(case: Case, inputs: dict[str, Any], options: dict[str, Any]) -> Numbers:
    video, (t, h, w) = inputs["video"], options["patch"]
    B, C, T, H, W = video.shape
    frames, rows, columns = T // t, H // h, W // w
    out = torch.full((B, frames, rows, columns), math.inf, dtype=torch.float64)
    unit = torch.zeros_like(out)
    pixels = video.double()
    scale = torch.ones(C, dtype=torch.float64)
    if video.dtype == torch.uint8:
        scale = 255 * torch.tensor(options.get("std") or [1.0] * C, dtype=torch.float64)
    for s in range(1, frames):
        last, first = pixels[:, :, s * t + t - 1], pixels[:, :, (s - 1) * t]  # [B, C, H, W]
        difference = (last - first).abs()
        size = difference if video.dtype == torch.uint8 else last.abs() + first.abs()
        for i in range(rows):
            for j in range(columns):
                place = (..., slice(i * h, i * h + h), slice(j * w, j * w + w))
                out[:, s, i, j] = (difference[place].mean((2, 3)) / scale).mean(1)
                unit[:, s, i, j] = (size[place].mean((2, 3)) / scale).mean(1)
    return {"out": (out.flatten(1), unit.flatten(1))}


ORACLES: dict[str, Callable[[Case, dict[str, Any], dict[str, Any]], Numbers]] = {
    "masked_patch_embed": _embed,
    "masked_patch_loss": _loss,
    "space_time_attention": attention,
    "cls_attention_scores": token_scores,
    "mean_attention_scores": token_scores,
    "value_weighted_scores": token_scores,
    "key_similarity_scores": token_scores,
    "select_tokens": _select,
    "frame_difference": _difference,
}
