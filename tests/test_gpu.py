"""What a GPU asks of the layers above the ops, on tensors without memory, compiled, and on a GPU where there is one."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from icl_ft_fast.engine import trie
from icl_ft_fast.engine.flops import Work
from icl_ft_fast.engine.forward import (
    ScoringOptions,
    chunk_tokens_of,
    footprint_of,
    forward_chunks,
    hidden_states,
    suited_chunk_tokens,
)
from icl_ft_fast.engine.generate import Sampling, generate
from icl_ft_fast.engine.kv_cache import KVCache, num_staying
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.likelihood import loglikelihood
from icl_ft_fast.engine.loading import from_network, load
from icl_ft_fast.engine.model import Model, Rows
from icl_ft_fast.engine.transfer import send
from icl_ft_fast.finetuning import batches
from icl_ft_fast.finetuning.data import EncodedExample
from icl_ft_fast.finetuning.network import Objective
from icl_ft_fast.finetuning.optimizer import Optimizer
from icl_ft_fast.finetuning.run import finetune
from icl_ft_fast.finetuning.settings import FinetuneSettings


class Waits(TorchDispatchMode):
    """Counts copies to the meta device, which has no values to bring, and what a host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = self.waited = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            self.waited += 1
            return 0
        packet = func.overloadpacket
        if packet in (torch.ops.aten.to, torch.ops.aten._to_copy, torch.ops.aten.copy_):
            here, there = args[0].device, kwargs.get("device")
            if packet is torch.ops.aten.copy_:
                here, there = args[1].device, here
            there = torch.device(there or next((arg for arg in args if isinstance(arg, torch.device)), here))
            if there != here:
                is_apart = kwargs.get("non_blocking", False) or True in args[1:]
                self.sent += is_apart and here.type == "cpu"
                self.waited += not is_apart
                if there.type == "cpu":
                    return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return func(*args, **kwargs)


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


def test_scoring_copies_once_a_chunk_and_waits_only_for_results(tiny_network, monkeypatch) -> None:
    """At most 2 waits a chunk, whatever the number of layers: here 1, for results of the chunk before."""
    model = from_network(tiny_network("llama", num_hidden_layers=4).to("meta"), None, "nowhere", self_check=False)
    footprint_of(model)
    waits, chunks, order = Waits(), [], []

    class Arrived:
        def synchronize(self) -> None:
            waits.waited += 1
            order.append("read")

    forward_chunk = Model.forward_chunk
    monkeypatch.setattr("icl_ft_fast.engine.transfer._marked", lambda device: Arrived())
    monkeypatch.setattr(
        Model, "forward_chunk", lambda *rest: (chunks.append(rest[1]), order.append("run"), forward_chunk(*rest))[2]
    )
    with waits:
        loglikelihood(model, REQUESTS, chunk_tokens=7)
    assert len(chunks) > 4
    assert sum(len(chunk.keep) > 0 for chunk in chunks) > 2  # of which the cache is compacted for
    assert (waits.sent, waits.waited) == (len(chunks), sum(len(chunk.head_rows) > 0 for chunk in chunks))
    assert order[-2:] == ["run", "read"]
    assert ["run", "run", "read"] in [order[i : i + 3] for i in range(len(order))]  # one chunk late


@pytest.mark.parametrize(("temperature", "copies"), [(0.0, 1), (0.7, 3)])
def test_a_step_of_decoding_waits_once(temperature, copies, tiny_network) -> None:
    """Whatever the number of layers; the meta device writes token 0, and the steps have constant shapes."""
    words = SimpleNamespace(eos_token_id=None, decode=lambda ids: "")
    model = from_network(tiny_network("llama", num_hidden_layers=4).to("meta"), words, "nowhere", self_check=False)
    footprint_of(model)
    found = {}
    for new_tokens in (1, 7):
        with Waits() as waits:
            how = Sampling(new_tokens, temperature=temperature)
            (written, *_) = generate(model, [[5, 6, t] for t in range(7, 11)], how)
        assert len(written.ids) == new_tokens
        found[new_tokens] = waits
    assert found[7].waited - found[1].waited == 6
    assert found[7].sent - found[1].sent == 6 * copies + 1  # the place of a batch's numbers is made once


def test_a_chunk_on_the_device_is_what_it_is_on_the_host() -> None:
    tree = trie.build_from_lists(REQUESTS)
    for chunk in trie.plan(tree, 7).chunks:
        sent = send(chunk, torch.device("cpu"))
        assert {x.data_ptr() % 16 for x in (sent.end_k, sent.head_rows, sent.target_row, sent.target_token)} == {0}
        assert torch.equal(sent.moved, chunk.keep[num_staying(chunk.keep) :])
        for name in ("token", "end_k", "depth_k", "head_rows", "target_row", "target_token"):
            assert getattr(sent, name).tolist() == getattr(chunk, name).tolist(), name
        row_q = range(chunk.cached_rows, chunk.cached_rows + len(chunk.token))
        assert sent.row_q.tolist() == [*row_q]
        shared = [all(sent.end_k[p] > row for row in row_q) for p in range(chunk.cached_rows)]
        assert sent.num_shared == sum(shared) == (shared.index(False) if False in shared else len(shared))
        assert sent.max_depth == max(sent.depth_k[chunk.cached_rows :].tolist())


def test_a_gpu_forwards_more_at_a_time_cut_behind_what_all_share(tiny_network) -> None:
    """At least 8,192 rows, more of a small model; and the shared beginning is a chunk of its own."""
    gpu, layers = torch.device("cuda"), ((None, 1),) * 32

    def rows(parameters_a_layer: float) -> int:
        return suited_chunk_tokens(gpu, Work(int(2 * 32 * parameters_a_layer), 1, layers, 1, 1))

    assert [rows(x) for x in (218e6, 61e6, 15e6, 3.5e6, 1e4)] == [8192, 8192, 16_384, 65_536, 65_536]
    model = from_network(tiny_network("llama", num_hidden_layers=1), None, "here", self_check=False)
    assert chunk_tokens_of(model) == 512
    tree = trie.build_from_lists([([1, 2, 3], [4 + t, 5, 6, 7]) for t in range(3)])
    nothing = type("Nothing", (), {"extra_bytes": 0, "__call__": lambda *_: None})()
    ends = {}
    for device in ("cpu", "meta"):
        model.network.to(device)
        chunks = forward_chunks(model, tree, nothing, options=ScoringOptions(5), ledger=Ledger())
        ends[device] = [chunk.last_row for chunk in chunks]
    assert ends == {"cpu": [5, 10, 12], "meta": [3, 8, 12]}


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
def test_steps_of_decoding_are_replayed(on_gpu: Model, monkeypatch) -> None:
    """One graph, of the one batch size, for all steps but the first, which reads the prompts."""
    captured, replayed = [], []
    graph = torch.cuda.CUDAGraph
    monkeypatch.setattr(graph, "capture_end", lambda self, end=graph.capture_end: captured.append(1) or end(self))
    monkeypatch.setattr(graph, "replay", lambda self, replay=graph.replay: replayed.append(1) or replay(self))
    generate(on_gpu, ["the cat sat", "the cat"], Sampling(max_new_tokens=8))
    assert len(captured) == 1 < len(replayed) <= 7  # fewer where an end token comes first


@NEEDS_GPU
@pytest.mark.gpu
def test_losses_are_those_of_the_cpu(on_gpu: Model, llama: Model) -> None:
    texts, settings = ["the cat sat on that mat.", "the cat knows why."], FinetuneSettings(steps=3, batch_size=2)
    losses = [finetune(model, texts, settings, ledger=Ledger()).losses for model in (on_gpu, llama)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@NEEDS_GPU
@pytest.mark.gpu
def test_scoring_waits_for_no_copy(on_gpu: Model) -> None:
    """Only events are waited for, which torch's debug mode does not count."""
    for mode in ("default", "error"):  # the first round compiles, and measures the model
        torch.cuda.set_sync_debug_mode(mode)
        try:
            loglikelihood(on_gpu, REQUESTS, chunk_tokens=7)
        finally:
            torch.cuda.set_sync_debug_mode("default")


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
