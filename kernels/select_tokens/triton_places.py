"""The place of a token among the kept tokens of its sample, in Triton.

The key of a token is an integer; the order of keys is the total order of the op's contract. In the
order of scores, a token's place is the number of larger keys. In the order of indices, a search for
the K-th largest key, two bits at a time, decides which tokens are kept, and a token's place is the
number of kept tokens before it.
"""

import triton
import triton.language as tl


@triton.jit
def score_keys(ranks_ptr, stride, n, N, index_bits):
    """A key for each token n: larger for higher scores, then for lower indices; -1 beyond N."""
    score = tl.load(ranks_ptr + n.to(tl.int64) * stride, mask=n < N, other=0)
    score = tl.where(score == 0, 0.0, score)  # not -0.0
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    bits = tl.where(score == score, bits, -0x80000000)
    one = tl.full([1], 1, tl.int64)
    key = ((bits.to(tl.int64) + 0x80000000) << index_bits) + ((one << index_bits) - 1 - n)
    return tl.where(n < N, key, -1)


@triton.jit
def threshold_of(ranks_ptr, stride, N, K, index_bits, BLOCK: tl.constexpr):
    """The K-th largest key, two bits at a time: the largest number that K keys reach."""
    threshold = tl.zeros([1], tl.int64)
    bit = (32 + index_bits + 1) // 2 * 2 - 2
    while bit >= 0:
        step = tl.full([1], 1, tl.int64) << bit
        counts = tl.zeros([BLOCK], tl.int64)  # three counts, of 21 bits each
        for start in range(0, N, BLOCK):
            key = score_keys(ranks_ptr, stride, start + tl.arange(0, BLOCK), N, index_bits)
            counts += (key >= threshold + step).to(tl.int64)
            counts += (key >= threshold + 2 * step).to(tl.int64) << 21
            counts += (key >= threshold + 3 * step).to(tl.int64) << 42
        count = tl.sum(counts, 0)
        reached = (count & 0x1FFFFF) >= K
        more = ((count >> 21) & 0x1FFFFF) >= K
        most = (count >> 42) >= K
        threshold += step * (reached.to(tl.int64) + more.to(tl.int64) + most.to(tl.int64))
        bit -= 2
    return threshold


@triton.jit
def place_by_index(ranks_ptr, stride, n, N, K, index_bits, BLOCK: tl.constexpr):
    """Whether each token is kept, and the number of kept tokens before it."""
    threshold = threshold_of(ranks_ptr, stride, N, K, index_bits, BLOCK)
    first = tl.minimum(tl.maximum(tl.min(n, 0), 0), N)
    counts = tl.zeros([BLOCK], tl.int32)
    for start in range(0, first, BLOCK):
        other = start + tl.arange(0, BLOCK)
        key = score_keys(ranks_ptr, stride, other, N, index_bits)
        counts += ((key >= threshold) & (other < first)).to(tl.int32)
    real = (n >= 0) & (n < N)
    key = score_keys(ranks_ptr, stride, tl.where(real, n, N), N, index_bits)
    kept = real & (key >= threshold)
    return kept, tl.sum(counts, 0) + tl.cumsum(kept.to(tl.int32), 0) - 1


@triton.jit
def place_by_score(
    ranks_ptr, stride, n, N, K, index_bits, RIVALS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Whether each token is kept, and the number of tokens with larger keys."""
    real = (n >= 0) & (n < N)
    key = score_keys(ranks_ptr, stride, tl.where(real, n, N), N, index_bits)
    better = tl.zeros([BLOCK_N, RIVALS], tl.int32)
    for start in range(0, N, RIVALS):
        rival = score_keys(ranks_ptr, stride, start + tl.arange(0, RIVALS), N, index_bits)
        better += (rival[None, :] > key[:, None]).to(tl.int32)
    place = tl.sum(better, 1)
    return real & (place < K), place
