"""Word-patch alignment (WPA): the optimal transport between words and patches."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vidl.kernels.arguments import check_count, check_floating, check_shape, check_tensors, finite

# Denominators are at least this: a row of the plan that underflows stays zero instead of NaN.
TINY = 1e-30


@torch.no_grad()
def transport_plan(
    cost: Tensor, words: Tensor, patches: Tensor, *, beta: float = 0.5, iterations: int = 50
) -> Tensor:
    """The plan that moves the mass of words to patches at the lowest cost, by proximal steps.

        min_T <T, cost>, where T has the row sums 1 / L_b and the column sums 1 / N_b

    All words of a sample have the same mass, and so have all patches. Each step is one iteration of
    Sinkhorn's algorithm on exp(-cost / beta) T, first of the columns, then of the rows, whose sums
    are therefore exact. Samples are padded and computed together, without a host synchronisation
    and without a gradient. Source: IPOT, arXiv 1802.04307, algorithm 1.

    Args:
        cost: [B, L, N], floating point; not read where there is no word or no patch.
        words, patches: [B, L] and [B, N], nonzero where there is one.
        beta: weight of the proximal term, > 0.
        iterations: number of steps.

    Returns:
        [B, L, N], float32 (float64 for a float64 cost); zero at padding, and for a sample without
        words or without patches.

    Raises:
        ValueError: the shapes do not fit, or a number is out of range.
    """
    check_tensors(cost=cost, words=words, patches=patches)
    check_floating(cost=cost)
    check_shape("cost", cost, "B", "L", "N")
    check_shape("words", words, *cost.shape[:2])
    check_shape("patches", patches, cost.shape[0], cost.shape[2])
    if finite("beta", beta) <= 0:
        raise ValueError(f"need beta > 0, got {beta}")
    check_count("iterations", iterations, 1)
    dtype = torch.promote_types(cost.dtype, torch.float32)
    words, patches = (words != 0).to(dtype), (patches != 0).to(dtype)
    row_sums = words / words.sum(1, keepdim=True).clamp(min=1)
    column_sums = patches / patches.sum(1, keepdim=True).clamp(min=1)
    plan = words[:, :, None] * patches[:, None]  # before the first step, all ones
    kernel = torch.where(plan > 0, torch.exp(-cost.to(dtype) / beta), 0)
    rows = row_sums
    with torch.autocast(cost.device.type, enabled=False):
        for _ in range(iterations):
            step = kernel * plan
            columns = column_sums / (rows[:, None] @ step).squeeze(1).clamp(min=TINY)
            rows = row_sums / (step @ columns[:, :, None]).squeeze(2).clamp(min=TINY)
            plan = rows[:, :, None] * step * columns[:, None]
    return plan


def word_patch_alignment(
    text: Tensor,
    clips: Tensor,
    words: Tensor,
    patches: Tensor | None = None,
    *,
    beta: float = 0.5,
    iterations: int = 50,
) -> Tensor:
    """The optimal transport distance between the words and the patches of each sample.

        distance = <T, cost>, where cost = 1 - cos(word, patch) and T is `transport_plan`

    The plan has no gradient; the cost has. Sources: UNITER, arXiv 1909.11740, 3.2; ViLT, arXiv
    2102.03334, 3.2.

    Args:
        text, clips: tokens of captions and of their clips, [B, L, C] and [B, N, C], floating point.
        words, patches: [B, L] and [B, N], nonzero at the tokens that take part; patches None: all.
        beta, iterations: as in `transport_plan`.

    Returns:
        [B], float32 (float64 for float64 tokens), from 0 to 2; zero without words or patches.

    Raises:
        ValueError: the shapes do not fit, or a number is out of range.
    """
    tensors = dict(text=text, clips=clips, words=words, patches=patches)
    check_tensors(("patches",), **tensors)
    check_floating(text=text, clips=clips)
    check_shape("text", text, "B", "L", "C")
    check_shape("clips", clips, text.shape[0], "N", text.shape[2])
    check_shape("words", words, *text.shape[:2])
    if patches is None:
        patches = words.new_ones(clips.shape[:2])
    check_shape("patches", patches, *clips.shape[:2])
    dtype = torch.promote_types(torch.promote_types(text.dtype, clips.dtype), torch.float32)
    with torch.autocast(text.device.type, enabled=False):
        text, clips = (F.normalize(x.to(dtype), dim=-1) for x in (text, clips))
        cost = 1 - text @ clips.mT
        plan = transport_plan(cost, words, patches, beta=beta, iterations=iterations)
        return (plan * cost).sum((1, 2))
