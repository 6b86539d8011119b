"""Self-study: texts that a model writes with documents before it, for others to learn what the documents say.

The documents take turns. A conversation has a part of them before it, with its own document among them, and begins as a
sentence of the document does, up to a word that few of all sentences have; the model goes on. Every second one begins
with the word alone or, under a chat template, goes on for two turns more: the model writes a message that asks about
the part, and answers it. A small chat model's messages make no sense (LOG.md); they are written here. Source:
Cartridges (arXiv 2506.06266), section 4.1, with parts of 512 to 4,096 tokens; the beginnings are ours, for models that
follow no instructions.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

from icl_ft_fast.augmentation.batches import SMALL
from icl_ft_fast.augmentation.strategy import SMALL_TEMPERATURE
from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.control_tokens import as_text
from icl_ft_fast.engine.generate import Sampling, iter_generations
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.model import Model
from icl_ft_fast.engine.prompting import chosen_template, documents_turn, prompt_context
from icl_ft_fast.runtime.durable import ResultJournal, digest
from icl_ft_fast.runtime.errors import UserError
from icl_ft_fast.runtime.templates import ChatText, render_chat
from icl_ft_fast.tasks.sentences import UNSPACED, split_sentences
from icl_ft_fast.tasks.task import Document

PER_CALL = 256  # conversations that are written in one call of the engine
RARE = 0.05  # of the sentences: a word that more of them have is no beginning
PART_TOKENS, SMALL_PART_TOKENS = 512, 128  # of a part; of a small chat model's, which finds little in more (LOG.md)
ROOM = 32  # tokens for a beginning and what a chat template writes between turns
_WORD = re.compile(rf"[{UNSPACED}]{{1,2}}|[^\W{UNSPACED}]+")
MESSAGES = tuple(
    f"{asked} Write the message to me and nothing else."
    for asked in (
        "Ask me one question that the documents answer.",
        "Ask me to sum up one part of the documents; name the part.",
        "Ask me to put one part of the documents into a list; name the part.",
        "Ask me one question about what follows from the documents though they do not say it, or say it the other way.",
        "Ask me what something that the documents say can be used for.",
    )
)
SMALL_MESSAGE = "What do the documents say about {word}?"


class SelfStudyError(UserError):
    """Documents that a model cannot write about; the message names the argument."""


@dataclass(frozen=True)
class Conversation:
    """What a model wrote with documents before it.

    Attributes:
        part: index of the documents, see document_parts().
        ids: token ids that follow those of the documents' context.
    """

    part: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class ConversationSettings:
    """How conversations are written.

    Attributes:
        tokens: the most of each turn.
        temperature: of what is written but for answers, which are greedy; at most SMALL_TEMPERATURE for a small chat
            model.
        part_tokens: see document_parts().
    """

    tokens: int = 48
    temperature: float = 0.7
    part_tokens: int | None = None


class Beginning(NamedTuple):
    """What a conversation begins with.

    Attributes:
        part: index of the documents before it, see document_parts().
        text: as a sentence of one of them does, up to `word`; or `word` alone.
        word: one that few sentences of the documents have.
        is_second: whether it is the second of its kinds: asked about under a chat template, else of the word alone.
    """

    part: int
    text: str
    word: str
    is_second: bool


def is_small_chat(model: Model, template: str) -> bool:
    """Whether a model that is asked through a chat template is too small to ask about documents by itself."""
    return chosen_template(model, template) == "chat" and model.num_parameters < SMALL


def document_parts(
    model: Model,
    documents: Sequence[Document],
    *,
    template: str = "base",
    tokens: int = 48,
    part_tokens: int | None = None,
) -> tuple[tuple[Document, ...], ...]:
    """The documents in runs of at most `part_tokens` that fit the model's positions; a longer document stands alone.

    Args:
        model: from load().
        documents: at least one.
        template: see prompt_context().
        tokens: of each turn that the model writes.
        part_tokens: the most of several documents with their template; None for PART_TOKENS, or SMALL_PART_TOKENS for
            a small chat model.

    Raises:
        SelfStudyError: no documents, or one that does not fit alone.
    """
    if not documents:
        raise SelfStudyError("documents: expected at least one")
    is_chat = chosen_template(model, template) == "chat"
    longest = max(map(len, encoding.encode(model.tokenizer, MESSAGES))) if is_chat else 0
    room = model.max_positions - ROOM - longest - tokens * (3 if is_chat else 1)
    most = part_tokens or (SMALL_PART_TOKENS if is_small_chat(model, template) else PART_TOKENS)

    def length(part: Sequence[Document]) -> int:
        return len(encoding.encode(model.tokenizer, [prompt_context(model, part, template)])[0])

    parts: list[list[Document]] = [[]]
    for document in documents:
        if parts[-1] and length([*parts[-1], document]) > min(room, most):
            parts.append([])
        parts[-1].append(document)
        if len(parts[-1]) == 1 and (needed := length(parts[-1])) > room:
            raise SelfStudyError(
                f"documents: {document.id!r} takes {needed} tokens, a conversation behind it leaves {room} of the "
                f"model's {model.max_positions} positions; split it into several documents"
            )
    return tuple(map(tuple, parts))


def rare_words(documents: Sequence[Document], seed: int) -> list[list[tuple[str, str]]]:
    """For each document its words that few sentences of all have, or all its words, in a seeded order.

    Returns:
        Each with what the document's first sentence that has it says up to its end: pairs (that, word).

    Raises:
        SelfStudyError: no document has a word.
    """
    sentences = [split_sentences(document.text, "independent") for document in documents]
    found = Counter(word for some in sentences for sentence in some for word in set(_WORD.findall(sentence)))
    if not found:
        raise SelfStudyError("documents: expected at least one word")
    most, made = max(1, RARE * sum(map(len, sentences))), []
    for some in sentences:
        first: dict[str, str] = {}
        for sentence in some:
            for match in _WORD.finditer(sentence):
                first.setdefault(match[0], sentence[: match.end()])
        words = sorted(word for word in first if found[word] <= most) or sorted(first)
        made.append([(first[word], word) for word in random.Random(f"words/{seed}").sample(words, len(words))])
    return made


@dataclass(frozen=True)
class ConversationBatch:
    """Conversations that are written in one call of the engine.

    Attributes:
        name: a digest of all that decides them.
        parts: the documents, see document_parts().
        template: see prompt_context().
        first, count: numbers of the conversations.
        tokens: the most of each turn.
        temperature: of the beginning and of the message; the answer is greedy.
        seed: of the draws.
        is_small: whether the messages are written here, see is_small_chat().
    """

    name: str
    parts: tuple[tuple[Document, ...], ...]
    template: str
    first: int
    count: int
    tokens: int
    temperature: float
    seed: int
    is_small: bool

    def generate(self, model: Model, ledger: Ledger, *, progress: bool = False) -> dict[str, Any]:
        """The conversations as plain values, and the work done, which is all that `ledger` holds then."""
        with ledger.phase("generate"):
            write = partial(_written, model, ledger, progress)
            numbers = range(self.first, self.first + self.count)
            contexts = [prompt_context(model, part, self.template) for part in self.parts]
            starts = self.beginnings()
            begun = [(contexts[start.part], as_text(model.tokenizer, start.text)) for start in starts]
            draws = [self.sampling(n, self.temperature) for n in numbers]
            texts, ids = write([context + start for context, start in begun], draws)
            after = encoding.encode_pairs(model.tokenizer, begun)
            made = [(*follows, *its) for (_, follows), its in zip(after, ids, strict=True)]
            said = [start + as_text(model.tokenizer, text) for (_, start), text in zip(begun, texts, strict=True)]
            if self.template == "chat" and any(start.is_second for start in starts):
                self._ask(model, write, starts, said, contexts, made)
        return {
            "conversations": [[start.part, list(ids)] for start, ids in zip(starts, made, strict=True)],
            "counts": ledger.as_dict(),
        }

    def beginnings(self) -> list[Beginning]:
        """What each conversation begins with; two of a document, one after the other, have the same word."""
        places = [(p, document) for p, part in enumerate(self.parts) for document in part]
        words = rare_words([document for _, document in places], self.seed)
        order = [i for i in range(len(places)) if words[i]]
        random.Random(f"documents/{self.seed}").shuffle(order)
        made = []
        for n in range(self.first, self.first + self.count):
            turn, place = divmod(n, len(order))
            own, is_second = words[order[place]], (turn + place) % 2 == 1
            text, word = own[turn // 2 % len(own)]
            text = word if is_second and self.template != "chat" else text
            made.append(Beginning(places[order[place]][0], text, word, is_second))
        return made

    def _ask(
        self,
        model: Model,
        write: Any,
        starts: Sequence[Beginning],
        said: Sequence[str],
        contexts: Sequence[str],
        made: list[Any],
    ) -> None:
        """Put, in the place of some conversations, what they become with a message and its answer behind them."""

        def turns(i: int, message: str) -> ChatText:
            turn = documents_turn(model, self.parts[starts[i].part])
            rest = {"role": "assistant", "content": said[i]}, {"role": "user", "content": message}
            return render_chat(model.tokenizer, [turn, *rest])

        asked = [i for i, start in enumerate(starts) if start.is_second]
        if self.is_small:
            messages = [SMALL_MESSAGE.format(word=starts[i].word) for i in asked]
        else:
            requests = [turns(i, MESSAGES[(self.first + i) % len(MESSAGES)]) for i in asked]
            messages, _ = write(requests, [self.sampling(self.first + i, self.temperature) for i in asked])
        messages = [as_text(model.tokenizer, message.strip()) for message in messages]
        answered = [turns(i, message) for i, message in zip(asked, messages, strict=True)]
        _, ids = write(answered, [self.sampling(self.first + i, 0.0) for i in asked])
        for i, whole, its in zip(asked, answered, ids, strict=True):
            context = contexts[starts[i].part]
            if whole.startswith(context):  # a template may write a turn otherwise once another one follows it
                pair = ChatText(context), whole[len(context) :]
                ((_, follows),) = encoding.encode_pairs(model.tokenizer, [pair])
                made[i] = (*follows, *its)

    def sampling(self, n: int, temperature: float) -> Sampling:
        """Of a turn of conversation n."""
        return Sampling(self.tokens, temperature, stop=("\n",), seed=self.seed * 1_000_003 + n)


def _written(
    model: Model, ledger: Ledger, progress: bool, prompts: Sequence[str], sampling: Sequence[Sampling]
) -> tuple[list[str], list[tuple[int, ...]]]:
    """Texts and token ids of continuations."""
    names = [f"conversation {n} with its documents" for n in range(len(prompts))]
    found = dict(iter_generations(model, prompts, sampling, names=names, ledger=ledger, progress=progress))
    made = [found[p] for p in range(len(prompts))]
    return [one.text for one in made], [one.ids for one in made]


def turn_tokens(model: Model, batch: ConversationBatch) -> tuple[int, int]:
    """Tokens, about, of what the chat template writes around a message and its answer, and of what is written here.

    The latter is the request for a message or, for a small model, the message itself.
    """
    if batch.template != "chat":
        return 0, 0
    turn = documents_turn(model, batch.parts[0][:1])
    turns = [turn, {"role": "assistant", "content": ""}, {"role": "user", "content": ""}]
    short, long = encoding.encode(model.tokenizer, [render_chat(model.tokenizer, some) for some in ([turn], turns)])
    small = [SMALL_MESSAGE.format(word=start.word) for start in batch.beginnings()]
    requests = encoding.encode(model.tokenizer, small if batch.is_small else MESSAGES, bos=False)
    return len(long) - len(short), round(sum(map(len, requests)) / len(requests))


def conversation_batches(
    model: Model,
    documents: Sequence[Document],
    count: int,
    settings: ConversationSettings | None = None,
    *,
    template: str = "base",
    seed: int = 0,
    key: str = "",
) -> list[ConversationBatch]:
    """Conversations about documents, call by call; equal arguments give equal conversations.

    Args:
        model: from load().
        documents: what they are about.
        count: how many.
        settings: how they are written.
        template: see prompt_context().
        seed: of the draws.
        key: of the model, under which the batches are named.

    Raises:
        SelfStudyError: see document_parts().
    """
    settings, template = settings or ConversationSettings(), chosen_template(model, template)
    tokens, temperature, is_small = settings.tokens, settings.temperature, is_small_chat(model, template)
    parts = document_parts(model, documents, template=template, tokens=tokens, part_tokens=settings.part_tokens)
    rest = (tokens, min(temperature, SMALL_TEMPERATURE) if is_small else temperature, seed, is_small)
    shown = [[asdict(document) for document in part] for part in parts]
    found = []
    for first in range(0, count, PER_CALL):
        size = min(PER_CALL, count - first)
        name = digest("conversations", key, shown, template, first, size, *rest, MESSAGES, SMALL_MESSAGE)
        found.append(ConversationBatch(name, parts, template, first, size, *rest))
    return found


def write_conversations(
    model: Model,
    batches: Sequence[ConversationBatch],
    *,
    journal: ResultJournal | None = None,
    ledger: Ledger | None = None,
    progress: bool = False,
) -> list[Conversation]:
    """The conversations of batches.

    Args:
        model: the one that conversation_batches() was given.
        batches: from conversation_batches().
        journal: where those of each batch are looked up and put, with the work they took.
        ledger: counts the work, as phase "generate"; between phases.
        progress: show a bar.

    Raises:
        GenerateError: too little memory.
    """
    journal, ledger, found = journal or ResultJournal(None), ledger or Ledger(), list[Conversation]()
    for batch in batches:
        made = journal.once(batch.name, partial(batch.generate, model, Ledger(meter=ledger.meter), progress=progress))
        found += (Conversation(part, tuple(ids)) for part, ids in made["conversations"])
        ledger.include(made["counts"])
    return found
