"""timm's ViT and EVA with layers that prune their tokens."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import timm.models.deit as timm_deit
import timm.models.eva as timm_eva
import timm.models.vision_transformer as timm_vit
import torch
from torch import Tensor

from vidl.nn.pruning import Pruning, Scores
from vidl.swapping.prune import plan_of, without_class_token
from vidl.swapping.registry import Family, Tower, original, state_of
from vidl.swapping.timm.tokens import KeptTokens, needs_grid, refuse_grids
from vidl.swapping.timm.vit import VisionTransformer


class Block(timm_vit.Block):
    """timm's layer with pruning."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        plan = plan_of(self)
        if not plan.drops(x.shape[1]):
            return super().forward(x, attn_mask, is_causal)
        refuse_masks(plan.layer, attn_mask, is_causal)
        return plan.run(x, self.attended, self.transformed)[0]

    def attended(self, x: Tensor, scores: Scores | None) -> tuple[Tensor, Tensor | None]:
        """The tokens after attention, and their scores."""
        out, importance = self.attn.scored(self.norm1(x), scores=scores)
        return x + self.drop_path1(self.ls1(out)), importance

    def transformed(self, x: Tensor) -> Tensor:
        """The tokens after the MLP."""
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class RotaryBlock:
    """What EVA's layers share; rotary embeddings follow the tokens that stay."""

    def forward(
        self,
        x: Tensor,
        rope: KeptTokens | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        block: Any = self
        plan, kept = plan_of(block), rope
        own = None if kept is None else rope_of(kept, plan.layer)
        ids = fused = None
        if not plan.drops(x.shape[1]):
            x = super().forward(x, own, attn_mask, is_causal)  # type: ignore[misc]
        else:
            refuse_masks(plan.layer, attn_mask, is_causal)
            x, selected = plan.run(x, partial(block.attended, rope=own), block.transformed)
            assert plan.pruning is not None and selected is not None
            ids = selected.ids_keep
            if kept is not None and kept.embedding is not None and plan.pruning.fuse:
                fused = kept.embedding.shape[-2]
        if kept is not None:
            kept.hand_on(plan.layer, ids, fused)
        return x


class EvaBlock(RotaryBlock, timm_eva.EvaBlock):
    """timm's layer with pruning."""

    def attended(
        self, x: Tensor, scores: Scores | None, rope: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens after attention, and their scores."""
        out, importance = self.attn.scored(self.norm1(x), rope, scores=scores)
        out = out if self.gamma_1 is None else self.gamma_1 * out
        return x + self.drop_path1(out), importance

    def transformed(self, x: Tensor) -> Tensor:
        """The tokens after the MLP."""
        out = self.mlp(self.norm2(x))
        return x + self.drop_path2(out if self.gamma_2 is None else self.gamma_2 * out)


class EvaBlockPostNorm(RotaryBlock, timm_eva.EvaBlockPostNorm):
    """timm's layer with pruning."""

    def attended(
        self, x: Tensor, scores: Scores | None, rope: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens after attention, and their scores."""
        out, importance = self.attn.scored(x, rope, scores=scores)
        return x + self.drop_path1(self.norm1(out)), importance

    def transformed(self, x: Tensor) -> Tensor:
        """The tokens after the MLP."""
        return x + self.drop_path2(self.norm2(self.mlp(x)))


def rope_of(kept: KeptTokens, layer: int) -> Tensor:
    """The rotary embeddings of a layer's tokens; a fused token has no position, so no rotation."""
    rope, ids = kept.embedding, kept.before(layer)
    assert rope is not None
    if ids is None:
        return rope
    identity = torch.zeros_like(rope[..., :1, :])  # sines, then cosines
    identity[..., rope.shape[-1] // 2 :] = 1
    rope = torch.cat([rope, identity], -2)
    if rope.ndim == 2:  # [N, D] -> [B, 1, K, D]
        return rope[ids].unsqueeze(1)
    if rope.ndim == 3:  # [H, N, D] -> [B, H, K, D]
        return rope[:, ids].transpose(0, 1)
    index = ids[:, None, :, None].expand(-1, rope.shape[1], -1, rope.shape[3])
    return rope.gather(2, index)


def refuse_masks(layer: int, attn_mask: Any, is_causal: bool) -> None:
    """Raise if a layer that drops tokens gets a mask."""
    if attn_mask is not None or is_causal:
        raise ValueError(
            f"layer {layer} drops tokens, so it needs a call without attn_mask and is_causal; "
            "vidl.unswap(model) restores layers that take them"
        )


class VisionTransformerDistilled(timm_deit.VisionTransformerDistilled):
    """timm's model with layers that prune."""

    def forward_intermediates(self, *args: Any, **options: Any) -> Any:
        return refuse_grids(self, super().forward_intermediates, *args, **options)


class Eva(timm_eva.Eva):
    """timm's model with layers that prune."""

    def forward_intermediates(self, *args: Any, **options: Any) -> Any:
        return refuse_grids(self, super().forward_intermediates, *args, **options)

    def _pos_embed(self, x: Tensor) -> tuple[Tensor, Any]:
        x, rope = super()._pos_embed(x)
        return x, None if rope is None else KeptTokens(rope)


def why_not(model: Any, pruning: Pruning, layers: Sequence[int]) -> str | None:
    """The reason why these layers cannot be pruned, or None."""
    if model.cls_token is None and (reason := without_class_token(pruning)):
        return reason
    for layer, block in enumerate(model.blocks):
        kind = original(block)
        # Every layer of Eva must pass on the embeddings of the tokens that stay.
        concerned = layer in layers or isinstance(model, timm_eva.Eva)
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


def tower(original: Any, swapped: Any, every: bool) -> Tower:
    """A model of timm; all of them name their parts alike."""
    return Tower(
        original,
        swapped,
        BLOCKS,
        layers=lambda model: model.blocks,
        prefix=lambda model: model.num_prefix_tokens,
        why_not=why_not,
        around=needs_grid,
        every=every,
    )


FAMILY = Family(
    towers=[
        tower(timm_vit.VisionTransformer, VisionTransformer, every=False),
        tower(timm_deit.VisionTransformerDistilled, VisionTransformerDistilled, every=False),
        tower(timm_eva.Eva, Eva, every=True),
    ]
)
