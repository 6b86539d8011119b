"""A trained prefix: keys and values before every question, in place of documents; the model's weights stay as they are.

The p slots of each layer start as the keys and values of the documents' first p tokens and are trained on conversations
that the model had about the documents, by cross-entropy to what it predicts itself with the documents before them:

    best = model(documents + conversation).log_softmax(-1).topk(20)
    loss = -(best.values.exp() * model(slots, conversation).log_softmax(-1).gather(-1, best.indices)).sum(-1).mean()

Source: Cartridges (arXiv 2506.06266). The first slot stays: models put what they need nothing of on the first token.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from icl_ft_fast.augmentation.self_study import (
    Conversation,
    ConversationSettings,
    conversation_batches,
    write_conversations,
)
from icl_ft_fast.engine import encoding, trie
from icl_ft_fast.engine.contexts import save_context
from icl_ft_fast.engine.defaults import CHUNK_TOKENS
from icl_ft_fast.engine.flops import work_of
from icl_ft_fast.engine.forward import hidden_states
from icl_ft_fast.engine.kv_cache import Context
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.model import Model
from icl_ft_fast.engine.prompting import prompt_context
from icl_ft_fast.engine.slots import LABEL, key_of, slots_context
from icl_ft_fast.engine.transfer import Sent
from icl_ft_fast.finetuning import distributed
from icl_ft_fast.finetuning.batches import Batch
from icl_ft_fast.finetuning.checkpoint import Progress, RunFolder, read_state
from icl_ft_fast.finetuning.data import EncodedExample
from icl_ft_fast.finetuning.distillation import read_teacher
from icl_ft_fast.finetuning.optimizer import Optimizer
from icl_ft_fast.finetuning.run import RunState, train
from icl_ft_fast.finetuning.settings import FinetuneError, PrefixSettings, RunOptions
from icl_ft_fast.finetuning.trackers import Trackers
from icl_ft_fast.runtime.durable import replacing
from icl_ft_fast.tasks.task import Document, Task

LOGIT_ROWS = 64  # rows whose distributions over the vocabulary are held at a time
FILE = "prefix.safetensors"  # in a checkpoint: the slots as they are trained
CONTEXT_FILE = "context.safetensors"  # in output_dir: the trained prefix as a saved context


class Slots(torch.nn.Module):
    """Keys [p, G, D] and values [p, G, Dv] by layer, and what the first token behind them is predicted from, [E]."""

    def __init__(self, layers: Mapping[int, tuple[torch.Tensor, torch.Tensor]], hidden: torch.Tensor) -> None:
        super().__init__()
        self._dtype = hidden.dtype
        exact = torch.promote_types(hidden.dtype, torch.float32)
        self._keys = torch.nn.ParameterDict({str(layer): k.to(exact, copy=True) for layer, (k, _) in layers.items()})
        self._values = torch.nn.ParameterDict({str(layer): v.to(exact, copy=True) for layer, (_, v) in layers.items()})
        self._hidden = torch.nn.Parameter(hidden.to(exact, copy=True))

    def layers(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values by layer in the model's dtype; gradients do not reach the first of several slots."""
        return {int(n): (self._read(self._keys[n]), self._read(self._values[n])) for n in self._keys}

    def hidden(self) -> torch.Tensor:
        """What the first token behind the slots is predicted from, [E]."""
        return self._hidden.to(self._dtype)

    def _read(self, rows: torch.Tensor) -> torch.Tensor:
        return (torch.cat([rows[:1].detach(), rows[1:]]) if len(rows) > 1 else rows).to(self._dtype)


class SlotsObjective(torch.nn.Module):
    """The summed cross-entropy, in nats, to the best tokens of each place: what DDP wraps."""

    def __init__(self, model: Model, slots: Slots, best: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        self.slots, self._model, self._best = slots, model, best

    def forward(self, batch: Batch, examples: Sequence[int]) -> torch.Tensor:
        """The loss of a batch, whose examples begin with a token that stands for the slots."""
        behind = self._model.forward_behind(batch.tree, self.slots.layers())
        hidden = torch.cat([self.slots.hidden()[None], behind])
        hidden = hidden[batch.head_row.to(hidden.device)]
        row = batch.row[batch.target_index].to(hidden.device)
        token, probability = (torch.cat([self._best[e][n] for e in examples]).to(hidden.device) for n in (0, 1))
        row = row.repeat_interleave(token.shape[1])
        return -self._model.target_logprob_sum(hidden, row, token.flatten(), probability.flatten())


class SlotsInTraining:
    """What a run trains, see NetworkInTraining.

    Args:
        model: stays as it is.
        slots: what training starts from.
        best: token ids and probabilities of each example's places, [places, top].
        checkpoint: a folder whose slots are taken instead.
    """

    passes = 2  # no gradients of weights

    def __init__(
        self,
        model: Model,
        slots: Slots,
        best: Sequence[tuple[torch.Tensor, torch.Tensor]],
        checkpoint: Path | None = None,
    ) -> None:
        self.network, self.device = slots, model.device
        if checkpoint is not None:
            slots.load_state_dict(load_file(checkpoint / FILE))
        self.rows_before = len(next(iter(slots.layers().values()))[0]) - 1  # the tree's root stands for the last
        self.objective = distributed.wrap(SlotsObjective(model, slots, best), slots, fsdp=False)

    def weights(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of the slots."""
        return {name: tensor.detach().cpu() for name, tensor in self.network.state_dict().items()}

    def write(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Write the slots into a folder."""
        with replacing(folder / FILE) as partial:
            save_file(weights, partial)


@dataclass(frozen=True)
class SlotsRun:
    """What slots start from, what they are trained on, and how.

    Attributes:
        token: ids whose keys and values the slots start from.
        parts: the text that the conversations of each part follow.
        conversations: from write_conversations().
        settings: steps and rate.
        seed: of the order of conversations.
    """

    token: Sequence[int]
    parts: Sequence[str]
    conversations: Sequence[Conversation]
    settings: PrefixSettings
    seed: int = 0


@dataclass(frozen=True)
class TrainedSlots:
    """What training made.

    Attributes:
        layers: keys [p, G, D] and values [p, G, Dv] by layer, for positions 0 to p - 1.
        hidden: what the first token behind them is predicted from, [E].
        losses: mean loss of each step, in nats a token.
    """

    layers: dict[int, tuple[torch.Tensor, torch.Tensor]]
    hidden: torch.Tensor
    losses: tuple[float, ...]


@dataclass(frozen=True)
class TrainedPrefix:
    """A trained prefix, for save_context(), ContextStore.add() and loglikelihood(start=...).

    Attributes:
        key: a text that stands for it: score(context=key, store=...) asks behind the prefix.
        context: keys and values under the key's tokens.
        losses: mean loss of each step, in nats a token.
    """

    key: str
    context: Context
    losses: tuple[float, ...]


def conversation_settings(settings: PrefixSettings) -> ConversationSettings:
    """How the conversations of a prefix are written."""
    return ConversationSettings(settings.conversation_tokens, settings.temperature, settings.part_tokens)


def train_prefix(
    model: Model,
    documents: Task | Sequence[Document],
    num_tokens: int,
    settings: PrefixSettings | None = None,
    *,
    template: str = "base",
    seed: int = 0,
    options: RunOptions | None = None,
    ledger: Ledger | None = None,
) -> TrainedPrefix:
    """Train keys and values of `num_tokens` tokens that stand for documents; the model stays as it is.

    Args:
        model: from load(), any dtype.
        documents: at least one; together they may be longer than the model's positions.
        num_tokens: p, from 1 to the tokens of the documents' context.
        settings: conversations to write, and steps over them.
        template: what stands around documents and question, see prompt_context().
        seed: of the conversations and of their order.
        options: where the run saves, whether it resumes and what it shows; output_dir also gets context.safetensors,
            which load_context() reads. There is nothing to watch, and in_place means nothing.
        ledger: counts the work, as phases "generate", "teach" and "train".

    Raises:
        SelfStudyError: a document that does not fit the model's positions.
        FinetuneError: num_tokens out of range, files that do not fit, or a loss that is not finite.
        InterruptedRunError: SIGINT or SIGTERM arrived and there is an output_dir.

    Examples:
        >>> documents, model = [iff.Document("d", "femp are wider than glon.")], iff.load("shipped")
        >>> settings = iff.PrefixSettings(conversations=4, steps=2)
        >>> prefix = iff.train_prefix(model, documents, 4, settings)
        >>> len(prefix.context.token)
        4
    """
    settings, ledger = settings or PrefixSettings(), Ledger() if ledger is None else ledger
    shown = documents.documents if isinstance(documents, Task) else documents
    batches = conversation_batches(
        model,
        shown,
        settings.conversations,
        conversation_settings(settings),
        template=template,
        seed=seed,
    )
    options = options or RunOptions()
    conversations = write_conversations(model, batches, ledger=ledger, progress=options.progress)
    parts = [prompt_context(model, part, template) for part in batches[0].parts]
    (token,) = encoding.encode(model.tokenizer, [prompt_context(model, shown, template).rstrip()])
    if not 1 <= num_tokens <= len(token):
        raise FinetuneError(f"num_tokens: expected 1 to the {len(token)} tokens of the documents, got {num_tokens}")
    run = SlotsRun(token[:num_tokens], parts, conversations, settings, seed)
    made = train_slots(model, run, options=options, ledger=ledger)
    name = hashlib.sha256(json.dumps([token, asdict(settings), seed]).encode()).hexdigest()
    key, ids = key_of(model, name, num_tokens)
    context = slots_context(model, made.layers, made.hidden, ids)
    if options.output_dir is not None:
        save_context(Path(options.output_dir) / CONTEXT_FILE, model, context, label=f"{LABEL}{key}")
    return TrainedPrefix(key, context, made.losses)


def train_slots(model: Model, run: SlotsRun, *, options: RunOptions, ledger: Ledger) -> TrainedSlots:
    """Train slots on conversations; the model stays as it is.

    Args:
        model: from load().
        run: see SlotsRun.
        options: see train_prefix().
        ledger: counts the work, as phases "teach" and "train".
    """
    with _frozen(model):
        state = _prepare(model, run, options, Ledger(meter=ledger.meter))
        train(state)
        ledger.include(state.ledger.as_dict())
        slots = state.network.network
        with torch.no_grad():
            layers = {layer: (k.clone(), v.clone()) for layer, (k, v) in slots.layers().items()}
            return TrainedSlots(layers, slots.hidden().clone(), tuple(state.progress.losses))


def _prepare(model: Model, run: SlotsRun, options: RunOptions, ledger: Ledger) -> RunState:
    """The run before its next step: the first one, or the one after the last checkpoint."""
    token, conversations, settings = run.token, run.conversations, run.settings
    over = max(len(token) + len(one.ids) for one in conversations) - model.max_positions
    if over > 0:
        raise FinetuneError(
            f"num_tokens: {len(token)} slots and the longest conversation are {over} tokens over the model's "
            f"{model.max_positions} positions"
        )
    if options.watch is not None:
        raise FinetuneError("watch: a prefix is trained, the model's weights stay as they are")
    path = None if options.output_dir is None else Path(options.output_dir)
    said = hashlib.sha256(json.dumps([list(run.parts), [[c.part, c.ids] for c in conversations]]).encode()).hexdigest()
    rank, processes = distributed.place()
    origin = asdict(settings) | {"seed": run.seed, "token": list(token), "conversations": said, "processes": processes}
    origin["model"] = "" if path is None else model.fingerprint()
    folder = RunFolder(path, origin, resume=options.resume, is_writer=rank == 0)
    progress = folder.restore() if options.resume else Progress()
    checkpoint = folder.folder(progress.step) if progress.step else None
    with ledger.phase("teach"):
        slots = first_slots(model, token, ledger)
        best = read_best(model, run.parts, conversations, settings.top, ledger)
    if checkpoint is not None:  # its counts include the reading
        ledger = Ledger(meter=ledger.meter)
        ledger.include(progress.counts)
    network = SlotsInTraining(model, slots, best, checkpoint)
    training = settings.training()
    optimizer = Optimizer(slots, training)
    if checkpoint is not None:
        optimizer.load(read_state(checkpoint))
    begin = token[-1]  # stands for the slots as the root of each step's tree
    return RunState(
        settings=training,
        seed=run.seed,
        options=replace(options, output_dir=path),
        examples=[
            EncodedExample([begin, *c.ids], [False] + [True] * len(c.ids), n) for n, c in enumerate(conversations)
        ],
        validation=[],
        network=network,
        optimizer=optimizer,
        folder=folder,
        progress=progress,
        trackers=Trackers((), path, folder.origin),
        ledger=ledger,
        work=work_of(model),
    )


@torch.no_grad()
def first_slots(model: Model, token: Sequence[int], ledger: Ledger) -> Slots:
    """The keys and values of a text, as slots to train."""
    plan = trie.plan(trie.build_from_lists([(list(token), [])], whole=True), CHUNK_TOKENS)
    cache = model.new_cache(plan.capacity)
    for _, hidden in hidden_states(model, plan, cache):
        last = hidden[-1]
    ledger.forwarded_tokens += len(token)
    ledger.kv_bytes += cache.nbytes
    ledger.ran(work_of(model), torch.arange(len(token)), 0, 0)
    return Slots(cache.layers(len(token)), last)


@torch.no_grad()
def read_best(
    model: Model, parts: Sequence[str], conversations: Sequence[Conversation], top: int, ledger: Ledger
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the model predicts at each place of conversations with their documents before them, read as one tree.

    Returns:
        For each conversation the ids int32 [places, top] of the likeliest tokens, and their probabilities.

    Raises:
        FinetuneError: too little memory.
    """
    before = encoding.encode(model.tokenizer, [part.rstrip() for part in parts])
    tree = trie.build_from_lists([(before[one.part], list(one.ids)) for one in conversations])
    best = _Best(model, tree, min(top, len(model.head.weight)))
    paths = read_teacher(model, tree, best, ledger)
    return [(best.ids[path], best.probability[path]) for path in paths]


class _Best:
    """Reads the likeliest tokens at the place of every scored token."""

    def __init__(self, model: Model, tree: trie.Trie, top: int) -> None:
        shape = len(tree.scored_token), top
        self.ids, self.probability = torch.empty(shape, dtype=torch.int32), torch.empty(shape)
        self.extra_bytes = self.ids.nbytes + self.probability.nbytes + 3 * 4 * LOGIT_ROWS * len(model.head.weight)
        self._head = model.head

    def __call__(self, sent: Sent, hidden: torch.Tensor) -> None:
        found = []
        for rows in sent.head_rows.split(LOGIT_ROWS):
            found.append(self._head.logits(hidden[rows]).log_softmax(-1).topk(self.ids.shape[1]))
        if found:
            row, place = sent.chunk.target_row.long(), sent.chunk.target_index
            self.ids[place] = torch.cat([ids for _, ids in found]).int().cpu()[row]
            self.probability[place] = torch.cat([logp for logp, _ in found]).exp().float().cpu()[row]


@contextlib.contextmanager
def _frozen(model: Model) -> Iterator[None]:
    """Within the block the model's weights take no gradients."""
    trained = [parameter for parameter in model.network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
