"""The selection kernel: a row a program, exact top-k by bisection of the bit pattern, without a sort.

A row of at most 16384 values lies in registers as integer keys that order as the values do. The k-th largest key is
built from the top bit down: a bit stays set if at least k keys reach the pattern. That is 32 counting passes over
registers (64 for float64), fewer where exactly k reach a pattern. Keys above it are chosen, and of those equal to it
the first in index order: how far they go is found in the same way. Nothing is added atomically.

Shape tags: N positions, BLOCK the power of two that holds them. UNIT: N, row_stride and partial_stride are in units of
16 bytes of scores wherever all are multiples of that; the multiplication tells the compiler so, and loads are wide.

    HAS_VALID    (B, N) uint8: what may be chosen
    PER_ROW      (B,) int64: k or fixed-point ratio of each row, in place of limit_high 2**24 + limit_low
    HAS_NOISE    Gumbel noise from Philox is added
    STAGED       keys are made CHUNK positions at a time and pass through memory: a thread that adds partials and draws
                 noise for all of its values at once spills registers
    HAS_INDICES  (B, width) int64: chosen positions, ascending, then -1; from cumulative sums of the mask, which is
                 read back CHUNK positions at a time, as registers that hold a row have no room for its ranks
"""

import triton
import triton.language as tl

# Not specialised, and all of them int32 whatever their value: a kernel is compiled once for its flags, block and dtype,
# and that is the binary that was proven ahead of time.
SIZES = (
    *("N", "partials", "row_stride", "partial_stride", "width"),
    *("limit_high", "limit_low", "is_ratio", "flip", "beyond_high", "beyond_low"),
)
ROUNDS = tl.constexpr(7)
RATIO_BITS = tl.constexpr(48)


@triton.jit
def uniform(Seed, Rows, row, first, LENGTH: tl.constexpr):
    """[LENGTH] float32 of a row's positions from ``first`` on, bit for bit those of ``philox.uniform``: a Philox block
    for four neighbours, with counter (n // 4, low half of the row's identity, high half, 0)."""
    identity = tl.load(Rows + row)
    block = first // 4 + tl.arange(0, LENGTH // 4)
    zero = block * 0
    low, high = zero + identity.to(tl.int32), zero + (identity >> 32).to(tl.int32)
    r0, r1, r2, r3 = tl.philox(tl.load(Seed), block, low, high, zero, ROUNDS)
    # join puts a new last axis: [LENGTH / 4, 2, 2] with word 2a + b at [a, b], so a reshape lays the words side by side
    words = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (LENGTH,))
    return ((words >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2**-23


@triton.jit
def sortable(value, flip, BITS: tl.constexpr):
    """Integer keys in the order of ``value``, +0 and -0 one, and NaN above the lowest integer alone; ``flip`` of -1
    turns the order of all but NaN. And whether it is NaN."""
    KEY: tl.constexpr = tl.int64 if BITS == 64 else tl.int32
    HIGHEST: tl.constexpr = 2 ** (BITS - 1) - 1
    INFINITE: tl.constexpr = 0x7FF0000000000000 if BITS == 64 else 0x7F800000
    bits = value.to(KEY, bitcast=True)
    magnitude = bits & HIGHEST
    key = tl.where(magnitude == 0, 0, bits ^ ((bits >> (BITS - 1)) & HIGHEST)) ^ flip.to(KEY)
    return tl.where(magnitude > INFINITE, -HIGHEST, key).to(KEY), magnitude > INFINITE


@triton.jit
def keys(
    Scores, Valid, Seed, Rows, row, first, length, partials, partial_stride, flip, beyond,
    UNIT: tl.constexpr, LENGTH: tl.constexpr, BITS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_NOISE: tl.constexpr,
):  # fmt: skip
    """[LENGTH] keys of a row's positions from ``first`` on, the lowest where not allowed or not beyond ``beyond``; how
    many are allowed, how many of those NaN. ``Scores`` and ``Valid`` begin at the row."""
    FLOAT: tl.constexpr = tl.float64 if BITS == 64 else tl.float32
    n = first + tl.arange(0, LENGTH)
    allowed = n < length
    step = partial_stride.to(tl.int64) * UNIT
    value = tl.zeros((LENGTH,), FLOAT)
    for partial in tl.range(0, partials, loop_unroll_factor=4 if LENGTH <= 256 else 1):  # a few loads under way
        value += tl.load(Scores + n + partial * step, mask=n < length, other=0.0).to(FLOAT)
    value *= tl.div_rn(1.0, partials.to(tl.float32)) if BITS == 32 else 1.0 / partials.to(FLOAT)
    if HAS_NOISE:
        value -= tl.log(-tl.log(uniform(Seed, Rows, row, first, LENGTH)))
    if HAS_VALID:
        allowed = allowed & (tl.load(Valid + n, mask=allowed, other=0) != 0)
    key, nan = sortable(value, flip, BITS)
    key = tl.where(allowed & (key > beyond), key, -(2 ** (BITS - 1))).to(key.dtype)
    return key, tl.sum(allowed.to(tl.int32), 0), tl.sum((allowed & nan).to(tl.int32), 0)


@triton.jit
def kth(key, k, BITS: tl.constexpr):
    """The k-th largest of ``key``, or a pattern below it that exactly k of them reach."""
    KEY: tl.constexpr = tl.int64 if BITS == 64 else tl.int32
    LOWEST: tl.constexpr = -(2 ** (BITS - 1))
    found = tl.where(tl.sum((key >= 0).to(tl.int32), 0) >= k, 0, LOWEST).to(KEY)
    bit = tl.full((), 2 ** (BITS - 2), KEY)
    while bit > 0:
        pattern = found | bit
        reached = tl.sum((key >= pattern).to(tl.int32), 0)
        found = tl.where(reached >= k, pattern, found)
        bit = tl.where(reached == k, 0, bit >> 1).to(KEY)
    return found


@triton.jit
def places(key, least, n, BLOCK: tl.constexpr):
    """Where a value lies that may be chosen, or else beyond all; those above the least come before all others."""
    return tl.where(key > least, -1, tl.where(key == least, n, 2 * BLOCK))


@triton.jit
def until(place, k, BLOCK: tl.constexpr):
    """A position with k of ``place`` before it, or the last that has no more; at least k lie before BLOCK."""
    end, bit = 0, BLOCK
    while bit > 0:
        further = end | bit
        before = tl.sum((place < further).to(tl.int32), 0)
        end = tl.where(before <= k, further, end)
        bit = tl.where(before == k, 0, bit >> 1)
    return end


@triton.jit(do_not_specialize=SIZES)
def topk_mask(
    Scores, Valid, Limit, Seed, Rows, Keys, Mask, Indices, Count, Nan,
    N, partials, row_stride, partial_stride, width,
    limit_high, limit_low, is_ratio, flip, beyond_high, beyond_low,
    UNIT: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr,
    HAS_VALID: tl.constexpr, PER_ROW: tl.constexpr, HAS_NOISE: tl.constexpr, STAGED: tl.constexpr,
    HAS_INDICES: tl.constexpr,
):  # fmt: skip
    """Mask (B, N) uint8, Indices (B, width), Count (B,) and Nan (B,) int64 of Scores (B, partials, N); Keys (B,
    BLOCK) is room for STAGED, of BITS bits."""
    KEY: tl.constexpr = tl.int64 if BITS == 64 else tl.int32
    LOWEST: tl.constexpr = -(2 ** (BITS - 1))
    row = tl.program_id(0).to(tl.int64)
    length = N * UNIT
    Scores += row * row_stride * UNIT
    Valid += row * length
    beyond = beyond_high.to(KEY)
    if BITS == 64:
        beyond = (beyond << 32) | (beyond_low.to(KEY) & 0xFFFFFFFF)
    n = tl.arange(0, BLOCK)
    if STAGED:
        Keys += row * BLOCK
        count, nan = 0, 0
        for first in range(0, BLOCK, CHUNK):
            key, more, more_nan = keys(
                Scores, Valid, Seed, Rows, row, first, length, partials, partial_stride, flip, beyond,
                UNIT, CHUNK, BITS, HAS_VALID, HAS_NOISE,
            )  # fmt: skip
            tl.store(Keys + first + tl.arange(0, CHUNK), key)
            count += more
            nan += more_nan
        tl.debug_barrier()  # what the program's other threads have stored is read
        key = tl.load(Keys + n)
    else:
        key, count, nan = keys(
            Scores, Valid, Seed, Rows, row, 0, length, partials, partial_stride, flip, beyond,
            UNIT, BLOCK, BITS, HAS_VALID, HAS_NOISE,
        )  # fmt: skip
    tl.store(Nan + row, nan.to(tl.int64))

    if PER_ROW:
        limit = tl.load(Limit + row)
    else:
        limit = (limit_high.to(tl.int64) << 24) + limit_low
    share = tl.maximum((limit * count) >> RATIO_BITS, tl.minimum(limit, 1))
    k = tl.minimum(tl.where(is_ratio != 0, share, tl.maximum(limit, 0)), count).to(tl.int32)
    k = tl.minimum(k, tl.sum((key > LOWEST).to(tl.int32), 0))

    least = kth(key, k, BITS)
    place = places(key, least, n, BLOCK)  # takes the keys' registers
    end = until(place, k, BLOCK)
    Mask += row * length
    Indices += row * width
    if not STAGED:
        tl.store(Mask + n, (place < end).to(tl.uint8), mask=n < length)
    if HAS_INDICES and not STAGED:
        tl.debug_barrier()
    before = 0
    for first in range(0, length if STAGED or HAS_INDICES else 0, CHUNK):
        part = first + tl.arange(0, CHUNK)
        if STAGED:
            chosen = places(tl.load(Keys + part), least, part, BLOCK) < end
            tl.store(Mask + part, chosen.to(tl.uint8), mask=part < length)
        else:
            chosen = tl.load(Mask + part, mask=part < length, other=0) != 0
        if HAS_INDICES:
            rank = before + tl.cumsum(chosen.to(tl.int32), 0) - 1
            tl.store(Indices + rank, part.to(tl.int64), mask=chosen & (rank < width))
            before += tl.sum(chosen.to(tl.int32), 0)
    tl.store(Count + row, k.to(tl.int64))
    if HAS_INDICES:
        for first in range(k // CHUNK * CHUNK, width, CHUNK):
            part = first + tl.arange(0, CHUNK)
            tl.store(Indices + part, tl.full((CHUNK,), -1, tl.int64), mask=(part >= k) & (part < width))
