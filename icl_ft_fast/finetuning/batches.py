"""Which examples a step takes, as a function of the seed alone, and a batch as one prefix tree with its targets."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from icl_ft_fast.engine import trie
from icl_ft_fast.finetuning.data import EncodedExample


def order(examples: Sequence[EncodedExample], seed: int, *, group_by_prompt: bool = False) -> Iterator[int]:
    """Indices of examples, each epoch in a fresh order, without end; each group consecutive if asked for."""
    groups: dict[int, list[int]] = {}
    for e, example in enumerate(examples):
        groups.setdefault(example.group if group_by_prompt else e, []).append(e)
    members, rng = list(groups.values()), random.Random(seed)
    while True:
        for g in rng.sample(range(len(members)), len(members)):
            yield from members[g]


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples merged into one prefix tree, which forwards a shared prefix once; its gradient is the sum of theirs.

    Shapes: R predicting nodes, M distinct targets, P targets of all examples.

    Attributes:
        tree: the examples' tokens but the last of each; no example sees another's tokens beyond their shared prefix.
        head_row: int64 [R], nodes that predict some target, ascending.
        row: int64 [M], for each distinct target an index into head_row.
        target: int64 [M], token ids of the distinct targets.
        target_index: int64 [P], for each target of each example, in the order of the examples, an index into target.
    """

    tree: trie.Trie
    head_row: torch.Tensor
    row: torch.Tensor
    target: torch.Tensor
    target_index: torch.Tensor


def pack(examples: Sequence[EncodedExample]) -> Batch:
    """Merge examples, at least one."""
    tree = trie.build_from_lists([(example.ids[:1], example.ids[1:]) for example in examples])
    is_target = torch.tensor([flag for example in examples for flag in example.is_target[1:]])
    scored, target_index = tree.path[is_target].long().unique(return_inverse=True)
    head_row, row = tree.scored_row[scored].long().unique(return_inverse=True)
    return Batch(tree, head_row, row, tree.scored_token[scored].long(), target_index)
