"""How many kernels Triton's JIT compiles for a load and a scoring run: the real JIT, with a launch that does nothing.

A compilation takes about a second, and on a GPU the run stands still meanwhile. Sizes that differ from chunk to chunk
must therefore not make variants of a kernel.
"""

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from transformers import LlamaConfig, LlamaForCausalLM
from triton.backends.compiler import GPUTarget

from icl_ft_fast.engine.likelihood import loglikelihood
from icl_ft_fast.engine.loading import from_network
from icl_ft_fast.ops import checks, cpu
from icl_ft_fast.ops.triton import target_logprob, trie_attention

# The scoring runs: tokens of the context, questions, tokens of a question, tokens of a choice, and of a chunk.
RUNS = ((700, 9, 40, 5, 512), (333, 5, 17, 3, 256))


def compilations() -> list[str]:
    """Names of the kernels compiled for the self-check of a load and for two scoring runs, in order."""
    made: list[str] = []

    def compile_nothing(kernel: Any, key: Any, signature: Any, device: Any, *_: Any) -> object:
        made.append(f"{kernel.__module__.rpartition('.')[2]}{kernel.__name__}")
        stub = SimpleNamespace(run=lambda *_: None, function=0, packed_metadata=0, launch_metadata=lambda *_: None)
        kernel.device_caches[device][0][key] = stub
        return stub

    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )

    def both(launch: Callable[..., Any], serve: Callable[..., Any]) -> Callable[..., Any]:
        """The results are the CPU's, since a launch makes none."""

        def call(*arguments: Any) -> Any:
            launch(*(x for x in arguments if not isinstance(x, bool)))  # a launcher knows no batch_invariant
            return serve(*arguments)

        return call

    library = torch.library.Library("icl_ft_fast", "IMPL")
    with ExitStack() as stack:
        stack.callback(library._destroy)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", UserWarning)  # that the CPU's own kernel is overridden
        for name, kernel in (
            ("trie_attention", both(trie_attention.trie_attention, _without_plan(cpu.trie_attention))),
            ("trie_attention_plan", trie_attention.trie_attention_plan),
            ("target_logprob", both(target_logprob.target_logprob, cpu.target_logprob)),
        ):
            library.impl(name, kernel, "CPU", allow_override=True)
        stack.enter_context(mock.patch.object(checks, "PLANNED", ("cpu",)))
        stack.enter_context(mock.patch.object(triton.runtime.JITFunction, "_do_compile", compile_nothing))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", driver))
        _load_and_score()
    return made


def _without_plan(serve: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: serve(*arguments[:11], None, *arguments[12:])


def _load_and_score() -> None:
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    model = from_network(LlamaForCausalLM(config).to(torch.bfloat16), None, "random")
    for context, questions, question, choice, chunk_tokens in RUNS:
        first = torch.randint(1000, (context,)).tolist()
        requests = [(first + [q] * question, [q + c] * choice) for q in range(questions) for c in range(10, 14)]
        loglikelihood(model, requests, chunk_tokens=chunk_tokens)


if __name__ == "__main__":
    found = compilations()
    print(len(found), *found)
