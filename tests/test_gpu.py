"""What a GPU asks of the layers above the ops, on tensors without memory, compiled, and on a GPU where there is one."""

from pathlib import Path

import pytest
import torch

from icl_ft_fast.engine import trie
from icl_ft_fast.engine.forward import hidden_states
from icl_ft_fast.engine.generate import Sampling, generate
from icl_ft_fast.engine.kv_cache import KVCache
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.likelihood import loglikelihood
from icl_ft_fast.engine.loading import from_network, load
from icl_ft_fast.engine.model import Model, Rows
from icl_ft_fast.finetuning import batches
from icl_ft_fast.finetuning.data import EncodedExample
from icl_ft_fast.finetuning.network import Objective
from icl_ft_fast.finetuning.optimizer import Optimizer
from icl_ft_fast.finetuning.run import finetune
from icl_ft_fast.finetuning.settings import FinetuneSettings

REQUESTS = [([3, *range(10, 40)], [5, 6]), ([3, *range(10, 40)], [7]), ([3, 4], [9, 9, 8]), ([3, *range(10, 20)], [2])]
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_scoring_and_training_stay_on_one_device_and_read_nothing_back(family, tiny_network) -> None:
    """On the meta device a value that is read, or an operand left on the CPU, is an error."""
    network = tiny_network(family, num_hidden_layers=2).to("meta")
    model = from_network(network, None, "nowhere", self_check=False)
    tree = trie.build_from_lists(REQUESTS)
    plan = trie.plan(tree, 7)
    cache = KVCache(plan.capacity)
    for chunk, hidden in hidden_states(model, plan, cache):
        needed = hidden[chunk.head_rows.to(hidden.device)]
        results = model.target_logprob(needed, chunk.target_row, chunk.target_token)
        assert [x.device.type for x in (hidden, *results)] == ["meta"] * 3
    examples = [EncodedExample([*before, *after], [True] * (len(before) + len(after)), 0) for before, after in REQUESTS]
    Objective(model, None)(batches.pack(examples), range(len(examples))).backward()
    assert all(p.grad.device.type == "meta" for p in network.parameters())
    with pytest.raises(RuntimeError, match="meta"):
        loglikelihood(model, REQUESTS)  # brings its results back


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_what_a_checkpoint_holds_goes_back_where_the_optimizer_has_it(optim, tiny_network) -> None:
    """The number of steps too: a fused AdamW reads it on the device of the weights, and the others on the CPU."""
    state = {}
    for device in ("cpu", "meta"):
        network = tiny_network("llama", num_hidden_layers=1).to(device)
        optimizer = Optimizer(network, FinetuneSettings(optim=optim))
        if device == "meta":
            optimizer.load(state)
        for weight in network.parameters():
            weight.grad = torch.ones_like(weight)
        optimizer.step(0.1)
        state = optimizer.state()
    steps = {tensor.device.type for key, tensor in state.items() if key.startswith("step/")}
    assert steps == {"meta" if "fused" in optim else "cpu"}
    assert {tensor.device.type for key, tensor in state.items() if not key.startswith("step/")} == {"meta"}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of torch, by torch
def test_layers_can_be_compiled(tiny_network) -> None:
    """Whole layers, with rows that change from chunk to chunk; nothing is left to Python inside of them."""
    from torch._dynamo.utils import counters

    model = from_network(tiny_network("llama", num_hidden_layers=1), None, "here", self_check=False)
    want = {chunk_tokens: loglikelihood(model, REQUESTS, chunk_tokens=chunk_tokens) for chunk_tokens in (9, 13)}
    torch._dynamo.reset()
    counters.clear()
    for layer in model.body.layers:
        layer.compile(backend="aot_eager", dynamic=True)
    for chunk_tokens, exact in want.items():
        results = loglikelihood(model, REQUESTS, chunk_tokens=chunk_tokens)
        assert [r.is_greedy for r in results] == [r.is_greedy for r in exact]
        assert [r.logp for r in results] == pytest.approx([r.logp for r in exact], abs=1e-5)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def on_gpu(llama_directory: Path) -> Model:
    return load(llama_directory, device="cuda")  # and has proved itself there


@NEEDS_GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_proves_itself_on_the_gpu(dtype: str, llama_directory: Path) -> None:
    assert load(llama_directory, dtype=dtype, device="cuda").device.type == "cuda"


@NEEDS_GPU
@pytest.mark.gpu
def test_scores_are_those_of_the_cpu(on_gpu: Model, llama: Model) -> None:
    for chunk_tokens in (7, 512):
        exact = loglikelihood(llama, REQUESTS, chunk_tokens=chunk_tokens)
        results = loglikelihood(on_gpu, REQUESTS, chunk_tokens=chunk_tokens)
        assert [r.is_greedy for r in results] == [r.is_greedy for r in exact]
        assert [r.logp for r in results] == pytest.approx([r.logp for r in exact], abs=1e-4)


@NEEDS_GPU
@pytest.mark.gpu
def test_texts_are_those_of_the_cpu(on_gpu: Model, llama: Model) -> None:
    prompts = ["the cat sat", "the cat", "who knows why the mat"]
    texts = [[g.text for g in generate(model, prompts, Sampling(max_new_tokens=8))] for model in (on_gpu, llama)]
    assert texts[0] == texts[1]


@NEEDS_GPU
@pytest.mark.gpu
def test_losses_are_those_of_the_cpu(on_gpu: Model, llama: Model) -> None:
    texts, settings = ["the cat sat on that mat.", "the cat knows why."], FinetuneSettings(steps=3, batch_size=2)
    losses = [finetune(model, texts, settings, ledger=Ledger()).losses for model in (on_gpu, llama)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@NEEDS_GPU
@pytest.mark.gpu
def test_a_forward_and_the_head_wait_for_nothing(on_gpu: Model) -> None:
    row = torch.arange(20, dtype=torch.int32, device="cuda")
    token, end, zero = row.long(), torch.full_like(row, 20), torch.zeros_like(row)
    for mode in ("default", "error"):  # the first round compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.inference_mode():
                hidden = on_gpu.forward(Rows(token, row, row, end, row))
                on_gpu.target_logprob(hidden, zero, zero)
        finally:
            torch.cuda.set_sync_debug_mode("default")
