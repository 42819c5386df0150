"""timm's NaFlexVit with groups of valid tokens in place of its N x N mask."""

from typing import Any

import timm.models.naflexvit as timm_naflex
import torch
import torch.nn.functional as F
from torch import Tensor

from vidl.kernels.groups import Groups
from vidl.swapping.registry import Family, Rule, state_of
from vidl.swapping.timm.attention import FAMILY as ATTENTION


class NaFlexVit(timm_naflex.NaFlexVit):
    """timm's model without attention to padding.

    Padded tokens attend to one another, so their outputs differ from timm's; the model ignores
    them.
    """

    def _forward_embeds(
        self, x: Any, patch_coord: Any, patch_valid: Any, attn_mask: Any
    ) -> dict[str, Any]:
        if patch_valid is None or attn_mask is not None or not self._takes_groups():
            return super()._forward_embeds(x, patch_coord, patch_valid, attn_mask)
        # With a mask given, timm does not build its own.
        embeds = super()._forward_embeds(x, patch_coord, patch_valid, patch_valid)
        embeds["attn_mask"] = valid_groups(embeds["patch_valid"], self.num_prefix_tokens)
        return embeds

    def _takes_groups(self) -> bool:
        return all(state_of(block.attn) is not None for block in self.blocks)


def valid_groups(valid: Tensor, prefix: int) -> Groups:
    """Two groups a sample: its valid tokens, and its padding.

    Args:
        valid: which patches are valid, [B, N] bool.
        prefix: number of tokens before the patches of each sample, always valid.
    """
    B, N = valid.shape
    valid = F.pad(valid.bool(), (prefix, 0), value=True)
    labels = 2 * torch.arange(B, device=valid.device)[:, None] + (~valid).long()
    return Groups.labelled(labels.flatten(), 2 * B, N + prefix)


def why_not(model: Any) -> str | None:
    """The reason why this model keeps its mask, or None."""
    swapped = {rule.original: rule for rule in ATTENTION.rules}
    for name, block in model.blocks.named_children():
        attention: Any = block.attn
        rule = swapped.get(type(attention))
        reason = rule.why_not(attention) if rule else f"it is {type(attention).__name__}"
        if reason:
            return f"blocks.{name}.attn cannot take groups: {reason}"
    return None


FAMILY = Family(rules=[Rule(timm_naflex.NaFlexVit, NaFlexVit, why_not)])
