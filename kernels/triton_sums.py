"""Long sums in Triton."""

import triton
import triton.language as tl


@triton.jit
def add_compensated(term, total, lost):
    """total + term and what rounding cut off, by Kahan: errors would grow with the terms.

    An infinite total stays infinite.
    """
    term -= lost
    higher = total + term
    rest = (higher - total) - term
    return higher, tl.where(tl.abs(rest) < float("inf"), rest, 0.0)
