"""Export the encoders of a model to files that timm and transformers load without vidl."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from vidl.files import replaced
from vidl.models.system import System, check_model
from vidl.nn import Bert, GridFeatures, SpaceTimeTransformer, TimeSformer, ViT
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


# From the names of our TimeSformer, those of its authors, to those of transformers.
_TIMESFORMER = {
    r"^patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
    r"^cls_token$": "embeddings.cls_token",
    r"^pos_embed$": "embeddings.position_embeddings",
    r"^time_embed$": "embeddings.time_embeddings",
    r"^norm\.": "layernorm.",
    r"^blocks\.": "encoder.layer.",
    r"\.temporal_norm1\.": ".temporal_layernorm.",
    r"\.temporal_attn\.qkv\.": ".temporal_attention.attention.qkv.",
    r"\.temporal_attn\.proj\.": ".temporal_attention.output.dense.",
    r"\.temporal_fc\.": ".temporal_dense.",
    r"\.norm1\.": ".layernorm_before.",
    r"\.attn\.qkv\.": ".attention.attention.qkv.",
    r"\.attn\.proj\.": ".attention.output.dense.",
    r"\.norm2\.": ".layernorm_after.",
    r"\.mlp\.fc1\.": ".intermediate.dense.",
    r"\.mlp\.fc2\.": ".output.dense.",
}


def _check_encoders(model: Any) -> None:
    """Raise unless timm and transformers have classes for both encoders."""
    check_model(model)
    visions = (ViT, SpaceTimeTransformer, TimeSformer, GridFeatures)
    for name, kinds in (("vision", visions), ("text", (Bert,))):
        part = getattr(model, name, None)
        if not isinstance(part, kinds):
            known = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(
                f"cannot export {type(model).__name__}: need {name} as {known}, got "
                f"{type(part).__name__}, which we do not map to a class of timm or transformers; "
                "vidl.training.open_run loads the run, whose model encodes clips and captions"
            )


def vision_weights(model: System) -> dict[str, Tensor]:
    """The clip encoder, or its part that timm or transformers has, under their parameter names.

    - `vidl.nn.ViT`: all weights, for timm's `VisionTransformer(num_classes=0)`, which computes the
      same without mask and pruning.
    - `vidl.nn.SpaceTimeTransformer`: the spatial layers, for the same class.
    - `vidl.nn.TimeSformer`: all weights, for transformers' `TimesformerModel`, without the patch
      embedding of images if it has one; of a model that sees images only, those that images use,
      for timm's `VisionTransformer`.
    - `vidl.nn.GridFeatures`: the CNN, for the ResNet of timm with its name, without classifier.
    """
    _check_encoders(model)
    own: Any = model
    vision = own.vision
    if isinstance(vision, GridFeatures):
        return vision.cnn.state_dict()
    state = vision.state_dict()
    if not isinstance(vision, TimeSformer):
        return _without(state, SpaceTimeTransformer.TIME)
    if _images_only(vision):
        images = _without(state, (*TimeSformer.TIME, "patch_embed."))
        return {name.replace("image_embed.", "patch_embed."): x for name, x in images.items()}
    clips = _without(state, ("image_embed.",))
    return {_renamed(name, _TIMESFORMER): x for name, x in clips.items()}


def _without(state: Mapping[str, Tensor], parts: Sequence[str]) -> dict[str, Tensor]:
    return {name: x for name, x in state.items() if not any(part in name for part in parts)}


def _images_only(vision: Any) -> bool:
    """Whether an encoder was trained on images, with their own patch embedding."""
    return vision.image_embed is not None and vision.num_frames == 1


def text_weights(model: System) -> dict[str, Tensor]:
    """The text layers under the parameter names of transformers' `BertModel` without a pooler.

    Without segments, under those of `DistilBertModel`. Fusion layers, merge layers and heads are
    left out; of ClipBERT, which has merge layers only, they are exported, with its pooler.
    """
    _check_encoders(model)
    own: Any = model
    text = own.text
    kept = tuple(f"encoder.layer.{layer}." for layer in range(_layers(text)))
    weights = {
        name: x for name, x in text.state_dict().items() if name.startswith(("embeddings.", *kept))
    }
    if _is_merged(text):
        pooler = own.pooler.state_dict()
        weights |= {f"pooler.dense.{name}": x for name, x in pooler.items()}
    if _has_segments(text):
        return weights
    return {_renamed(name, _DISTILBERT): x for name, x in weights.items()}


def _is_merged(text: Bert) -> bool:
    """Whether words have no layers of their own: all of them see clips, too."""
    return text.text_layers == 0


def _layers(text: Bert) -> int:
    return text.merge_layers if _is_merged(text) else text.text_layers


def text_config(model: System) -> dict[str, Any]:
    """The config.json for `text_weights`, as transformers reads it."""
    _check_encoders(model)
    own: Any = model
    text = own.text
    recipe, embeddings = model.recipe, text.embeddings
    first: Any = text.encoder.layer[0]
    mlp, positions = first.intermediate.dense.out_features, embeddings.max_positions
    if not _has_segments(text):
        return {
            "architectures": ["DistilBertModel"], "model_type": "distilbert",
            "vocab_size": recipe.vocabulary.size, "dim": text.width, "n_layers": _layers(text),
            "n_heads": recipe.text_heads, "hidden_dim": mlp, "max_position_embeddings": positions,
            "dropout": recipe.dropout, "attention_dropout": 0.0, "activation": "gelu",
            "sinusoidal_pos_embds": False, "pad_token_id": 0,
        }  # fmt: skip
    segments: Any = embeddings.token_type_embeddings
    return {
        "architectures": ["BertModel"], "model_type": "bert",
        "vocab_size": recipe.vocabulary.size, "hidden_size": text.width,
        "num_hidden_layers": _layers(text), "num_attention_heads": recipe.text_heads,
        "intermediate_size": mlp, "max_position_embeddings": positions,
        "type_vocab_size": segments.num_embeddings, "hidden_dropout_prob": recipe.dropout,
        "attention_probs_dropout_prob": 0.0, "hidden_act": "gelu", "layer_norm_eps": EPS,
        "pad_token_id": 0,
    }  # fmt: skip


def vision_options(model: System) -> dict[str, Any]:
    """The arguments of timm's `VisionTransformer` for `vision_weights`, and "mean" and "std".

    "mean" and "std" normalise pixels in 0 to 1; they are not arguments of `VisionTransformer`.

    Raises:
        ValueError: the weights are not for this class, or tubelet_size > 1, which it does not
            support.
    """
    _check_encoders(model)
    own: Any = model
    if vision_class(model) != "VisionTransformer":
        raise ValueError(
            f"need a vision encoder for timm's VisionTransformer, got {type(own.vision).__name__}, "
            f"whose class is {vision_class(model)}"
        )
    r = model.recipe
    _check_patches(r)
    sizes = dict(img_size=r.image_size, patch_size=r.patch_size, embed_dim=r.width, depth=r.depth)
    return {**sizes, "num_heads": r.heads, "num_classes": 0, "mean": r.mean, "std": r.std}


def _check_patches(recipe: Any) -> None:
    if recipe.tubelet_size > 1:
        raise ValueError(
            "need tubelet_size 1: patches of timm's VisionTransformer and of transformers' "
            f"TimesformerModel have one frame, got {recipe.tubelet_size}"
        )


def vision_class(model: System) -> str:
    """The class that `vision_weights` are for.

    Returns:
        "VisionTransformer" or "ResNet" of timm, or "TimesformerModel" of transformers.
    """
    _check_encoders(model)
    own: Any = model
    if isinstance(own.vision, GridFeatures):
        return "ResNet"
    clips = isinstance(own.vision, TimeSformer) and not _images_only(own.vision)
    return "TimesformerModel" if clips else "VisionTransformer"


def vision_config(model: System) -> dict[str, Any]:
    """The config.json for `vision_weights`.

    `timm.create_model("local-dir:...")` reads it, or `transformers.AutoModel` if `vision_class` is
    "TimesformerModel".

    Raises:
        ValueError: tubelet_size > 1; see `vision_options`.
    """
    kind = vision_class(model)
    own: Any = model
    r = own.recipe
    if kind == "TimesformerModel":
        _check_patches(r)
        return {
            "architectures": [kind], "model_type": "timesformer", "image_size": r.image_size,
            "patch_size": r.patch_size, "num_channels": 3, "num_frames": r.frames,
            "hidden_size": r.width, "num_hidden_layers": r.depth, "num_attention_heads": r.heads,
            "intermediate_size": 4 * r.width, "hidden_act": "gelu", "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0, "layer_norm_eps": 1e-6, "qkv_bias": True,
            "attention_type": "divided_space_time", "drop_path_rate": 0,
        }  # fmt: skip
    if kind == "ResNet":
        architecture, options = r.cnn, {"output_stride": r.stride}
        width, pool = own.vision.cnn.num_features, "avg"
        ends = {"first_conv": own.vision.cnn.default_cfg["first_conv"], "classifier": "fc"}
    else:
        # any architecture of VisionTransformer: model_args override its sizes
        architecture, options = "vit_base_patch16_224", vision_options(model)
        del options["mean"], options["std"]
        width, pool = r.width, "token"
        ends = {"first_conv": "patch_embed.proj", "classifier": "head"}
    return {
        "architecture": architecture, "model_args": options, "num_classes": 0,
        "num_features": width, "global_pool": pool,
        "pretrained_cfg": {
            "input_size": [3, r.image_size, r.image_size], "fixed_input_size": kind != "ResNet",
            "num_classes": 0, "crop_pct": 1.0, "interpolation": "bilinear", "mean": r.mean,
            "std": r.std, "custom_load": False, **ends,
        },
    }  # fmt: skip


def _preprocessor(recipe: Any) -> dict[str, Any]:
    """The preprocessor_config.json beside the config.json of `TimesformerModel`."""
    side = recipe.image_size
    return {
        "image_processor_type": "VideoMAEImageProcessor", "do_resize": True,
        "size": {"shortest_edge": side}, "do_center_crop": True,
        "crop_size": {"height": side, "width": side}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": recipe.mean,
        "image_std": recipe.std,
    }  # fmt: skip


def tokenizer_config(model: System) -> dict[str, Any]:
    """The tokenizer_config.json beside tokenizer.json, as transformers reads it."""
    check_model(model)
    own: Any = model
    inputs = ["input_ids", "attention_mask"]
    if _has_segments(own.text):
        inputs.insert(1, "token_type_ids")
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": inputs,
        "model_max_length": own.text.embeddings.max_positions, **names,
    }  # fmt: skip


@runtime_checkable
class Tokenizer(Protocol):
    """What `export` needs of a `vidl.data.text.Tokenizer`."""

    pad_id: int

    def __len__(self) -> int: ...

    def save(self, file: str | Path) -> None: ...


def export(model: System, folder: str | Path, tokenizer: Tokenizer) -> list[Path]:
    """Write both encoders and the tokenizer.

    `vision/` has model.safetensors, config.json for `timm.create_model("local-dir:...",
    pretrained=True)`, and timm.json, the arguments of `timm.models.VisionTransformer`, if
    `vision_class` is that. For "TimesformerModel" config.json and preprocessor_config.json are
    those of transformers. `text/` has
    model.safetensors and config.json for `transformers.AutoModel`, and tokenizer.json and
    tokenizer_config.json for `AutoTokenizer`.

    Args:
        model: on any device; for `Answering` pass its `model`.
        folder: output folder; created if missing.
        tokenizer: tokenizer of the run.

    Returns:
        The files.

    Raises:
        ValueError: the vocabulary of the tokenizer is larger than that of the model, there is no
            class for an encoder, or tubelet_size > 1; nothing is written.
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
        "vision": {"config.json": vision_config(model), **_more_of_vision(model)},
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


def _more_of_vision(model: System) -> dict[str, Any]:
    """The other files of `vision/`."""
    kind = vision_class(model)
    if kind == "TimesformerModel":
        return {"preprocessor_config.json": _preprocessor(model.recipe)}
    return {"timm.json": vision_options(model)} if kind == "VisionTransformer" else {}


def _has_segments(text: Bert) -> bool:
    return text.embeddings.token_type_embeddings is not None


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for pattern, theirs in names.items():
        name = re.sub(pattern, theirs, name)
    return name
