"""Which examples a step takes, as a function of the seed alone, and a batch as one tree with its targets."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from icl_ft_fast.engine import trie
from icl_ft_fast.finetune.data import Tokens


def order(examples: Sequence[Tokens], seed: int, *, group_by_prompt: bool = False) -> Iterator[int]:
    """Indices of examples, each epoch in a fresh order, without end; a group's stay together if asked for."""
    groups: dict[int, list[int]] = {}
    for e, example in enumerate(examples):
        groups.setdefault(example.group if group_by_prompt else e, []).append(e)
    members, rng = list(groups.values()), random.Random(seed)
    while True:
        for g in rng.sample(range(len(members)), len(members)):
            yield from members[g]


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples merged into one tree: a prefix they share is forwarded once, and its gradient is the sum of theirs.

    Attributes:
        tree: the trie; nobody sees another's tokens beyond a prefix that both have.
        head_row: int64 [R], rows of the tree that predict some target, ascending.
        row: int64 [M], indices into head_row; target: int64 [M], the token; the distinct targets of the batch.
        taken: int64 [P], an index into those for each target of each example, in the order of the examples.
    """

    tree: trie.Trie
    head_row: torch.Tensor
    row: torch.Tensor
    target: torch.Tensor
    taken: torch.Tensor


def pack(examples: Sequence[Tokens]) -> Batch:
    """Merge examples, at least one."""
    tree = trie.build_from_lists([(example.ids[:1], example.ids[1:]) for example in examples])
    is_target = torch.tensor([flag for example in examples for flag in example.is_target[1:]])
    scored, taken = tree.path[is_target].long().unique(return_inverse=True)
    head_row, row = tree.scored_row[scored].long().unique(return_inverse=True)
    return Batch(tree, head_row, row, tree.scored_token[scored].long(), taken)
