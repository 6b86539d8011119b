"""What queries cost, measured."""

import torch

from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.likelihood import prefill
from icl_ft_fast.engine.prompting import prompt_context
from icl_ft_fast.study import sweep
from icl_ft_fast.tasks.reversals import simple_reversals


def task_of_seed(seed):
    """Two facts, two articles each."""
    return simple_reversals(seed, num_facts=2, num_articles=2)


def test_without_time_what_is_needed_is_measured_once_and_nothing_else(llama):
    task = task_of_seed(0)
    context = prompt_context(llama, task.documents[:2])
    found = sweep.sweep(llama, task.questions, context, lengths=(64,), needed=(5,), seconds=1e-9)
    assert [(p.context_tokens, p.batch) for p in found.points] == [(n, 1) for n in sorted((0, 5, found.context_tokens))]
    assert {len(p.query_s) for p in found.points} == {1}
    assert [len(p.prefill_s) for p in found.points] == [0, 1, 1]
    settled = sweep.sweep(llama, task.questions, context, lengths=(64,), batches=(1, 2), rounds=2, seconds=1e9)
    assert {(p.context_tokens, p.batch) for p in settled.points} >= {(64, 1), (64, 2)}
    assert {len(p.query_s) for p in settled.points} == {2}
    taken = sum(seconds for p in settled.points for seconds in (*p.prefill_s, *(p.batch * q for q in p.query_s)))
    assert settled.measured_s > taken / 2  # a reading is in the points of both batch sizes


def test_the_sweep_saves_and_loads_the_context_itself(llama, monkeypatch):
    task, loaded = task_of_seed(0), []
    context = prompt_context(llama, task.documents[:2])
    load = sweep.load_context

    def noted(path, model, **more):
        loaded.append(load(path, model, **more))
        return loaded[-1]

    monkeypatch.setattr(sweep, "load_context", noted)
    found = sweep.sweep(llama, task.questions, context, lengths=(), batches=(1,), rounds=2)
    (own,) = encoding.encode(llama.tokenizer, [context.rstrip()])
    assert [(p.context_tokens, len(p.save_s), len(p.load_s)) for p in found.points] == [(0, 0, 0), (len(own), 1, 2)]
    assert [c.token.tolist() for c in loaded] == [own] * 3  # the warm-up too
    expected = prefill(llama, own)
    assert torch.equal(loaded[-1].hidden, expected.hidden)
    rows, layers = len(own), expected.cache.layers(len(own))
    for layer, (keys, values) in loaded[-1].cache.layers(rows).items():
        assert torch.equal(keys, layers[layer][0])
        assert torch.equal(values, layers[layer][1])
    assert loaded[-1].cache.capacity > rows  # opened as the first run opens it


def test_answers_are_decoded_behind_the_context(llama, monkeypatch):
    """A clock that only generation moves: a second a token, and ten before the first."""
    task, now = task_of_seed(0), [0.0]
    prompts = []

    def written(model, asked, sampling, *, on_token):
        prompts.append((len(asked), min(map(len, asked)), sampling.max_new_tokens))
        now[0] += 10
        for _ in range(sampling.max_new_tokens):
            for p in range(len(asked)):
                now[0] += 1
                on_token(p, 0, 0.0)
        return iter(())

    monkeypatch.setattr(sweep, "iter_generations", written)
    monkeypatch.setattr(sweep.time, "perf_counter", lambda: now[0])
    found = sweep.sweep(llama, task.questions, lengths=(64,), batches=(1, 2), rounds=2, seconds=1e9, decoded=40)
    assert {p.decode_s for p in found.points} == {(1.0,) * 3}  # a token of a query, whatever the batch
    assert {(n, length >= 64, tokens) for n, length, tokens in prompts} == {
        (1, False, sweep.DECODED),
        (2, False, sweep.DECODED),
        (1, True, sweep.DECODED),
        (2, True, sweep.DECODED),
    }
    monkeypatch.undo()
    real = sweep.sweep(llama, task.questions, lengths=(), batches=(1, 2), rounds=1, decoded=3)
    assert all(0 < s < 60 for p in real.points for s in p.decode_s)
