"""A vision transformer on all visible tubelets of a clip, and on words beside them."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vidl.kernels.arguments import (
    check_count,
    check_flag,
    check_floating,
    check_shape,
    check_tensors,
)
from vidl.kernels.groups import Groups
from vidl.kernels.masked_patch_embed.op import Position
from vidl.nn.arguments import check_groups, check_layer, check_state
from vidl.nn.block import LAYER_NORM, Block
from vidl.nn.checkpoints import load_or_explain, timm_names
from vidl.nn.decoder import sincos_1d, sincos_2d
from vidl.nn.patch_embed import MaskedPatchEmbed
from vidl.nn.vit import frames_of, grid_of, initialise


class JointViT(nn.Module):
    """The encoder of VideoMAE and of MAE: every token attends to all tokens of its clip.

    Positions are fixed sines. VideoMAE's are of the index of the tubelet, and there is no CLS
    token; MAE, with `position="sincos_2d"` and `class_token=True`, has sines of row and column.
    `embed` and `forward` are separate, so that a clip is embedded once for several passes, and
    words can stand beside its tokens. Parameters are named as in timm's `VisionTransformer`.
    Sources: MAE, arXiv 2111.06377, 3; VideoMAE, arXiv 2203.12602, 3; SimVTP, arXiv 2212.03490, 3.1.

    Args:
        img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio, qkv_bias: as in
            `ViT`.
        act_layer, norm_layer: as in `ViT`.
        num_frames: the largest number of tubelets through time; clips may have fewer.
        tubelet_size: as in `ViT`.
        position: "sincos_1d" or "sincos_2d"; the latter is the same in all frames.
        class_token: put a learned CLS token, without a position, in front of the patches.
        mean, std: normalisation of uint8 clips, as in `MaskedPatchEmbed`.
        backend: of all ops.

    Raises:
        ValueError: options do not fit together.
    """

    position: Tensor
    cls_token: nn.Parameter | None

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
        num_frames: int = 8,
        tubelet_size: int | None = 2,
        position: Literal["sincos_1d", "sincos_2d"] = "sincos_1d",
        class_token: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.grid = grid_of(img_size, patch_size)
        check_count("depth", depth)
        check_count("num_frames", num_frames, 1)
        layer: Any = (num_heads, mlp_ratio, qkv_bias, act_layer, norm_layer, backend)
        check_layer(embed_dim, *layer, width="embed_dim")
        check_flag("class_token", class_token)
        if position not in ("sincos_1d", "sincos_2d"):
            raise ValueError(f"need position 'sincos_1d' or 'sincos_2d', got {position!r}")
        self.by_frame = position == "sincos_2d"
        if embed_dim % (least := 4 if self.by_frame else 2):
            raise ValueError(f"need embed_dim as a multiple of {least}, got {embed_dim}")
        self.embed_dim, self.num_frames = embed_dim, num_frames
        self.patch_embed = MaskedPatchEmbed(
            patch_size, in_chans, embed_dim, tubelet_size, mean=mean, std=std, backend=backend
        )
        if self.by_frame:
            table = sincos_2d(*self.grid, embed_dim)
        else:
            table = sincos_1d(num_frames * math.prod(self.grid), embed_dim)
        self.register_buffer("position", table.float(), persistent=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        block: dict[str, Any] = dict(mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, backend=backend)
        block |= dict(act_layer=act_layer, norm_layer=norm_layer)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, **block) for _ in range(depth))
        self.norm = norm_layer(embed_dim)
        initialise(self)

    def embed(
        self, video: Tensor, ids_keep: Tensor | None = None, time: Tensor | None = None
    ) -> Tensor:
        """Embed the visible tubelets of clips.

        Args:
            video: [B, C, T, H, W], uint8 or floating point, any strides.
            ids_keep: visible tubelets in (time, row, column) order, [B, K] int64; None: all.
            time: embedding added to the tubelets of each frame, [T, C], with the position
                "sincos_2d"; None: nothing.

        Returns:
            [B, K, C]; with a class token [B, 1 + K, C].

        Raises:
            ValueError: the clip, the ids or the time embedding do not have these shapes.
        """
        optional = ("ids_keep", "time")
        check_tensors(optional, video=video, ids_keep=ids_keep, time=time, model=self.norm.weight)
        T = frames_of(video, ids_keep, self.grid, self.patch_embed)
        if self.num_frames < T:
            raise ValueError(f"need at most {self.num_frames} tubelets through time, got {T}")
        x = self.patch_embed(video, ids_keep, position=self._position(T, time))
        if self.cls_token is None:
            return x
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)

    def _position(self, T: int, time: Tensor | None) -> Position:
        """The positions of all tubelets of T frames, as `masked_patch_embed` takes them."""
        if not self.by_frame:
            if time is not None:
                raise ValueError("need time=None with position='sincos_1d', which tells the frame")
            return self.position[: T * math.prod(self.grid)]
        if time is not None:
            check_floating(time=time)
            check_shape("time", time, T, self.embed_dim)
        elif T > 1:
            time = self.position.new_zeros(T, self.embed_dim)
        return self.position if time is None else (time, self.position)

    def forward(self, x: Tensor, groups: Groups | None = None) -> Tensor:
        """Encode embedded tokens.

        Args:
            x: [B, N, C]; or packed rows [total, C] with `groups`.
            groups: which rows of a packed x attend to one another.

        Returns:
            The tokens after the final norm, of the shape of x.

        Raises:
            ValueError: the shapes do not fit.
        """
        check_tensors(x=x, model=self.norm.weight)
        check_floating(x=x)
        if groups is None:
            check_shape("x", x, "B", "N", self.embed_dim)
        else:
            check_shape("x", x, "total", self.embed_dim)
            check_groups("groups", groups, x)
        for block in self.blocks:
            x = block(x) if groups is None else block(x, groups)[0]
        return self.norm(x)

    def load_pretrained(self, state_dict: Mapping[str, Tensor]) -> list[str]:
        """Load the encoder of VideoMAE or MAE, under the names of Hugging Face or of the authors.

        Returns:
            The names of weights that were skipped: decoder, classifier, positions.

        Raises:
            ValueError: other weights are missing, unexpected, or of another shape (all are named).
        """
        check_state(state_dict)
        state, skipped = _timm_names(state_dict)
        own = set(self.state_dict())
        outside = [n for n in state if n not in own and re.match(NOT_ENCODER, n)]
        skipped += outside
        load_or_explain(self, {name: x for name, x in state.items() if name not in outside})
        return skipped


# Parts of the checkpoints of MAE and VideoMAE outside the encoder.
NOT_ENCODER = r"(decoder|encoder_to_decoder|mask_token|head\.|classifier\.|fc_norm\.|pos_embed)"


def _timm_names(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The weights under timm's names, with q_bias and v_bias as one bias, and those left out."""
    renamed = {}
    for name, value in state_dict.items():
        name = name.removeprefix("videomae.").removeprefix("module.")
        name = re.sub(r"^encoder\.(blocks|patch_embed|norm)\b", r"\1", name)
        name = re.sub(r"^encoder\.layer\.(\d+)\.attention\.attention\.([qv])_bias$",
                      r"blocks.\1.attn.\2_bias", name)  # fmt: skip
        renamed[name] = value
    state, skipped = timm_names(renamed)
    for name in [n for n in state if re.search(r"\.attn\.q[._]bias$", n)]:
        at, kind = name.rpartition("q")[0], name[-5:]
        q, v = state.pop(name), state.pop(f"{at}v{kind}")
        # A bias of the keys changes no attention weight; VideoMAE has none.
        state[f"{at}qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    return state, skipped
