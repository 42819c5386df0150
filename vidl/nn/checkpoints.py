"""Published weights: rename them to timm's names, resample positions, and explain misfits."""

import math
import re
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Prefixes of the encoder's weights in larger models: OpenAI's CLIP and open_clip; Hugging Face's
# CLIP; Hugging Face's ViT, MAE and BEiT with a head; Frozen in Time.
TOWERS = ("visual.", "vision_model.", "vit.", "beit.", "module.video_model.", "video_model.")

_BLOCK = r"(?:encoder\.|transformer\.)?(?:layers?|resblocks)\.(\d+)\."
RENAMES = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"conv1\.", "patch_embed.proj."),
        (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"embeddings\.patch_embedding\.", "patch_embed.proj."),
        (r"(?:embeddings\.)?(?:class_embedding|cls_token)$", "cls_token"),
        (r"(?:embeddings\.)?(?:position_embeddings|positional_embedding)$", "pos_embed"),
        (r"embeddings\.position_embedding\.weight$", "pos_embed"),
        (r"(?:ln_pre|pre_layrnorm)\.", "norm_pre."),
        (r"(?:ln_post|post_layernorm|layernorm)\.", "norm."),
        (_BLOCK + r"(?:ln_1|layer_norm1|layernorm_before)\.", r"blocks.\1.norm1."),
        (_BLOCK + r"(?:ln_2|layer_norm2|layernorm_after)\.", r"blocks.\1.norm2."),
        (_BLOCK + r"attn\.in_proj_", r"blocks.\1.attn.qkv."),
        (_BLOCK + r"(?:self_attn|attention)\.([qkv])_proj\.", r"blocks.\1.attn.\2."),
        (_BLOCK + r"attention\.attention\.([qkv])(?:uery|ey|alue)\.", r"blocks.\1.attn.\2."),
        (_BLOCK + r"(?:self_attn|attn)\.out_proj\.", r"blocks.\1.attn.proj."),
        (_BLOCK + r"attention\.(?:o_proj|output\.dense)\.", r"blocks.\1.attn.proj."),
        (_BLOCK + r"(?:mlp\.c_fc|mlp\.fc1|intermediate\.dense)\.", r"blocks.\1.mlp.fc1."),
        (_BLOCK + r"(?:mlp\.c_proj|mlp\.fc2|output\.dense)\.", r"blocks.\1.mlp.fc2."),
        (_BLOCK + r"lambda_([12])$", r"blocks.\1.gamma_\2"),
        (_BLOCK + r"(?:attention\.attention\.)?relative_position_bias\.", r"blocks.\1.attn."),
        (r"(?:encoder\.)?(?:shared_position_bias|relative_position_bias)\.", "rel_pos_bias."),
    )
]


def timm_names(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of a ViT under timm's names.

    It renames the weights of timm (ViT, DeiT; MAE has the same names), OpenAI's CLIP, open_clip,
    and Hugging Face's ViT, ViTMAE, CLIP and BEiT, and joins separate query, key and value
    projections. Unknown names stay as they are.

    Returns:
        The weights, and the names of weights outside the vision tower of a larger model.
    """
    tower = next((t for t in TOWERS if any(name.startswith(t) for name in state_dict)), "")
    state, others = {}, [name for name in state_dict if not name.startswith(tower)]
    for name, value in state_dict.items():
        if not name.startswith(tower):
            continue
        name = name.removeprefix(tower)
        for pattern, replacement in RENAMES:
            if pattern.match(name):
                name = pattern.sub(replacement, name, count=1)
                break
        state[name] = value
    for name in [n for n in state if ".attn.q." in n]:
        parts = [name.replace(".attn.q.", f".attn.{p}.") for p in "qkv"]
        if all(part in state for part in parts):
            whole = torch.cat([state.pop(part) for part in parts])
            state[name.replace(".attn.q.", ".attn.qkv.")] = whole
    for name in ("cls_token", "pos_embed"):
        if name in state:
            state[name] = state[name].reshape((1,) * (3 - state[name].ndim) + state[name].shape)
    return state, others


def resample_position(position: Tensor, grid: tuple[int, int], prefix: int = 1) -> Tensor:
    """Resample position embeddings to another grid (bicubic), as timm does.

    Args:
        position: [1, prefix + P, C], of a square grid of P patches.
        grid: rows and columns of the result.
        prefix: number of embeddings in front that belong to prefix tokens; these stay as they are.

    Raises:
        ValueError: P is not a square number.
    """
    patches = position.shape[1] - prefix
    if patches == math.prod(grid):
        return position
    side = math.isqrt(max(patches, 0))
    if side * side != patches or side == 0:
        raise ValueError(
            f"need positions of a square grid to resample to {grid}, got {patches} patches"
        )
    first, rest = position[:, :prefix], position[:, prefix:]
    rest = rest.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    rest = F.interpolate(rest, grid, mode="bicubic", antialias=True)
    rest = rest.permute(0, 2, 3, 1).flatten(1, 2).to(position.dtype)
    return torch.cat([first, rest], 1)


def load_or_explain(
    module: nn.Module, state_dict: Mapping[str, Tensor], may_miss: Iterable[str] = ()
) -> None:
    """Load all weights, or raise an error that names every misfit and load none.

    Args:
        module: the module to load into.
        state_dict: the weights by name.
        may_miss: names that may be missing.

    Raises:
        ValueError: weights are missing, unexpected, or of another shape.
    """
    check_fit(module, state_dict, may_miss)
    module.load_state_dict(dict(state_dict), strict=False)


def check_fit(
    module: nn.Module, state_dict: Mapping[str, Tensor], may_miss: Iterable[str] = ()
) -> None:
    """Raise the error of `load_or_explain`, and load nothing; arguments are its own."""
    own = module.state_dict()
    missing = sorted(own.keys() - state_dict.keys() - set(may_miss))
    unexpected = sorted(state_dict.keys() - own.keys())
    shapes = [
        f"{name} {list(state_dict[name].shape)}, not {list(own[name].shape)}"
        for name in own.keys() & state_dict.keys()
        if own[name].shape != state_dict[name].shape
    ]
    wrong = [("missing", missing), ("unexpected", unexpected), ("of another shape", sorted(shapes))]
    if misfits := [f"{what}: {', '.join(names)}" for what, names in wrong if names]:
        raise ValueError(
            f"these weights do not fit {type(module).__name__}; {'; '.join(misfits)}. Nothing was "
            "loaded: build the module with the options of the model that the weights come from"
        )
