"""Counter-based random numbers.

A number depends on (seed, step, stream, sample, i) only, so a resumed run, another split into
batches or ranks, and another device draw the same numbers. All arithmetic is on integers below
2^63.
"""

from typing import Any

import torch
from torch import Tensor

from vidl.kernels.arguments import check_count, check_dtype, check_shape, check_tensors

Word = Any  # an int or an int64 tensor: the same arithmetic on the host and on the device

BITS = 0xFFFFFFFF
# lowbias32, a two-round 32-bit mixer of very low bias. The second constant is 0x846CA68B - 2^32: it
# gives the same 32-bit product without overflow in 64 bits.
FIRST, SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
GOLDEN = 0x9E3779B9 - (1 << 32)  # steps of 2^32 / golden ratio spread the counter over all bits


def uniform(seed: int, step: int | Tensor, samples: Tensor, n: int, *, stream: int = 0) -> Tensor:
    """Draw `n` reproducible uniform random numbers for each sample.

        out[b, i] = hash(seed, step, stream, samples[b], i) / 2^24, 24 bits of the hash

    No state, no host synchronisation, and the same bits on every device.

    Args:
        seed: seed of the run, >= 0.
        step: training step, >= 0: an int, or an int64 scalar tensor on the device of `samples`
            (`torch.compile` does not recompile when its value changes).
        samples: index of each sample in the data set, [B] int64.
        n: number of random numbers for each sample.
        stream: >= 0; different streams of one sample are independent.

    Returns:
        [B, n] float32 in [0, 1), multiples of 2^-24, without a gradient.

    Raises:
        TypeError: `samples` or a tensor `step` is not int64.
        ValueError: a shape, a device or a number does not fit.

    Source: counter-based generators, Salmon et al., SC 2011; the mixer: hash-prospector, lowbias32.
    """
    _check(seed, step, samples, n, stream)
    if torch.compiler.is_compiling() and samples.device.type == "cpu":
        # Inductor inlines both uses of `x` in each line of `_mix`: a fused kernel took it a minute.
        # On a GPU the draws stay inlined, since a fused kernel is one launch.
        step = step if isinstance(step, Tensor) else torch.full((), step, dtype=torch.int64)
        return _opaque(seed, step, samples, n, stream)
    return _draw(seed, step, samples, n, stream)


def _draw(seed: int, step: int | Tensor, samples: Tensor, n: int, stream: int) -> Tensor:
    # 64 bits of state: with 32, two of 2^16 samples would share their numbers.
    low: Word = 0x243F6A88
    high: Word = 0x13198A2E
    for number in (seed, stream, step, samples):
        for word in _words(number):
            low, high = _mix(low ^ word), _mix((high + _mix(word ^ 0x3C6EF372)) & BITS)
    counter = torch.arange(n, dtype=torch.int64, device=samples.device) * GOLDEN
    drawn = _mix(_mix((counter + low[:, None]) & BITS) ^ high[:, None])
    return (drawn >> 8).float() * 2.0**-24


@torch.library.custom_op("vidl::uniform", mutates_args=())
def _opaque(seed: int, step: Tensor, samples: Tensor, n: int, stream: int) -> Tensor:
    return _draw(seed, step, samples, n, stream)


@_opaque.register_fake
def _(seed: int, step: Tensor, samples: Tensor, n: int, stream: int) -> Tensor:
    return samples.new_empty((samples.shape[0], n), dtype=torch.float32)


def _words(number: Word) -> tuple[Word, Word]:
    """The lower and the upper 32 bits."""
    return number & BITS, number >> 32 & BITS


def _mix(x: Word) -> Word:
    """A 32-bit bijection in which each input bit flips about half of the output bits."""
    x = x ^ (x >> 16)
    x = x * FIRST & BITS
    x = x ^ (x >> 15)
    x = x * SECOND & BITS
    return x ^ (x >> 16)


def _check(seed: int, step: int | Tensor, samples: Tensor, n: int, stream: int) -> None:
    check_tensors(samples=samples)
    check_dtype("samples", samples, torch.int64)
    check_shape("samples", samples, "B")
    if isinstance(step, Tensor):
        check_dtype("step", step, torch.int64)
        if step.ndim != 0 or step.device != samples.device:
            raise ValueError(
                f"need a scalar step on {samples.device}, got {tuple(step.shape)} on {step.device}"
            )
    else:
        check_count("step", step)
    for name, number in (("seed", seed), ("n", n), ("stream", stream)):
        check_count(name, number)
        if number >= 2**63:
            raise ValueError(f"need {name} in [0, 2^63), got {number}")
