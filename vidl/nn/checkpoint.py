"""Weights of others into our modules: everything that does not fit is named."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn


def load(module: nn.Module, weights: Mapping[str, Tensor], optional: Sequence[str] = ()) -> None:
    """Load `weights`, which must be exactly those of `module`.

    Args:
        module: whose parameters and buffers are overwritten.
        weights: by the names of `module`.
        optional: parts of a name whose parameters `weights` may lack; they stay as they are.

    Raises:
        ValueError: a name is missing or unexpected, or a shape differs; names all of them.
    """
    own = module.state_dict()
    lacking = [name for name in own if name not in weights]
    missing = [name for name in lacking if not any(part in name for part in optional)]
    unexpected = [name for name in weights if name not in own]
    shapes = [
        f"{name} {tuple(weights[name].shape)}, need {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    found = [f"{what}: {', '.join(names)}" for what, names in problems.items() if names]
    if found:
        raise ValueError(
            f"the weights do not fit {type(module).__name__}: " + "; ".join(found) + ". "
            "Build it with the sizes of the checkpoint, or map its names"
        )
    module.load_state_dict(dict(weights), strict=False)
