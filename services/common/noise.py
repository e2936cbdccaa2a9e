"""Noise with an address instead of a state (R21).

The noise of a token is a hash of where it is needed: (seed, token id, position, choice, purpose). Any process computes
the same value at the same place, in any order, so nothing has to be saved for a generation to go on elsewhere.

The hash is Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011), in
int64 arrays of any array-API library: a product of two 32-bit words may wrap to a negative number, but its 64 bits are
right, and shifts and masks look at bits. Whoever changes a value here raises `NOISE_VERSION`.

Knows nothing of logits, filters or requests.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import array_api_compat

Array: TypeAlias = Any
"""An array of any array-API library; there is no common static type for them."""

Counter: TypeAlias = tuple[Array, Array, Array, Array]
"""(token id, position, choice, purpose): 32-bit words, int64 arrays that broadcast with each other and with the key."""

Key: TypeAlias = tuple[Array, Array]
"""(low, high) 32-bit words of the seed, int64 arrays."""

TOKEN_PURPOSE = 0
"""The counter's token word is the id of a token."""

BLOCK_PURPOSE = 1
"""The counter's token word is the index of a block of tokens."""

LARGEST_GUMBEL = 22.875
SMALLEST_GUMBEL = -3.131
"""Bounds of what `gumbel` returns: -log(-log(u)) at the largest and the smallest u."""

_ROUNDS = 10
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85  # golden ratio, square root of 3 minus 1
_WORD = 0xFFFFFFFF

_ROUNDS_TO_FULL_SHAPE = 2
"""After the round of this number every word depends on the token and on the row alike, and none is the caller's."""


def split_seed(seed: int) -> tuple[int, int]:
    """The low and the high 32 bits of a 64-bit seed: the key of the noise."""
    return seed & _WORD, seed >> 32 & _WORD


def philox(counter: Counter, key: Key) -> Counter:
    """Philox4x32-10: a keyed bijection of 128-bit counters.

    Args:
        counter: four words, each an int64 array with at least one dimension and values in [0, 2^32), or all six words
            of counter and key plain integers.
        key: two words alike.

    Returns:
        The four output words, of the broadcast shape.
    """
    (word_0, word_1, word_2, word_3), _ = _rounds(counter, key, _ROUNDS)
    return word_0, word_1 & _WORD, word_2, word_3 & _WORD


def gumbel(counter: Counter, key: Key) -> Array:
    """Standard Gumbel noise at an address: -log(-log(u)), u = (x + 0.5) / 2^32, x = output word 0 of Philox.

    In float64 throughout: in float32 the largest u would round to 1 and its noise to infinity.

    Args:
        counter: see `Counter`; the purpose may be a plain integer.
        key: see `Key`.

    Returns:
        float64 array of the broadcast shape, within [SMALLEST_GUMBEL, LARGEST_GUMBEL].
    """
    word = _first_word(counter, key)
    xp = array_api_compat.array_namespace(word)
    uniform = xp.astype(word, xp.float64)
    uniform += 0.5
    uniform *= 2.0**-32
    return -xp.log(-xp.log(uniform))


def _first_word(counter: Counter, key: Key) -> Array:
    """`philox(counter, key)[0]`, without what the last two rounds compute for the other words."""
    (word_0, _, word_2, word_3), (low, high) = _rounds(counter, key, _ROUNDS - 2)
    product = word_2 * _MULTIPLIERS[1]
    word_2 = _mix_into(word_3, word_0 * _MULTIPLIERS[0], high)
    return _mix_into(product, word_2 * _MULTIPLIERS[1], low + _KEY_STEPS[0])


def _rounds(counter: Counter, key: Key, count: int) -> tuple[Counter, Key]:
    """The state after some rounds, and the key of the round after them.

    Only words 0 and 2 are multiplied, so only they are cut to 32 bits here; the upper bits of words 1 and 3 and of the
    key fall away where they are mixed into those.
    """
    word_0, word_1, word_2, word_3 = counter
    low, high = key
    for number in range(count):
        mix = _mix_into if number > _ROUNDS_TO_FULL_SHAPE else _mix
        product_0, product_1 = word_0 * _MULTIPLIERS[0], word_2 * _MULTIPLIERS[1]
        word_0, word_2 = mix(word_1, product_1, low), mix(word_3, product_0, high)
        word_1, word_3 = product_1, product_0
        low, high = low + _KEY_STEPS[0], high + _KEY_STEPS[1]
    return (word_0, word_1, word_2, word_3), (low, high)


def _mix(word: Array, product: Array, key: Array) -> Array:
    """The high half of a product, xor a word, xor the key; all may have shapes of their own.

    Word and key are joined first: in the first rounds both are one value per row, while the product is one per token.
    """
    mixed = (product >> 32) ^ (word ^ key)
    mixed &= _WORD
    return mixed


def _mix_into(word: Array, product: Array, key: Array) -> Array:
    """`_mix` into the memory of the word, which has the full shape."""
    word ^= key
    word ^= product >> 32
    word &= _WORD
    return word
