"""timm's `VisionTransformer`, embedding only the patches that its patch dropout keeps."""

from collections.abc import Iterator, Sequence
from typing import Any

import timm.models.vision_transformer as timm_vit
import torch
from timm.layers import PatchDropout, PatchEmbed
from timm.layers.patch_dropout import patch_dropout_forward
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

from vidl.kernels.masked_patch_embed import masked_patch_embed
from vidl.swapping.patches import why_not as why_not_convolution
from vidl.swapping.registry import Family, full_name, original, remember, state_of
from vidl.swapping.report import Change
from vidl.swapping.timm.tokens import refuse_grids


class VisionTransformer(timm_vit.VisionTransformer):
    """timm's model: patch dropout runs before the embedding, and layers may prune."""

    def forward_features(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        drops = self.training and isinstance(self.patch_drop, PatchDropout) and self.patch_drop.prob
        if not drops or attn_mask is not None or is_causal or embeds_all(self) is not None:
            return super().forward_features(x, attn_mask, is_causal)
        x = self.norm_pre(visible(self, x))
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        return self.norm(x)

    def forward_intermediates(self, *args: Any, **options: Any) -> Any:
        return refuse_grids(self, super().forward_intermediates, *args, **options)


def visible(model: Any, images: Tensor) -> Tensor:
    """Class and register tokens, then the patches that stay, all with position embeddings."""
    embed, drop, prefix = model.patch_embed, model.patch_drop, model.num_prefix_tokens
    B, patches = images.shape[0], embed.num_patches
    if tuple(images.shape[2:]) != tuple(embed.img_size):
        raise ValueError(f"need images of {embed.img_size}, got {tuple(images.shape[2:])}")
    # timm's own random draw, of patch numbers in place of tokens.
    numbers = torch.arange(patches, device=images.device).expand(B, -1).unsqueeze(-1)
    _, ids = patch_dropout_forward(numbers, drop.prob, 0, drop.ordered, True)
    tokens = [t.expand(B, -1, -1) for t in (model.cls_token, model.reg_token) if t is not None]
    position = None
    if model.pos_embed is not None:
        position = model.pos_embed[0]
        if not model.no_embed_class and prefix:
            tokens = [torch.cat(tokens, 1) + position[:prefix]]
            position = position[prefix:]
    state = state_of(model)
    assert state is not None
    weight, bias = embed.proj.weight, embed.proj.bias
    options: Any = {"ids_keep": ids, "backend": state.backend}
    x = masked_patch_embed(images.unsqueeze(2), weight, bias, position, **options)
    return torch.cat([*tokens, x], 1)


def embeds_all(model: Any) -> str | None:
    """The reason why this model must embed all patches before it drops some, or None."""
    embed = model.patch_embed
    if model.dynamic_img_size or embed.img_size is None or not embed.strict_img_size:
        return "it accepts images of any size"
    if original(embed) is not PatchEmbed or not embed.flatten:
        return f"its patch embedding is a {type(embed).__name__}, or does not flatten its output"
    if not isinstance(embed.norm, nn.Identity):
        return "its patch embedding has a norm"
    if model.pos_drop.p > 0:
        return f"it has dropout before patch dropout (pos_drop_rate={model.pos_drop.p})"
    return why_not_convolution(embed.proj)


def transformers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules whose class is exactly timm's, swapped or not."""
    for name, module in model.named_modules():
        if original(module) is timm_vit.VisionTransformer:
            yield name, module


def drop_first(model: nn.Module, backend: str) -> Sequence[Change]:
    """Run patch dropout before the patch embedding."""
    changes = []
    for name, module in transformers(model):
        if isinstance(module.patch_drop, PatchDropout):
            changes.append(_swap(name, module, backend, "embeds only patches that stay"))
    return changes


def mask(model: nn.Module, ratio: float, backend: str) -> Sequence[Change]:
    """`vidl.mask` of timm's ViT."""
    changes = []
    for name, module in transformers(model):
        change = _swap(name, module, backend, f"masks {ratio:g} of its patches in training")
        if change.became is not None:
            state = state_of(module)
            assert state is not None
            if "patch_drop" not in state.memory:
                state.memory["patch_drop"] = module.patch_drop
                state.undo.append(unmask)
            module.patch_drop = PatchDropout(ratio, module.num_prefix_tokens)
            module.patch_drop.train(module.training)
        changes.append(change)
    return changes


def unmask(model: Any) -> None:
    """Restore the model's own patch dropout."""
    state = state_of(model)
    assert state is not None
    model.patch_drop = state.memory["patch_drop"].train(model.training)


def _swap(name: str, module: Any, backend: str, note: str) -> Change:
    was = full_name(timm_vit.VisionTransformer)
    reason = embeds_all(module)
    if reason is not None:
        return Change(name, was, None, f"it embeds all patches: {reason}")
    remember(module, backend, swapped=VisionTransformer)
    return Change(name, was, full_name(VisionTransformer), note)


FAMILY = Family(whole=drop_first, mask=mask)
