"""Reference models: each reads like the figure of its paper, and calls the ops."""

import dataclasses
from typing import Any

from vidl.models.answering import Answering, frequent_answers
from vidl.models.mac import Mac, MacRecipe
from vidl.models.recipe import Recipe
from vidl.models.smaug import Smaug, SmaugRecipe
from vidl.models.summary import Cost, Summary, summarize
from vidl.models.two_towers import TwoTowers

from . import mac, smaug

__all__ = [
    "MODELS",
    "Answering",
    "Cost",
    "Mac",
    "MacRecipe",
    "Recipe",
    "Smaug",
    "SmaugRecipe",
    "Summary",
    "TwoTowers",
    "create",
    "frequent_answers",
    "recipe",
    "summarize",
]

MODELS: dict[str, Any] = {"smaug": (Smaug, smaug.PRESETS), "mac": (Mac, mac.PRESETS)}


def recipe(name: str, preset: str = "base", **overrides: Any) -> Recipe:
    """The recipe of a model, from a preset.

    Args:
        name: "smaug" or "mac".
        preset: "tiny", which trains on a CPU, "small" or "base".
        overrides: fields of the recipe with another value.

    Raises:
        ValueError: there is no such model, preset or field, or the fields do not fit together.
    """
    if name not in MODELS:
        raise ValueError(f"need a model among {', '.join(MODELS)}, got {name!r}")
    presets = MODELS[name][1]
    if preset not in presets:
        raise ValueError(f"need a preset among {', '.join(presets)}, got {preset!r}")
    fields = [field.name for field in dataclasses.fields(presets[preset])]
    if unknown := sorted(set(overrides) - set(fields)):
        raise ValueError(f"{name} has no {', '.join(unknown)}; it has {', '.join(fields)}")
    return dataclasses.replace(presets[preset], **overrides)


def create(name: str, preset: str = "base", **overrides: Any) -> Any:
    """A model with fresh weights.

    `create("smaug", preset="tiny", mask_ratio=0.5)`; arguments and errors are those of `recipe`.
    """
    made = recipe(name, preset, **overrides)  # its errors first
    return MODELS[name][0](made)
