"""MAE's light decoder: from the tokens of visible patches to the pixels of masked ones."""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidl.kernels.groups import Grid
from vidl.nn.block import LAYER_NORM, Block
from vidl.nn.vit import initialise

DecoderPosition = Literal["sincos_2d", "sincos_1d", "learned"]


class MaeDecoder(nn.Module):
    """Predict the pixels of masked patches, as MAE and VideoMAE do.

    Tokens of visible patches are projected; a learned mask token stands for each masked patch; all
    get the position of their patch and pass through blocks; the masked ones are then normed and
    projected to pixels. Attention knows of order by the positions alone, so that there is neither
    unshuffling nor a prediction of visible patches. Parameters are named as MAE's: of its
    checkpoints those load that begin with "decoder" or "mask_token". Sources: MAE, arXiv
    2111.06377, 3, and models_mae.py; VideoMAE, arXiv 2203.12602, 3.

    Args:
        grid: frames (or tubelets), rows and columns of patches in what is reconstructed:
            (1, 14, 14) for frames by themselves.
        patch_size: pixels, one number or (height, width).
        encoder_dim: width of the encoder's tokens.
        in_chans: channels of the clip.
        tubelet_size: frames in a patch.
        dim, depth, num_heads, mlp_ratio, qkv_bias, norm_layer: of the decoder's blocks, as in
            `Block`; by default MAE's.
        position: "sincos_2d", fixed (MAE; of one frame), "sincos_1d", fixed, by the number of the
            patch (VideoMAE), or "learned".
        prefix: so many tokens at the front (CLS) are no patches. MAE has 1, VideoMAE none.
        embed_bias: whether the projection of the encoder's tokens has a bias. VideoMAE's has none.
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
        if prefix < 0:
            raise ValueError(f"need prefix >= 0, got {prefix}")
        patch = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
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
        """Predict.

        Args:
            tokens: of the encoder, [B, prefix + K, encoder_dim].
            ids_keep: which patch each of the K tokens is, [B, K] int64; -1 for one that is no patch
                (a fused token), which gets no position. Patches that are in neither list (pruned)
                are simply absent.
            ids_mask: the patches to predict, [B, M] int64.

        Returns:
            [B, M, t p p C], the numbers of a patch in the order (t, p, p, C), for
            `vidl.ops.masked_patch_loss`.

        Raises:
            ValueError: the shapes do not fit.
        """
        B, K = ids_keep.shape if ids_keep.ndim == 2 else (-1, -1)
        if ids_mask.ndim != 2 or tokens.shape != (B, self.prefix + K, self.encoder_dim):
            raise ValueError(
                f"need tokens [B, {self.prefix} + K, {self.encoder_dim}], ids_keep [B, K] and "
                f"ids_mask [B, M], got {tuple(tokens.shape)}, {tuple(ids_keep.shape)} and "
                f"{tuple(ids_mask.shape)}"
            )
        N, M = math.prod(self.grid), ids_mask.shape[1]
        first, patches = self.decoder_pos_embed[0].split([self.prefix, N])
        table = F.pad(patches, (0, 0, 0, 1))  # a row of zeros for what is no patch
        places = F.embedding(torch.where(ids_keep < 0, N, ids_keep), table)
        places = torch.cat([first.expand(B, -1, -1), places], 1)
        masked = self.mask_token + F.embedding(ids_mask, patches)
        x = torch.cat([self.decoder_embed(tokens) + places, masked], 1)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x[:, x.shape[1] - M :]))


def _position(grid: Grid, dim: int, prefix: int, kind: str) -> nn.Parameter:
    """[1, prefix + N, dim]; those that are fixed do not learn, and are zero in the prefix."""
    if kind not in get_args(DecoderPosition):
        names = ", ".join(get_args(DecoderPosition))
        raise ValueError(f"need position among {names}, got {kind!r}")
    if len(grid) != 3 or any(n < 1 for n in grid):
        raise ValueError(f"need a grid of frames, rows and columns, got {grid}")
    N = math.prod(grid)
    if kind == "learned":
        return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, prefix + N, dim), std=0.02))
    if kind == "sincos_2d":
        if grid[0] != 1 or dim % 4:
            raise ValueError(
                "sincos_2d needs a grid of one frame and dim in fours, got "
                f"{grid} and {dim}: decode frame by frame, or take sincos_1d"
            )
        table = sincos_2d(grid[1], grid[2], dim)
    else:
        if dim % 2:
            raise ValueError(f"sincos_1d needs an even dim, got {dim}")
        table = sincos_1d(N, dim)
    table = F.pad(table, (0, 0, prefix, 0)).float()
    return nn.Parameter(table[None], requires_grad=False)


def sincos_2d(rows: int, columns: int, dim: int) -> Tensor:
    """MAE's fixed positions, [rows * columns, dim] float64.

    The first half of the channels is of the column, the second of the row; in each half the sines
    of all frequencies come first, then the cosines.
    """
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64),
        torch.arange(columns, dtype=torch.float64),
        indexing="ij",
    )
    angles = [place.flatten()[:, None] * frequency for place in (column, row)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)


def sincos_1d(length: int, dim: int) -> Tensor:
    """VideoMAE's fixed positions, [length, dim] float64: sine and cosine take turns."""
    frequency = 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)
