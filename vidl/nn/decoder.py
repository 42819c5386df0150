"""MAE's decoder: tokens of visible patches in, pixels of masked patches out."""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidl.kernels.arguments import (
    check_count,
    check_counts,
    check_dtype,
    check_flag,
    check_floating,
    check_tensors,
    pair,
)
from vidl.kernels.groups import Grid
from vidl.nn.arguments import check_layer
from vidl.nn.block import LAYER_NORM, Block
from vidl.nn.vit import initialise

DecoderPosition = Literal["sincos_2d", "sincos_1d", "learned"]


class MaeDecoder(nn.Module):
    """Predict the pixels of masked patches, as MAE and VideoMAE do.

    The tokens of visible patches are projected, and a learned mask token is added for each masked
    patch. All get the position embedding of their patch and pass through transformer blocks. Then
    the tokens of masked patches are normalised and projected to pixels. Attention depends on the
    order only through position embeddings, so tokens are not unshuffled, and visible patches are
    not predicted. Parameters are named as in MAE: the weights of its checkpoints that begin with
    "decoder" or "mask_token" load. Sources: MAE, arXiv 2111.06377, 3, and models_mae.py; VideoMAE,
    arXiv 2203.12602, 3.

    Args:
        grid: frames (or tubelets), rows and columns of patches that are reconstructed together; (1,
            14, 14) if frames are reconstructed separately.
        patch_size: of a patch in pixels, one number or (height, width).
        encoder_dim: channels of the encoder's tokens.
        in_chans: channels of the clip.
        tubelet_size: frames in a patch.
        dim, depth, num_heads, mlp_ratio, qkv_bias, norm_layer: of the decoder's blocks, as in
            `Block`; by default MAE's.
        position: position embeddings: "sincos_2d", fixed, for one frame (MAE); "sincos_1d", fixed,
            by the index of the patch (VideoMAE); or "learned".
        prefix: number of prefix tokens (CLS). MAE has 1, VideoMAE 0.
        embed_bias: whether the projection of the encoder's tokens has a bias; not in VideoMAE.
        backend: of all ops.

    Raises:
        ValueError: options do not fit together.
    """

    def __init__(
        self,
        grid: Grid,
        patch_size: int | tuple[int, int] = 16,
        encoder_dim: int = 768,
        in_chans: int = 3,
        tubelet_size: int = 1,
        dim: int = 512,
        depth: int = 8,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_layer: Callable[..., nn.Module] = LAYER_NORM,
        *,
        position: DecoderPosition = "sincos_2d",
        prefix: int = 1,
        embed_bias: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_layer(dim, num_heads, mlp_ratio, qkv_bias, nn.GELU, norm_layer, backend)
        check_counts("grid", grid, 3)
        for name, count, least in (
            ("encoder_dim", encoder_dim, 1), ("in_chans", in_chans, 1), ("depth", depth, 0),
            ("tubelet_size", tubelet_size, 1), ("prefix", prefix, 0),
        ):  # fmt: skip
            check_count(name, count, least)
        check_flag("embed_bias", embed_bias)
        patch = pair("patch_size", patch_size)
        self.grid, self.prefix, self.encoder_dim = grid, prefix, encoder_dim
        self.decoder_embed = nn.Linear(encoder_dim, dim, bias=embed_bias)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_pos_embed = _position(grid, dim, prefix, position)
        options: dict[str, Any] = dict(norm_layer=norm_layer, backend=backend)
        self.decoder_blocks = nn.ModuleList(
            Block(dim, num_heads, mlp_ratio, qkv_bias, **options) for _ in range(depth)
        )
        self.decoder_norm = norm_layer(dim)
        self.decoder_pred = nn.Linear(dim, tubelet_size * math.prod(patch) * in_chans)
        initialise(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, ids_keep: Tensor, ids_mask: Tensor) -> Tensor:
        """Predict the pixels of masked patches.

        Args:
            tokens: of the encoder, [B, prefix + K, encoder_dim].
            ids_keep: the patch of each of the K tokens, [B, K] int64; -1 for a fused token, which
                gets no position embedding. Patches in neither list (pruned ones) are ignored.
            ids_mask: the patches to predict, [B, M] int64.

        Returns:
            [B, M, t p p C_in], the pixels of a patch in the order (t, p, p, C_in), for
            `vidl.ops.masked_patch_loss`.

        Raises:
            ValueError: the shapes do not fit.
        """
        check_tensors(tokens=tokens, ids_keep=ids_keep, ids_mask=ids_mask, model=self.mask_token)
        check_floating(tokens=tokens)
        check_dtype("ids_keep", ids_keep, torch.int64)
        check_dtype("ids_mask", ids_mask, torch.int64)
        B, K = ids_keep.shape if ids_keep.ndim == 2 else (-1, -1)
        if (
            ids_mask.ndim != 2
            or ids_mask.shape[0] != B
            or tokens.shape != (B, self.prefix + K, self.encoder_dim)
        ):
            raise ValueError(
                f"need tokens [B, {self.prefix} + K, {self.encoder_dim}], ids_keep [B, K] and "
                f"ids_mask [B, M], got {tuple(tokens.shape)}, {tuple(ids_keep.shape)} and "
                f"{tuple(ids_mask.shape)}"
            )
        N, M = math.prod(self.grid), ids_mask.shape[1]
        first, patches = self.decoder_pos_embed[0].split([self.prefix, N])
        table = F.pad(patches, (0, 0, 0, 1))  # a row of zeros for fused tokens
        positions = F.embedding(torch.where(ids_keep < 0, N, ids_keep), table)
        positions = torch.cat([first.expand(B, -1, -1), positions], 1)
        masked = self.mask_token + F.embedding(ids_mask, patches)
        x = torch.cat([self.decoder_embed(tokens) + positions, masked], 1)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x[:, x.shape[1] - M :]))


def _position(grid: Grid, dim: int, prefix: int, kind: str) -> nn.Parameter:
    """Position embeddings, [1, prefix + N, dim]; fixed ones are zero in the prefix."""
    if kind not in get_args(DecoderPosition):
        names = ", ".join(get_args(DecoderPosition))
        raise ValueError(f"need position among {names}, got {kind!r}")
    N = math.prod(grid)
    if kind == "learned":
        return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, prefix + N, dim), std=0.02))
    if kind == "sincos_2d":
        if grid[0] != 1 or dim % 4:
            raise ValueError(
                "position='sincos_2d' needs a grid of one frame and dim as a multiple of 4, got "
                f"{grid} and {dim}: decode frame by frame, or use position='sincos_1d'"
            )
        table = sincos_2d(grid[1], grid[2], dim)
    else:
        if dim % 2:
            raise ValueError(f"position='sincos_1d' needs an even dim, got {dim}")
        table = sincos_1d(N, dim)
    table = F.pad(table, (0, 0, prefix, 0)).float()
    return nn.Parameter(table[None], requires_grad=False)


def sincos_2d(rows: int, columns: int, dim: int) -> Tensor:
    """MAE's fixed position embeddings, [rows * columns, dim] float64.

    The first half of the channels encodes the column, the second half the row. In each half the
    sines of all frequencies come first, then the cosines.
    """
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64),
        torch.arange(columns, dtype=torch.float64),
        indexing="ij",
    )
    angles = [index.flatten()[:, None] * frequency for index in (column, row)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)


def sincos_1d(length: int, dim: int) -> Tensor:
    """VideoMAE's fixed position embeddings, [length, dim] float64: sine and cosine alternate."""
    frequency = 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)
