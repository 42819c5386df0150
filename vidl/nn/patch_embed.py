"""Patch embedding of visible patches only, with the parameters of a convolution."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vidl.kernels.arguments import check_count, check_flag, check_tensors, pair
from vidl.kernels.library import check_backend
from vidl.kernels.masked_patch_embed import masked_patch_embed
from vidl.kernels.masked_patch_embed.op import Position
from vidl.kernels.patches import (
    check_ids,
    check_normalisation,
    check_video,
    gather,
    per_channel,
)


class MaskedPatchEmbed(nn.Module):
    """Embed only the visible patches of a clip or an image.

    Equivalent to `proj(x).flatten(2).transpose(1, 2)`, plus `position`, then a gather of
    `ids_keep`. The convolution `proj` holds the parameters and is not called, so it loads the
    state_dict of timm's `PatchEmbed`, and of Hugging Face's `...PatchEmbeddings`, whose convolution
    is named `projection`. Another module in its place, such as an adapter of peft, is called: it
    embeds all patches. Sources: ViT, arXiv 2010.11929, 3.1; MAE, arXiv 2111.06377, 3.

    Args:
        patch_size: of a patch in pixels, one number or (height, width).
        in_chans: channels of the clip.
        embed_dim: channels of a token.
        tubelet_size: frames in a patch, for a `Conv3d`; None for a `Conv2d`, which embeds images or
            the frames of clips.
        bias: whether the convolution has a bias.
        mean, std: normalisation of uint8 clips, one number per channel, for pixels scaled to [0,
            1]; floating-point clips are not normalised.
        backend: as in `vidl.ops.masked_patch_embed`.
    """

    def __init__(
        self,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        tubelet_size: int | None = None,
        bias: bool = True,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        h, w = pair("patch_size", patch_size)
        check_count("in_chans", in_chans, 1)
        check_count("embed_dim", embed_dim, 1)
        if tubelet_size is not None:
            check_count("tubelet_size", tubelet_size, 1)
        check_flag("bias", bias)
        check_backend(backend)
        per_channel(in_chans, mean, std)  # checks them
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.proj: nn.Conv2d | nn.Conv3d
        if tubelet_size is None:
            self.proj = nn.Conv2d(in_chans, embed_dim, (h, w), (h, w), **options)
        else:
            size = (tubelet_size, h, w)
            self.proj = nn.Conv3d(in_chans, embed_dim, size, size, **options)
        self.mean, self.std, self.backend = mean, std, backend
        self.register_load_state_dict_pre_hook(_rename_projection)

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d | nn.Conv3d,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        backend: str = "auto",
    ) -> "MaskedPatchEmbed":
        """Take over the convolution of a patch embedding; its parameters are shared, not copied.

        Raises:
            TypeError: `conv` is neither a Conv2d nor a Conv3d.
            ValueError: `conv` has overlapping patches, padding, dilation or groups.
        """
        if not isinstance(conv, nn.Conv2d | nn.Conv3d):
            raise TypeError(f"need conv as nn.Conv2d or nn.Conv3d, got {type(conv).__name__}")
        if not cuts_patches(conv):
            raise ValueError(
                "need conv whose stride is its kernel_size, without padding, dilation or groups, "
                f"got {conv}"
            )
        *t, h, w = conv.kernel_size
        embedding = cls(
            (h, w), conv.in_channels, conv.out_channels, t[0] if t else None,
            conv.bias is not None, mean=mean, std=std, backend=backend, device="meta",
        )  # fmt: skip
        embedding.proj = conv
        return embedding.train(conv.training)

    def forward(
        self,
        video: Tensor,
        ids_keep: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        position: Position | None = None,
    ) -> Tensor:
        """Embed the visible patches.

        Args:
            video: [B, C_in, T, H, W], or [B, C_in, H, W] if `proj` is a Conv2d; uint8 or floating
                point, any strides.
            ids_keep: visible patches, [B, K] int64, or [total] with `cu_seqlens`; None: all.
            cu_seqlens: offsets of the samples in a packed `ids_keep`, [B + 1] int32.
            position: position embeddings that are added to the tokens, [N, C], or a pair (time [T,
                C], space [P, C]).

        Returns:
            [B, K, C], [total, C] if packed, or [B, N, C] without `ids_keep`.

        Raises:
            TypeError, ValueError, RuntimeError: as `vidl.ops.masked_patch_embed`.
        """
        check_tensors(video=video)
        if video.ndim == 4 and takes_images(self.proj):
            video = video.unsqueeze(2)
        uint8 = video.dtype == torch.uint8
        return embed(
            self.proj,
            video,
            position,
            ids_keep,
            cu_seqlens,
            mean=self.mean if uint8 else None,
            std=self.std if uint8 else None,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        parts = [f"{name}={getattr(self, name)}" for name in ("mean", "std")]
        parts = [part for part in parts if not part.endswith("=None")]
        return ", ".join([*parts, f"backend={self.backend!r}"])


def embed(
    projection: Any,
    video: Tensor,
    position: Position | None = None,
    ids_keep: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    backend: str = "auto",
) -> Tensor:
    """`masked_patch_embed` by a module whose parameters are read only if it is a convolution.

    Any other module is called on the whole clip, and the visible tokens are gathered.
    """
    if is_convolution(projection):
        weight, bias = projection.weight, projection.bias
        options: Any = {"mean": mean, "std": std, "backend": backend}
        return masked_patch_embed(video, weight, bias, position, ids_keep, cu_seqlens, **options)
    check_video(video)
    if ids_keep is not None:
        check_ids("ids_keep", video, ids_keep, cu_seqlens)
    tokens = _call(projection, _pixels(projection, video, mean, std))  # [B, C, T/t, H/h, W/w]
    visible, ids = gather("ids_keep", tokens, (1, 1, 1), ids_keep, cu_seqlens)
    x = visible.flatten(1)
    if position is not None:
        time, space = position if isinstance(position, tuple) else (None, position)
        x = x + space[ids % space.shape[0]].to(x.dtype)
        if time is not None:
            x = x + time[ids // space.shape[0]].to(x.dtype)
    rows = (tokens.shape[0], -1) if ids_keep is None else ids_keep.shape
    return x.view(*rows, tokens.shape[1])


def _call(projection: nn.Module, video: Tensor) -> Tensor:
    if not takes_images(projection):
        return projection(video)
    images = projection(video.transpose(1, 2).flatten(0, 1))  # [B T, C, H/h, W/w]
    return images.unflatten(0, (video.shape[0], -1)).transpose(1, 2)


def _pixels(
    projection: nn.Module,
    video: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Tensor:
    """The normalised clip, in the dtype of the module."""
    means, stds = check_normalisation(video, mean, std)
    dtype = next(projection.parameters()).dtype
    if not means:
        return video.to(dtype)
    shift, scale = (video.new_tensor(x, dtype=torch.float32) for x in (means, stds))
    shift, scale = shift.view(-1, 1, 1, 1), scale.view(-1, 1, 1, 1)
    return ((video.float() / 255 - shift) / scale).to(dtype)


def is_convolution(projection: nn.Module) -> bool:
    """Whether a call computes the convolution by `weight` and `bias`, and nothing else.

    False for subclasses with a `forward` of their own, for adapters that wrap a convolution, and
    for hooks, which reading the parameters would skip.
    """
    kind: Any = type(projection)
    plain = kind.forward in (nn.Conv2d.forward, nn.Conv3d.forward)
    return (plain or hasattr(kind, "swapped_convolution")) and not has_hooks(projection)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs more than the `forward` of its class."""
    return bool(
        "forward" in module.__dict__
        or module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    )


def takes_images(projection: nn.Module) -> bool:
    """Whether a module embeds images, not clips, by the dimensions of its kernels."""
    return max(parameter.ndim for parameter in projection.parameters()) == 4


def cuts_patches(conv: nn.Conv2d | nn.Conv3d) -> bool:
    """Whether a convolution has no overlap, padding, dilation or groups."""
    padded = conv.padding not in ("valid", (0,) * len(conv.kernel_size))
    whole = conv.stride == conv.kernel_size and not padded and set(conv.dilation) == {1}
    return whole and conv.groups == 1


def _rename_projection(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in ("weight", "bias"):
        if f"{prefix}projection.{name}" in state_dict:
            state_dict[f"{prefix}proj.{name}"] = state_dict.pop(f"{prefix}projection.{name}")
