"""A vision transformer for the frames of a clip: visible patches in, the tokens that stay out."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vidl.kernels.select_tokens.op import Fuse, Order, Rounding
from vidl.nn.block import LAYER_NORM, Block, When
from vidl.nn.checkpoints import load_or_explain, resample_position, timm_names
from vidl.nn.patch_embed import MaskedPatchEmbed

# Parts of published checkpoints that are no part of an encoder: classifiers, MAE's decoder, the
# projection and the tables of numbers in CLIP.
NO_ENCODER = (
    *("head.", "head_dist.", "classifier.", "pooler.", "decoder", "mask_token", "proj"),
    *("embeddings.mask_token", "embeddings.position_ids"),
)


@dataclass(frozen=True, eq=False)
class Frames:
    """What the encoder found in each frame, and where.

    Attributes:
        tokens: CLS and the tokens that stayed, after the final norm, [B * T, 1 + n, C]; frame t of
            clip b is row b T + t.
        ids: which patch of its frame each of the n tokens after CLS is, [B * T, n] int64; -1 for a
            fused one.
        kept: for each layer that pruned, `ids` after it.
    """

    tokens: Tensor
    ids: Tensor
    kept: dict[int, Tensor]


class ViT(nn.Module):
    """Vision transformer that sees each frame of a clip by itself, and of it only visible patches.

    Masked patches are never embedded. Layers in `prune_layers` drop the tokens to which CLS attends
    least, frame by frame. Parameters are named as those of timm's `VisionTransformer`. Sources:
    ViT, arXiv 2010.11929, 3.1; MAE, arXiv 2111.06377, 3; pruning: EViT, arXiv 2202.07800, 3.2.

    Args:
        img_size: of a frame, one number or (height, width).
        patch_size: pixels, one number or (height, width).
        in_chans: channels of the clip.
        tubelet_size: frames in a patch, as in `MaskedPatchEmbed`; below, what such patches span
            counts as one frame.
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias, init_values: as timm has them.
        act_layer, norm_layer: as timm has them.
        pre_norm: a norm before the first block, and no bias in the patch embedding, as in CLIP.
        prune_layers: which layers drop tokens, counted from 0.
        keep_rate: of each of these, in (0, 1].
        when, order, fuse, rounding: as in `Block`.
        mean, std: normalisation of uint8 clips, as in `MaskedPatchEmbed`.
        backend: of all ops.

    Raises:
        ValueError: options do not fit together, as patches that do not divide a frame, or a layer
            to prune beyond the depth.
    """

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
        init_values: float | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = LAYER_NORM,
        pre_norm: bool = False,
        *,
        tubelet_size: int | None = None,
        prune_layers: Sequence[int] = (),
        keep_rate: float = 0.7,
        when: When = "before_mlp",
        order: Order | None = None,
        fuse: Fuse | None = None,
        rounding: Rounding = "ceil",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.grid = grid_of(img_size, patch_size)
        if wrong := sorted(layer for layer in prune_layers if not 0 <= layer < depth):
            raise ValueError(f"need prune_layers in [0, {depth}), the depth, got {wrong}")
        self.embed_dim, self.prune_layers = embed_dim, tuple(sorted(set(prune_layers)))
        self.patch_embed = MaskedPatchEmbed(
            patch_size, in_chans, embed_dim, tubelet_size, not pre_norm,
            mean=mean, std=std, backend=backend,
        )  # fmt: skip
        patches = self.grid[0] * self.grid[1]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, embed_dim))
        self.norm_pre = norm_layer(embed_dim) if pre_norm else nn.Identity()
        block: dict[str, Any] = dict(mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, backend=backend)
        block |= dict(init_values=init_values, act_layer=act_layer, norm_layer=norm_layer)
        pruning: dict[str, Any] = dict(keep_rate=keep_rate, when=when, order=order)
        pruning |= dict(fuse=fuse, rounding=rounding)
        Block(1, 1, **pruning)  # wrong options are an error though no layer prunes
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, **block, **(pruning if i in self.prune_layers else {}))
            for i in range(depth)
        )
        self.norm = norm_layer(embed_dim)
        initialise(self)

    def forward(
        self, video: Tensor, ids_keep: Tensor | None = None, time: Tensor | None = None
    ) -> Frames:
        """Encode the visible patches of each frame.

        Args:
            video: [B, C, T, H, W], or images [B, C, H, W]; uint8 or floating point, any strides.
            ids_keep: visible patches of the clip in (time, row, column) order, [B, T k] int64,
                those of frame t in the columns t k to (t + 1) k - 1; None: all.
            time: added to the patches of each frame, [T, C]; None: nothing.

        Returns:
            `Frames`.

        Raises:
            ValueError: the clip, the ids or the time have another shape.
            RuntimeError: the frames do not have equally many visible patches (on CUDA as a
                device-side assertion).
        """
        if video.ndim == 4:
            video = video.unsqueeze(2)
        T, patches = frames_of(video, ids_keep, self.grid, self.patch_embed), self.pos_embed[0, 1:]
        if time is not None and time.shape != (T, self.embed_dim):
            raise ValueError(f"need time [{T}, {self.embed_dim}], got {tuple(time.shape)}")
        if time is None and T > 1:
            time = patches.new_zeros(T, self.embed_dim)
        position = patches if time is None else (time, patches)
        x = self.patch_embed(video, ids_keep, position=position)  # [B, T k, C]
        ids = frame_ids(video.shape[0], T, patches.shape[0], ids_keep, x.device)  # [B T, k]
        x = x.reshape(*ids.shape, self.embed_dim)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        x = self.norm_pre(torch.cat([cls, x], 1))
        kept = {}
        for layer, block in enumerate(self.blocks):
            x, chosen = block(x, return_ids=True)
            if chosen is not None:
                ids = ids.gather(1, chosen)
                if x.shape[1] > 1 + ids.shape[1]:  # the fused token is no patch
                    ids = torch.nn.functional.pad(ids, (0, 1), value=-1)
                kept[layer] = ids
        return Frames(self.norm(x), ids, kept)

    def load_pretrained(self, state_dict: Mapping[str, Tensor]) -> list[str]:
        """Load the weights of a ViT, DeiT, MAE or CLIP visual tower.

        Under the names of timm (MAE's own are the same), OpenAI's CLIP, open_clip, or Hugging
        Face's ViT, ViTMAE and CLIP. Positions are resampled (bicubic) to this model's grid.

        Returns:
            The names of weights that were left out because they are no part of an encoder:
            classifiers, decoders, projections, a text tower.

        Raises:
            ValueError: names every other key that is missing, unexpected, or of another shape.
        """
        state, left = encoder_weights(state_dict, self)
        load_or_explain(self, state)
        return left


def grid_of(img_size: int | tuple[int, int], patch_size: int | tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches in a frame."""
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    patch = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    if any(n < 1 for n in (*size, *patch)) or size[0] % patch[0] or size[1] % patch[1]:
        raise ValueError(f"need img_size as a multiple of patch_size, got {img_size}, {patch_size}")
    return size[0] // patch[0], size[1] // patch[1]


def frames_of(
    video: Tensor, ids_keep: Tensor | None, grid: tuple[int, int], embed: MaskedPatchEmbed
) -> int:
    """T, of frames or tubelets, after a look at the shapes of a clip and its visible patches."""
    *tubelet, h, w = embed.proj.kernel_size
    size = (grid[0] * h, grid[1] * w)
    if video.ndim != 5 or video.shape[3:] != size:
        raise ValueError(
            f"need video [B, C, T, {size[0]}, {size[1]}], got {tuple(video.shape)}; img_size was "
            "chosen when the model was made, and load_pretrained resamples its positions"
        )
    B, t = video.shape[0], math.prod(tubelet)
    if video.shape[2] % t:
        raise ValueError(f"need frames in whole tubelets of {t}, got {video.shape[2]} frames")
    if ids_keep is not None and (ids_keep.ndim != 2 or ids_keep.shape[0] != B):
        raise ValueError(f"need ids_keep [{B}, K], got {tuple(ids_keep.shape)}")
    return video.shape[2] // t


def frame_ids(
    B: int, T: int, patches: int, ids_keep: Tensor | None, device: torch.device
) -> Tensor:
    """Which patches of its frame each frame shows, [B * T, k]."""
    if ids_keep is None:
        return torch.arange(patches, device=device).expand(B * T, patches)
    if ids_keep.shape[1] % T:
        raise ValueError(
            f"need as many visible patches in each of {T} frames, got {ids_keep.shape[1]} in all"
        )
    ids = ids_keep.reshape(B, T, ids_keep.shape[1] // T)
    frame = torch.arange(T, device=device)[:, None]
    torch._assert_async(
        (ids // patches == frame).all(),
        "need as many visible patches in each frame, one frame after another: a mask of kind "
        "'frame' or 'tube'",
    )
    return (ids - frame * patches).flatten(0, 1)


def encoder_weights(
    state_dict: Mapping[str, Tensor], encoder: Any
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of an encoder like this one under timm's names; and the names of what is none.

    Patches of images become tubelets as ViViT inflates them: each of t frames has the same weights,
    over t. Source: ViViT, arXiv 2103.15691, 3.4.
    """
    state, left = timm_names(state_dict)
    for name in [n for n in state if n.startswith(NO_ENCODER)]:
        left.append(name)
        del state[name]
    if "pos_embed" in state:
        state["pos_embed"] = resample_position(state["pos_embed"], encoder.grid)
    name, tubelet = "patch_embed.proj.weight", encoder.patch_embed.proj.kernel_size[:-2]
    if tubelet and name in state and state[name].ndim == 4:
        state[name] = state[name].unsqueeze(2).repeat(1, 1, *tubelet, 1, 1) / tubelet[0]
    return state, left


def initialise(model: nn.Module) -> None:
    """As MAE initialises a ViT: Xavier's uniform, which narrow models need, and zero biases.

    timm's normal of 0.02 is that of ViT-B, and does not grow where layers have fewer inputs.
    Source: MAE, arXiv 2111.06377, A.1.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name == "pos_embed":
            nn.init.trunc_normal_(parameter, std=0.02)
        elif name == "cls_token":
            nn.init.normal_(parameter, std=1e-6)
