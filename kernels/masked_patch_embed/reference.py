"""masked_patch_embed in plain PyTorch: its definition, on any device, in any floating dtype."""

from collections.abc import Sequence

import torch
from torch import Tensor


def masked_patch_embed(
    video: Tensor,  # [B, C, T, H, W]
    weight: Tensor,  # [D, C, t, h, w]
    bias: Tensor | None,  # [D]
    space: Tensor | None,  # [S, D]
    time: Tensor | None,  # [N / S, D]
    ids_keep: Tensor | None,  # [B, K] or [total]
    cu_seqlens: Tensor | None,  # [B + 1]
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Cut the visible patches out, normalise them, project them, add their positions."""
    B, (t, h, w) = video.shape[0], weight.shape[2:]
    # [B, T', H', W', C, t, h, w]: a view, so that only the patches picked below are copied
    patches = video.unflatten(2, (-1, t)).unflatten(4, (-1, h)).unflatten(6, (-1, w))
    patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7)
    H, W = patches.shape[2:4]
    N = patches.shape[1] * H * W

    sample, ids = rows(B, N, ids_keep, cu_seqlens, video.device)
    torch._assert_async(
        ((ids >= 0) & (ids < N)).all(), f"masked_patch_embed: ids_keep must lie in [0, {N})"
    )
    visible = patches[sample, ids // (H * W), ids // W % H, ids % W]  # [M, C, t, h, w]
    if len(mean):
        per_channel = (-1, 1, 1, 1)
        high = weight.dtype if weight.dtype == torch.float64 else torch.float32
        shift = torch.tensor(mean, dtype=high, device=video.device).view(per_channel)
        scale = torch.tensor(std, dtype=high, device=video.device).view(per_channel)
        visible = (visible.to(high) / 255 - shift) / scale

    out = torch.nn.functional.linear(
        visible.to(weight.dtype).flatten(1),
        weight.flatten(1),
        bias if bias is None else bias.to(weight.dtype),
    )
    if space is not None:
        out = out + space[ids % space.shape[0]].to(out.dtype)
        if time is not None:
            out = out + time[ids // space.shape[0]].to(out.dtype)
    shape = (B, N) if ids_keep is None else ids_keep.shape
    return out.view(*shape, weight.shape[0])


def rows(
    B: int, N: int, ids_keep: Tensor | None, cu_seqlens: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The sample and the patch of every row of the result, int64 [M] each."""
    if ids_keep is None:
        ids_keep = torch.arange(N, device=device).expand(B, N)
    if cu_seqlens is None:
        sample = torch.arange(B, device=device)[:, None].expand(ids_keep.shape)
        return sample.reshape(-1), ids_keep.reshape(-1)
    total = ids_keep.shape[0]
    torch._assert_async(
        (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total) & (cu_seqlens.diff() >= 0).all(),
        f"masked_patch_embed: cu_seqlens must ascend from 0 to {total}",
    )
    row = torch.arange(total, device=device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:], row, right=True), ids_keep
