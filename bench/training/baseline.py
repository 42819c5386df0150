"""The baseline of whole training steps: the models of `vidl.models` in plain PyTorch.

Same modules, parameters and results as in vidl. Each op runs by its backend "torch", the fastest
composition of PyTorch's operations that we know, so that a baseline is written once. What differs
in the layout of a batch is written here: captions are padded and masked, not packed, and divided
attention is `scaled_dot_product_attention` of a batch of frames or positions where these have equal
sizes, with a boolean mask where they do not. Nothing synchronises with the host.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidl.kernels.groups import Groups
from vidl.nn import Bert, KeysOfText
from vidl.nn.bert import BertAttention
from vidl.nn.divided import DividedBlock, SpaceTimeTransformer
from vidl.nn.pruning import Scores


def baseline_of(model: nn.Module) -> nn.Module:
    """A copy of a model without vidl's ops, which shares its parameters and buffers.

    The copy raises ValueError in its forward where an option is not written here.
    """
    shared: dict[int, Any] = {id(p): p for p in model.parameters()}
    shared |= {id(b): b for b in model.buffers()}
    baseline = copy.deepcopy(model, shared)
    module: Any
    for module in baseline.modules():
        module.__class__ = SWAPS.get(type(module), type(module))
        if hasattr(module, "backend"):
            module.backend = "torch"
    return baseline


def heads(x: Tensor, count: int) -> Tensor:
    """Split [..., N, C] into heads, [..., H, N, D]; a view."""
    return x.unflatten(-1, (count, -1)).transpose(-3, -2)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of q, k and v [..., H, N, D], with the heads merged: [..., N, C]."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(-3, -2).flatten(-2)


class BaselineDividedBlock(DividedBlock):
    """Divided attention by reshaping; CLS attends in a call of its own."""

    def forward(self, x: Tensor, space: Any, time: Any) -> Tensor:
        """x: [B, 1 + K, C]; space, time: `_Groups` of the tokens."""
        through_time = self._attend(self.timeattn, self.norm3(x), time)
        x = x + self._attend(self.attn, self.norm1(x + through_time), space)
        return x + self.mlp(self.norm2(x))

    @staticmethod
    def _attend(attn: Any, x: Tensor, groups: "_Groups") -> Tensor:
        q, k, v = heads(attn.qkv(x), 3 * attn.num_heads).chunk(3, 1)
        return attn.proj(groups.attend(q, k, v))


class _Groups:
    """All tokens of a clip attend to each other."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of q, k and v [B, H, 1 + K, D]: [B, 1 + K, C]."""
        return attention(q, k, v)


class _Equal(_Groups):
    """Groups of equal size, and CLS: the tokens of each frame, or of each position through time."""

    def __init__(self, T: int, through_time: bool) -> None:
        self.T, self.through_time = T, through_time

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, first = q.shape[0], attention(q[:, :, :1], k, v)
        # Four dimensions: the fused kernels of SDPA do not take five.
        cut = (self._cut(q, False), self._cut(k, True), self._cut(v, True))
        out = attention(*(x.flatten(0, 1) for x in cut)).unflatten(0, (B, -1))  # [B, G, N, C]
        out = out.transpose(1, 2) if self.through_time else out
        return torch.cat([first, out.flatten(1, 2)], 1)

    def _cut(self, x: Tensor, with_cls: bool) -> Tensor:
        """[B, H, 1 + K, D] to [B, G, H, N, D], with CLS in front of each group if `with_cls`."""
        groups = x[:, :, 1:].unflatten(2, (self.T, -1)).transpose(1, 2)
        groups = groups.permute(0, 3, 2, 1, 4) if self.through_time else groups
        if not with_cls:
            return groups
        cls = x[:, None, :, :1].expand(-1, groups.shape[1], -1, -1, -1)
        return torch.cat([cls, groups], 3)


class _Masked(_Groups):
    """Groups of any size, as a boolean mask.

    Args:
        labels: the group of each token after CLS, [B, K].
    """

    def __init__(self, labels: Tensor) -> None:
        labels = F.pad(labels, (1, 0), value=-1)
        same = labels[:, :, None] == labels[:, None]
        self.mask = (same | (labels < 0)[:, :, None] | (labels < 0)[:, None])[:, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, self.mask)


class BaselineSpaceTime(SpaceTimeTransformer):
    """The encoder of Frozen in Time, on batches instead of packed rows."""

    def forward(self, video: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        x, T = self.embed(video, ids_keep)
        space, time = self._cut(T, ids_keep)
        for block in self.blocks:
            x = block(x, space, time)
        return self.norm(x)

    def _cut(self, T: int, ids_keep: Tensor | None) -> tuple[_Groups, _Groups]:
        patches = self.grid[0] * self.grid[1]
        even = ids_keep is None or self.time == "slot"
        if ids_keep is None or even:
            space: _Groups = _Equal(T, through_time=False)
        else:
            space = _Masked(ids_keep // patches)
        if self.time == "joint":
            return space, _Groups()
        if ids_keep is None or even:
            return space, _Equal(T, through_time=True)
        return space, _Masked(ids_keep % patches)


class BaselineAttention(BertAttention):
    """Attention over padded captions; `groups` is a boolean mask, True for words, or None."""

    def scored(
        self, x: Tensor, context: Tensor, groups: Any, backend: str, scores: Scores | None
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(groups, Groups):  # not of captions
            return super().scored(x, context, groups, "torch", scores)
        project: Any = self.self
        q, k, v = (
            heads(y, self.heads)
            for y in (project.query(x), project.key(context), project.value(context))
        )
        out = self.output(attention(q, k, v, groups), x)
        if scores is None:
            return out, None
        logits = q[:, :, :1] @ k.mT * q.shape[-1] ** -0.5
        return out, logits.float().softmax(-1).mean(1)[:, 0]


class BaselineBert(Bert):
    """Encodes captions that are padded to the longest."""

    def encode(
        self, ids: Tensor, attention_mask: Tensor | None = None, *, words: int | None = None
    ) -> Tensor:
        columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        x, mask = self.embeddings(ids, columns), _keys(attention_mask)
        for layer in self._layers()[: self.text_layers]:
            x = layer(x, mask, "")
        return x

    def fuse(
        self, text: Tensor, attention_mask: Tensor | None, visual: Tensor, *,
        partner: Tensor | None = None, cu_visual: Tensor | None = None,
        max_visual: int | None = None, words: int | None = None, keys: KeysOfText | None = None,
    ) -> Tensor:  # fmt: skip
        if cu_visual is not None:
            raise ValueError("need equally many tokens in every clip, got cu_visual")
        visual = visual if partner is None else visual[partner]
        x, mask = text, _keys(attention_mask)
        last = self.text_layers + self.fusion_layers
        for number, layer in enumerate(self._layers()[self.text_layers : last]):
            if keys is None or number != keys.layer or not keys.drops(visual.shape[1]):
                x = layer(x, mask, "", visual, None)
            else:
                x, scores = layer(x, mask, "", visual, None, "cls")
                visual = keys.select(visual, scores, backend="torch")
        return x

    def merge(
        self, text: Tensor, attention_mask: Tensor | None, clips: Tensor, *,
        partner: Tensor | None = None, words: int | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        clips = clips if partner is None else clips[partner]
        x, mask = torch.cat([text, clips], 1), None
        if attention_mask is not None:
            mask = _keys(F.pad(attention_mask != 0, (0, clips.shape[1]), value=True))
        for layer in self._layers()[self.text_layers + self.fusion_layers :]:
            x = layer(x, mask, "")
        return x[:, : text.shape[1]], x[:, text.shape[1] :]


def _keys(attention_mask: Tensor | None) -> Tensor | None:
    return None if attention_mask is None else (attention_mask != 0)[:, None, None]


SWAPS: dict[type, type] = {
    DividedBlock: BaselineDividedBlock,
    SpaceTimeTransformer: BaselineSpaceTime,
    BertAttention: BaselineAttention,
    Bert: BaselineBert,
}
