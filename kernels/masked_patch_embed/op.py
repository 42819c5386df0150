"""masked_patch_embed: embed the visible patches of a clip, without touching the masked ones.

    out[m] = weight . normalise(patch[ids_keep[m]]) + bias + position[ids_keep[m]]

Sources: patch embedding of ViT (arXiv 2010.11929, 3.1) and of tubelets (VideoMAE, arXiv 2203.12602,
3.2), in the reverse of MAE's order (arXiv 2111.06377, 3): first drop, then embed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vidl.kernels import choices, library
from vidl.kernels.arguments import check_tensors, in_dtype
from vidl.kernels.patches import (
    FLOATING,
    check_divides,
    check_ids,
    check_normalisation,
    check_video,
)

from . import pytorch, reference

Position = Tensor | tuple[Tensor, Tensor]


def patch_grid(video: Sequence[int], weight: Sequence[int]) -> tuple[int, int, int]:
    """Patches along T, H, W: clip [B, C_in, T, H, W], weight [C, C_in, t, h, w]."""
    return video[2] // weight[2], video[3] // weight[3], video[4] // weight[4]


def num_patches(video: Sequence[int], weight: Sequence[int]) -> int:
    """N, the number of patches of a clip."""
    frames, rows, columns = patch_grid(video, weight)
    return frames * rows * columns


def _fake(video, weight, bias, time, space, ids_keep, cu_seqlens, mean, std):
    rows = (video.shape[0], num_patches(video.shape, weight.shape))
    return weight.new_empty(*(rows if ids_keep is None else ids_keep.shape), weight.shape[0])


def _flops(video, weight, bias, time, space, ids_keep, *args, **kwargs) -> int:
    N = num_patches(video.shape, weight.shape)
    rows = video.shape[0] * N if ids_keep is None else ids_keep.numel()
    return 2 * rows * weight.numel()


def _fake_bwd(
    grad_out, video, weight, ids_keep, cu_seqlens, mean, std, need_video, need_weight, need_position
):
    N = num_patches(video.shape, weight.shape)
    return (
        video.new_empty(video.shape if need_video else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        grad_out.new_empty((N, weight.shape[0]) if need_position else (0,), dtype=torch.float32),
    )


def _flops_bwd(
    grad_out, video, weight, ids_keep, cu_seqlens, mean, std, need_video, need_weight, *a, **kw
) -> int:
    rows = grad_out.numel() // max(weight.shape[0], 1)
    return 2 * rows * weight.numel() * (need_video + need_weight)


def _setup_context(ctx, inputs, output) -> None:
    video, weight, bias, time, space, ids_keep, cu_seqlens, ctx.mean, ctx.std = inputs
    ctx.save_for_backward(video, weight, ids_keep, cu_seqlens)
    ctx.position_like = [None if p is None else (p.shape, p.dtype) for p in (bias, time, space)]


def _backward(bwd: Callable[..., Any], ctx, grad_out: Tensor):
    video, weight, ids_keep, cu_seqlens = ctx.saved_tensors
    need_video, need_weight, need_bias, need_time, need_space = ctx.needs_input_grad[:5]
    need_position = need_space or need_time
    grad_video, grad_weight, grad_position = bwd(
        grad_out.contiguous(),
        video,
        weight,
        ids_keep,
        cu_seqlens,
        ctx.mean,
        ctx.std,
        need_video,
        need_weight,
        need_position,
    )
    bias, time, space = ctx.position_like
    grad_bias = grad_time = grad_space = None
    if need_bias:
        sums = grad_position if need_position else grad_out.flatten(0, -2)
        grad_bias = in_dtype(sums.sum(0, dtype=torch.float32), bias[1])
    if need_time:
        grad_time = in_dtype(grad_position.view(time[0][0], *space[0]).sum(1), time[1])
    if need_space:
        by_frame = None if time is None else grad_position.view(time[0][0], *space[0])
        grad_space = in_dtype(grad_position if by_frame is None else by_frame.sum(0), space[1])
    return (
        grad_video if need_video else None,
        grad_weight if need_weight else None,
        grad_bias,
        grad_time,
        grad_space,
        None,
        None,
        None,
        None,
    )


library.define(
    library.Op(
        "masked_patch_embed_bwd(Tensor grad_out, Tensor video, Tensor weight, Tensor? ids_keep, "
        "Tensor? cu_seqlens, float[] mean, float[] std, bool need_video, bool need_weight, "
        "bool need_position) -> (Tensor, Tensor, Tensor)",
        module=__package__,
        fake=_fake_bwd,
        flops=_flops_bwd,
    )
)
library.define(
    library.Op(
        "masked_patch_embed(Tensor video, Tensor weight, Tensor? bias, Tensor? time, "
        "Tensor? space, Tensor? ids_keep, Tensor? cu_seqlens, float[] mean, float[] std) -> Tensor",
        module=__package__,
        fake=_fake,
        flops=_flops,
        reference=reference.masked_patch_embed,
        torch=pytorch.masked_patch_embed,
        setup_context=_setup_context,
        backward=_backward,
    )
)


def masked_patch_embed(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    position: Position | None = None,
    ids_keep: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Embed only the visible patches of a clip.

    Equal to `conv3d` over the whole normalised clip, flattened to tokens in the order (time, row,
    column), plus `position`, then a gather of `ids_keep`. Deterministic, forward and backward.

    Args:
        video: [B, C_in, T, H, W], any strides: `permute` a [B, T, C_in, H, W] or a channels-last
            [B, T, H, W, C_in] clip without a copy. uint8 (0 to 255) or floating point.
        weight: [C, C_in, t, h, w] as in `nn.Conv3d`, or [C, C_in, h, w] as in `nn.Conv2d` (then
            t = 1); float32, float16 or bfloat16; the dtype of the result. Autocast casts float32.
        bias: [C], in the dtype of `weight` or float32.
        position: [N, C], added to the tokens; or a pair ([N / P, C], [P, C]) for time and space,
            where P is the number of patches of a frame. In the dtype of `weight` or float32.
        ids_keep: int64, the visible patches in [0, N), N = T/t * H/h * W/w. [B, K], or [total] with
            `cu_seqlens`; None embeds all. A repeated id is embedded repeatedly; its gradients add.
        cu_seqlens: [B + 1] int32, where each sample begins in a packed `ids_keep`, from 0 to total.
        mean: C_in numbers, subtracted from the pixels of a uint8 clip after division by 255.
        std: C_in positive numbers that then divide them. Default: mean 0 and std 1.
        backend: "auto", "native", "triton", "torch" or "reference".

    Returns:
        [B, K, C], [total, C] if packed, or [B, N, C] without `ids_keep`. Gradients flow to
        `weight`, `bias`, `position`, and to a floating-point `video`.

    Raises:
        TypeError: a dtype is not one of those above.
        ValueError: shapes, devices or options do not fit together.
        RuntimeError: a backend asked for by name cannot run here; or, on the CPU, an id or an
            offset is out of range. On CUDA the kernels read nothing out of range: the token of
            such an id is NaN, and some are NaN if `cu_seqlens` do not ascend. "torch" and
            "reference" assert them on the device, as PyTorch does.
    """
    return _embed(video, weight, bias, position, ids_keep, cu_seqlens, mean, std, backend)


def embed_as_convolution(
    video: Tensor, weight: Tensor, bias: Tensor | None, *, backend: str = "auto"
) -> Tensor:
    """All patches of a floating-point clip, for a caller that could run a convolution instead.

    The backend "torch" is that convolution, so that "auto" takes a kernel where it is faster than
    the convolution. Arguments, result and errors are those of `masked_patch_embed`.
    """
    return _embed(video, weight, bias, backend=backend, convolution=True)


def _embed(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    position: Position | None = None,
    ids_keep: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    backend: str = "auto",
    convolution: bool = False,
) -> Tensor:
    check_tensors(video=video, weight=weight)
    if weight.ndim == 4:
        weight = weight.unsqueeze(2)
    check_video(video)
    _check_weight(video, weight)
    check_divides(video, weight.shape[2:])
    if ids_keep is not None:
        check_ids("ids_keep", video, ids_keep, cu_seqlens)
    elif cu_seqlens is not None:
        raise ValueError("cu_seqlens needs a packed ids_keep, got None")
    mean, std = check_normalisation(video, mean, std)
    weight = in_dtype(weight, library.autocast_dtype(weight))
    time, space = _time_and_space(position)
    _check_position(video, weight, bias, time, space)
    args = (video, weight, bias, time, space, ids_keep, cu_seqlens, mean, std)
    backend = choose(backend, video, weight, bias, time, space, ids_keep, cu_seqlens, convolution)
    hints = {"convolution": True} if convolution else {}
    return library.run("masked_patch_embed", backend, *args, **hints)


def choose(
    backend: str,
    video: Tensor,
    weight: Tensor,  # [C, C_in, t, h, w], in the dtype of the computation
    bias: Tensor | None = None,
    time: Tensor | None = None,
    space: Tensor | None = None,
    ids_keep: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    convolution: bool = False,
) -> str:
    """The backend of a call: see `library.choose`, and for `convolution` `embed_as_convolution`."""
    kind = video.device.type

    def key() -> choices.Key | None:
        rows = video.shape[0] * num_patches(video.shape, weight.shape)
        return choices.key(
            "masked_patch_embed",
            kind,
            weight.dtype,
            (video, weight, bias, time, space),
            {
                "rows": rows if ids_keep is None else ids_keep.numel(),
                "pixels": weight.shape[1:].numel(),
                "width": weight.shape[0],
            },
            bytes=video.dtype == torch.uint8,
            masked=ids_keep is not None,
            packed=cu_seqlens is not None,
            video_gradient=torch.is_grad_enabled() and video.requires_grad,
            **({"convolution": True} if convolution else {}),
        )

    if backend == "auto" and convolution:
        chosen, source = library.automatic("masked_patch_embed", kind, weight.dtype, key())
        return "torch" if source == "rule" else chosen  # PyTorch's own, until a kernel is measured
    return library.choose(backend, "masked_patch_embed", kind, weight.dtype, key)


def _time_and_space(position: Position | None) -> tuple[Tensor | None, Tensor | None]:
    if position is None or isinstance(position, Tensor):
        return None, position
    if not isinstance(position, (tuple, list)):
        raise TypeError(
            "need position as a tensor or a pair of tensors (time, space), "
            f"got {type(position).__name__}"
        )
    if len(position) != 2 or not all(isinstance(x, Tensor) for x in position):
        types = ", ".join(type(x).__name__ for x in position)
        raise ValueError(f"need position (time, space) with two tensors, got ({types})")
    time, space = position
    return time, space


def _check_weight(video: Tensor, weight: Tensor) -> None:
    if weight.dtype not in FLOATING:
        raise TypeError(f"need a weight in one of {FLOATING}, got {weight.dtype}")
    if weight.ndim != 5 or weight.shape[1] != video.shape[1]:
        raise ValueError(
            f"need weight [C, {video.shape[1]}, t, h, w] or [C, {video.shape[1]}, h, w] for video "
            f"{tuple(video.shape)}, got {tuple(weight.shape)}"
        )


def _check_position(
    video: Tensor, weight: Tensor, bias: Tensor | None, time: Tensor | None, space: Tensor | None
) -> None:
    frames, rows, columns = patch_grid(video.shape, weight.shape)
    C, patches = weight.shape[0], rows * columns * (frames if time is None else 1)
    given = {"bias": bias, "position for time": time, "position": space}
    check_tensors(optional=tuple(given), weight=weight, **given)
    shapes = ((C,), (frames, C), (patches, C))
    for (name, tensor), shape in zip(given.items(), shapes, strict=True):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"need {name} {list(shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype not in (weight.dtype, torch.float32):
            raise TypeError(f"need {name} in {weight.dtype} or float32, got {tensor.dtype}")
