"""The server's scheduler without a server: what is one batch, what is kept, and whose a failure is."""

import threading
from concurrent.futures import wait

import pytest
from conftest import sentences
from serving import CHOICES, CONTEXT

from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.generate import Sampling, generate
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.likelihood import ScoreError, loglikelihood
from icl_ft_fast.integrations import scheduler as scheduler_module
from icl_ft_fast.integrations.scheduler import (
    Choices,
    Prompts,
    Scheduler,
    SchedulerBusyError,
    SchedulerClosedError,
    Sequences,
)


def test_what_waits_together_is_one_trie(llama, monkeypatch):
    begun, go_on, batches = threading.Event(), threading.Event(), []

    def encode(self, jobs):
        batches.append(len(jobs))
        begun.set()
        assert go_on.wait(60)
        return original(self, jobs)

    original = Scheduler._encode
    monkeypatch.setattr(Scheduler, "_encode", encode)
    scheduler = Scheduler(llama, context_bytes=0)
    prompts = [" " + text.strip() for text in sentences(8)]
    first = scheduler.submit(Choices("", "the cat", (" sat",)))
    assert begun.wait(60)
    futures = [scheduler.submit(Choices(CONTEXT, prompt, CHOICES)) for prompt in prompts]
    dropped = scheduler.submit(Choices(CONTEXT, " nobody waits for this", CHOICES))
    wrong = scheduler.submit(Choices(CONTEXT, "", ("",)))
    assert dropped.cancel()
    go_on.set()
    before = Ledger()
    loglikelihood(llama, [("the cat", " sat")], ledger=before)
    loglikelihood(llama, [(CONTEXT + prompt, choice) for prompt in prompts for choice in CHOICES], ledger=before)
    for prompt, future in zip(prompts, futures, strict=True):
        expected = loglikelihood(llama, [(CONTEXT + prompt, choice) for choice in CHOICES])
        assert [r.logp for r in future.result().results] == pytest.approx([e.logp for e in expected], abs=1e-4)
    with pytest.raises(ScoreError, match=r"^choices\[0\]: no token of its own"):
        wrong.result()
    assert first.done()
    scheduler.close()
    assert batches == [1, len(prompts) + 1]
    assert scheduler.ledger == before


def test_a_beginning_that_batches_had_in_common_is_kept(llama):
    scheduler, expected = Scheduler(llama, context_bytes=2**26), []
    ids = encoding.encode(llama.tokenizer, [CONTEXT + text for text in (" who", " knows", " that", " mat")])
    try:
        for token in ids:
            answer = scheduler.submit(Sequences([(token[:1], token[1:])], 1)).result()
            expected.append(answer.cached_tokens)
            alone = loglikelihood(llama, [(token[:1], token[1:])])[0].logp
            assert sum(answer.results[0].logp) == pytest.approx(alone, abs=1e-3)
    finally:
        scheduler.close()
    assert expected[:2] == [0, 0]  # the second sees that the first began alike, and keeps that
    assert min(expected[2:]) >= 64
    assert len(scheduler.contexts) == 1


def test_a_second_attempt_at_a_batch_tells_no_token_again(llama, monkeypatch):
    written, failed = [], []

    def iter_generations(*arguments, on_token, **options):
        def breaks(p, token):
            if len(written) == 3 and not failed:
                failed.append(token)
                raise RuntimeError("the device is lost")
            return on_token(p, token)

        return original(*arguments, on_token=breaks, **options)

    original = scheduler_module.iter_generations
    scheduler = Scheduler(llama, context_bytes=2**26)
    how = Sampling(max_new_tokens=6, temperature=1.0, seed=3)
    prompts = encoding.encode(llama.tokenizer, ["the cat", "who"])
    expected = generate(llama, prompts, how)
    monkeypatch.setattr(scheduler_module, "iter_generations", iter_generations)
    with scheduler._changed:  # both wait together
        told = scheduler.submit(Prompts(prompts[:1], [how], lambda _, token: written.append(token.id) or True))
        other = scheduler.submit(Prompts(prompts[1:], [how]))
    assert [future.result().results[0].ids for future in (told, other)] == [one.ids for one in expected]
    assert failed
    assert written == list(expected[0].ids)
    scheduler.close()


def test_more_than_may_wait_is_refused_and_shutting_down_answers_everyone(llama, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    original = Scheduler._encode

    def encode(self, jobs):
        begun.set()
        assert go_on.wait(60)
        return original(self, jobs)

    monkeypatch.setattr(Scheduler, "_encode", encode)
    scheduler = Scheduler(llama, context_bytes=0, max_waiting=2)
    at_work = scheduler.submit(Choices("", "the", CHOICES))
    assert begun.wait(60)
    waiting = [scheduler.submit(Choices("", "the", CHOICES)) for _ in range(2)]
    with pytest.raises(SchedulerBusyError, match=r"^2 requests are waiting already"):
        scheduler.submit(Choices("", "the", CHOICES))
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    wait(waiting)
    go_on.set()
    closing.join()
    assert len(at_work.result().results) == 3
    for future in waiting:
        assert isinstance(future.exception(), SchedulerClosedError)
    with pytest.raises(SchedulerClosedError):
        scheduler.submit(Choices("", "the", CHOICES))


def test_a_text_that_choices_repeat_too_often_is_refused(llama, monkeypatch):
    monkeypatch.setattr("icl_ft_fast.integrations.scheduler.BATCH_CHARACTERS", 100)
    scheduler = Scheduler(llama, context_bytes=0)
    with pytest.raises(ScoreError, match=r"^choices: 109 characters, counting context and prompt with each choice"):
        scheduler.submit(Choices("x" * 30, "y" * 5, ("a", "b", "cd")))
    scheduler.close()


def test_generation_and_scores_share_a_batch(llama):
    scheduler = Scheduler(llama, context_bytes=2**26)
    prompts = encoding.encode(llama.tokenizer, ["the cat", "who knows"])
    how = Sampling(max_new_tokens=5, temperature=1.0, seed=7)
    written, scored = scheduler.submit(Prompts(prompts, [how, how])), scheduler.submit(Choices("", "the cat", CHOICES))
    assert written.result().results == generate(llama, prompts, how)
    assert len(scored.result().results) == 3
    scheduler.close()
