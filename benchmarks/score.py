"""Scoring all questions on one article, end to end: icl_ft_fast, its floor, and what people would use instead.

Models are random Llamas of 30M and 135M parameters. The article and its questions come from `--data` (documents.jsonl,
questions.jsonl) or are generated. Slow peers score a sample of the questions, and what a question costs is multiplied
by their number; what they do once (reading the context) is not.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import icl_ft_fast as iff
from benchmarks.peers import Job, PeerMissingError, Sample, interpreter
from benchmarks.timing import Row, measure
from icl_ft_fast import ops
from icl_ft_fast.engine import encoding, trie
from icl_ft_fast.engine.defaults import CHUNK_TOKENS
from icl_ft_fast.engine.model import Model
from icl_ft_fast.engine.prompting import icl_context
from icl_ft_fast.tasks.reversals import simple_reversals
from icl_ft_fast.tasks.task import Question, read_documents, read_questions

SIZES = {
    "30M": {
        "vocab_size": 8000,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "135M": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}
DTYPES = ("bfloat16", "float32")
# A peer's log-likelihoods may differ from ours by this share of their size: rounding alone. llama.cpp's differ more the
# later the position, in float32 too (1e-5 at 5 tokens, 1e-3 at 3,000, 2e-2 at 6,700).
TOLERANCE = {"bfloat16": 3e-2, "float32": 1e-4}
TOLERANCE_LLAMA_CPP = 5e-2


def run(quick: bool, data: Path | None = None) -> list[Row]:
    """Time every size, dtype and peer; `quick` takes the small model and the peers that need no other environment."""
    context, questions = article(data, 40 if quick else None)
    rows = []
    for size in list(SIZES)[: 1 if quick else None]:
        with tempfile.TemporaryDirectory() as folder:
            save_model(Path(folder) / "model", SIZES[size], [context, *(q.prompt for q in questions)])
            for dtype in DTYPES:
                model = iff.load(Path(folder) / "model", dtype=dtype)
                case = Case.of(model, context, questions)
                name = (
                    f"{size} {dtype}, {len(questions)} questions over {len(case.context):,} tokens, "
                    f"{torch.get_num_threads()} threads"
                )
                rows += _ours(name, case)
                rows += _peers(name, case, Path(folder), dtype, quick)
    return rows


@dataclass(frozen=True)
class Case:
    """The same work as text, as requests of token ids, and as ids split into context, prompts and choices."""

    model: Model
    text: str
    questions: list[Question]
    requests: list[tuple[list[int], list[int]]]
    context: list[int]
    prompts: list[list[int]]
    choices: list[list[list[int]]]

    @classmethod
    def of(cls, model: Model, text: str, questions: list[Question]) -> "Case":
        """Encode the questions once."""
        pairs = [(text + question.prompt, choice) for question in questions for choice in question.choices]
        requests = encoding.encode_pairs(model.tokenizer, pairs)
        owner = [q for q, question in enumerate(questions) for _ in question.choices]
        heads = [ids for ids, _ in requests]
        shared = next((i for i, ids in enumerate(zip(*heads, strict=False)) if len(set(ids)) > 1), min(map(len, heads)))
        first = [owner.index(q) for q in range(len(questions))]
        choices: list[list[list[int]]] = [[] for _ in questions]
        for q, (_, continuation) in zip(owner, requests, strict=True):
            choices[q].append(continuation)
        return cls(model, text, questions, requests, heads[0][:shared], [heads[r][shared:] for r in first], choices)


def article(data: Path | None, limit: int | None) -> tuple[str, list[Question]]:
    """The text and its first questions, of the folder `data` or generated."""
    if data is None:
        task = simple_reversals(0, num_facts=500, num_articles=1)
        return icl_context(task.documents), list(task.questions[: limit or 172])
    documents = read_documents(data / "documents.jsonl")
    return "\n\n".join(d.text for d in documents) + "\n\n", list(read_questions(data / "questions.jsonl"))[:limit]


def save_model(folder: Path, size: dict[str, int], texts: list[str]) -> None:
    """A random Llama in float32 and its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(**size, max_position_embeddings=16_384, bos_token_id=0, eos_token_id=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer(texts).save_pretrained(folder)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 8,000 tokens made from the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def _ours(name: str, case: Case) -> list[Row]:
    """The engine from text to scores, what of it is Python before the first row, and the bare arithmetic."""

    def prepare() -> None:
        pairs = [(case.text + question.prompt, choice) for question in case.questions for choice in question.choices]
        trie.plan(trie.build_from_lists(encoding.encode_pairs(case.model.tokenizer, pairs)), CHUNK_TOKENS)

    ledger = iff.Ledger()
    iff.score(case.model, case.questions, context=case.text, ledger=ledger)
    variants: dict[str, Callable[[], object]] = {
        "icl_ft_fast": lambda: iff.score(case.model, case.questions, context=case.text),
        "encode, plan": prepare,
        "floor": floor(case),
    }
    rows = []
    for variant, timing in measure(variants, min_rounds=3, max_rounds=9, seconds=20).items():
        rate = len(case.questions) / timing.ms * 1e3
        rows.append(Row("score", name, variant, timing.ms, timing.p20_ms, timing.p80_ms, rate, "questions/s"))
    return rows


def floor(case: Case, chunk_tokens: int = CHUNK_TOKENS) -> Callable[[], None]:
    """The matrix products of the rows the engine forwards, its attention calls and its head calls; nothing else."""
    model = case.model
    plan = trie.plan(trie.build_from_lists(case.requests), chunk_tokens)
    config, dtype, device = model.network.config, model.head.weight.dtype, model.device
    size = config.hidden_size // config.num_attention_heads
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    head = model.network.get_output_embeddings()
    weights = [m.weight for m in model.network.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    inputs = {width: random(chunk_tokens, width) for width in {w.shape[1] for w in weights}}
    k, v = random(2, plan.capacity, config.num_key_value_heads, size).unbind()
    q = random(chunk_tokens, config.num_attention_heads, size)
    chunks = []
    for chunk in plan.chunks:
        row = torch.arange(chunk.cached_rows, len(chunk.end_k), dtype=torch.int32, device=device)
        end_k, depth_k = chunk.end_k.to(device), chunk.depth_k.to(device)
        targets = chunk.target_row.to(device), chunk.target_token.to(device)
        tree = ops.TreeIndex(row, end_k, depth_k[chunk.cached_rows :], depth_k)
        chunks.append((len(chunk.head_rows), targets, tree))

    @torch.inference_mode()
    def call() -> None:
        for num_head_rows, targets, tree in chunks:
            rows, keys, plans = len(tree.row_q), len(tree.end_k), {}
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]][:rows], weight)
            for _ in range(config.num_hidden_layers):
                ops.trie_attention(q[:rows], k[:keys], v[:keys], tree, plans=plans)
            if num_head_rows:
                ops.target_logprob(inputs[config.hidden_size][:num_head_rows], head.weight, *targets)

    return call


def _peers(name: str, case: Case, folder: Path, dtype: str, quick: bool) -> Iterator[Row]:
    """Each peer once over its sample, its log-likelihoods held against ours."""
    ours = torch.tensor([logp for logp, _ in iff.loglikelihood(case.model, case.requests)])
    first = torch.tensor([0, *(len(choices) for choices in case.choices)]).cumsum(0)
    jobs: dict[str, Callable[[], Sample]] = {"KV loop": lambda: kv_loop(case, 12)}
    if not quick:
        job = Job(str(folder / "model"), dtype, torch.get_num_threads(), 0, case.context, case.prompts, case.choices)
        for peer, sample in (("lm-eval hf", 1), ("llama.cpp", 20), ("vllm", 2), ("vllm, no logp", 20)):
            if peer.startswith("vllm") and dtype != "bfloat16":
                continue
            jobs[peer] = lambda peer=peer, sample=sample: _ask(peer, Job(**{**asdict(job), "sample": sample}), folder)  # type: ignore[misc]
    for peer, ask in jobs.items():
        try:
            sample = ask()
        except PeerMissingError as missing:
            print(f"not measured: {missing}", file=sys.stderr)
            continue
        if sample.logp:
            theirs = torch.tensor([logp for of_question in sample.logp for logp in of_question])
            mine = ours[: first[len(sample.logp)]]
            worst = ((theirs - mine).abs() / mine.abs()).max().item()
            if not worst <= (TOLERANCE_LLAMA_CPP if peer == "llama.cpp" else TOLERANCE[dtype]):
                raise AssertionError(f"{peer}, {name}: log-likelihoods differ by {worst:.1e} of their size")
        seconds = sample.once + statistics.mean(sample.seconds) * len(case.questions)
        variant = f"{peer} ({len(sample.seconds)})"
        ms = seconds * 1e3
        yield Row("score", name, variant, ms, ms, ms, len(case.questions) / seconds, "questions/s")


def _ask(peer: str, job: Job, folder: Path) -> Sample:
    """Run a peer in its own environment."""
    environment, script = interpreter(peer)
    path = folder / "job.json"
    path.write_text(json.dumps(asdict(job)))
    done = subprocess.run([environment, script, str(path), peer], stdout=subprocess.PIPE, text=True, check=True)
    return Sample(**json.loads(done.stdout.splitlines()[-1]))


@torch.inference_mode()
def kv_loop(case: Case, sample: int, *, chunk_tokens: int = CHUNK_TOKENS) -> Sample:
    """What a good user writes: read the context once, expand its cache to the choices, batch them, crop, go on."""
    network: Any = case.model.network
    network.set_attn_implementation("sdpa")
    try:
        start = time.perf_counter()
        cache = DynamicCache(config=network.config)
        ids = torch.tensor([case.context], device=network.device)
        for first in range(0, ids.shape[1], chunk_tokens):
            output = network(ids[:, first : first + chunk_tokens], past_key_values=cache, logits_to_keep=1)
        width = len(case.choices[0])
        cache.batch_repeat_interleave(width)
        output.logits.max().item()  # which is there when the device is done
        once = time.perf_counter() - start
        seconds, logp = [], []
        for prompt, choices in list(zip(case.prompts, case.choices, strict=True))[:sample]:
            start = time.perf_counter()
            longest = max(map(len, choices))
            padded = [[*prompt, *choice, *[0] * (longest - len(choice))] for choice in choices]
            ids = torch.tensor(padded, device=network.device)
            output = network(ids[:, :-1], past_key_values=cache, logits_to_keep=longest).logits.float()
            per_token = output.log_softmax(-1).gather(-1, ids[:, -longest:, None])[..., 0].cpu()
            logp.append([per_token[c, : len(choice)].sum().item() for c, choice in enumerate(choices)])
            cache.crop(1 - ids.shape[1])
            seconds.append(time.perf_counter() - start)
    finally:
        network.set_attn_implementation("icl_ft_fast")
    return Sample(once, seconds, logp)
