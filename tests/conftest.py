"""What tests share: no network, few threads, tiny tokenizers, tiny networks of any family, and what they alone say."""

import gc
import os
import random
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from logging import getLogger
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tests start processes of their own
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # on a busy machine, threads that wait would hold the others up
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores; what tests threads says how many it wants
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from icl_ft_fast.engine.loading import load
from icl_ft_fast.engine.model import Model
from icl_ft_fast.runtime import progress

progress.FIRST_S = 3600.0  # on a busy machine any test may last; test_progress.py has its own
# The same examples in every run; --hypothesis-profile=default draws new ones.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")

VOCABULARY = 300
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
WORDS = "the cat sat on that mat who knows why".split()


def pytest_collection_finish() -> None:
    """What is imported and collected stays: looking through it again and again took a tenth of the suite's time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _log_levels():
    """A command that is run here sets them for its process; the next test gets them as they were."""
    loggers = [getLogger(name) for name in ("icl_ft_fast", "icl_ft_fast.engine.memory")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_reproducible():
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    logging.disable_progress_bar()


def sentences(number: int, seed: int = 0) -> list[str]:
    """Made-up sentences; some begin alike, some hold digits and letters beyond ASCII."""
    rng = random.Random(seed)
    made = [" ".join(rng.choices(WORDS, k=rng.randint(2, 9))) for _ in range(number)]
    return [text + rng.choice(["", ".", "?", " 42", " — über", "\n"]) for text in made]


def _byte_level(*, bos: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    # Without the pattern that splits words, merges run across spaces too.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=bos)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"] if bos else ["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(300), trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **names)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of VOCABULARY tokens that adds BOS."""
    return _byte_level(bos=True)


@pytest.fixture(scope="session")
def tokenizer_without_bos() -> PreTrainedTokenizerFast:
    """One that has no BOS, and has tokens of more than one word."""
    return _byte_level(bos=False)


def _tiny_network(family: str, *, std: float = 0.1, **settings: Any) -> Any:
    config = AutoConfig.for_model(family, **{**TINY, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=std)
                else:  # biases that are zero and norms that are one would hide that they are left out
                    parameter.add_(0.05 * torch.randn_like(parameter))
    return network


@pytest.fixture(scope="session")
def tiny_network() -> Callable[..., Any]:
    """A function from a family and its settings to a network with eager attention; the same weights at every call."""
    return _tiny_network


@pytest.fixture(scope="session")
def llama_directory(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny llama as safetensors, with the tokenizer that adds BOS; not to be written to."""
    folder = tmp_path_factory.mktemp("llama")
    _tiny_network("llama", num_hidden_layers=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(llama_directory: Path) -> Model:
    """The tiny llama, loaded."""
    return load(llama_directory)


@pytest.fixture(scope="module")
def live(llama: Model) -> Iterator[tuple[int, Any]]:
    """Port and scheduler of a live server of the tiny llama, with a key, a chat template and small limits."""
    from serving import KEY, TEMPLATE, serving

    from icl_ft_fast.integrations.guard import Limits

    words = deepcopy(llama.tokenizer)
    words.chat_template = TEMPLATE
    limits = Limits(body_bytes=100_000, body_s=0.3, choices=100, new_tokens=50)
    with serving(replace(llama, tokenizer=words), key=KEY, limits=limits) as (port, scheduler):
        yield port, scheduler


@pytest.fixture(scope="module")
def client(live: tuple[int, Any]) -> Iterator[Any]:
    """OpenAI's client of the live server."""
    import openai
    from serving import KEY

    with openai.OpenAI(base_url=f"http://127.0.0.1:{live[0]}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def plain_llama() -> Any:
    """The same weights as `llama`, in a network that nothing was changed in."""
    return _tiny_network("llama", num_hidden_layers=2)


def _plain(network: Any, context: Sequence[int], continuation: Sequence[int]) -> tuple[torch.Tensor, bool]:
    # The last token is predicted only: at the very last position it has none of its own.
    ids = torch.tensor([[*context, *continuation][:-1]])
    with torch.no_grad():
        logits = network(ids, use_cache=False).logits[0, len(context) - 1 :]
    target = torch.tensor(continuation)
    logp = logits.double().log_softmax(-1).gather(-1, target[:, None])[:, 0]
    return logp, bool((logits.argmax(-1) == target).all())


@pytest.fixture(scope="session")
def plain() -> Callable[[Any, Sequence[int], Sequence[int]], tuple[torch.Tensor, bool]]:
    """A function from a network, context ids and continuation ids to what one forward of that request alone gives.

    Float64 log-probabilities of the continuation's tokens, and whether each is the most likely.
    """
    return _plain
