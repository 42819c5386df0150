"""A vision transformer on the visible patches of each frame, with token pruning."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vidl.kernels.arguments import (
    check_count,
    check_dtype,
    check_flag,
    check_floating,
    check_shape,
    check_tensors,
    finite,
    pair,
)
from vidl.nn.arguments import check_layer, check_state
from vidl.nn.block import LAYER_NORM, Block
from vidl.nn.checkpoints import load_or_explain, resample_position, timm_names
from vidl.nn.patch_embed import MaskedPatchEmbed
from vidl.nn.pruning import Pruning, check_prune_layers

# Parts of published checkpoints outside the encoder: classifiers, MAE's decoder, CLIP's projection,
# and the index buffers of Hugging Face.
NOT_ENCODER = (
    *("head.", "head_dist.", "classifier.", "pooler.", "decoder", "mask_token", "proj"),
    *("embeddings.mask_token", "embeddings.position_ids"),
)


@dataclass(frozen=True, eq=False)
class Frames:
    """The tokens of each frame after the encoder, and their patches.

    An encoder of whole clips, such as `Beit(joint=True)`, has one row for each clip.

    Attributes:
        tokens: CLS and the K tokens that stayed, after the final norm, [B T, 1 + K, C]; frame t of
            clip b is row b T + t. [B, 1 + K, C] for whole clips.
        ids: index of each of the K tokens' patch in its frame, [B T, K] int64, or in its clip, [B,
            K]; -1 for a fused token.
        kept: `ids` after each layer that pruned, by the layer's index.
    """

    tokens: Tensor
    ids: Tensor
    kept: dict[int, Tensor]


class ViT(nn.Module):
    """Vision transformer that encodes each frame of a clip separately, from its visible patches.

    Masked patches are never embedded. Layers in `prune_layers` prune the tokens of each frame.
    Parameters are named as in timm's `VisionTransformer`. Sources: ViT, arXiv 2010.11929, 3.1; MAE,
    arXiv 2111.06377, 3; pruning: EViT, arXiv 2202.07800, 3.2.

    Args:
        img_size: of a frame, one number or (height, width).
        patch_size: of a patch in pixels, one number or (height, width).
        in_chans: channels of the clip.
        tubelet_size: frames in a patch, as in `MaskedPatchEmbed`; if given, "frame" below means one
            such tubelet slice.
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias, init_values: as in timm.
        act_layer, norm_layer: as in timm.
        pre_norm: add a norm before the first block, and no bias to the patch embedding, as in CLIP.
        prune_layers: the layers that prune their tokens, counted from 0.
        pruning: how these layers prune; required with `prune_layers`.
        mean, std: normalisation of uint8 clips, as in `MaskedPatchEmbed`.
        backend: of all ops.

    Raises:
        ValueError: options do not fit together: for example, patches do not divide a frame, or
            `prune_layers` are beyond the depth or come without `pruning`.
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
        pruning: Pruning | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.grid = grid_of(img_size, patch_size)
        check_count("depth", depth)
        layer: Any = (num_heads, mlp_ratio, qkv_bias, act_layer, norm_layer, backend)
        check_layer(embed_dim, *layer, width="embed_dim")
        check_flag("pre_norm", pre_norm)
        if init_values is not None:
            finite("init_values", init_values)
        self.embed_dim = embed_dim
        self.prune_layers = check_prune_layers(prune_layers, depth, pruning)
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
        plans = [pruning if layer in self.prune_layers else None for layer in range(depth)]
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, **block, pruning=plan) for plan in plans
        )
        self.norm = norm_layer(embed_dim)
        initialise(self)

    def forward(
        self, video: Tensor, ids_keep: Tensor | None = None, time: Tensor | None = None
    ) -> Frames:
        """Encode the visible patches of each frame.

        Args:
            video: [B, C, T, H, W], or images [B, C, H, W]; uint8 or floating point, any strides.
            ids_keep: visible patches of the clip in (time, row, column) order, [B, T K] int64,
                those of frame t in columns t K to (t + 1) K - 1; None: all.
            time: embedding added to the patches of each frame, [T, C]; None: nothing.

        Returns:
            `Frames`.

        Raises:
            ValueError: the clip, the ids or the time embedding do not have these shapes.
            RuntimeError: frames differ in their number of visible patches (on CUDA as a device-side
                assertion).
        """
        optional = ("ids_keep", "time")
        check_tensors(optional, video=video, ids_keep=ids_keep, time=time, model=self.cls_token)
        if video.ndim == 4:
            video = video.unsqueeze(2)
        T, patches = frames_of(video, ids_keep, self.grid, self.patch_embed), self.pos_embed[0, 1:]
        if time is not None:
            check_floating(time=time)
            check_shape("time", time, T, self.embed_dim)
        if time is None and T > 1:
            time = patches.new_zeros(T, self.embed_dim)
        position = patches if time is None else (time, patches)
        x = self.patch_embed(video, ids_keep, position=position)  # [B, T K, C]
        ids = frame_ids(video.shape[0], T, patches.shape[0], ids_keep, x.device)  # [B T, K]
        x = x.reshape(*ids.shape, self.embed_dim)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        x = self.norm_pre(torch.cat([cls, x], 1))
        kept = {}
        for layer, block in enumerate(self.blocks):
            x, chosen = block(x, return_ids=True)
            if chosen is not None:
                ids = ids.gather(1, chosen)
                if x.shape[1] > 1 + ids.shape[1]:  # a fused token has no patch
                    ids = torch.nn.functional.pad(ids, (0, 1), value=-1)
                kept[layer] = ids
        return Frames(self.norm(x), ids, kept)

    @property
    def keep_rate(self) -> float:
        """The share of tokens that each layer in `prune_layers` keeps."""
        if not self.prune_layers:
            return 1.0
        block: Any = self.blocks[self.prune_layers[0]]
        return block.pruning.keep_rate

    def set_keep_rate(self, keep_rate: float) -> None:
        """Set the keep rate of all layers in `prune_layers`; 1.0 keeps all tokens.

        Raises:
            ValueError: keep_rate is not in (0, 1].
        """
        for layer in self.prune_layers:
            block: Any = self.blocks[layer]
            block.set_keep_rate(keep_rate)

    def load_pretrained(self, state_dict: Mapping[str, Tensor]) -> list[str]:
        """Load the weights of a ViT, DeiT, MAE or CLIP visual tower.

        The weights may have the names of timm (MAE's are the same), OpenAI's CLIP, open_clip, or
        Hugging Face's ViT, ViTMAE and CLIP. Position embeddings are resampled (bicubic) to this
        model's grid.

        Returns:
            The names of weights that were skipped because they are outside the encoder:
            classifiers, decoders, projections, a text tower.

        Raises:
            ValueError: other weights are missing, unexpected, or of another shape (all are named).
        """
        check_state(state_dict)
        state, skipped = encoder_weights(state_dict, self)
        load_or_explain(self, state)
        return skipped


def grid_of(img_size: int | tuple[int, int], patch_size: int | tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches in a frame."""
    size, patch = pair("img_size", img_size), pair("patch_size", patch_size)
    if size[0] % patch[0] or size[1] % patch[1]:
        raise ValueError(f"need img_size as a multiple of patch_size, got {img_size}, {patch_size}")
    return size[0] // patch[0], size[1] // patch[1]


def frames_of(
    video: Tensor, ids_keep: Tensor | None, grid: tuple[int, int], embed: MaskedPatchEmbed
) -> int:
    """Check the shapes of a clip and its visible patches; return T, in frames or tubelets."""
    *tubelet, h, w = embed.proj.kernel_size
    size = (grid[0] * h, grid[1] * w)
    if video.ndim != 5 or video.shape[3:] != size:
        raise ValueError(
            f"need video [B, C, T, {size[0]}, {size[1]}], got {tuple(video.shape)}; img_size is an "
            "option of the model, and load_pretrained resamples position embeddings to it"
        )
    B, t = video.shape[0], math.prod(tubelet)
    if video.shape[2] % t:
        raise ValueError(f"need video in whole tubelets of {t} frames, got {video.shape[2]} frames")
    if ids_keep is not None:
        check_dtype("ids_keep", ids_keep, torch.int64)
        check_shape("ids_keep", ids_keep, B, "K")
    return video.shape[2] // t


def frame_ids(
    B: int, T: int, patches: int, ids_keep: Tensor | None, device: torch.device
) -> Tensor:
    """Indices of the visible patches within their frames, [B T, K]."""
    if ids_keep is None:
        return torch.arange(patches, device=device).expand(B * T, patches)
    if ids_keep.shape[1] % T:
        raise ValueError(
            f"need the same number of visible patches in each of {T} frames in ids_keep, got "
            f"{ids_keep.shape[1]} in total"
        )
    ids = ids_keep.reshape(B, T, ids_keep.shape[1] // T)
    frame = torch.arange(T, device=device)[:, None]
    torch._assert_async(
        (ids // patches == frame).all(),
        "need the same number of visible patches in each frame, frame after frame: a mask of kind "
        "'frame' or 'tube'",
    )
    return (ids - frame * patches).flatten(0, 1)


def encoder_weights(
    state_dict: Mapping[str, Tensor], encoder: Any
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of an encoder like this one under timm's names, and the names of all others.

    Patch embeddings of images are inflated to tubelets, see `inflated`.
    """
    state, skipped = timm_names(state_dict)
    for name in [n for n in state if n.startswith(NOT_ENCODER)]:
        skipped.append(name)
        del state[name]
    if "pos_embed" in state:
        state["pos_embed"] = resample_position(state["pos_embed"], encoder.grid)
    name, tubelet = "patch_embed.proj.weight", encoder.patch_embed.proj.kernel_size[:-2]
    if name in state and state[name].ndim == 4:
        state[name] = inflated(state[name], tubelet)
    return state, skipped


def inflated(weight: Tensor, tubelet: Sequence[int]) -> Tensor:
    """The patch embedding of images, [C, C_in, h, w], for tubelets of (t,) frames; (): unchanged.

    Each of the t frames gets the weights of images divided by t. Source: ViViT, arXiv 2103.15691,
    3.4.
    """
    if not tubelet:
        return weight
    return weight.unsqueeze(2).repeat(1, 1, *tubelet, 1, 1) / tubelet[0]


def initialise(model: nn.Module) -> None:
    """MAE's initialisation of a ViT: Xavier uniform weights and zero biases.

    timm's normal distribution with a deviation of 0.02 suits ViT-B; it does not grow for narrower
    layers. Source: MAE, arXiv 2111.06377, A.1.
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
