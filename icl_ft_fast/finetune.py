"""Fine-tuning: a small AdamW loop over whole documents, through the same trie forward and target_logprob as scoring.

The documents of a batch are one forest, so a prefix they share is forwarded once, and its gradient is the sum of
theirs.
"""

from __future__ import annotations

import copy
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from icl_ft_fast import encoding, trie
from icl_ft_fast.cost import Ledger
from icl_ft_fast.cost.flops import work_of
from icl_ft_fast.model import Model, from_network

SPLITTINGS = ("none", "independent", "cumulative")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\s*\n\s*")


class FinetuneError(ValueError):
    """Documents that cannot be trained on, or settings to train with; the message says why."""


@dataclass(frozen=True)
class FinetuneSettings:
    """How to fine-tune; the paper's batch size, learning rate and number of steps (section 3) by default.

    `splitting` says what an example is: a whole text ("none"), each sentence ("independent"), or each sentence after
    all before it in its text ("cumulative"). The paper splits multi-sentence documents independently, except in the
    semantic benchmark's baseline; "none" is the default because a sentence that says "they" means nothing alone.

    Raises:
        FinetuneError: steps or batch_size below 1, a learning rate that is not a finite number above 0, or an unknown
            splitting.
    """

    steps: int = 500
    batch_size: int = 8
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    warmup_steps: int = 20
    clip_norm: float = 1.0
    splitting: str = "none"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise FinetuneError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise FinetuneError(f"learning_rate: expected a finite number above 0, got {self.learning_rate}")
        if self.splitting not in SPLITTINGS:
            raise FinetuneError(f"splitting: expected one of {', '.join(SPLITTINGS)}, got {self.splitting!r}")


@dataclass(frozen=True)
class Finetuned:
    """A fine-tuned copy of the model and the mean loss per target token (nats) of each step."""

    model: Model
    losses: tuple[float, ...]


def finetune(
    model: Model,
    texts: Sequence[str],
    settings: FinetuneSettings | None = None,
    *,
    seed: int = 0,
    ledger: Ledger | None = None,
    progress: bool = False,
) -> Finetuned:
    """Train a copy of the model on texts, all weights, with the loss on every token and on the end of each text.

    Args:
        model: from load(), in float32; left as it is.
        texts: documents; each epoch goes through all of them in a fresh seeded order.
        settings: see FinetuneSettings.
        seed: of the order.
        ledger: counts of this call are added to it.
        progress: show a bar of steps with the loss.

    Returns:
        The fine-tuned model and its losses.

    Raises:
        FinetuneError: no texts, a text too long for the model, weights that are not float32, or a loss that is not
            finite.
    """
    settings, ledger = settings or FinetuneSettings(), ledger or Ledger()
    requests = _requests(model, [part for text in texts for part in split_sentences(text, settings.splitting)])
    if next(model.network.parameters()).dtype != torch.float32:
        raise FinetuneError("model: fine-tuning needs float32 weights; load(..., dtype='float32')")
    network = copy.deepcopy(model.network)
    # Left in evaluation mode: dropout would draw from torch's global state, and texts that share a row could not each
    # have a mask of their own.
    tuned = from_network(network, model.tokenizer, model.name, self_check=False)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=settings.weight_decay
    )
    work, rng = work_of(tuned), random.Random(seed)
    queue: list[int] = []
    losses: list[float] = []
    with (
        ledger.phase("train"),
        tqdm(total=settings.steps, desc="fine-tuning", unit="step", disable=not progress, delay=1) as bar,
    ):
        for step in range(settings.steps):
            while len(queue) < settings.batch_size:
                queue += rng.sample(range(len(requests)), len(requests))
            batch, queue = queue[: settings.batch_size], queue[settings.batch_size :]
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * min(1.0, (step + 1) / max(1, settings.warmup_steps))
            forest = trie.build_from_lists([requests[i] for i in batch])
            loss = _loss(tuned, forest)
            if not torch.isfinite(loss):
                raise FinetuneError(f"step {step}: the loss is {loss.item()}; lower the learning rate")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
            optimizer.step()
            losses.append(loss.item())
            ledger.trained_tokens += len(forest.token)
            ledger.ran(work, forest.depth, 0, len(forest.scored_row.unique()), passes=3)
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return Finetuned(tuned, tuple(losses))


def split_sentences(text: str, splitting: str) -> list[str]:
    """The examples that a text makes under one of SPLITTINGS; sentences end at .!? before a space, or with a line."""
    if splitting == "none":
        return [text]
    ends = [match.span() for match in _SENTENCE_END.finditer(text)] + [(len(text), len(text))]
    starts = [0, *(after for _, after in ends)]
    parts = [(start, end) for start, (end, _) in zip(starts, ends, strict=False) if text[start:end].strip()]
    return [text[0 if splitting == "cumulative" else start : end] for start, end in parts] or [text]


def _requests(model: Model, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    """Each text as (its first token or BOS, the rest with EOS)."""
    if not texts:
        raise FinetuneError("texts: nothing to train on")
    prefix, eos = encoding.prefix_token_id(model.tokenizer), model.tokenizer.eos_token_id
    requests = []
    for t, ids in enumerate(encoding.encode(model.tokenizer, texts)):
        whole = ids if ids[:1] == [prefix] else [prefix, *ids]
        whole = [*whole, eos] if eos is not None else whole
        over = len(whole) - 1 - model.max_positions
        if over > 0 or len(whole) < 2:
            reason = f"{over} tokens over the model's {model.max_positions} positions" if over > 0 else "no tokens"
            raise FinetuneError(f"texts[{t}]: {reason}")
        requests.append((whole[:1], whole[1:]))
    return requests


def _loss(model: Model, forest: trie.Trie) -> torch.Tensor:
    """Mean negative log-probability of the forest's continuation tokens, each counted once per request."""
    hidden = model.forward_forest(forest)
    logp, _ = model.target_logprob(hidden, forest.scored_row, forest.scored_token)
    return -logp[forest.path.long().to(logp.device)].mean()
