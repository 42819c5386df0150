"""ViT, ViViT and VideoMAE of transformers with layers that prune their tokens."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import transformers.models.videomae.modeling_videomae as videomae
import transformers.models.vit.modeling_vit as vit
import transformers.models.vivit.modeling_vivit as vivit
from torch import Tensor, nn

from vidl.nn.pruning import Pruning, Scores
from vidl.swapping.attention import attend
from vidl.swapping.huggingface.attention import Visible, refuse
from vidl.swapping.huggingface.grids import needs_grid
from vidl.swapping.prune import plan_of, without_class_token
from vidl.swapping.registry import Family, Tower, state_of


class ViTLayer(vit.ViTLayer):
    """The original layer with pruning."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        return _layer(self, super().forward, hidden_states, attention_mask, **kwargs)


class VivitLayer(vivit.VivitLayer):
    """The original layer with pruning."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        return _layer(self, super().forward, hidden_states, attention_mask, **kwargs)


class VideoMAELayer(videomae.VideoMAELayer):
    """The original layer with pruning."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        plan = plan_of(self)
        if not plan.drops(hidden_states.shape[1]):
            return super().forward(hidden_states, **kwargs)
        return plan.run(hidden_states, self._attended, self._transformed)[0]

    def _attended(self, x: Tensor, scores: Scores | None) -> tuple[Tensor, Tensor | None]:
        attn = self.attention.attention
        projections = (attn.query, attn.key, attn.value)
        out, importance = scored(attn, projections, self.layernorm_before(x), scores)
        return x + self.attention.output(out, x), importance

    def _transformed(self, x: Tensor) -> Tensor:
        return self.output(self.intermediate(self.layernorm_after(x)), x)  # adds the residual


def _layer(
    block: Any, original: Callable[..., Tensor], x: Tensor, mask: Any, **kwargs: Any
) -> Tensor:
    """A layer of ViT or ViViT, which have the same parts."""
    plan = plan_of(block)
    if not plan.drops(x.shape[1]):
        return original(x, mask, **kwargs)
    refuse(block.attention, kwargs)
    if mask is not None and not (isinstance(mask, Visible) and mask.keys is None):
        raise ValueError(
            f"layer {plan.layer} drops tokens, so it needs a call without attention_mask; "
            "vidl.unswap(model) restores layers that take one"
        )
    return plan.run(x, partial(_attended, block), partial(_transformed, block))[0]


def _attended(block: Any, x: Tensor, scores: Scores | None) -> tuple[Tensor, Tensor | None]:
    attn = block.attention
    projections = (attn.q_proj, attn.k_proj, attn.v_proj)
    out, importance = scored(attn, projections, block.layernorm_before(x), scores)
    return x + block.dropout(attn.o_proj(out)), importance


def _transformed(block: Any, x: Tensor) -> Tensor:
    return x + block.dropout(block.mlp(block.layernorm_after(x)))


def scored(
    attention: Any, projections: Sequence[nn.Module], x: Tensor, scores: Scores | None
) -> tuple[Tensor, Tensor | None]:
    """Attention of tokens [B, N, C] before its output projection, and their scores, [B, N]."""
    state = state_of(attention)
    assert state is not None
    q, k, v = (p(x).unflatten(-1, (attention.num_attention_heads, -1)) for p in projections)
    return attend(q, k, v, scale=attention.scaling, scores=scores, backend=state.backend)


def _dropout(model: Any) -> str | None:
    if drop := model.config.attention_probs_dropout_prob:
        return f"attention_probs_dropout_prob={drop}: vidl does not drop out attention weights"
    return None


def _why_not(model: Any, pruning: Pruning, layers: Sequence[int]) -> str | None:
    if getattr(model.embeddings, "mask_token", None) is not None:
        return "it predicts masked patches, so it needs all of them"
    return _dropout(model)


def _why_not_videomae(model: Any, pruning: Pruning, layers: Sequence[int]) -> str | None:
    if not model.config.use_mean_pooling:
        return "it classifies by its first patch (use_mean_pooling=False), which might be dropped"
    return _dropout(model) or without_class_token(pruning)


def _tower(model: Any, layer: Any, swapped: Any) -> Tower:
    """A model that keeps its class: only its layers change."""
    return Tower(
        *(model, model, {layer: swapped}, lambda model: model.layers, lambda model: 1, _why_not),
        around=needs_grid,
    )


FAMILY = Family(
    towers=[
        _tower(vit.ViTModel, vit.ViTLayer, ViTLayer),
        _tower(vivit.VivitModel, vivit.VivitLayer, VivitLayer),
        Tower(
            videomae.VideoMAEForVideoClassification,
            videomae.VideoMAEForVideoClassification,
            {videomae.VideoMAELayer: VideoMAELayer},
            lambda model: model.videomae.encoder.layer,
            lambda model: 0,
            _why_not_videomae,
            around=needs_grid,
        ),
    ]
)
