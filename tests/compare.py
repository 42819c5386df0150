"""Compare a kernel with PyTorch: it may err as PyTorch does in the same dtype, twice at most."""

from collections.abc import Sequence

import torch
from torch import Tensor


def random_like(x: Tensor) -> Tensor:
    """The same random numbers in every dtype and on every device, rounded to those of `x`."""
    numbers = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return numbers.to(x.device, x.dtype)


def gradients(out: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """`out` and the gradients of its product with random numbers, in the order of `leaves`."""
    return [out, *torch.autograd.grad(out, leaves, random_like(out))]


def assert_as_accurate(
    ours: Tensor, low: Tensor, true: Tensor, dtype: torch.dtype, order: float = 0.0
) -> None:
    """`ours` is at most twice as far from `true` as `low`, in the mean square and at worst.

    Args:
        ours: of the kernel under test, computed in `dtype`.
        low: of plain PyTorch, computed in `dtype`.
        true: of plain PyTorch, computed in float64.
        order: of magnitude of what the result is a difference of, if `true` may be smaller.
    """
    assert ours.shape == true.shape
    assert not ours.isnan().any(), "NaN: something was read or left that should not have been"
    if true.numel() == 0:
        return
    true = true.detach().cpu()
    errors = [(x.detach().cpu().double() - true).abs() for x in (ours, low)]
    # PyTorch may be exact by luck: half a unit in the last place is always allowed, at worst one.
    eps = torch.finfo(dtype).eps
    for size, slack in ((lambda x: x.square().mean().sqrt(), 0.5), (torch.max, 1.0)):
        our, theirs = (float(size(error)) for error in errors)
        bound = 2 * theirs + slack * eps * max(float(size(true.abs())), order)
        assert our <= bound, f"error {our:.2e}, PyTorch's own {theirs:.2e}, allowed {bound:.2e}"


def assert_model_as_accurate(
    ours: Sequence[Tensor], low: Sequence[Tensor], true: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """The same for all results of a model together, each in units of its own root mean square.

    Layers hand their rounding errors on: by luck one small gradient may be twice as far off.
    """
    assert [x.shape for x in ours] == [x.shape for x in true]
    units = [x.double().square().mean().sqrt().clamp(min=1e-30) for x in true]

    def together(results: Sequence[Tensor]) -> Tensor:
        scaled = [x.detach().double() / u for x, u in zip(results, units, strict=True)]
        return torch.cat([x.flatten() for x in scaled])

    assert_as_accurate(together(ours), together(low), together(true), dtype)
