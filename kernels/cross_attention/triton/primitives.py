"""What the forward and the backward kernels share: tiles in, logits, masks and dropout out.

Shape tags: S queries, P keys, D width; BS, BP, BD a block of them (``BLOCK_S`` …). A tile of logits is [BS, BP], or
with ``TRANSPOSED`` [BP, BS]: K Qᵀ has the keys in its rows, which reaches Hopper's 64-row matrix instruction where the
queries are fewer. All softmax arithmetic is in base 2 and float32: exp2 is one instruction, exp is two.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
# Not specialised: a kernel is compiled once for its flags and tile, whatever the lengths, and that is the binary that
# was proven ahead of time. What the compiler has to know of strides it learns from UNIT: strides of matrices are in
# units of 16 bytes wherever they are multiples of that, which the multiplication shows. Of an argument it would ask
# only whether 16 divides it, and load a width of 72 two bytes at a time.
SIZES = (
    *("H", "S", "P", "splits", "split_keys", "threshold", "dq_split", "link_batch", "link_row"),
    *(
        f"{x}_{axis}"
        for x in ("q", "k", "v", "output", "o", "do", "dq", "dk", "dv", "c", "u")
        for axis in ("batch", "head", "row")
    ),
)
# A logit without a link where the gradient of the entropy is multiplied by it: finite, and exp2 of it is 0.
UNLINKED = tl.constexpr(-1e20)
NOTHING = tl.constexpr(1e30)  # base-2 log-sum-exp of a row that attends to nothing: exp2(s - 1e30) is 0, never 0 * inf


@triton.jit
def by_query(x, TRANSPOSED: tl.constexpr):  # [BS] -> broadcasts over a tile of logits
    return x[None, :] if TRANSPOSED else x[:, None]


@triton.jit
def by_key(x, TRANSPOSED: tl.constexpr):  # [BP] -> broadcasts over a tile of logits
    return x[:, None] if TRANSPOSED else x[None, :]


@triton.jit
def at_head(Start, head, H, batch_stride, head_stride, UNIT: tl.constexpr):
    """Where the matrix of a head begins; ``head`` is b * H + h. In int64, as a tensor may hold over 2**31 elements."""
    return Start + ((head // H).to(tl.int64) * batch_stride + (head % H).to(tl.int64) * head_stride) * UNIT


@triton.jit
def length_if_on(HeadMask, head, length, HAS_HEAD_MASK: tl.constexpr):
    """``length``, or 0 where a contiguous (B, H) uint8 mask has the head off: a loop up to it then does nothing."""
    if HAS_HEAD_MASK:
        length = tl.where(tl.load(HeadMask + head) != 0, length, 0)
    return length


@triton.jit
def load_rows(Start, rows, stride, count, D: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr):
    """[rows, BD] of a (count, D) matrix whose last dimension is dense; zeros beyond its edges."""
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < count)[:, None]
    if D != BLOCK_D:
        inside = inside & (columns < D)[None, :]
    return tl.load(Start + rows[:, None] * stride * UNIT + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(Start, rows, stride, count, x, D: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < count)[:, None]
    if D != BLOCK_D:
        inside = inside & (columns < D)[None, :]
    tl.store(Start + rows[:, None] * stride * UNIT + columns[None, :], x.to(Start.dtype.element_ty), mask=inside)


@triton.jit
def product(a, b, TRANSPOSED: tl.constexpr):
    """a of the queries [BS, BD] times b of the keys [BP, BD]: [BS, BP], or transposed [BP, BS]. Float32."""
    if TRANSPOSED:
        r = tl.dot(b, tl.trans(a), input_precision="ieee")
    else:
        r = tl.dot(a, tl.trans(b), input_precision="ieee")
    return r


@triton.jit
def valid(Mask, sample, positions, count, HAS_MASK: tl.constexpr):
    """[block] bool: inside the axis, and allowed by a contiguous (B, count) uint8 mask."""
    inside = positions < count
    if HAS_MASK:
        inside = inside & (tl.load(Mask + sample * count + positions, mask=inside, other=0) != 0)
    return inside


@triton.jit
def linked(
    s, LinkMask, sample, link_batch, link_row, queries, keys, S, P, without: tl.constexpr, TRANSPOSED: tl.constexpr
):  # fmt: skip
    """A tile of logits, ``without`` where a (samples, S, P) uint8 mask keeps the query from the key; anything beyond
    the edges. The strides of sample and row are in units of 16 bytes, and rows are read to a multiple of 16, so that a
    thread loads 16 links at once."""
    rows = tl.minimum(queries, S - 1).to(tl.int64) * link_row * 16
    Link = LinkMask + sample.to(tl.int64) * link_batch * 16
    inside = by_key(keys < tl.cdiv(P, 16) * 16, TRANSPOSED)
    link = tl.load(by_query(Link + rows, TRANSPOSED) + by_key(keys, TRANSPOSED), mask=inside, other=0)
    return tl.where(link != 0, s, without)


@triton.jit
def row_lse2(Lse, row, inside):
    """Base-2 log-sum-exp of rows, for recomputing their weights; NOTHING beyond the edge and where all was masked."""
    x = tl.load(Lse + row, mask=inside, other=-INF)
    return tl.where(x == -INF, NOTHING, x * LOG2E)


@triton.jit
def weights(s2, lse2, keys, TRANSPOSED: tl.constexpr):
    """Softmax weights from base-2 logits, their rows' log-sum-exp and the keys that count."""
    return tl.where(by_key(keys, TRANSPOSED), tl.exp2(s2 - by_query(lse2, TRANSPOSED)), 0.0)


@triton.jit
def kept(
    Seed, head, first_query, first_key, P, threshold,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Dropout's mask for a tile, as ``dropout.py`` says: one Philox block for four neighbouring keys, which spills no
    register where one for every weight does. ``head`` is b * H + h; ``threshold`` is that of ``dropout.py`` less 2**31,
    which fits an int32 and is compared with draws whose top bit is turned."""
    rows = first_query + tl.arange(0, BLOCK_S)
    blocks = first_key // 4 + tl.arange(0, BLOCK_P // 4)
    counter = rows[:, None] * ((P + 3) // 4) + blocks[None, :]
    zero = counter * 0
    r0, r1, r2, r3 = tl.philox(tl.load(Seed), counter, zero + head, zero, zero, 7)
    # join puts a new last axis: [BS, BP / 4, 2, 2] with word 2a + b at [a, b], so a reshape lays the words side by side
    drawn = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (BLOCK_S, BLOCK_P))
    if TRANSPOSED:
        drawn = tl.trans(drawn)
    return (drawn.to(tl.int32, bitcast=True) ^ -2147483648) >= threshold
