"""Frozen in Time's video encoder, divided space-time attention, on visible patches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidl.kernels.arguments import check_floating, check_shape, check_tensors
from vidl.kernels.groups import Groups
from vidl.nn.arguments import check_groups, check_layer, check_state
from vidl.nn.block import LAYER_NORM, Attention, Mlp, attend
from vidl.nn.checkpoints import load_or_explain
from vidl.nn.space_time import SpaceTimeEncoder
from vidl.nn.vit import encoder_weights, frame_ids

TimeGroups = Literal["slot", "position", "joint"]


class DividedBlock(nn.Module):
    """Temporal attention, spatial attention and MLP, in the order of Frozen in Time.

        t = time(norm3(x));  s = space(norm1(x + t));  y = x + s;  out = y + mlp(norm2(y))

    The residual of both attentions is x, not x + t. Parameters are named as in the authors' code
    (`SpaceTimeBlock`). Source: Frozen in Time, arXiv 2104.00650, 3.1.

    Args:
        dim, num_heads, mlp_ratio, qkv_bias, act_layer, norm_layer: as in `Block`.
        backend: of both attentions.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = LAYER_NORM,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_layer(dim, num_heads, mlp_ratio, qkv_bias, act_layer, norm_layer, backend)
        self.dim = dim
        self.norm1, self.norm2, self.norm3 = (norm_layer(dim) for _ in range(3))
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.timeattn = Attention(dim, num_heads, qkv_bias)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer)
        self.backend = backend
        self.reset_time()

    def reset_time(self) -> None:
        """Set the values of temporal attention to zero, so that it adds nothing at first.

        The block then equals a ViT block, and temporal attention learns from the first step on.
        Frozen in Time sets `qkv` to zeros and `proj` to ones instead. But queries and keys that are
        both zero get no gradient from each other, and such a `proj` adds the same number to all
        channels, which `norm1` removes: only rounding noise would train temporal attention.
        """
        with torch.no_grad():
            for parameter in self.timeattn.qkv.parameters():
                parameter.chunk(3)[2].zero_()
            self.timeattn.proj.bias.zero_()

    def forward(self, x: Tensor, space: Groups, time: Groups) -> Tensor:
        """Transform packed tokens.

        Args:
            x: [total, C].
            space, time: groups of spatial and temporal attention.

        Returns:
            [total, C].
        """
        check_tensors(x=x)
        check_floating(x=x)
        check_shape("x", x, "total", self.dim)
        check_groups("space", space, x)
        check_groups("time", time, x)
        through_time, _ = attend(self.timeattn, self.norm3(x), time, None, self.backend)
        in_space, _ = attend(self.attn, self.norm1(x + through_time), space, None, self.backend)
        x = x + in_space
        return x + self.mlp(self.norm2(x))


class SpaceTimeTransformer(SpaceTimeEncoder):
    """Divided space-time transformer with one global CLS token, on the visible patches of a clip.

    In both attentions CLS attends to all tokens of the clip, and a patch attends to its group and
    to CLS. In spatial attention its group is its frame. In temporal attention `time` chooses the
    group:

    - "slot": patches with the same index among the visible patches of their frame, as in Frozen;
      with random masks per frame these are at different positions;
    - "position": patches at the same position, in all frames where it is visible; equal to "slot"
      if every frame shows the same positions (a tube mask);
    - "joint": all patches of the clip.

    The paper of MAC does not report which of these it uses. Parameters are named as in
    frozen-in-time's `SpaceTimeTransformer`; the names of the spatial part are timm's. Sources:
    Frozen in Time, arXiv 2104.00650; MAC, arXiv 2212.00986, figure 2.

    Args:
        img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio, qkv_bias: as in
            `ViT`.
        act_layer, norm_layer: as in `ViT`.
        num_frames: the largest number of frames; clips may have fewer.
        tubelet_size: as in `ViT`.
        time: see above; "slot" needs the same number of visible patches in every frame.
        mean, std: normalisation of uint8 clips, as in `MaskedPatchEmbed`.
        backend: of all ops.

    Raises:
        ValueError: options do not fit together.
    """

    TIME = ("timeattn.", "norm3.", "temporal_embed")
    temporal_embed: Tensor

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = LAYER_NORM,
        *,
        num_frames: int = 4,
        tubelet_size: int | None = None,
        time: TimeGroups = "slot",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        backend: str = "auto",
    ) -> None:
        if time not in get_args(TimeGroups):
            raise ValueError(f"need time among {', '.join(get_args(TimeGroups))}, got {time!r}")
        super().__init__(
            DividedBlock, img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio,
            qkv_bias, act_layer, norm_layer, num_frames=num_frames, tubelet_size=tubelet_size,
            mean=mean, std=std, backend=backend,
        )  # fmt: skip
        self.time = time

    def forward(self, video: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Encode the visible patches of a clip.

        Args:
            video: [B, C, T, H, W], or images [B, C, H, W]; uint8 or floating point, any strides; T
                up to `num_frames`.
            ids_keep: visible patches in (time, row, column) order, [B, K] int64; None: all.

        Returns:
            CLS and the tokens of the visible patches, after the final norm, [B, 1 + K, C].

        Raises:
            ValueError: the clip or the ids have another shape.
            RuntimeError: with time "slot", frames differ in their number of visible patches (on
                CUDA as a device-side assertion).
        """
        x, T = self.embed(video, ids_keep)
        shape = x.shape
        space, time = self._groups(x.shape[0], T, ids_keep, x.device)
        x = x.flatten(0, 1)
        for block in self.blocks:
            x = block(x, space, time)
        return self.norm(x).view(shape)

    def _groups(
        self, B: int, T: int, ids_keep: Tensor | None, device: torch.device
    ) -> tuple[Groups, Groups]:
        """The groups of spatial and temporal attention, built once for all layers."""
        rows, columns = self.grid
        patches, grid = rows * columns, (T, rows, columns)
        if ids_keep is None:
            ids = torch.arange(T * patches, device=device).expand(B, -1)
        else:
            ids = ids_keep
        K = ids.shape[1]
        even = ids_keep is None or self.time == "slot"
        if even:
            frame_ids(B, T, patches, ids_keep, device)  # checks that it is so
        in_frame = K // T if even else patches
        space = Groups.spatial(ids, grid, longest=in_frame).with_global()
        if self.time == "joint":
            return space, Groups.equal(B, 1 + K, device=device)
        if self.time == "position":
            return space, Groups.temporal(ids, grid).with_global()
        slots = torch.arange(K, device=device).expand(B, K)
        return space, Groups.temporal(slots, (T, 1, max(in_frame, 1))).with_global()

    def load_pretrained(
        self,
        state_dict: Mapping[str, Tensor],
        *,
        frames: Literal["zeros", "interpolate"] = "zeros",
    ) -> list[str]:
        """Load the weights of a Frozen-in-Time video encoder, or of an image model.

        From an image model (see `ViT.load_pretrained` for the names) only spatial attention is
        loaded. Temporal attention keeps its weights: in a new model it adds nothing. Position
        embeddings are resampled (bicubic) to this model's grid.

        Args:
            state_dict: the weights by name.
            frames: temporal embeddings if the weights have another number of frames: "zeros" for
                missing frames, and the first ones of too many; or "interpolate" (linear).

        Returns:
            The names of weights that were skipped because they are outside the encoder.

        Raises:
            ValueError: other weights are missing, unexpected, or of another shape (all are named).
        """
        if frames not in ("zeros", "interpolate"):
            raise ValueError(f"need frames 'zeros' or 'interpolate', got {frames!r}")
        check_state(state_dict)
        state, skipped = encoder_weights(state_dict, self)
        if "temporal_embed" in state:
            state["temporal_embed"] = _other_frames(
                state["temporal_embed"], self.num_frames, frames
            )
        load_or_explain(self, state, may_miss=self.of_time(state))
        return skipped


def _other_frames(embed: Tensor, frames: int, how: str) -> Tensor:
    """Temporal embeddings, [1, T, C], for another number of frames."""
    if how == "interpolate" and embed.shape[1] != frames:
        resized = F.interpolate(embed.float().mT, frames, mode="linear", align_corners=True)
        return resized.mT.to(embed.dtype)
    return F.pad(embed[:, :frames], (0, 0, 0, max(frames - embed.shape[1], 0)))
