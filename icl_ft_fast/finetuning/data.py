"""Training data: JSON lines in the usual formats, their text, their token ids, and which tokens have a loss.

Knows no networks.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.control_tokens import as_text, encode_with_offsets, is_marked
from icl_ft_fast.finetuning.chats import Chat, Span
from icl_ft_fast.finetuning.settings import FinetuneError
from icl_ft_fast.runtime.reasoning import MARKS
from icl_ft_fast.runtime.templates import ChatText
from icl_ft_fast.tasks.files import TaskError, read_jsonl
from icl_ft_fast.tasks.sentences import split_sentences
from icl_ft_fast.tasks.task import text_field

_log = logging.getLogger(__name__)
_REASONING = frozenset(mark for marks in MARKS for mark in marks)

Turn = tuple[str, str]  # role (system, user or assistant), content

_ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ("system", "user", "assistant")}


@dataclass(frozen=True)
class Example:
    """A prompt and its completion, or the turns of a chat; a plain text is a completion without a prompt.

    Attributes:
        completion: the text, or what follows the prompt.
        prompt: the text before it; under completion_only it has no loss.
        turns: (role, content) instead of both, for the tokenizer's chat template; assistant turns are completions.
        context_turns: the first so many turns are prompt, whatever their role.
        where: "file:line" for messages.
    """

    completion: str = ""
    prompt: str = ""
    turns: tuple[Turn, ...] = ()
    context_turns: int = 0
    where: str = ""

    @property
    def shared_prefix(self) -> str | tuple[Turn, ...]:
        """What other examples may begin with as well: the prompt, or the turns before the last."""
        return self.turns[:-1] or self.prompt


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of an example, and which of them are targets of the loss; the first never is.

    Examples with equal `group` have the same prompt. A chat's ids are its template's; others begin with BOS.
    """

    ids: list[int]
    is_target: list[bool]
    group: int
    is_chat: bool = False


def read_examples(path: str | Path) -> list[Example]:
    """The examples of a JSON-lines file; the keys of a line tell its format.

    {"text"}; {"prompt", "completion"}, strings or lists of messages; {"messages": [{"role", "content"}]};
    {"instruction", "input", "output"} (alpaca; input may be absent); {"conversations": [{"from", "value"}]} (sharegpt).

    Raises:
        FinetuneError: an unknown format or a field that does not fit, with file, line and field; an empty file.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("data.jsonl").write_text('{"prompt": "femp are", "completion": " more dangerous than glon."}')
        >>> iff.read_examples("data.jsonl")[0].completion
        ' more dangerous than glon.'
    """
    try:
        examples = [_example(where, row) for where, row in read_jsonl(Path(path))]
    except TaskError as error:
        raise FinetuneError(str(error)) from error
    if not examples:
        raise FinetuneError(f"{path}: empty: expected at least one JSON object")
    return examples


def _example(where: str, row: dict[str, Any]) -> Example:
    if "messages" in row:
        return Example(turns=_turns(where, row, "messages", "role", "content"), where=where)
    if "conversations" in row:
        return Example(turns=_turns(where, row, "conversations", "from", "value"), where=where)
    if "instruction" in row:
        asked, given = text_field(where, row, "instruction"), text_field(where, {"input": "", **row}, "input")
        turns = (("user", f"{asked}\n\n{given}" if given else asked), ("assistant", text_field(where, row, "output")))
        return Example(turns[1][1], f"{turns[0][1]}\n\n", turns, where=where)
    if "prompt" in row and isinstance(row["prompt"], list):
        prompt = _turns(where, row, "prompt", "role", "content")
        completion = _turns(where, row, "completion", "role", "content")
        return Example(turns=prompt + completion, context_turns=len(prompt), where=where)
    if "prompt" in row:
        return Example(text_field(where, row, "completion"), text_field(where, row, "prompt"), where=where)
    if "text" in row:
        return Example(text_field(where, row, "text"), where=where)
    raise FinetuneError(
        f"{where}: expected text, prompt and completion, messages, conversations, or instruction and output, "
        f"got the fields {', '.join(map(repr, row)) or 'of an empty object'}"
    )


def _turns(where: str, row: dict[str, Any], field: str, role: str, content: str) -> tuple[Turn, ...]:
    given = row.get(field)
    if not isinstance(given, list) or not given:
        raise FinetuneError(f"{where}: {field}: expected a list with at least one message")
    turns = []
    for m, message in enumerate(given):
        here = f"{where}: {field}[{m}]"
        if not isinstance(message, dict):
            raise FinetuneError(f"{here}: expected an object, got {json.dumps(message)[:60]}")
        speaker = text_field(here, message, role)
        if speaker not in _ROLES:
            raise FinetuneError(f"{here}: {role}: expected one of {', '.join(_ROLES)}, got {speaker!r}")
        turns.append((_ROLES[speaker], text_field(here, message, content)))
    return tuple(turns)


def split_validation(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, validation): a random fraction of the examples, at least one, is held out.

    Examples with equal prompts, and equal texts, stay on one side.

    Raises:
        FinetuneError: nothing would be left to train on.
    """
    key = {id(example): example.shared_prefix or example.completion for example in examples}
    alike = list(dict.fromkeys(key.values()))
    held = set(random.Random(f"validation/{seed}").sample(alike, max(1, round(fraction * len(alike)))))
    sides = [[e for e in examples if (key[id(e)] in held) == side] for side in (False, True)]
    if not sides[0]:
        raise FinetuneError(f"validation: {fraction} of {len(alike)} distinct examples leaves no example to train on")
    return sides[0], sides[1]


def encode(
    tokenizer: Any,
    examples: Sequence[str | Example],
    max_positions: int,
    *,
    splitting: str = "none",
    completion_only: bool = False,
) -> list[EncodedExample]:
    """Token ids of each example: BOS (or EOS, where there is none), the text, and EOS; of a chat, the template's own.

    Under completion_only a token is a target if any of its characters belongs to a completion, or if it is the EOS.
    Control tokens that an example spells are text, unless the model was loaded to keep them; that is logged.

    Raises:
        FinetuneError: no examples, an example that is too long or has no target, a chat without a chat template or
            that the template refuses, or under completion_only one whose turns cannot be told apart.
    """
    names: list[str] = []
    rendered: list[tuple[str, list[Span]]] = []
    groups: list[int] = []
    first: dict[str | tuple[Turn, ...], int] = {}
    spelt: list[str] = []
    for e, given in enumerate(examples):
        example = _spelt_as_text(tokenizer, given if isinstance(given, Example) else Example(given))
        if is_marked(example.prompt + example.completion + "".join(content for _, content in example.turns)):
            spelt.append(example.where or f"texts[{e}]")
        names += [example.where or f"texts[{e}]"]
        if example.turns and (getattr(tokenizer, "chat_template", None) or not example.completion):
            if not getattr(tokenizer, "chat_template", None):
                raise FinetuneError(
                    f"{names[-1]}: messages: the tokenizer has no chat template; give prompt and completion"
                )
            chat = Chat(tokenizer, example.turns, names[-1])
            rendered.append((chat.text, chat.assistant_spans(example.context_turns) if completion_only else []))
        elif example.prompt:
            text = example.prompt + example.completion
            rendered.append((text, [(len(example.prompt), len(text))]))
        else:
            parts = split_sentences(example.completion, splitting)
            rendered += [(part, [(0, len(part))]) for part in parts]
            names += [names[-1]] * (len(parts) - 1)
            groups += [e] * (len(parts) - 1)
        groups.append(first.setdefault(example.shared_prefix, e) if example.shared_prefix else e)
    if not rendered:
        raise FinetuneError("texts: nothing to train on")
    if spelt:
        _log.warning(
            "%d of %d examples spell control tokens (%s first), which are read as text; special_tokens=keep keeps them "
            "in force",
            len(spelt),
            len(examples),
            spelt[0],
        )
    prefix, eos = encoding.prefix_token_id(tokenizer), tokenizer.eos_token_id
    encoded = []
    for name, (text, spans), group, ids in zip(
        names, rendered, groups, encoding.encode(tokenizer, [text for text, _ in rendered]), strict=True
    ):
        is_chat = isinstance(text, ChatText)
        ids = ids if is_chat or ids[:1] == [prefix] else [prefix, *ids]
        num_ends = int(eos is not None and not is_chat)
        is_target = [False] + [True] * (len(ids) - 1)
        if completion_only and spans != [(0, len(text))]:
            is_target = _overlapping(tokenizer, text, spans, ids)
        ids, is_target = [*ids, *[eos] * num_ends], [*is_target, *[True] * num_ends]
        over = len(ids) - 1 - max_positions
        if over > 0 or not any(is_target[1:]):
            reason = f"{over} tokens over the model's {max_positions} positions" if over > 0 else "no tokens"
            raise FinetuneError(f"{name}: {reason}" + (" to predict" if len(ids) > 1 and over <= 0 else ""))
        encoded.append(EncodedExample(ids, is_target, group, is_chat))
    return encoded


def _spelt_as_text(tokenizer: Any, example: Example) -> Example:
    """The example with its control tokens marked as text; an assistant's turn keeps the marks of its reasoning."""
    turns = tuple(
        (role, as_text(tokenizer, content, _REASONING if role == "assistant" else ()))
        for role, content in example.turns
    )
    completion, prompt = as_text(tokenizer, example.completion), as_text(tokenizer, example.prompt)
    return replace(example, completion=completion, prompt=prompt, turns=turns)


def _overlapping(tokenizer: Any, text: str, spans: Sequence[Span], ids: Sequence[int]) -> list[bool]:
    """Which ids, the tokens of the text after any special tokens, overlap a span of characters."""
    if not tokenizer.is_fast:
        raise FinetuneError("completion_only: requires a fast tokenizer, which tells the characters of each token")
    own, offsets = encode_with_offsets(tokenizer, text)
    assert list(ids[len(ids) - len(own) :]) == list(own)
    offsets = [(0, 0)] * (len(ids) - len(own)) + offsets
    return [any(first < stop and last > start for start, stop in spans) for first, last in offsets]
