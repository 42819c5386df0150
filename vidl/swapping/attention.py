"""What the families share: attention among whole samples of equal length."""

from typing import Any

import torch
from torch import Tensor

from vidl.kernels import library
from vidl.kernels.groups import Groups
from vidl.kernels.space_time_attention import space_time_attention
from vidl.kernels.space_time_attention.op import Scores
from vidl.kernels.token_scores import cls_attention_scores, mean_attention_scores
from vidl.swapping.kept_groups import kept


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    groups: Groups | None = None,
    scale: float | None = None,
    scores: Scores | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attention of the tokens of each sample, or of groups of them.

    Args:
        q: [B, N, H, D], any strides of the first three: slices of a fused buffer need no copy.
        k, v: [B, M, H, D].
        groups: of the B N queries and B M keys; default each sample is one.
        scale: default 1 / sqrt(D).
        scores: also return how important each key is, as `vidl.ops.space_time_attention` does.

    Returns:
        The output, [B, N, H D], and the scores, [B, M] float32, or None; of samples only.
    """
    B, N, M = q.shape[0], q.shape[1], k.shape[1]
    if groups is None:
        groups = equal_groups(B, N, M, q.device)
    # Norms of q and k return float32 under autocast.
    q, k, v = (x.to(v.dtype).flatten(0, 1) for x in (q, k, v))
    options: Any = {"scale": scale, "backend": backend}
    importance: Tensor | None = None
    if scores is not None and fused(q, backend):
        out, importance = space_time_attention(q, k, v, groups, return_scores=scores, **options)
    else:
        out = space_time_attention(q, k, v, groups, **options)
        if scores is not None:
            score = cls_attention_scores if scores == "cls" else mean_attention_scores
            importance = score(q, k, groups, **options)
    return out.view(B, N, -1), None if importance is None else importance.view(B, M)


def fused(q: Tensor, backend: str) -> bool:
    """Whether scores should come with the attention: not where that is PyTorch's own, without."""
    dtype, head_size = library.autocast_dtype(q), q.shape[2]
    place = ("space_time_attention", q.device.type, dtype)
    return backend != "auto" or library.choose("auto", *place, head_size=head_size) != "reference"


@kept
def equal_groups(B: int, N: int, M: int, device: torch.device) -> Groups:
    """B samples of N queries and M keys."""
    return Groups.equal(B, N, keys=M, device=device)


def speed(device: torch.device, dtype: torch.dtype, head_size: int, backend: str) -> str:
    """What the report says of attention that gains nothing here; "" where our kernels run."""
    if backend != "auto":
        return ""
    op = "space_time_attention"
    if library.choose(backend, op, device.type, dtype, head_size=head_size) != "reference":
        return ""
    reason = library.why_not("native", op, device.type, dtype, head_size=head_size)
    if reason is None:
        reason = f"no kernel of ours is known to be faster on {device.type}"
    return f"as fast as before: backend='auto' stays with PyTorch's own attention, as {reason}"
