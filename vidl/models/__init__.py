"""Reference models, written with the ops of vidl."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from vidl.models.abilities import (
    Aligns,
    Describes,
    Encodes,
    Joins,
    Joint,
    Matches,
    Taught,
    can,
)
from vidl.models.alpro import Alpro, AlproRecipe
from vidl.models.answering import Answering, Answers, frequent_answers
from vidl.models.captioning import Captioning
from vidl.models.cards import Card
from vidl.models.clipbert import ClipBert, ClipBertRecipe
from vidl.models.finetuned import FineTuned
from vidl.models.fusing import FusionRecipe
from vidl.models.mac import Mac, MacRecipe
from vidl.models.omnivl import Omnivl, OmnivlRecipe
from vidl.models.pairing import Pairing
from vidl.models.ranking import Ranking
from vidl.models.recipe import Recipe, VitRecipe, types_of
from vidl.models.simvtp import SimVtp, SimVtpRecipe
from vidl.models.singularity import Singularity, SingularityRecipe
from vidl.models.smaug import Smaug, SmaugRecipe
from vidl.models.summary import Cost, Summary, summarize
from vidl.models.svitt import Svitt, SvittRecipe
from vidl.models.system import Inputs, Seen, System
from vidl.models.two_towers import TwoTowers
from vidl.models.vindlu import Vindlu, VindluRecipe
from vidl.models.vlc import Vlc, VlcRecipe
from vidl.overrides import convert

from . import alpro, clipbert, mac, omnivl, simvtp, singularity, smaug, svitt, vindlu, vlc

__all__ = [
    "MODELS",
    "Aligns",
    "Alpro",
    "AlproRecipe",
    "Answering",
    "Answers",
    "Captioning",
    "Card",
    "ClipBert",
    "ClipBertRecipe",
    "Cost",
    "Describes",
    "Encodes",
    "Entry",
    "FineTuned",
    "FusionRecipe",
    "Inputs",
    "Joins",
    "Joint",
    "Mac",
    "MacRecipe",
    "Matches",
    "Omnivl",
    "OmnivlRecipe",
    "Pairing",
    "Ranking",
    "Recipe",
    "Seen",
    "SimVtp",
    "SimVtpRecipe",
    "Singularity",
    "SingularityRecipe",
    "Smaug",
    "SmaugRecipe",
    "Summary",
    "Svitt",
    "SvittRecipe",
    "System",
    "Taught",
    "TwoTowers",
    "Vindlu",
    "VindluRecipe",
    "VitRecipe",
    "Vlc",
    "VlcRecipe",
    "can",
    "create",
    "frequent_answers",
    "recipe",
    "summarize",
]


class Entry(NamedTuple):
    """A system.

    Attributes:
        model: its class, made from a recipe.
        presets: recipes by name; "base" is the published one.
    """

    model: Any
    presets: Mapping[str, Recipe]

    def tasks(self) -> list[str]:
        """What the model can be evaluated on, by its abilities."""
        compares = can(self.model, Aligns) or can(self.model, Matches)
        can_do = {
            "retrieval": compares, "multiple choice": compares,
            "question answering": can(self.model, Joins),
            "captioning": can(self.model, Describes),
            "pairs": can(self.model, Joins) and can(self.model, Describes),
        }  # fmt: skip
        return [task for task, able in can_do.items() if able]


MODELS: dict[str, Entry] = {
    "smaug": Entry(Smaug, smaug.PRESETS),
    "mac": Entry(Mac, mac.PRESETS),
    "singularity": Entry(Singularity, singularity.PRESETS),
    "vindlu": Entry(Vindlu, vindlu.PRESETS),
    "svitt": Entry(Svitt, svitt.PRESETS),
    "simvtp": Entry(SimVtp, simvtp.PRESETS),
    "vlc": Entry(Vlc, vlc.PRESETS),
    "alpro": Entry(Alpro, alpro.PRESETS),
    "clipbert": Entry(ClipBert, clipbert.PRESETS),
    "omnivl": Entry(Omnivl, omnivl.PRESETS),
}


def recipe(name: str, preset: str = "base", **overrides: Any) -> Any:
    """The recipe of a model, from a preset.

    Args:
        name: a model in `MODELS`; `vidl systems` lists them.
        preset: "tiny", which trains on a CPU, "small", "base" and others of the model.
        overrides: fields of the recipe that differ from the preset.

    Raises:
        ValueError: unknown model, preset or field, or the fields do not fit together.
    """
    if name not in tuple(MODELS):
        raise ValueError(f"name: need a model among {', '.join(MODELS)}, got {name!r}")
    presets = MODELS[name].presets
    if preset not in tuple(presets):
        raise ValueError(f"need a preset among {', '.join(presets)}, got {preset!r}")
    hints = types_of(presets[preset])
    return dataclasses.replace(presets[preset], **convert(overrides, hints, of=name))


def create(name: str, preset: str = "base", **overrides: Any) -> Any:
    """A model with random weights, e.g. `create("smaug", preset="tiny", mask_ratio=0.5)`.

    Arguments and errors are those of `recipe`.
    """
    chosen = recipe(name, preset, **overrides)  # raises its errors
    return MODELS[name].model(chosen)


def name_of(recipe: Recipe) -> str:
    """The name of the model to which a recipe belongs."""
    return next(n for n, e in MODELS.items() if type(recipe) is type(e.presets["base"]))
