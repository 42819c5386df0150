"""ViViT of transformers: tubelets are embedded without a Conv3d.

Its attention is in huggingface_attention.py. Source: ViViT, arXiv 2103.15691, 3.2.
"""

from typing import Any

import transformers.models.vivit.modeling_vivit as vivit
from torch import Tensor

from vidl.kernels.masked_patch_embed import masked_patch_embed
from vidl.swapping.patches import whole_patches
from vidl.swapping.rules import Family, Rule, state_of


class VivitTubeletEmbeddings(vivit.VivitTubeletEmbeddings):
    """One product of matrices."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        state, projection = state_of(self), self.projection
        assert state is not None
        video = pixel_values.transpose(1, 2)
        return masked_patch_embed(video, projection.weight, projection.bias, backend=state.backend)


def _why_not(embeddings: Any) -> str | None:
    return whole_patches(embeddings.projection)


FAMILY = Family(rules=[Rule(vivit.VivitTubeletEmbeddings, VivitTubeletEmbeddings, _why_not)])
