"""TimeSformer: attention over time, then within each frame, on visible patches."""

import re
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidl.kernels.arguments import (
    check_count,
    check_flag,
    check_floating,
    check_shape,
    check_tensors,
    require,
)
from vidl.kernels.groups import Groups
from vidl.nn.arguments import check_groups, check_layer, check_state
from vidl.nn.block import LAYER_NORM, Attention, Mlp, attend
from vidl.nn.checkpoints import load_or_explain
from vidl.nn.frames_in_time import zero_of
from vidl.nn.patch_embed import MaskedPatchEmbed
from vidl.nn.space_time import SpaceTimeEncoder
from vidl.nn.vit import encoder_weights, frame_ids, inflated


class TimeSformerBlock(nn.Module):
    """Attention over time, attention within each frame, and MLP, in the order of TimeSformer.

        t = x + temporal_fc(time(temporal_norm1(x)))                        without CLS
        y = t + space(norm1(t)),  CLS: x + mean over frames of space(norm1([x, t of the frame]))
        out = y + mlp(norm2(y))

    In spatial attention every frame has a copy of CLS, whose outputs are averaged. Parameters are
    named as in the authors' code, those of the spatial part as in timm. `temporal_fc` begins at
    zero, as in ALPRO, so that a new block is a ViT block. Sources: TimeSformer, arXiv 2102.05095,
    3; ALPRO, arXiv 2112.09583, 3.1.

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
        self.dim, self.backend = dim, backend
        self.temporal_norm1 = norm_layer(dim)
        self.temporal_attn = Attention(dim, num_heads, qkv_bias)
        self.temporal_fc = nn.Linear(dim, dim)
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer)
        self.reset_time()

    def reset_time(self) -> None:
        """Set `temporal_fc` to zero, so that attention over time adds nothing at first."""
        for parameter in self.temporal_fc.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, frames: int, space: Groups, time: Groups | None) -> Tensor:
        """Transform the tokens of clips.

        Args:
            x: CLS and the patches of each clip, frame by frame, [B, 1 + T K, C].
            frames: T.
            space: groups of the B T (1 + K) rows of CLS and patches of each frame.
            time: groups of the B T K patches; None: without attention over time.

        Returns:
            [B, 1 + T K, C].
        """
        check_tensors(x=x)
        check_floating(x=x)
        check_shape("x", x, "B", "N", self.dim)
        check_count("frames", frames, 1)
        if (x.shape[1] - 1) % frames:
            raise ValueError(f"need x as CLS and patches of {frames} frames, got {tuple(x.shape)}")
        cls, patches = x[:, :1], x[:, 1:]
        if time is None:
            parts = (self.temporal_norm1, self.temporal_attn, self.temporal_fc)
            patches = patches + zero_of(p for part in parts for p in part.parameters())
        else:
            rows = patches.flatten(0, 1)
            check_groups("time", time, rows)
            moved, _ = attend(
                self.temporal_attn, self.temporal_norm1(rows), time, None, self.backend
            )
            patches = patches + self.temporal_fc(moved).view_as(patches)
        of_frames = patches.unflatten(1, (frames, -1))
        y = torch.cat([cls[:, None].expand(-1, frames, -1, -1), of_frames], 2)  # [B, T, 1 + K, C]
        rows = y.flatten(0, 2)
        check_groups("space", space, rows)
        out, _ = attend(self.attn, self.norm1(rows), space, None, self.backend)
        out = out.view_as(y)
        x = torch.cat([cls + out[:, :, :1].mean(1), patches + out[:, :, 1:].flatten(1, 2)], 1)
        return x + self.mlp(self.norm2(x))


class TimeSformer(SpaceTimeEncoder):
    """Divided space-time transformer whose CLS is in every frame, on the visible patches of clips.

    A patch attends to the patches at its place in the other frames, then to its frame and CLS; see
    `TimeSformerBlock`. All frames of a clip must show the same places, as with a tube mask.
    Parameters are named as in the authors' code, and those of the spatial part as in timm. Sources:
    TimeSformer, arXiv 2102.05095; ALPRO, arXiv 2112.09583, 3.1; `stills`: OmniVL, arXiv 2209.07526.

    Args:
        img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio, qkv_bias: as in
            `ViT`.
        act_layer, norm_layer: as in `ViT`.
        num_frames: the largest number of frames; clips may have fewer.
        tubelet_size: as in `ViT`.
        stills: whether images and clips of one frame have a patch embedding of their own,
            `image_embed`, and skip attention over time. With `num_frames=1` there is nothing else
            to train: the other patch embedding and attention over time are frozen.
        mean, std: normalisation of uint8 clips, as in `MaskedPatchEmbed`.
        backend: of all ops.

    Raises:
        ValueError: options do not fit together.
    """

    TIME = ("temporal_", "time_embed")
    time_embed: Tensor

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
        stills: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            TimeSformerBlock, img_size, patch_size, in_chans, embed_dim, depth, num_heads,
            mlp_ratio, qkv_bias, act_layer, norm_layer, num_frames=num_frames,
            tubelet_size=tubelet_size, mean=mean, std=std, backend=backend,
        )  # fmt: skip
        check_flag("stills", stills)
        self.image_embed = None
        if stills:
            self.image_embed = MaskedPatchEmbed(
                patch_size, in_chans, embed_dim, mean=mean, std=std, backend=backend
            )
        if stills and num_frames == 1:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(not _of_clips(name))

    def forward(self, video: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Encode the visible patches of clips.

        Args:
            video: [B, C, T, H, W], or images [B, C, H, W]; uint8 or floating point, any strides; T
                up to `num_frames`.
            ids_keep: visible patches in (time, row, column) order, [B, K] int64, the same places in
                every frame; None: all.

        Returns:
            CLS and the tokens of the visible patches, frame by frame, after the final norm, [B, 1 +
            K, C].

        Raises:
            ValueError: the clip or the ids have another shape.
            RuntimeError: frames show different places (on CUDA as a device-side assertion).
        """
        x, T = self.embed(video, ids_keep)
        B = x.shape[0]
        ids = frame_ids(B, T, self.grid[0] * self.grid[1], ids_keep, x.device)
        if ids_keep is not None:
            of_frames = ids.unflatten(0, (B, T))
            require(
                (of_frames == of_frames[:, :1]).all(),
                "need ids_keep with the same places in every frame: a mask of kind 'tube'",
            )
        still = self.embedding(video) is self.image_embed
        if self.image_embed is not None:
            unused = self.patch_embed if still else self.image_embed
            x = x + zero_of([*unused.parameters(), self.time_embed])
        space = Groups.equal(B * T, 1 + ids.shape[1], device=x.device)
        time = None if still else _through_time(B, T, ids.shape[1], x.device)
        for block in self.blocks:
            x = block(x, T, space, time)
        return self.norm(x)

    def embedding(self, video: Tensor) -> MaskedPatchEmbed:
        """See `SpaceTimeEncoder.embedding`."""
        still = video.ndim == 4 or video.shape[2:3] == (1,)
        return self.image_embed if self.image_embed is not None and still else self.patch_embed

    def load_pretrained(self, state_dict: Mapping[str, Tensor]) -> list[str]:
        """Load the weights of a TimeSformer, of the authors or of Hugging Face, or of an image ViT.

        From an image model (see `ViT.load_pretrained` for the names) only spatial attention is
        loaded. Attention over time keeps its weights: in a new model it adds nothing. Position
        embeddings are resampled (bicubic) to this model's grid, and embeddings of time to its
        number of frames (nearest), as the authors do.

        Args:
            state_dict: the weights by name.

        Returns:
            The names of weights that were skipped because they are outside the encoder.

        Raises:
            ValueError: other weights are missing, unexpected, or of another shape (all are named).
        """
        check_state(state_dict)
        state, skipped = encoder_weights({_name(n): x for n, x in state_dict.items()}, self)
        for part in ("weight", "bias"):
            clips, images = f"patch_embed.proj.{part}", f"image_embed.proj.{part}"
            if self.image_embed is not None and clips in state:
                state.setdefault(images, _of_frames(state[clips]))
        load_or_explain(self, self.resized(state), may_miss=self.of_time(state))
        return skipped

    def resized(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a TimeSformer with another number of frames, for this one.

        Embeddings of time are resampled (nearest). With `stills`, weights of `num_frames=1` saw
        images only: the patch embedding of clips becomes that of images, inflated as in ViViT.
        """
        check_state(state_dict)
        state = dict(state_dict)
        if "time_embed" not in state or state["time_embed"].shape[1] == self.num_frames:
            return state
        time = state["time_embed"]
        resized = F.interpolate(time.float().mT, self.num_frames, mode="nearest").mT
        state["time_embed"] = resized.to(time.dtype)
        if time.shape[1] == 1 and "image_embed.proj.weight" in state:
            tubelet = self.patch_embed.proj.kernel_size[:-2]
            state["patch_embed.proj.weight"] = inflated(state["image_embed.proj.weight"], tubelet)
            state["patch_embed.proj.bias"] = state["image_embed.proj.bias"]
        return state


def _of_clips(name: str) -> bool:
    """Whether a parameter is not used for images, if there are `stills`."""
    return name.startswith("patch_embed.") or any(part in name for part in TimeSformer.TIME)


def _of_frames(parameter: Tensor) -> Tensor:
    """A parameter of a patch embedding for one frame in place of a tubelet of equal frames."""
    return parameter.sum(2) if parameter.ndim == 5 else parameter


def _through_time(B: int, T: int, n: int, device: torch.device) -> Groups:
    """Groups of the n rows of each frame of B clips: the rows at one place, in all frames."""
    rows = torch.arange(B * T * n, device=device, dtype=torch.int32)
    rows = rows.view(B, T, n).transpose(1, 2).flatten()
    offsets = torch.arange(B * n + 1, device=device, dtype=torch.int32) * T
    ends = torch.arange(B + 1, device=device, dtype=torch.int32) * (T * n)
    sample = torch.arange(B, device=device).repeat_interleave(n)
    return Groups(
        offsets, offsets, rows, rows, T, T, B * T * n, B * T * n, uniform=True, row_offsets=ends,
        max_rows=T * n, group_sample=sample, checked=True,
    )  # fmt: skip


_LAYER = r"^encoder\.layer\.(\d+)\."
_RENAMED = {
    r"^(timesformer|model|module)\.": "",
    r"^embeddings\.time_embeddings$": "time_embed",
    _LAYER + r"temporal_layernorm\.": r"blocks.\1.temporal_norm1.",
    _LAYER + r"temporal_attention\.attention\.qkv\.": r"blocks.\1.temporal_attn.qkv.",
    _LAYER + r"temporal_attention\.output\.dense\.": r"blocks.\1.temporal_attn.proj.",
    _LAYER + r"temporal_dense\.": r"blocks.\1.temporal_fc.",
    _LAYER + r"attention\.attention\.qkv\.": r"blocks.\1.attn.qkv.",
}


def _name(name: str) -> str:
    """The authors' name of a weight of Hugging Face's `TimesformerModel`."""
    for pattern, ours in _RENAMED.items():
        name = re.sub(pattern, ours, name)
    return name
