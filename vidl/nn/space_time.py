"""What encoders share whose layers attend over time and within frames in turn."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vidl.kernels.arguments import check_count, check_tensors
from vidl.nn.arguments import check_layer
from vidl.nn.patch_embed import MaskedPatchEmbed
from vidl.nn.vit import frames_of, grid_of, initialise


class SpaceTimeEncoder(nn.Module):
    """Patches with embeddings of time and place, one CLS for the clip, and blocks.

    A subclass names its block, which has `reset_time`, and its embedding of time, and implements
    `forward`. The options are those of the subclass.

    Attributes:
        TIME: parts of the names of the parameters that image models do not have; the last is the
            name of the embedding of time.
    """

    TIME: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        block: Callable[..., Any],
        img_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        act_layer: Callable[[], nn.Module],
        norm_layer: Callable[..., nn.Module],
        *,
        num_frames: int,
        tubelet_size: int | None,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        backend: str,
    ) -> None:
        super().__init__()
        check_count("num_frames", num_frames, 1)
        check_count("depth", depth)
        layer: Any = (num_heads, mlp_ratio, qkv_bias, act_layer, norm_layer, backend)
        check_layer(embed_dim, *layer, width="embed_dim")
        self.grid = grid_of(img_size, patch_size)
        self.embed_dim, self.num_frames = embed_dim, num_frames
        self.patch_embed = MaskedPatchEmbed(
            patch_size, in_chans, embed_dim, tubelet_size, mean=mean, std=std, backend=backend
        )
        patches = self.grid[0] * self.grid[1]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, embed_dim))
        self.register_parameter(self.TIME[-1], nn.Parameter(torch.zeros(1, num_frames, embed_dim)))
        options: dict[str, Any] = dict(act_layer=act_layer, norm_layer=norm_layer, backend=backend)
        blocks = [block(embed_dim, num_heads, mlp_ratio, qkv_bias, **options) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm_layer(embed_dim)
        initialise(self)
        for each_block in blocks:
            each_block.reset_time()

    def embed(self, video: Tensor, ids_keep: Tensor | None) -> tuple[Tensor, int]:
        """CLS and the visible patches, [B, 1 + K, C], and T; arguments are those of `forward`."""
        check_tensors(("ids_keep",), video=video, ids_keep=ids_keep, model=self.cls_token)
        if video.ndim == 4:
            video = video.unsqueeze(2)
        embedding = self.embedding(video)
        T = frames_of(video, ids_keep, self.grid, embedding)
        if self.num_frames < T:
            raise ValueError(f"need video of at most num_frames={self.num_frames} frames, got {T}")
        position: Any = self.pos_embed[0, 1:]
        if embedding is self.patch_embed:
            position = (self.get_parameter(self.TIME[-1])[0, :T], position)
        x = embedding(video, ids_keep, position=position)  # [B, K, C]
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        return torch.cat([cls, x], 1), T

    def embedding(self, video: Tensor) -> MaskedPatchEmbed:
        """The patch embedding of a clip, [B, C, T, H, W]; another one is without time."""
        return self.patch_embed

    def of_time(self, state: Mapping[str, Tensor]) -> tuple[str, ...]:
        """The parameters that may be missing: those of time, if the weights have none of them."""
        own = [name for name in self.state_dict() if any(part in name for part in self.TIME)]
        return () if any(name in state for name in own) else tuple(own)
