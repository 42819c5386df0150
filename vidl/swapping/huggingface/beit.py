"""BEiT of transformers: attention with a table of relative positions, also when it prunes."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import transformers.models.beit.modeling_beit as beit
from torch import Tensor, nn

from vidl.nn.pruning import Scores
from vidl.swapping.attention import speed
from vidl.swapping.huggingface.attention import Visible, collected
from vidl.swapping.huggingface.grids import needs_grid
from vidl.swapping.huggingface.positions import (
    Table,
    Window,
    attention,
    fits,
    require_pruning,
    why_not,
)
from vidl.swapping.prune import plan_of
from vidl.swapping.registry import Family, Rule, Tower, full_name, own_forward, remember
from vidl.swapping.report import Change


class BeitRelativePositionBias(beit.BeitRelativePositionBias):
    """Returns its table; at another image size, the N x N bias that transformers makes."""

    def forward(
        self, window_size: Window, interpolate_pos_encoding: bool = False, dim_size: Any = None
    ) -> Any:
        if fits(self, window_size, interpolate_pos_encoding):
            return Table(self.relative_position_bias_table, window_size)
        return super().forward(window_size, interpolate_pos_encoding, dim_size)


class BeitAttention(beit.BeitAttention):
    """Attention by `space_time_attention`; that of transformers with a mask, at another image size,
    with dropout or for `output_attentions`."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(attention_mask, Visible) and attention_mask.keys is None:
            attention_mask = None
        table = Table(None) if attention_mask is None else attention_mask
        if isinstance(table, Table) and not drops(self) and not wants_weights():
            return self.scored(hidden_states, table)[0], None
        mask = table.dense() if isinstance(table, Table) else table
        return super().forward(hidden_states, mask, **kwargs)

    def scored(self, x: Tensor, table: Table, **options: Any) -> tuple[Tensor, Tensor | None]:
        """The output, and the importance of each token, [B, N], or None."""
        options |= {"heads": self.num_attention_heads, "scale": self.scaling}
        projections = (self.q_proj, self.k_proj, self.v_proj)
        out, importance = attention(self, x, projections, table, **options)
        return self.o_proj(out), importance


def drops(attention: Any) -> bool:
    """Whether attention weights are dropped out now."""
    return attention.training and attention.attention_dropout > 0


def wants_weights() -> bool:
    """Whether the running forward returns attention weights."""
    return any("attentions" in name for name in collected())


class BeitLayer(beit.BeitLayer):
    """The original layer with pruning."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        interpolate_pos_encoding: bool = False,
        resolution: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        plan, own = plan_of(self), Table(None)
        if self.relative_position_bias is not None:
            window = resolution[0] // self.patch_size, resolution[1] // self.patch_size
            tokens = hidden_states.shape[1]
            own = self.relative_position_bias(window, interpolate_pos_encoding, tokens)
        tables = (own, attention_mask)
        require_pruning(plan, tables, drops(self.attention), wants_weights())
        table = own + attention_mask
        attended = partial(self._attended, table=table, ids=table.before(plan.layer))
        x, selected = plan.run(hidden_states, attended, self._transformed)
        table.hand_on(plan.layer, None if selected is None else selected.ids_keep)
        return x

    def _attended(
        self, x: Tensor, scores: Scores | None, table: Table, ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        normed = self.layernorm_before(x)
        out, importance = self.attention.scored(normed, table, ids=ids, scores=scores)
        return self.drop_path(self.lambda_1 * self.dropout(out)) + x, importance

    def _transformed(self, x: Tensor) -> Tensor:
        out = self.dropout(self.mlp(self.layernorm_after(x)))
        return self.drop_path(self.lambda_2 * out) + x


class Unshared(nn.Module):
    """Takes the place of a missing shared bias, and gives the layers a new `Table` of ids."""

    def forward(self, window_size: Window, **options: Any) -> Table:
        return Table(None, window_size, {})


class Shared(BeitRelativePositionBias):
    """The table that layers share, in a new `Table` of ids."""

    def forward(self, *args: Any, **options: Any) -> Any:
        table = super().forward(*args, **options)
        return Table(table.table, table.window, {}) if isinstance(table, Table) else table


def set_up(model: Any) -> None:
    """Let layers pass on which tokens they kept."""
    if model.shared_position_bias is None:
        model.shared_position_bias = Unshared()
    else:
        remember(model.shared_position_bias, swapped=Shared)


def undo(model: Any) -> None:
    """Remove `Unshared` from a model without a shared bias."""
    if isinstance(model.shared_position_bias, Unshared):
        del model.shared_position_bias
        model.shared_position_bias = None


def _tables(model: nn.Module, backend: str) -> Sequence[Change]:
    """Let all biases return their tables, if every attention reads tables."""
    attentions = [m for m in model.modules() if isinstance(m, beit.BeitAttention)]
    if not all(type(m) is BeitAttention for m in attentions):
        return ()
    changes = []
    for name, module in model.named_modules():
        if type(module) is beit.BeitRelativePositionBias:
            was, reason, became = full_name(type(module)), own_forward(module), None
            if reason is None:
                remember(module, backend, swapped=BeitRelativePositionBias)
                became = full_name(BeitRelativePositionBias)
            changes.append(Change(name, was, became, reason or ""))
    return changes


def _note(attention: Any, backend: str) -> str:
    weight = attention.q_proj.weight
    note = speed(weight.device, weight.dtype, attention.head_dim, backend)
    if not note and (drop := attention.attention_dropout):
        return f"that of transformers in training, because it drops out weights ({drop})"
    return note


def _why_not(model: Any, pruning: Any, layers: Sequence[int]) -> str | None:
    for layer, block in enumerate(model.layers):
        if type(block.attention) is not BeitAttention:
            return f"the attention of layer {layer} was left"
    return why_not(model, pruning, layers)


FAMILY = Family(
    rules=[Rule(beit.BeitAttention, BeitAttention, note=_note)],
    whole=_tables,
    towers=[
        Tower(
            beit.BeitModel,
            beit.BeitModel,
            {beit.BeitLayer: BeitLayer},
            layers=lambda model: model.layers,
            prefix=lambda model: 1,
            why_not=_why_not,
            around=needs_grid,
            every=True,
            setup=set_up,
            undo=undo,
        )
    ],
)
