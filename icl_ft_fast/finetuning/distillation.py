"""Context distillation: training a model to predict what it predicts itself with documents in its context.

The loss is KL(teacher || student) at every target token; the teacher reads context + example, the student only
the example. Related work: Snell et al. 2022 (arXiv 2209.15189); Cartridges (Eyuboglu et al. 2025, arXiv 2506.06266),
which train a KV cache instead of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from icl_ft_fast.engine import encoding, trie
from icl_ft_fast.engine.forward import Reader, ScoringOptions, forward_chunks
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.memory import BudgetError
from icl_ft_fast.engine.model import Head, Model
from icl_ft_fast.engine.transfer import Sent
from icl_ft_fast.finetuning.data import EncodedExample
from icl_ft_fast.finetuning.settings import FinetuneError

_LOGITS = 4 << 20  # of the teacher and of the student held at a time: 16 MB each in float32


@dataclass(frozen=True, eq=False)
class Teacher:
    """What a teacher predicts at the targets of each example.

    Attributes:
        head: its output head.
        hidden: for each example the hidden states that predict its targets, [targets, E]; E numbers per target, where
            its distribution would be V.
    """

    head: Head
    hidden: list[torch.Tensor]

    def divergence(self, hidden: torch.Tensor, head: Head, examples: Sequence[int]) -> torch.Tensor:
        """Sum of KL(teacher || student) in nats over the targets of examples, differentiable in hidden and the head.

        Args:
            hidden: the student's, [P, E], of all targets of the examples in their order.
            head: the student's.
            examples: indices into self.hidden.

        Memory: a block of rows of logits at a time, in the backward (which recomputes them) too.
        """
        given = torch.cat([self.hidden[e] for e in examples])
        total = hidden.new_zeros((), dtype=torch.float32)
        rows = max(1, _LOGITS // len(head.weight))
        for first in range(0, len(hidden), rows):
            block = slice(first, first + rows)
            total = total + checkpoint(
                _divergence, hidden[block], head.weight, head.bias, given[block], head, self.head, use_reentrant=False
            )
        return total


def _divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    given: torch.Tensor,
    head: Head,
    teacher: Head,
) -> torch.Tensor:
    logp = Head(weight, bias, head.scale, head.softcap).logits(hidden).log_softmax(-1)
    with torch.no_grad():
        target = teacher.logits(given).log_softmax(-1)
    return F.kl_div(logp, target, reduction="sum", log_target=True)


@torch.no_grad()
def read_in_context(
    model: Model, examples: Sequence[EncodedExample], context: str, *, ledger: Ledger | None = None
) -> Teacher:
    """The model as a teacher that reads `context` once for all examples.

    An example's tokens follow the context's unchanged, minus the BOS that the context has already.

    Raises:
        FinetuneError: an empty context, or an example that does not fit after it.
    """
    ledger = ledger or Ledger()
    if not context.strip():
        raise FinetuneError("teacher: the context is empty: give it documents")
    before = encoding.encode(model.tokenizer, [context.rstrip()])[0]
    requests = []
    for example in examples:
        is_bos = not example.is_chat or example.ids[0] == before[0]
        requests.append((before if is_bos else [*before, example.ids[0]], example.ids[1:]))
    over = max(len(before) + len(own) for _, own in requests) - 1 - model.max_positions
    if over > 0:
        raise FinetuneError(
            f"teacher: its documents and the longest example are {over} tokens over the model's {model.max_positions} "
            "positions; give it fewer documents"
        )
    tree = trie.build_from_lists(requests)
    predicting = _Predicting(model, tree)
    paths = read_teacher(model, tree, predicting, ledger)
    rows, place, head = torch.cat(predicting.hidden), predicting.place, model.head
    return Teacher(
        Head(head.weight.detach(), None if head.bias is None else head.bias.detach(), head.scale, head.softcap),
        [
            rows[place[path][torch.tensor(example.is_target[1:])].to(rows.device)]
            for path, example in zip(paths, examples, strict=True)
        ],
    )


def read_teacher(model: Model, tree: trie.Trie, reader: Reader, ledger: Ledger) -> tuple[torch.Tensor, ...]:
    """Forward what a teacher reads, as the ledger's phase "teach"; `reader` takes what it predicts.

    Returns:
        For each request of the tree int64 [places], which scored tokens are its own.

    Raises:
        FinetuneError: too little memory.
    """
    with ledger.phase("teach"):
        ledger.request_tokens += tree.request_tokens
    try:
        for _ in forward_chunks(model, tree, reader, options=ScoringOptions(), ledger=ledger, phase="teach"):
            pass
    except BudgetError as error:
        raise FinetuneError(f"teacher: {error}") from error
    paths: tuple[torch.Tensor, ...] = tree.path.long().split(tree.path_offset.diff().tolist())
    return paths


class _Predicting:
    """Reads the hidden states that predict the scored tokens."""

    def __init__(self, model: Model, tree: trie.Trie) -> None:
        weight = model.head.weight
        self.hidden: list[torch.Tensor] = []
        self.place = torch.empty(len(tree.scored_token), dtype=torch.int64)  # of each scored token's row among them
        self.extra_bytes = len(tree.scored_token) * weight.shape[1] * weight.element_size()
        self._rows = 0

    def __call__(self, sent: Sent, hidden: torch.Tensor) -> None:
        chunk, needed = sent.chunk, hidden[sent.head_rows]
        self.place[chunk.target_index] = chunk.target_row.long() + self._rows
        self.hidden.append(needed)
        self._rows += len(needed)
