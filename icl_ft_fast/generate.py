"""Greedy decoding of many prompts over the trie: shared prefixes are prefilled once, each step is one row a sequence.

Every prompt's last row is followed, in pre-order, by the rows reserved for what it will write. An unfilled row has
end 0, so nobody sees it; a written one is seen by the rest of its own sequence only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from icl_ft_fast import encoding, trie
from icl_ft_fast.cache import KVStack
from icl_ft_fast.cost import Ledger
from icl_ft_fast.cost.flops import work_of
from icl_ft_fast.model import CHUNK_ROWS, Model, Rows

GROUP_PROMPTS = 64  # prompts decoded together; bounds the stack, and on the CPU more at a time is not faster


class GenerateError(ValueError):
    """A prompt that cannot be continued; the message names it."""


@dataclass(frozen=True)
class _Layout:
    """Where the rows of a group of prompts and their reserved slots lie on the stack."""

    forest: trie.Trie
    position: torch.Tensor  # int64 [T], stack position of each prompt row
    end: torch.Tensor  # int32 [T], in stack positions
    last: list[int]  # each prompt's last row
    rows: int  # stack rows, reserved ones included


def generate(
    model: Model,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    stop: Sequence[str] = (),
    ledger: Ledger | None = None,
    progress: bool = False,
) -> list[str]:
    """Continue each prompt greedily until EOS, a stop string or `max_new_tokens`.

    Args:
        model: from load().
        prompts: texts, encoded with BOS where the tokenizer adds it.
        max_new_tokens: at least 1.
        stop: strings that end a continuation; they are cut off.
        ledger: counts of this call are added to it.
        progress: show a bar of finished prompts.

    Returns:
        The continuations, in the order of the prompts; equal prompts are decoded once.

    Raises:
        GenerateError: an empty prompt or stop string, or more tokens than the model has positions.
    """
    encoded = encoding.encode(model.tokenizer, prompts)
    names = [f"prompt {prompt[:40]!r}..." for prompt in prompts]
    written = dict(
        iter_tokens(
            model, encoded, max_new_tokens=max_new_tokens, stop=stop, names=names, ledger=ledger, progress=progress
        )
    )
    texts = [model.tokenizer.decode(written[p]) for p in range(len(prompts))]
    return [min((text.split(mark)[0] for mark in stop), key=len, default=text) for text in texts]


def iter_tokens(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    names: Sequence[str] | None = None,
    ledger: Ledger | None = None,
    progress: bool = False,
) -> Iterator[tuple[int, list[int]]]:
    """Continue prompts of token ids as generate() does, each yielded as soon as the group it is decoded in is done.

    Args:
        model: from load().
        prompts: token ids, at least one each.
        max_new_tokens: at least 1.
        stop: strings whose appearance in the decoded continuation ends it.
        names: what errors call each prompt.
        ledger: counts of this call are added to it.
        progress: show a bar of finished prompts.

    Yields:
        Index of the prompt and the ids written: EOS left out, the tokens of a stop string included.

    Raises:
        GenerateError: see generate().
    """
    ledger = ledger or Ledger()
    if max_new_tokens < 1:
        raise GenerateError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    if isinstance(stop, str) or not all(stop):
        raise GenerateError(f"stop: expected non-empty strings, got {stop!r}")
    equal: dict[tuple[int, ...], list[int]] = {}
    for p, prompt in enumerate(prompts):
        over = len(prompt) + max_new_tokens - 1 - model.max_positions  # the last new token is never forwarded
        if not prompt or over > 0:
            reason = f"{over} tokens over the model's {model.max_positions} positions" if prompt else "no tokens"
            raise GenerateError(f"{names[p] if names else f'prompts[{p}]'}: {reason}")
        equal.setdefault(tuple(prompt), []).append(p)
    distinct = sorted(equal)  # neighbours share prefixes, and groups hold neighbours
    with tqdm(total=len(distinct), desc="generating", unit="prompt", disable=not progress, delay=1) as bar:
        for first in range(0, len(distinct), GROUP_PROMPTS):
            group = distinct[first : first + GROUP_PROMPTS]
            with ledger.phase("generate"):
                written = _generate_group(model, group, max_new_tokens, stop, ledger)
                ledger.request_tokens += sum(map(len, group))
            bar.update(len(group))
            for prompt, ids in zip(group, written, strict=True):
                yield from ((p, ids) for p in equal[prompt])


def _lay_out(prompts: Sequence[Sequence[int]], reserved: int) -> _Layout:
    """Prompt rows in pre-order, each prompt's last row followed by `reserved` free ones."""
    # A placeholder child makes each prompt's last token a row; it is itself a leaf and takes none.
    forest = trie.build_from_lists([(prompt, [0]) for prompt in prompts])
    last = forest.scored_row[forest.path].long()
    ends_here = torch.zeros(len(forest.token) + 1, dtype=torch.int64)
    ends_here[last + 1] = 1
    before = ends_here.cumsum(0)  # prompts that end before row x
    rows = torch.arange(len(forest.token))
    end = forest.end.long()
    return _Layout(
        forest=forest,
        position=rows + reserved * before[:-1],
        end=(end + reserved * before[end]).int(),
        last=last.tolist(),
        rows=len(rows) + reserved * int(before[-1]),
    )


@torch.inference_mode()
def _generate_group(
    model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[str], ledger: Ledger
) -> list[list[int]]:
    device, tokenizer, ends_text = model.device, model.tokenizer, _end_tokens(model)
    layout = _lay_out(prompts, max_new_tokens)
    stack, work = KVStack(layout.rows), work_of(model)
    ledger.kv_bytes += layout.rows * work.kv_row_bytes
    end_k = torch.zeros(layout.rows, dtype=torch.int32)
    depth_k = torch.zeros(layout.rows, dtype=torch.int32)

    def forward(token: torch.Tensor, depth: torch.Tensor, slots: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        end_k[slots], depth_k[slots] = end, depth
        seen = int(slots.max()) + 1
        ledger.ran(work, depth, seen - len(slots), 0)
        return model.forward(
            Rows(
                token.to(device), depth.to(device), slots.int().to(device), end_k[:seen].to(device),
                depth_k[:seen].to(device), stack, slots.to(device),
            )
        )  # fmt: skip

    forest, hidden = layout.forest, []
    for first in range(0, len(forest.token), CHUNK_ROWS):
        part = slice(first, first + CHUNK_ROWS)
        hidden.append(forward(forest.token[part].long(), forest.depth[part], layout.position[part], layout.end[part]))
    last = torch.tensor(layout.last)
    token = _greedy(model, torch.cat(hidden)[last.to(device)])
    ledger.forwarded_rows += len(forest.token)

    written: list[list[int]] = [[] for _ in prompts]
    live = torch.arange(len(prompts))
    for step in range(max_new_tokens):
        going = []
        for place, sequence in enumerate(live.tolist()):
            new = int(token[place])
            ledger.decoded_tokens += 1
            ledger.head_rows += 1
            ledger.flops += work.head_flops
            if new not in ends_text:
                written[sequence].append(new)
                text = tokenizer.decode(written[sequence]) if stop else ""
                if not any(mark in text for mark in stop):
                    going.append(place)
        if step + 1 == max_new_tokens or not going:
            break
        live, token = live[going], token[going]
        ends = last[live]
        slots = layout.position[ends] + 1 + step
        block_end = (layout.position[ends] + 1 + max_new_tokens).int()
        order = torch.argsort(slots)  # queries ascend on the stack
        live, token, slots, block_end, ends = live[order], token[order], slots[order], block_end[order], ends[order]
        step_hidden = forward(token, forest.depth[ends] + 1 + step, slots, block_end)
        ledger.forwarded_rows += len(live)
        token = _greedy(model, step_hidden)
    return written


def _end_tokens(model: Model) -> set[int]:
    """The tokens that end a text: the tokenizer's EOS and those of the checkpoint's generation settings."""
    listed = getattr(getattr(model.network, "generation_config", None), "eos_token_id", None)
    ids = [model.tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])]
    return {int(token_id) for token_id in ids if token_id is not None}


def _greedy(model: Model, hidden: torch.Tensor) -> torch.Tensor:
    """The most likely next token of each row, int64 [R] on the CPU; scale and soft-cap keep the order."""
    head = model.head
    return torch.nn.functional.linear(hidden, head.weight, head.bias).argmax(-1).cpu()
