"""Compare a kernel with PyTorch: at most twice the error of PyTorch in the same dtype."""

from collections.abc import Sequence

import torch
from torch import Tensor


def random_like(x: Tensor) -> Tensor:
    """Random numbers in the dtype of `x`; the same on every device, up to rounding."""
    numbers = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return numbers.to(x.device, x.dtype)


def gradients(out: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """`out` and the gradients of `leaves` from a random gradient of `out`."""
    return [out, *torch.autograd.grad(out, leaves, random_like(out))]


def assert_as_accurate(
    ours: Tensor, low: Tensor, true: Tensor, dtype: torch.dtype, order: float = 0.0
) -> None:
    """The error of `ours` is at most twice that of `low`, in root mean square and maximum.

    Args:
        ours: from the kernel under test, computed in `dtype`.
        low: from plain PyTorch, computed in `dtype`.
        true: from plain PyTorch, computed in float64.
        order: the order of magnitude of the terms, if `true` is a smaller difference of them.
    """
    assert ours.shape == true.shape
    assert not ours.isnan().any(), "NaN: read outside the input, or output not written"
    if true.numel() == 0:
        return
    true = true.detach().cpu()
    errors = [(x.detach().cpu().double() - true).abs() for x in (ours, low)]
    # PyTorch may be exact by luck: 0.5 units in the last place are allowed, for the maximum 1.
    eps = torch.finfo(dtype).eps
    for size, slack in ((lambda x: x.square().mean().sqrt(), 0.5), (torch.max, 1.0)):
        our, theirs = (float(size(error)) for error in errors)
        bound = 2 * theirs + slack * eps * max(float(size(true.abs())), order)
        assert our <= bound, f"error {our:.2e}, PyTorch's own {theirs:.2e}, allowed {bound:.2e}"


def assert_model_as_accurate(
    ours: Sequence[Tensor], low: Sequence[Tensor], true: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """`assert_as_accurate` for all results of a model together, each divided by its RMS.

    Layers propagate rounding errors: a single small gradient may have twice the error by luck. A
    gradient that is zero in exact arithmetic, such as that of the bias of the keys, has rounding
    errors only: it is divided by the largest RMS.
    """
    assert [x.shape for x in ours] == [x.shape for x in true]
    sizes = torch.stack([x.double().square().mean().sqrt().nan_to_num() for x in true])
    largest = sizes.max().clamp(min=1e-30)
    units = torch.where(sizes > 1e-10 * largest, sizes, largest)

    def together(results: Sequence[Tensor]) -> Tensor:
        scaled = [x.detach().double() / u for x, u in zip(results, units, strict=True)]
        return torch.cat([x.flatten() for x in scaled])

    assert_as_accurate(together(ours), together(low), together(true), dtype)
