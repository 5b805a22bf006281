"""The multiplications of a step, counted from the algorithm: two FLOP for each multiply-add of a matrix product.

What is not a matrix product (softmax, norms, GELU, dropout, optimizer, average) is not counted: it costs memory
traffic.
"""

from __future__ import annotations

from dataclasses import dataclass

from .sizes import Sizes, lengths

# A product y = x W: its backward makes gradients of x and of W, each as large.
TRAINED, WEIGHTS_ONLY, FORWARD = 3, 2, 1


@dataclass(frozen=True)
class Work:
    """How much there is to do in one step."""

    rows: int  # B pairs
    longest: int  # L
    words: int  # real tokens in the batch, [CLS] and [SEP] included
    matched_words: int  # the same of ITM's 3 B texts
    masked: int  # words to predict
    places: int  # most of them in one caption

    @classmethod
    def expected(cls, sizes: Sizes, longest: int) -> Work:
        """Of :func:`~.sizes.random_batch`, with texts that are drawn as negatives equally often."""
        tokens = lengths(sizes, longest)
        chosen = [max(1, round(sizes.masked * (n - 2))) for n in tokens]
        return cls(sizes.batch, longest, sum(tokens), 3 * sum(tokens), sum(chosen), max(chosen))


def linear(rows: float, inner: int, outer: int) -> float:
    return 2.0 * rows * inner * outer


def attention(rows: int, queries: int, keys: int, width: int) -> float:
    """Scores and their product with the values."""
    return 2 * linear(rows * queries, width, keys)


def image_tower(sizes: Sizes, rows: int) -> float:
    tokens, width = sizes.image_tokens, sizes.width
    block = linear(rows * tokens, width, (4 + 2 * sizes.mlp_ratio) * width) + attention(rows, tokens, tokens, width)
    return sizes.image_depth * block


def patches(sizes: Sizes, rows: int) -> float:
    return linear(rows * (sizes.image_tokens - 1), 3 * sizes.patch**2, sizes.width)


def text_tower(sizes: Sizes, rows: int, longest: int, words: float) -> float:
    width = sizes.width
    layer = linear(words, width, (4 + 2 * sizes.mlp_ratio) * width) + attention(rows, longest, longest, width)
    return sizes.text_depth * layer


def image_keys(sizes: Sizes, images: int) -> float:
    """Keys and values of every fusion layer."""
    return sizes.fusion_depth * linear(images * sizes.image_tokens, sizes.width, 2 * sizes.width)


def fusion(sizes: Sizes, rows: int, longest: int, words: float, last: int | None = None) -> float:
    """Without the images' keys and values. ``last``: places of each text whose output is wanted; None = all words."""
    width, hidden = sizes.width, sizes.mlp_ratio * sizes.width

    def layer(computed: float, queries: int) -> float:
        own = linear(words, width, 2 * width) + linear(computed, width, 2 * width)
        own += attention(rows, queries, longest, width) + attention(rows, queries, sizes.image_tokens, width)
        return own + linear(computed, width, 2 * width) + 2 * linear(computed, width, hidden)

    whole = layer(words, longest)
    return (sizes.fusion_depth - 1) * whole + (whole if last is None else layer(rows * last, last))


def vocabulary(sizes: Sizes, words: float) -> float:
    return linear(words, sizes.width, sizes.vocabulary)


def heads(sizes: Sizes, rows: int, predicted: float) -> dict[str, float]:
    """Projections for ITC, of student and teacher; the match head; the word head before its decoder."""
    projection = linear(rows, sizes.width, sizes.projection)
    transform = linear(predicted, sizes.width, sizes.width)
    matched = linear(3 * rows, sizes.width, 2)
    return {
        "heads": 2 * (TRAINED + FORWARD) * projection + (TRAINED + FORWARD) * transform + TRAINED * matched,
    }


def contrast(sizes: Sizes, work: Work) -> float:
    """Student and teacher against the batch and the queue, and the gradient of the student's features."""
    return 2 * (2 * FORWARD + 1) * linear(work.rows, sizes.projection, work.rows + sizes.queue)


def common(sizes: Sizes, work: Work) -> dict[str, float]:
    """Of the step as commonly written: padding, a pair's own keys and values, every word in every layer and head."""
    B, L = work.rows, work.longest
    padded, towers = B * L, TRAINED + FORWARD
    return {
        "image towers": towers * image_tower(sizes, B) + (WEIGHTS_ONLY + FORWARD) * patches(sizes, B),
        "text towers": 2 * towers * text_tower(sizes, B, L, padded),
        "images' keys and values": (4 * TRAINED + FORWARD) * image_keys(sizes, B),
        "fusion for ITM": TRAINED * fusion(sizes, 3 * B, L, 3 * padded),
        "fusion for MLM": towers * fusion(sizes, B, L, padded),
        "vocabulary": towers * vocabulary(sizes, padded),
        "contrast": contrast(sizes, work),
        **heads(sizes, B, padded),
    }


def least(sizes: Sizes, work: Work) -> dict[str, float]:
    """What has to be done: words without padding, an image's keys and values once, outputs that a loss reads."""
    B, L = work.rows, work.longest
    towers = TRAINED + FORWARD
    return {
        "image towers": towers * image_tower(sizes, B) + (WEIGHTS_ONLY + FORWARD) * patches(sizes, B),
        "text towers": 2 * towers * text_tower(sizes, B, L, work.words),
        "images' keys and values": towers * image_keys(sizes, B),
        "fusion for ITM": TRAINED * fusion(sizes, 3 * B, L, work.matched_words, last=1),
        "fusion for MLM": towers * fusion(sizes, B, L, work.words, last=work.places),
        "vocabulary": towers * vocabulary(sizes, work.masked),
        "contrast": contrast(sizes, work),
        **heads(sizes, B, work.masked),
    }
