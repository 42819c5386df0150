"""Which files know which models, and with which versions of their libraries they were tested."""

import functools
import importlib
import re
import sys
import warnings

from torch import nn

from vidl.swapping.registry import Family

# A file of this folder, and the module that defines the classes it knows. Unless that is imported,
# no model can have them, and the file is not imported either.
FAMILIES = {
    "timm.attention": "timm.layers.attention",
    "huggingface.videomae": "transformers.models.videomae.modeling_videomae",
    "huggingface.timesformer": "transformers.models.timesformer.modeling_timesformer",
    "huggingface.bert": "transformers.models.bert.modeling_bert",
    "huggingface.bridgetower": "transformers.models.bridgetower.modeling_bridgetower",
    "huggingface.patches": "transformers.modeling_utils",
    "huggingface.pruning": "transformers.modeling_utils",
    "huggingface.masking": "transformers.modeling_utils",
    # After the others: it looks at what they made of a model.
    "huggingface.attention": "transformers.modeling_utils",
    "timm.embed": "timm.layers.patch_embed",
    "timm.naflex": "timm.models.naflexvit",
    "timm.vit": "timm.models.vision_transformer",
    "timm.pruning": "timm.models.eva",
    "timm.beit": "timm.models.beit",
}

# The first and the last version that the tests ran with.
TESTED = {"timm": ("1.0.31", "1.0.31"), "transformers": ("5.23.0", "5.24.0")}


def of(model: nn.Module) -> list[Family]:
    """The families that may know modules of a model."""
    libraries = {kind.__module__.split(".")[0] for m in model.modules() for kind in type(m).__mro__}
    found = []
    for file, defines in FAMILIES.items():
        library = defines.split(".")[0]
        if library in libraries and defines in sys.modules:
            check_version(library)
            try:
                found.append(importlib.import_module(f"vidl.swapping.{file}").FAMILY)
            except (ImportError, AttributeError) as error:  # another version lacks what it needs
                warnings.warn(
                    f"vidl.swap leaves models of {library} {sys.modules[library].__version__} "
                    f"({file}): {error}",
                    stacklevel=3,
                )
    return found


@functools.cache
def check_version(library: str) -> None:
    """Warn, once, of a library outside the versions that were tested."""
    first, last = TESTED[library]
    version = sys.modules[library].__version__
    if not _numbers(first) <= _numbers(version) <= _numbers(last):
        warnings.warn(
            f"vidl.swap was tested with {library} {first} to {last}, this is {version}: compare "
            "the outputs of your model before and after",
            stacklevel=4,
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:3])
