"""Export the encoders of a model to files that timm and transformers load without vidl."""

import json
import re
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from vidl.files import replaced
from vidl.models.system import check_model
from vidl.models.two_towers import TwoTowers
from vidl.nn import Bert, SpaceTimeTransformer, ViT
from vidl.nn.bert import EPS

# From our parameter names (those of BERT) to those of DistilBERT, which has no segments.
_DISTILBERT = {
    r"^encoder\.layer\.": "transformer.layer.",
    r"\.attention\.self\.query\.": ".attention.q_lin.",
    r"\.attention\.self\.key\.": ".attention.k_lin.",
    r"\.attention\.self\.value\.": ".attention.v_lin.",
    r"\.attention\.output\.dense\.": ".attention.out_lin.",
    r"\.attention\.output\.LayerNorm\.": ".sa_layer_norm.",
    r"\.intermediate\.dense\.": ".ffn.lin1.",
    r"\.output\.dense\.": ".ffn.lin2.",
    r"\.output\.LayerNorm\.": ".output_layer_norm.",
}


def _check_encoders(model: Any) -> None:
    """Raise unless timm and transformers have classes for both encoders."""
    check_model(model)
    for name, kinds in (("vision", (ViT, SpaceTimeTransformer)), ("text", (Bert,))):
        part = getattr(model, name, None)
        if not isinstance(part, kinds):
            known = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(
                f"cannot export {type(model).__name__}: need {name} as {known}, got "
                f"{type(part).__name__}"
            )


def vision_weights(model: TwoTowers) -> dict[str, Tensor]:
    """The frame encoder under the parameter names of timm's `VisionTransformer(num_classes=0)`.

    For `vidl.nn.ViT` these are all weights: without mask and pruning, timm computes the same. For
    `vidl.nn.SpaceTimeTransformer` these are the spatial layers.
    """
    _check_encoders(model)
    state = model.vision.state_dict()
    return {
        name: x
        for name, x in state.items()
        if not any(part in name for part in SpaceTimeTransformer.TIME)
    }


def text_weights(model: TwoTowers) -> dict[str, Tensor]:
    """The text layers under the parameter names of transformers' `BertModel` without a pooler.

    Without segments, under those of `DistilBertModel`. Fusion layers and heads are left out.
    """
    _check_encoders(model)
    text = model.text
    fusion = tuple(
        f"encoder.layer.{text.text_layers + layer}." for layer in range(text.fusion_layers)
    )
    state = text.state_dict()
    weights = {name: x for name, x in state.items() if not name.startswith(("cls.", *fusion))}
    if _has_segments(text):
        return weights
    return {_renamed(name): x for name, x in weights.items()}


def text_config(model: TwoTowers) -> dict[str, Any]:
    """The config.json for `text_weights`, as transformers reads it."""
    _check_encoders(model)
    text = model.text
    recipe, embeddings = model.recipe, text.embeddings
    first: Any = text.encoder.layer[0]  # type: ignore[index]
    mlp, positions = first.intermediate.dense.out_features, embeddings.max_positions
    if not _has_segments(text):
        return {
            "architectures": ["DistilBertModel"], "model_type": "distilbert",
            "vocab_size": recipe.vocabulary.size, "dim": text.width, "n_layers": text.text_layers,
            "n_heads": recipe.text_heads, "hidden_dim": mlp, "max_position_embeddings": positions,
            "dropout": recipe.dropout, "attention_dropout": 0.0, "activation": "gelu",
            "sinusoidal_pos_embds": False, "pad_token_id": 0,
        }  # fmt: skip
    segments: Any = embeddings.token_type_embeddings
    return {
        "architectures": ["BertModel"], "model_type": "bert",
        "vocab_size": recipe.vocabulary.size, "hidden_size": text.width,
        "num_hidden_layers": text.text_layers, "num_attention_heads": recipe.text_heads,
        "intermediate_size": mlp, "max_position_embeddings": positions,
        "type_vocab_size": segments.num_embeddings, "hidden_dropout_prob": recipe.dropout,
        "attention_probs_dropout_prob": 0.0, "hidden_act": "gelu", "layer_norm_eps": EPS,
        "pad_token_id": 0,
    }  # fmt: skip


def vision_options(model: TwoTowers) -> dict[str, Any]:
    """The arguments of timm's `VisionTransformer` for `vision_weights`, and "mean" and "std".

    "mean" and "std" normalise pixels in 0 to 1; they are not arguments of `VisionTransformer`.

    Raises:
        ValueError: tubelet_size > 1, which timm's `VisionTransformer` does not support.
    """
    _check_encoders(model)
    r = model.recipe
    if r.tubelet_size > 1:
        raise ValueError(
            "need tubelet_size 1: patches of timm's VisionTransformer have one frame, got "
            f"{r.tubelet_size}"
        )
    sizes = dict(img_size=r.image_size, patch_size=r.patch_size, embed_dim=r.width, depth=r.depth)
    return {**sizes, "num_heads": r.heads, "num_classes": 0, "mean": r.mean, "std": r.std}


def vision_config(model: TwoTowers) -> dict[str, Any]:
    """The config.json for `vision_weights`, as `timm.create_model("local-dir:...")` reads it.

    Raises:
        ValueError: see `vision_options`.
    """
    options = vision_options(model)
    mean, std = options.pop("mean"), options.pop("std")
    size = options["img_size"]
    return {
        # any architecture of VisionTransformer: model_args override its sizes
        "architecture": "vit_base_patch16_224", "model_args": options, "num_classes": 0,
        "num_features": model.recipe.width, "global_pool": "token",
        "pretrained_cfg": {
            "input_size": [3, size, size], "fixed_input_size": True, "num_classes": 0,
            "crop_pct": 1.0, "interpolation": "bilinear", "mean": mean, "std": std,
            "first_conv": "patch_embed.proj", "classifier": "head", "custom_load": False,
        },
    }  # fmt: skip


def tokenizer_config(model: TwoTowers) -> dict[str, Any]:
    """The tokenizer_config.json beside tokenizer.json, as transformers reads it."""
    check_model(model)
    inputs = ["input_ids", "attention_mask"]
    if _has_segments(model.text):
        inputs.insert(1, "token_type_ids")
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": inputs,
        "model_max_length": model.text.embeddings.max_positions, **names,
    }  # fmt: skip


@runtime_checkable
class Tokenizer(Protocol):
    """What `export` needs of a `vidl.data.text.Tokenizer`."""

    pad_id: int

    def __len__(self) -> int: ...

    def save(self, file: str | Path) -> None: ...


def export(model: TwoTowers, folder: str | Path, tokenizer: Tokenizer) -> list[Path]:
    """Write both encoders and the tokenizer.

    `vision/` has model.safetensors, config.json for `timm.create_model("local-dir:...",
    pretrained=True)`, and timm.json, the arguments of `timm.models.VisionTransformer`. `text/` has
    model.safetensors and config.json for `transformers.AutoModel`, and tokenizer.json and
    tokenizer_config.json for `AutoTokenizer`.

    Args:
        model: on any device; for `Answering` pass its `model`.
        folder: output folder; created if missing.
        tokenizer: tokenizer of the run.

    Returns:
        The files.

    Raises:
        ValueError: the vocabulary of the tokenizer is larger than that of the model, or see
            `vision_options`; nothing is written.
        OSError: a file cannot be written; names it.
    """
    check_model(model)
    from safetensors.torch import save as to_bytes

    if not isinstance(folder, (str, Path)):
        raise TypeError(f"need folder as a path, got {type(folder).__name__}")
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError(f"need tokenizer as a Tokenizer, got {type(tokenizer).__name__}")
    known = model.recipe.vocabulary.size
    if len(tokenizer) > known:
        raise ValueError(f"need a tokenizer of at most {known} tokens, got {len(tokenizer)}")
    text_facts = text_config(model) | {"pad_token_id": tokenizer.pad_id}
    facts = {
        "vision": {"config.json": vision_config(model), "timm.json": vision_options(model)},
        "text": {"config.json": text_facts, "tokenizer_config.json": tokenizer_config(model)},
    }
    files = []
    for name, weights in (("vision", vision_weights(model)), ("text", text_weights(model))):
        part = Path(folder) / name
        part.mkdir(parents=True, exist_ok=True)
        stored = {key: x.detach().cpu().contiguous() for key, x in weights.items()}
        files.append(part / "model.safetensors")
        with replaced(files[-1]) as unfinished:
            unfinished.write_bytes(to_bytes(stored, metadata={"format": "pt"}))
        for file, content in facts[name].items():
            files.append(part / file)
            with replaced(files[-1]) as unfinished:
                unfinished.write_text(json.dumps(content, indent=2) + "\n")
    files.append(Path(folder) / "text/tokenizer.json")
    tokenizer.save(files[-1])
    return files


def _has_segments(text: Bert) -> bool:
    return text.embeddings.token_type_embeddings is not None


def _renamed(name: str) -> str:
    for pattern, theirs in _DISTILBERT.items():
        name = re.sub(pattern, theirs, name)
    return name
