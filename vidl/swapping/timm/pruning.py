"""timm's ViT and EVA with layers that drop tokens."""

from collections.abc import Sequence
from typing import Any

import timm.models.deit as timm_deit
import timm.models.eva as timm_eva
import timm.models.vision_transformer as timm_vit
import torch
from torch import Tensor

from vidl.swapping.grids import refuse_grids
from vidl.swapping.prune import Kept, Pruning, plan_of
from vidl.swapping.registry import Family, Tower, original, state_of
from vidl.swapping.timm.vit import VisionTransformer


class Block(timm_vit.Block):
    """The same layer, dropping tokens."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        pruning, layer, prefix = plan_of(self, x.shape[1])
        if pruning is None:
            return super().forward(x, attn_mask, is_causal)
        refuse_masks(layer, attn_mask, is_causal)
        attended, scores = self.attn.scored(self.norm1(x), scores=pruning.score)
        x = x + self.drop_path1(self.ls1(attended))
        if pruning.when == "before_mlp":
            x, _ = pruning.select(x, scores, prefix)
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        if pruning.when == "after_mlp":
            x, _ = pruning.select(x, scores, prefix)
        return x


class EvaBlock(timm_eva.EvaBlock):
    """The same layer, dropping tokens; their rotary embeddings follow them."""

    def forward(
        self,
        x: Tensor,
        rope: Kept | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        return eva_block(self, super().forward, x, rope, attn_mask, is_causal)

    def attended(self, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        """The tokens after attention, and their scores."""
        out, scores = self.attn.scored(self.norm1(x), *args)
        return x + self.drop_path1(out if self.gamma_1 is None else self.gamma_1 * out), scores

    def transformed(self, x: Tensor) -> Tensor:
        """The tokens after the MLP."""
        out = self.mlp(self.norm2(x))
        return x + self.drop_path2(out if self.gamma_2 is None else self.gamma_2 * out)


class EvaBlockPostNorm(timm_eva.EvaBlockPostNorm):
    """The same layer, dropping tokens; their rotary embeddings follow them."""

    def forward(
        self,
        x: Tensor,
        rope: Kept | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        return eva_block(self, super().forward, x, rope, attn_mask, is_causal)

    def attended(self, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        """The tokens after attention, and their scores."""
        out, scores = self.attn.scored(x, *args)
        return x + self.drop_path1(self.norm1(out)), scores

    def transformed(self, x: Tensor) -> Tensor:
        """The tokens after the MLP."""
        return x + self.drop_path2(self.norm2(self.mlp(x)))


def eva_block(
    block: Any,
    stock: Any,
    x: Tensor,
    kept: Kept | None,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """A layer of EVA: timm's own with the embeddings of its tokens, or one that drops some."""
    pruning, layer, prefix = plan_of(block, x.shape[1])
    rope = None if kept is None else turns(kept, layer)
    if pruning is None:
        if kept is not None:
            kept.hand_on(layer, None)
        return stock(x, rope, attn_mask, is_causal)
    refuse_masks(layer, attn_mask, is_causal)
    x, scores = block.attended(x, rope, None, pruning.score)
    if pruning.when == "before_mlp":
        x, ids = pruning.select(x, scores, prefix)
    x = block.transformed(x)
    if pruning.when == "after_mlp":
        x, ids = pruning.select(x, scores, prefix)
    if kept is not None:
        kept.hand_on(layer, ids, places(kept) if pruning.fuse else None)
    return x


def places(kept: Kept) -> int:
    """How many positions have a rotary embedding."""
    assert kept.positions is not None
    return kept.positions.shape[-2]


def turns(kept: Kept, layer: int) -> Tensor:
    """The rotary embeddings of a layer's tokens; a fused token, which is nowhere, is not turned."""
    rope, ids = kept.positions, kept.before(layer)
    assert rope is not None
    if ids is None:
        return rope
    still = torch.zeros_like(rope[..., :1, :])  # sines, then cosines
    still[..., rope.shape[-1] // 2 :] = 1
    rope = torch.cat([rope, still], -2)
    if rope.ndim == 2:  # [N, D] -> [B, 1, K, D]
        return rope[ids].unsqueeze(1)
    if rope.ndim == 3:  # [H, N, D] -> [B, H, K, D]
        return rope[:, ids].transpose(0, 1)
    index = ids[:, None, :, None].expand(-1, rope.shape[1], -1, rope.shape[3])
    return rope.gather(2, index)


def refuse_masks(layer: int, attn_mask: Any, is_causal: bool) -> None:
    """A layer that drops tokens knows no masks."""
    if attn_mask is not None or is_causal:
        raise ValueError(
            f"layer {layer} drops tokens, so it needs a call without attn_mask and is_causal; "
            "vidl.unswap(model) brings back layers that take them"
        )


class VisionTransformerDistilled(timm_deit.VisionTransformerDistilled):
    """The same model, whose tokens become fewer."""

    def forward_intermediates(self, *args: Any, **options: Any) -> Any:
        return refuse_grids(self, super().forward_intermediates, *args, **options)


class Eva(timm_eva.Eva):
    """The same model, whose tokens become fewer."""

    def forward_intermediates(self, *args: Any, **options: Any) -> Any:
        return refuse_grids(self, super().forward_intermediates, *args, **options)

    def _pos_embed(self, x: Tensor) -> tuple[Tensor, Any]:
        x, rope = super()._pos_embed(x)
        return x, None if rope is None else Kept(rope)


def why_not(model: Any, pruning: Pruning, layers: Sequence[int]) -> str | None:
    """The reason why these layers cannot drop tokens so."""
    if pruning.score == "cls" and model.cls_token is None:
        return "it has no class token; score='mean' needs none"
    for layer, block in enumerate(model.blocks):
        kind = original(block)
        concerned = layer in layers or isinstance(model, timm_eva.Eva)  # its embeddings go through
        if concerned and kind not in BLOCKS:
            return f"layer {layer} is a {kind.__name__}, need one of {', '.join(NAMES)}"
        if layer in layers and state_of(block.attn) is None:
            return f"the attention of layer {layer} was left: see the report of vidl.swap"
    return None


BLOCKS: Any = {
    timm_vit.Block: Block,
    timm_eva.EvaBlock: EvaBlock,
    timm_eva.EvaBlockPostNorm: EvaBlockPostNorm,
}
NAMES = [kind.__name__ for kind in BLOCKS]


def tower(stock: Any, swapped: Any, every: bool) -> Tower:
    """All of timm's have the same parts."""
    return Tower(
        stock,
        swapped,
        BLOCKS,
        layers=lambda model: model.blocks,
        prefix=lambda model: model.num_prefix_tokens,
        why_not=why_not,
        every=every,
    )


FAMILY = Family(
    towers=[
        tower(timm_vit.VisionTransformer, VisionTransformer, every=False),
        tower(timm_deit.VisionTransformerDistilled, VisionTransformerDistilled, every=False),
        tower(timm_eva.Eva, Eva, every=True),
    ]
)
