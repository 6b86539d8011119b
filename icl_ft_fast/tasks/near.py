"""Texts that nearly repeat an earlier one: MinHash finds candidates, their word shingles decide.

Banding as in Leskovec et al., Mining of Massive Datasets, chapter 3 (Broder 1997). A candidate is missed with a small
probability; nothing is taken for a repeat wrongly. Needs datasketch, which the extra `augment` installs.
"""

from __future__ import annotations

from icl_ft_fast.tasks.sentences import words_of

SHINGLE_WORDS = 3


class NearRepeats:
    """Texts met so far, told apart by the Jaccard similarity of their word shingles.

    Args:
        similarity: from which on a text repeats another; above 0, at most 1.

    Raises:
        ModuleNotFoundError: datasketch is not installed.
    """

    def __init__(self, similarity: float) -> None:
        from datasketch import MinHash, MinHashLSH

        self.similarity, self._sketch = similarity, MinHash
        self._index = MinHashLSH(threshold=similarity, num_perm=128, weights=(0.05, 0.95))
        self._shingles: list[set[str]] = []

    @property
    def count(self) -> int:
        """Texts added."""
        return len(self._shingles)

    def add(self, text: str) -> bool:
        """Add a text unless it repeats one; returns whether it was added."""
        words = words_of(text)
        count = max(1, len(words) - SHINGLE_WORDS + 1)
        mine = {" ".join(words[first : first + SHINGLE_WORDS]) for first in range(count)}
        sketch = self._sketch(num_perm=128, seed=1)
        sketch.update_batch([shingle.encode() for shingle in sorted(mine)])
        for k in self._index.query(sketch):
            theirs = self._shingles[k]
            if len(mine & theirs) >= self.similarity * len(mine | theirs):
                return False
        self._index.insert(len(self._shingles), sketch)
        self._shingles.append(mine)
        return True
