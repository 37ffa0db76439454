"""Orders and seeds that depend on nothing but integers: the same in every process, on every machine, in every version.

Pure functions without state; the feed orders tasks with them, the dispatcher seeds sampling.
"""

from __future__ import annotations

import attrs

_MASK = (1 << 64) - 1
_ROUNDS = 6
_MEMBER_BITS = 16
_GROUP_BITS = 47


def mix(*values: int) -> int:
    """A 64-bit hash of integers: SplitMix64's finaliser (Steele et al. 2014, doi 10.1145/2660193.2660195), chained."""
    state = 0
    for value in values:
        state = (state + (value & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def fraction(*values: int) -> float:
    """A hash of integers as a number in [0, 1)."""
    return (mix(*values) >> 11) / (1 << 53)


@attrs.frozen
class Permutation:
    """A permutation of `range(size)` chosen by `key`, in constant memory.

    A Feistel network over the next power of four, walked until it lands inside the range (Black & Rogaway 2002,
    "Ciphers with arbitrary finite domains"): less than four evaluations on average.

    Example:
        >>> order = Permutation(5, key=7)
        >>> sorted(order(i) for i in range(5))
        [0, 1, 2, 3, 4]
    """

    size: int
    key: int

    def __call__(self, index: int) -> int:
        half = max(1, ((self.size - 1).bit_length() + 1) // 2)
        image = self._encipher(index, half)
        while image >= self.size:
            image = self._encipher(image, half)
        return image

    def _encipher(self, value: int, half: int) -> int:
        mask = (1 << half) - 1
        left, right = value >> half, value & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (mix(self.key, turn, right) & mask)
        return (left << half) | right


def sampling_seed(run_seed: int, group_id: int, attempt: int) -> int:
    """The 63-bit seed of a group's first member; member `i` samples with seed + i.

    No two groups or attempts of a run share a seed: (group, attempt) is permuted, not hashed, and leaves room for
    65,536 members. Distinct for |group_id| < 2^38 and attempt < 256.
    """
    number = 2 * group_id if group_id >= 0 else -2 * group_id - 1
    slot = (number << 8 | attempt & 0xFF) & ((1 << _GROUP_BITS) - 1)
    return Permutation(1 << _GROUP_BITS, mix(run_seed, 1))(slot) << _MEMBER_BITS
