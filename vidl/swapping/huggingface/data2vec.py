"""data2vec-vision of transformers: attention with a table of relative positions."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import transformers.models.data2vec.modeling_data2vec_vision as data2vec
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from vidl.nn.pruning import Scores
from vidl.swapping.attention import speed
from vidl.swapping.huggingface.grids import needs_grid
from vidl.swapping.huggingface.positions import (
    Table,
    attention,
    fits,
    require_pruning,
    why_not,
)
from vidl.swapping.prune import plan_of
from vidl.swapping.registry import Family, Rule, Tower, own_forward, state_of


class Reads:
    """What the two attentions share: that of transformers with dropout, for `output_attentions`,
    and at another image size."""

    def forward(
        self,
        hidden_states: Tensor,
        output_attentions: bool = False,
        relative_position_bias: Any = None,
        interpolate_pos_encoding: bool = False,
        resolution: Any = None,
    ) -> Any:
        own, shared = own_table(self, interpolate_pos_encoding, resolution), relative_position_bias
        shared = Table(None) if shared is None else shared
        exact = not output_attentions and not drops(self)
        if exact and own is not None and isinstance(shared, Table):
            return (self.scored(hidden_states, own + shared)[0],)
        bias = shared.dense() if isinstance(shared, Table) else shared
        rest = output_attentions, bias, interpolate_pos_encoding, resolution
        return super().forward(hidden_states, *rest)  # type: ignore[misc]

    def scored(self, x: Tensor, table: Table, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Attention before its output projection, and the importance of each token or None."""
        module: Any = self
        scale = 1 / math.sqrt(module.attention_head_size)
        options |= {"heads": module.num_attention_heads, "scale": scale}
        return attention(self, x, (module.query, module.key, module.value), table, **options)


class Data2VecVisionSelfAttention(Reads, data2vec.Data2VecVisionSelfAttention):
    """Attention by `space_time_attention`."""


class Data2VecVisionSdpaSelfAttention(Reads, data2vec.Data2VecVisionSdpaSelfAttention):
    """Attention by `space_time_attention`."""


def drops(attention: Any) -> bool:
    """Whether attention weights are dropped out now."""
    return attention.training and attention.config.attention_probs_dropout_prob > 0


def own_table(attention: Any, interpolates: bool, resolution: Any) -> Table | None:
    """The table of one attention; None if transformers resizes it."""
    if not attention.has_relative_position_bias:
        return Table(None)
    return table_of(attention.relative_position_bias, attention.config, interpolates, resolution)


def table_of(bias: Any, config: Any, interpolates: bool, resolution: Any) -> Table | None:
    """The table of a bias; None if transformers resizes it."""
    window = resolution[0] // config.patch_size, resolution[1] // config.patch_size
    if not fits(bias, window, interpolates):
        return None
    return Table(bias.relative_position_bias_table, window)


class Data2VecVisionEncoder(data2vec.Data2VecVisionEncoder):
    """Hands the table that layers share to them, and which tokens they kept."""

    def forward(
        self,
        hidden_states: Tensor,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        interpolate_pos_encoding: bool = False,
        resolution: Any = None,
        return_dict: bool = True,
    ) -> Any:
        shared, options = Table(None), (interpolate_pos_encoding, resolution)
        if self.has_relative_position_bias:
            own = table_of(self.relative_position_bias, self.config, *options)
            if own is None:
                more = (output_attentions, output_hidden_states, *options, return_dict)
                return super().forward(hidden_states, *more)
            shared = own
        shared.ids = {}
        states, weights = [hidden_states], []
        for layer in self.layer:
            x, *rest = layer(states[-1], output_attentions, shared, *options)
            states.append(x)
            weights += rest
        result = (
            states[-1],
            tuple(states) if output_hidden_states else None,
            tuple(weights) if output_attentions else None,
        )
        return (
            BaseModelOutput(*result) if return_dict else tuple(x for x in result if x is not None)
        )


class Data2VecVisionLayer(data2vec.Data2VecVisionLayer):
    """The original layer with pruning."""

    def forward(
        self,
        hidden_states: Tensor,
        output_attentions: bool = False,
        relative_position_bias: Any = None,
        interpolate_pos_encoding: bool = False,
        resolution: Any = None,
    ) -> tuple[Tensor]:
        plan, attn = plan_of(self), self.attention.attention
        own = own_table(attn, interpolate_pos_encoding, resolution)
        require_pruning(plan, (own, relative_position_bias), drops(attn), output_attentions)
        assert own is not None
        table = own + relative_position_bias
        attended = partial(self._attended, table=table, ids=table.before(plan.layer))
        x, selected = plan.run(hidden_states, attended, self._transformed)
        table.hand_on(plan.layer, None if selected is None else selected.ids_keep)
        return (x,)

    def _attended(
        self, x: Tensor, scores: Scores | None, table: Table, ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        normed, attn = self.layernorm_before(x), self.attention
        out, importance = attn.attention.scored(normed, table, ids=ids, scores=scores)
        out = attn.output(out, normed)
        out = out if self.lambda_1 is None else self.lambda_1 * out
        return self.drop_path(out) + x, importance

    def _transformed(self, x: Tensor) -> Tensor:
        out = self.output(self.intermediate(self.layernorm_after(x)))
        return self.drop_path(out if self.lambda_2 is None else self.lambda_2 * out) + x


KINDS = (data2vec.Data2VecVisionSelfAttention, data2vec.Data2VecVisionSdpaSelfAttention)


def _unread(encoder: Any) -> str | None:
    for layer, block in enumerate(encoder.layer):
        attn = block.attention.attention
        if type(attn) not in KINDS and state_of(attn) is None or own_forward(attn):
            return f"the attention of layer {layer} is left"
    return None


def _note(attention: Any, backend: str) -> str:
    weight, drop = attention.query.weight, attention.config.attention_probs_dropout_prob
    note = speed(weight.device, weight.dtype, attention.attention_head_size, backend)
    if not note and drop:
        return f"that of transformers in training, because it drops out weights ({drop})"
    return note


def _why_not(model: Any, pruning: Any, layers: Sequence[int]) -> str | None:
    if type(model.encoder) is not Data2VecVisionEncoder:
        return _unread(model.encoder) or "its encoder was left"
    return why_not(model, pruning, layers)


FAMILY = Family(
    rules=[
        Rule(data2vec.Data2VecVisionEncoder, Data2VecVisionEncoder, _unread),
        Rule(KINDS[0], Data2VecVisionSelfAttention, note=_note),
        Rule(KINDS[1], Data2VecVisionSdpaSelfAttention, note=_note),
    ],
    towers=[
        Tower(
            data2vec.Data2VecVisionModel,
            data2vec.Data2VecVisionModel,
            {data2vec.Data2VecVisionLayer: Data2VecVisionLayer},
            layers=lambda model: model.encoder.layer,
            prefix=lambda model: 1,
            why_not=_why_not,
            around=needs_grid,
            every=True,
        )
    ],
)
