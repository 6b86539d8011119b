"""What score, iter_scores and loglikelihood promise beside the numbers, which test_model.py holds to plain forwards."""

import random
from dataclasses import replace

import pytest
from conftest import VOCABULARY, sentences
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.likelihood import LogLikelihood, ScoreError, iter_loglikelihood, loglikelihood
from icl_ft_fast.engine.score import Score, iter_scores, score
from icl_ft_fast.study.models import compare_scores
from icl_ft_fast.study.statistics import gap_interval, sign_flip_test
from icl_ft_fast.tasks.task import Question

PART = st.lists(st.sampled_from([0, 5, VOCABULARY - 1]), min_size=1, max_size=6).map(tuple)
REQUESTS = st.lists(st.tuples(PART, PART), min_size=1, max_size=8)
CONTEXT = "the cat sat on that mat. who knows why"


def questions(number=9):
    """Questions of one to four choices; some prompts are equal, one is empty, and some choices begin alike."""
    rng = random.Random(0)
    prompts = ["", *(" " + text.strip() for text in sentences(number, seed=1))]
    made = []
    for q in range(number):
        choices = tuple(" " + text.strip() for text in rng.sample(sentences(30, seed=2), 1 + q % 4))
        answer = None if q == 4 else q % len(choices)
        made.append(Question(f"q{q}", prompts[q - q % 2], choices, answer))
    return made


def prefixes(requests):
    """Distinct prefixes that some token follows, and distinct (prefix, token) pairs of the continuations."""
    rows, scored = set(), set()
    for context, continuation in requests:
        whole = (*context, *continuation)
        rows |= {whole[:n] for n in range(1, len(whole))}
        scored |= {whole[: n + 1] for n in range(len(context), len(whole))}
    return rows, scored


def assert_same(results, expected, num_tokens):
    assert len(results) == len(expected)
    for got, want, tokens in zip(results, expected, num_tokens, strict=True):
        assert got.logp == pytest.approx(want.logp, rel=0, abs=1e-5 * tokens)
        assert got.is_greedy == want.is_greedy


@settings(max_examples=20, deadline=None)
@given(requests=REQUESTS, chunk_tokens=st.sampled_from([1, 3, 16, 100]), data=st.data())
def test_counts_results_and_order_depend_on_the_requests_alone(llama, requests, chunk_tokens, data):
    ledger = Ledger()
    results = loglikelihood(llama, requests, chunk_tokens=chunk_tokens, ledger=ledger)
    rows, scored = prefixes(requests)
    assert ledger == Ledger(
        request_tokens=sum(len(context) + len(continuation) for context, continuation in requests),
        forwarded_tokens=len(rows),
        head_tokens=len({node[:-1] for node in scored}),
        scored_tokens=len(scored),
    )
    order = data.draw(st.permutations(range(len(requests))))
    permuted = loglikelihood(llama, [requests[r] for r in order], chunk_tokens=chunk_tokens)
    assert permuted == [results[r] for r in order]  # the same trie, so the same bits
    alone = [loglikelihood(llama, [request])[0] for request in requests]
    assert_same(results, alone, [len(continuation) for _, continuation in requests])


def test_a_ledger_adds_up_over_calls(llama):
    ledger = Ledger(forwarded_tokens=7)
    for _ in range(2):
        loglikelihood(llama, [([5, 6], [7, 8])], ledger=ledger)
    assert ledger == Ledger(request_tokens=8, forwarded_tokens=13, head_tokens=4, scored_tokens=4)


def test_no_requests_are_no_results(llama):
    ledger = Ledger()
    assert loglikelihood(llama, [], ledger=ledger) == []
    assert score(llama, [], ledger=ledger) == []
    assert list(iter_scores(llama, [])) == []
    assert ledger == Ledger()


def test_a_question_is_scored_as_its_choices_after_context_and_prompt(llama, tokenizer):
    asked = questions()
    for question, got in zip(asked, score(llama, asked, context=CONTEXT), strict=True):
        pairs = [(CONTEXT + question.prompt, choice) for choice in question.choices]
        expected = [loglikelihood(llama, [pair])[0] for pair in pairs]
        tokens = [len(tokenizer.encode(context + choice)) - len(tokenizer.encode(context)) for context, choice in pairs]
        assert got.question_id == question.id
        assert got.num_tokens == tuple(tokens)
        assert_same([LogLikelihood(*pair) for pair in zip(got.logp, got.is_greedy, strict=True)], expected, tokens)
        assert got.logp[got.predicted] == max(got.logp)
        assert got.answer == question.answer
        assert got.is_correct == (None if question.answer is None else got.predicted == question.answer)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 16, 17, 64, 100_000])
def test_scores_do_not_depend_on_the_chunks(llama, chunk_tokens):
    asked = questions()
    for got, want in zip(
        score(llama, asked, context=CONTEXT, chunk_tokens=chunk_tokens),
        score(llama, asked, context=CONTEXT),
        strict=True,
    ):
        most = 1e-5 * max(got.num_tokens)
        assert got == replace(want, logp=got.logp)
        assert got.logp == pytest.approx(want.logp, rel=0, abs=most)


def test_iterating_yields_every_question_once_with_the_same_results(llama):
    asked = questions()
    yielded = list(iter_scores(llama, asked, context=CONTEXT, chunk_tokens=16))
    assert sorted(got.question_id for got in yielded) == sorted(question.id for question in asked)
    by_id = {got.question_id: got for got in yielded}
    assert [by_id[question.id] for question in asked] == score(llama, asked, context=CONTEXT, chunk_tokens=16)


def test_a_question_is_yielded_before_later_chunks_are_forwarded(llama):
    asked, ledger = questions(), Ledger()
    scores = iter_scores(llama, asked, context=CONTEXT, chunk_tokens=16, ledger=ledger)
    forwarded = [ledger.forwarded_tokens for _ in scores]
    assert len(forwarded) == len(asked)
    assert forwarded == sorted(forwarded)
    assert forwarded[0] < forwarded[-1] == ledger.forwarded_tokens


def test_a_likelihood_is_yielded_before_later_chunks_are_forwarded(llama):
    requests, ledger = [([5, token], [6, 7]) for token in (9, 5, 8, 7)], Ledger()
    yielded, forwarded = {}, []
    for r, result in iter_loglikelihood(llama, requests, chunk_tokens=3, ledger=ledger):
        yielded[r] = result
        forwarded.append(ledger.forwarded_tokens)
    assert [yielded[r] for r in range(4)] == loglikelihood(llama, requests, chunk_tokens=3)
    assert forwarded[0] < forwarded[-1] == ledger.forwarded_tokens


def test_questions_with_one_id_keep_their_places(llama):
    first, second = Question("same", " who", (" knows", " sat"), 0), Question("same", " why", (" it", " is", " on"), 2)
    for order in ([first, second], [second, first], [first, first, second]):
        got = score(llama, order, chunk_tokens=3)
        assert [len(result.logp) for result in got] == [len(question.choices) for question in order]
        assert [result.answer for result in got] == [question.answer for question in order]
        for result, question in zip(got, order, strict=True):
            alone = score(llama, [question])[0]
            assert result.logp == pytest.approx(alone.logp, rel=0, abs=1e-5 * max(alone.num_tokens))


def test_of_equally_likely_choices_the_first_is_predicted(llama):
    (apart,) = score(llama, [Question("q", "who", (" knows", " sat"))])
    better, worse = (" knows", " sat") if apart.predicted == 0 else (" sat", " knows")
    for choices, expected in [((better, better), 0), ((worse, better, better), 1), ((better, worse, better), 0)]:
        (got,) = score(llama, [Question("q", "who", choices)])
        assert got.predicted == expected
        assert got.logp[choices.index(better)] == got.logp[len(choices) - 1]


def test_text_and_its_token_ids_agree(llama, tokenizer):
    texts = [("the cat", " sat on"), ("the cat ", "sat on"), ("", "the cat"), ("", "<s>the cat"), (" \n", "the cat")]
    sat = [tokenizer.encode(text) for text in ("the cat", "the cat sat on")]
    spaced = tokenizer.encode(" \nthe cat")
    bos = tokenizer.bos_token_id
    split = (sat[0], sat[1][len(sat[0]) :])
    start = ([bos], sat[0][1:])
    ids = [split, split, start, start, ([bos], spaced[1:])]
    assert spaced[0] == bos
    assert loglikelihood(llama, texts) == loglikelihood(llama, ids)
    assert loglikelihood(llama, [texts[0], ids[2]]) == loglikelihood(llama, [ids[0], texts[2]])


def test_an_empty_prompt_is_scored_after_bos(llama, tokenizer):
    (got,) = score(llama, [Question("q", "", ("the cat", "why"))])
    ids = [([tokenizer.bos_token_id], tokenizer.encode(text)[1:]) for text in ("the cat", "why")]
    assert got.logp == tuple(result.logp for result in loglikelihood(llama, ids))
    assert got.num_tokens == tuple(len(continuation) for _, continuation in ids)


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([([5], [6]), ([5], [])], r"^requests\[1\]: empty continuation$"),
        ([([], [5])], r"^requests\[0\]: empty context$"),
        ([("the", " cat"), ("the", "")], r"^requests\[1\]: empty continuation$"),
        ([("who kn", "ows")], r"^requests\[0\]: empty continuation$"),
        ([("the", [5])], r"^requests\[0\]: one part is text and the other token ids$"),
        ([([5], "the")], r"^requests\[0\]: one part is text and the other token ids$"),
        (
            [([5], [VOCABULARY])],
            r"^requests\[0\]: token id 300: the model's vocabulary has 300 tokens$",
        ),
        ([([VOCABULARY + 1, 5], [5])], r"^requests\[0\]: token id 301: the model's vocabulary"),
        (
            [([5], [6]), ([5] * 200, [6] * 60)],
            r"^requests\[1\]: 200 tokens of context and 60 of continuation are 3 tokens over the model's 256 position",
        ),
        ([([5] * 257, [6])], r"are 1 tokens over the model's 256 positions$"),
    ],
)
def test_requests_that_cannot_be_scored_are_named(llama, requests, message):
    ledger = Ledger()
    with pytest.raises(ScoreError, match=message):
        loglikelihood(llama, requests, ledger=ledger)
    assert ledger == Ledger()


def test_the_last_token_needs_no_position(llama, plain_llama, plain):
    (got,) = loglikelihood(llama, [([5] * 200, [6] * 57)])
    assert got.logp == pytest.approx(plain(plain_llama, [5] * 200, [6] * 57)[0].sum().item(), rel=0, abs=1e-4)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (Question("q7", "the", (" cat", "")), r"^question 'q7': choices\[1\]: no token of its own: empty, or merged"),
        (Question("q7", "who kn", ("ows",)), r"^question 'q7': choices\[0\]: no token of its own"),
        (Question("q7", "the", ()), r"^question 'q7': choices: expected at least one$"),
        (
            Question("q7", "the " * 300, (" cat",)),
            r"^question 'q7': \d+ tokens of context and 2 of continuation are 46 tokens over",
        ),
    ],
)
def test_questions_that_cannot_be_scored_are_named(llama, question, message):
    fine = Question("q6", "the", (" cat",))
    with pytest.raises(ScoreError, match=message):
        score(llama, [fine, question])
    with pytest.raises(ScoreError, match=message):
        list(iter_scores(llama, [fine, question]))


@pytest.mark.parametrize("chunk_tokens", [0, -1])
def test_chunks_have_at_least_one_row(llama, chunk_tokens):
    with pytest.raises(ValueError, match="expected at least 1, got"):
        loglikelihood(llama, [([5], [6])], chunk_tokens=chunk_tokens)


def test_two_models_on_the_same_questions():
    """By hand: four known questions about two topics, of which the second model loses two and gains one."""
    asked = [Question(f"q{i}", "p", (" a", " b"), 0 if i < 4 else None, topic=f"t{i // 2}") for i in range(5)]

    def scored(*right):
        return [
            Score(f"q{i}", (-1.0, -2.0) if yes else (-2.5, -2.0), (1, 1), (True, False), int(not yes), q.answer)
            for i, (yes, q) in enumerate(zip(right, asked, strict=True))
        ]

    one, two = scored(True, True, True, False, True), scored(False, False, True, True, False)
    gap = compare_scores(asked, one, two)
    assert (gap.known, gap.correct, gap.gained, gap.lost, gap.changed) == (4, 2, 1, 2, 4)
    assert gap.gap == -0.25
    assert (gap.gap_low, gap.gap_high) == gap_interval([-1, -1, 0, 1], ["t0", "t0", "t1", "t1"])
    assert gap.p == sign_flip_test([-2, 1], mid=True)
    assert gap.mean_logp_distance == pytest.approx(4 * 1.5 / 10)
    assert gap.most_logp_distance == 1.5
    same = compare_scores(asked, one, one)
    assert (same.gap, same.changed, same.mean_logp_distance) == (0.0, 0, 0.0)
    unknown = compare_scores(asked[4:], one[4:], two[4:])
    assert (unknown.known, unknown.gap, unknown.changed) == (0, None, 1)
    with pytest.raises(ValueError, match="scores of the same questions"):
        compare_scores(asked, one, two[::-1])
