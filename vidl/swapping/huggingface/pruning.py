"""ViT, ViViT and VideoMAE of transformers with layers that drop tokens."""

from collections.abc import Callable, Sequence
from typing import Any

import transformers.models.videomae.modeling_videomae as videomae
import transformers.models.vit.modeling_vit as vit
import transformers.models.vivit.modeling_vivit as vivit
from torch import Tensor, nn

from vidl.kernels.space_time_attention.op import Scores
from vidl.swapping.attention import attend
from vidl.swapping.huggingface.attention import Visible, refuse
from vidl.swapping.prune import Pruning, plan_of
from vidl.swapping.registry import Family, Tower, state_of


class ViTLayer(vit.ViTLayer):
    """The same layer, dropping tokens."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        return _layer(self, super().forward, hidden_states, attention_mask, **kwargs)


class VivitLayer(vivit.VivitLayer):
    """The same layer, dropping tokens."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        return _layer(self, super().forward, hidden_states, attention_mask, **kwargs)


class VideoMAELayer(videomae.VideoMAELayer):
    """The same layer, dropping tokens."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        pruning, _, prefix = plan_of(self, hidden_states.shape[1])
        if pruning is None:
            return super().forward(hidden_states, **kwargs)
        attn = self.attention.attention
        projections = (attn.query, attn.key, attn.value)
        out, scores = scored(attn, projections, self.layernorm_before(hidden_states), pruning.score)
        x = hidden_states + self.attention.output(out, hidden_states)
        if pruning.when == "before_mlp":
            x, _ = pruning.select(x, scores, prefix)
        x = self.output(self.intermediate(self.layernorm_after(x)), x)  # adds the residual
        if pruning.when == "after_mlp":
            x, _ = pruning.select(x, scores, prefix)
        return x


def _layer(block: Any, stock: Callable[..., Tensor], x: Tensor, mask: Any, **kwargs: Any) -> Tensor:
    """A layer of ViT or ViViT, which have the same parts."""
    pruning, layer, prefix = plan_of(block, x.shape[1])
    if pruning is None:
        return stock(x, mask, **kwargs)
    refuse(block.attention, kwargs)
    if mask is not None and not (isinstance(mask, Visible) and mask.keys is None):
        raise ValueError(
            f"layer {layer} drops tokens, so it needs a call without attention_mask; "
            "vidl.unswap(model) brings back layers that take one"
        )
    attn = block.attention
    projections = (attn.q_proj, attn.k_proj, attn.v_proj)
    out, scores = scored(attn, projections, block.layernorm_before(x), pruning.score)
    x = x + block.dropout(attn.o_proj(out))
    if pruning.when == "before_mlp":
        x, _ = pruning.select(x, scores, prefix)
    x = x + block.dropout(block.mlp(block.layernorm_after(x)))
    if pruning.when == "after_mlp":
        x, _ = pruning.select(x, scores, prefix)
    return x


def scored(
    attention: Any, projections: Sequence[nn.Module], x: Tensor, score: Scores
) -> tuple[Tensor, Tensor]:
    """The attention of tokens [B, N, C], before its last projection, and their scores [B, N]."""
    state = state_of(attention)
    assert state is not None
    q, k, v = (p(x).unflatten(-1, (attention.num_attention_heads, -1)) for p in projections)
    out, scores = attend(q, k, v, scale=attention.scaling, scores=score, backend=state.backend)
    assert scores is not None
    return out, scores


def _why_not(model: Any, pruning: Pruning, layers: Sequence[int]) -> str | None:
    if drop := model.config.attention_probs_dropout_prob:
        return f"attention_probs_dropout_prob={drop}: weights of attention cannot be dropped out"
    if getattr(model.embeddings, "mask_token", None) is not None:
        return "it predicts masked patches, and needs all of them"
    return None


def _why_not_videomae(model: Any, pruning: Pruning, layers: Sequence[int]) -> str | None:
    if drop := model.config.attention_probs_dropout_prob:
        return f"attention_probs_dropout_prob={drop}: weights of attention cannot be dropped out"
    if pruning.score == "cls":
        return "it has no class token; score='mean' needs none"
    if not model.config.use_mean_pooling:
        return "it classifies by its first patch (use_mean_pooling=False), which may be dropped"
    return None


def _tower(model: Any, layer: Any, swapped: Any) -> Tower:
    """The model keeps its class: only the layers change."""
    return Tower(
        model, model, {layer: swapped}, lambda model: model.layers, lambda model: 1, _why_not
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
        ),
    ]
)
