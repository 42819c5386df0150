"""Reference models: SMAUG and MAC, written with the ops of vidl."""

import dataclasses
from typing import Any, get_type_hints

from vidl.models.answering import Answering, frequent_answers
from vidl.models.mac import Mac, MacRecipe
from vidl.models.recipe import Recipe
from vidl.models.smaug import Smaug, SmaugRecipe
from vidl.models.summary import Cost, Summary, summarize
from vidl.models.two_towers import TwoTowers
from vidl.overrides import convert

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
        overrides: fields of the recipe that differ from the preset.

    Raises:
        ValueError: unknown model, preset or field, or the fields do not fit together.
    """
    if name not in tuple(MODELS):
        raise ValueError(f"name: need a model among {', '.join(MODELS)}, got {name!r}")
    presets = MODELS[name][1]
    if preset not in tuple(presets):
        raise ValueError(f"need a preset among {', '.join(presets)}, got {preset!r}")
    hints = get_type_hints(type(presets[preset]))
    return dataclasses.replace(presets[preset], **convert(overrides, hints, of=name))


def create(name: str, preset: str = "base", **overrides: Any) -> Any:
    """A model with random weights, e.g. `create("smaug", preset="tiny", mask_ratio=0.5)`.

    Arguments and errors are those of `recipe`.
    """
    chosen = recipe(name, preset, **overrides)  # raises its errors
    return MODELS[name][0](chosen)
