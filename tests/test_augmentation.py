"""Augmentation: what the rules write, and how the model's lines are read, counted and dropped."""

import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from icl_ft_fast.augmentation.batches import augment, augment_by_model, augment_by_rule, prompt_batches, prompts
from icl_ft_fast.augmentation.generators import LocalGenerator, Reply
from icl_ft_fast.augmentation.prompts import Prompting, completed, fitting, label_of
from icl_ft_fast.augmentation.run import SAMPLES_APART, AugmentationRun, reply_key
from icl_ft_fast.augmentation.steps import (
    self_consistent,
    within_length,
    without_duplicates,
    without_near_duplicates,
)
from icl_ft_fast.augmentation.strategies import BY_MODEL, STRATEGIES
from icl_ft_fast.augmentation.strategy import Augmentation, AugmentError, Parsed, normalized
from icl_ft_fast.engine.generate import Sampling, generate
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.likelihood import loglikelihood
from icl_ft_fast.engine.loading import load
from icl_ft_fast.runtime.durable import ResultJournal
from icl_ft_fast.runtime.reasoning import answer_in, split_reasoning
from icl_ft_fast.runtime.templates import ChatText
from icl_ft_fast.study.results import unmeasured
from icl_ft_fast.tasks.comparisons import deny, find
from icl_ft_fast.tasks.reversals import simple_reversals
from icl_ft_fast.tasks.syllogisms import simple_syllogisms
from icl_ft_fast.tasks.task import Document, Task

SHOWING = "{{ documents | join }} {{ document }}"


class Scripted:
    """A generator that answers in order with the texts given to it."""

    fingerprint, prompts_per_call = "scripted", None

    def __init__(self, *texts):
        self.texts, self.requests = texts, []

    def prompt_tokens(self, text):
        return len(text.split())

    def counting(self, ledger):
        return self

    def replies(self, requests):
        self.requests += requests
        for i, text in enumerate(self.texts[: len(requests)]):
            yield i, Reply(text, 10, 5, -1.5)


def local(documents, *texts):
    """What local augmentation makes of the texts, and the generator that gave them."""
    generator, prompting = Scripted(*texts), Prompting.of("local")
    run = AugmentationRun(prompting, prompting.prompts(documents), generator, Sampling(9, stop=("\n\n",)))
    run.collect()
    return run.read(), generator


def test_rules_write_both_forms_of_every_comparison():
    documents = [
        Document("a", "Note: femp are more common than glon."),
        Document("b", "Nothing is compared here."),
        Document("c", "We found that zota are taller than blata. zota are less noisy than yazo."),
    ]
    written = augment_by_rule(documents)
    assert written.rows == (
        Augmentation("a", "reversed", "glon are less common than femp."),
        Augmentation("a", "rephrased", "Compared with glon, femp are more common."),
        Augmentation("c", "reversed", "blata are shorter than zota."),
        Augmentation("c", "rephrased", "Compared with blata, zota are taller."),
        Augmentation("c", "reversed", "yazo are more noisy than zota."),
        Augmentation("c", "rephrased", "Compared with yazo, zota are less noisy."),
    )
    assert written.dropped == {"unparsed": 0, "repeats": 0}
    assert augment_by_rule([]).rows == ()


def test_rules_answer_the_generated_task():
    task = simple_reversals(0, num_facts=20, num_articles=1)
    answers = {q.prompt + q.choices[q.answer] for q in task.questions if q.split == "reversal"}
    assert {row.text for row in augment_by_rule(task.documents).rows if row.kind == "reversed"} == answers


def test_the_worked_examples_follow_their_own_rules():
    _, *blocks, _ = Prompting.of("local").source.split("\n\n")
    assert len(blocks) == 2
    for block in blocks:
        statement, *lines = block.split("\n")
        written = augment_by_rule([Document("", statement)]).rows
        assert lines == [f"{row.kind.capitalize()}: {row.text}" for row in written]


def test_prompts_hold_a_sentence_on_one_line():
    documents = [
        Document("a", "  femp are\n\nmore\tcommon  than glon.\r\n"),
        Document("b", "x {document} {{ document }} y? Is it!"),
        Document("c", ""),
    ]
    _, generator = local(documents)
    head = Prompting.of("local").source.partition("{{")[0]
    texts = ("femp are more common than glon.", "x {document} {{ document }} y?", "Is it!", "")
    assert [prompt.text for prompt, _ in generator.requests] == [f"{head}{text}\n" for text in texts]
    assert [prompt.id for prompt, _ in generator.requests] == ["a", "b#0", "b#1", "c"]
    assert {sampling for _, sampling in generator.requests} == {Sampling(9, stop=("\n\n",))}


def test_lines_are_read_and_the_others_counted():
    document = Document("a", " femp are more\ncommon than glon.")
    lines = {
        "Reversed: glon are less common than femp.": "row",
        "  Rephrased: Compared with glon, femp are more common. ": "row",
        "Reversed: femp are more common than glon.": "repeat",  # the document itself, but for its line break
        "Rephrased: glon are less common than femp.": "repeat",  # an earlier line
        "Rephrased: Glon are less common than femp.": "row",
        "reversed: glon are rarer.": "unparsed",
        "Reversed:": "unparsed",
        "Reversed: ": "unparsed",
        "Reversed:glon are rarer.": "unparsed",
        "Reversed:  glon are rarer.": "unparsed",
        "Opposite: glon are rarer.": "unparsed",
        "glon are rarer.": "unparsed",
        "So Reversed: glon are rarer.": "unparsed",
    }
    written, _ = local([document], "\n".join(lines))
    assert written.rows == (
        Augmentation("a", "reversed", "glon are less common than femp."),
        Augmentation("a", "rephrased", "Compared with glon, femp are more common."),
        Augmentation("a", "rephrased", "Glon are less common than femp."),
    )
    assert written.dropped["unparsed"] == list(lines.values()).count("unparsed")
    assert written.dropped["repeats"] == list(lines.values()).count("repeat")


def test_rows_stay_with_their_documents():
    texts = ("Reversed: same.", "", "Reversed: same.\nRephrased: other.\nno", "\n\nReversed: b.\n")
    documents = [Document(name, name) for name in "abcd"]
    written, _ = local(documents, *texts)
    assert [(row.source_id, row.kind, row.text) for row in written.rows] == [
        ("a", "reversed", "same."),
        ("c", "reversed", "same."),
        ("c", "rephrased", "other."),
        ("d", "reversed", "b."),
    ]
    assert written.dropped == {"unanswered": 1, "unparsed": 1, "repeats": 0}  # an empty reply is none


LINE = st.sampled_from(["Reversed: ", "Rephrased: ", "Reversed:", ""]).flatmap(
    lambda label: st.sampled_from(["a", "b", "a b", " ", "Reversed: a"]).map(lambda text: label + text) | st.text()
)


@settings(deadline=None)
@given(st.lists(LINE).map("\n".join))
@example("Reversed: a\x0bReversed: a\u2028\x85Reversed: b")
def test_every_line_is_kept_or_counted(text):
    written, _ = local([Document("d", "a  b")], text)
    counted = sum(written.dropped.get(step, 0) for step in ("unparsed", "repeats", "looping"))
    assert len(written.rows) + counted == len(split_reasoning(text)[1].strip().splitlines())
    texts = [row.text for row in written.rows]
    assert len(set(texts)) == len(texts)
    assert "a b" not in texts
    for row in written.rows:
        assert row.text == normalized(row.text)
        assert f"{row.kind.capitalize()}: {row.text}" in normalized(text)


@pytest.mark.parametrize("strategy", BY_MODEL)
def test_no_documents(llama, strategy):
    assert augment_by_model(LocalGenerator(llama), prompt_batches(LocalGenerator(llama), [], strategy)).rows == ()


def short(monkeypatch, strategy, **changes):
    """Make the strategy's prompt the document alone, and every reply a row."""
    changed = replace(STRATEGIES[strategy], is_lines=False, **changes)
    monkeypatch.setattr(Prompting, "of", lambda *_, **__: Prompting(changed, "{{ document }}", "here"))


def test_what_is_in_the_journal_is_not_generated_again_and_costs_the_same(llama, monkeypatch):
    documents = [Document(f"d{n}", f"the cat {n}") for n in range(5)]
    short(monkeypatch, "local", read=lambda source, reply: Parsed([("row", source + reply)], 1, 0))
    monkeypatch.setattr(LocalGenerator, "prompts_per_call", 2)
    journal, ledgers = ResultJournal(None), [Ledger(), Ledger()]
    batches = prompt_batches(LocalGenerator(llama), documents, key="a")
    first = augment_by_model(LocalGenerator(llama), batches, journal=journal, ledger=ledgers[0])
    assert [row.source_id for row in first.rows] == [document.id for document in documents]
    assert first.dropped == {"unanswered": 0, "unparsed": 5, "repeats": 0}
    assert ledgers[0].phases.keys() == {"filter", "generate"}
    assert len(journal.values) == 3
    journal.values.popitem()  # the last call was killed
    monkeypatch.setattr(LocalGenerator, "replies", counted := Counted(LocalGenerator.replies))
    assert [batch.name for batch in prompt_batches(LocalGenerator(llama), documents, key="a")] == [
        batch.name for batch in batches
    ]
    assert augment_by_model(LocalGenerator(llama), batches, journal=journal, ledger=ledgers[1]) == first
    assert counted.requests == 1
    assert unmeasured(ledgers[1].as_dict()) == unmeasured(ledgers[0].as_dict())


def test_several_replies_to_a_prompt_are_drawn_apart_and_counted_in_calls(llama, monkeypatch):
    documents = [Document(f"d{n}", f"the cat {n}") for n in range(3)]
    short(monkeypatch, "global", read=lambda source, reply: Parsed([("row", reply)], 0, 0), max_new_tokens=6)
    monkeypatch.setattr(LocalGenerator, "prompts_per_call", 4)
    batches = prompt_batches(LocalGenerator(llama), documents, "global", samples=2, seed=5)
    assert [len(batch.prompts) for batch in batches] == [4, 2]
    others = prompt_batches(LocalGenerator(llama), documents, "global", seed=5)
    assert {batch.name for batch in batches}.isdisjoint(batch.name for batch in others)
    rows = augment_by_model(LocalGenerator(llama), batches).rows
    seeds = (5, 5 + SAMPLES_APART)
    assert [(row.source_id, row.origin["seed"]) for row in rows] == [(one.id, s) for one in documents for s in seeds]
    hows = [Sampling(6, STRATEGIES["global"].temperature, stop=("\n\n",), seed=seed) for seed in seeds] * 3
    texts = [document.text for document in documents for _ in range(2)]
    assert [row.text for row in rows] == [made.text for made in generate(llama, texts, hows)]


def test_several_replies_of_a_greedy_strategy_are_refused(llama):
    with pytest.raises(AugmentError, match="samples: the strategy local is greedy, 2 replies would be all alike"):
        prompt_batches(LocalGenerator(llama), [Document("d", "the cat")], "local", samples=2)


class Counted:
    """LocalGenerator.replies, and how many requests it was given."""

    def __init__(self, replies):
        self.replies, self.requests = replies, 0

    def __get__(self, generator, _):
        def replies(requests):
            self.requests += len(requests)
            return self.replies(generator, requests)

        return replies


def test_a_model_shows_and_asks_about_what_fits_its_positions(llama):
    documents = [Document(f"d{n}", f"the cat {n} sat on the mat. " * 2) for n in range(20)]
    prompting, generator = Prompting(STRATEGIES["global"], SHOWING, "here"), LocalGenerator(llama)
    made, shown = prompts(prompting, documents, generator, 64, seed=1)
    assert 1 < len(shown) < 20
    assert [prompt.source_ids[0] for prompt in made] == [document.id for document in documents]
    longest = max(generator.prompt_tokens(prompt.text) for prompt in made)
    assert longest + 64 <= llama.max_positions
    assert len(prompts(prompting, documents, generator, 64, most=2)[1]) == 2
    assert prompts(Prompting.of("document"), documents, generator, 64)[1] == ()


def test_each_sample_shows_documents_of_its_own_in_an_order_of_its_own(llama):
    documents = [Document(f"d{n}", f"the cat {n}.") for n in range(6)]
    prompting, generator = Prompting(STRATEGIES["global"], SHOWING, "here"), LocalGenerator(llama)

    def shown(prompt):
        return prompt.text.removesuffix(f" {prompt.source}")

    made, first = prompts(prompting, documents, generator, 8, samples=3, seed=1)
    assert [(prompt.id, prompt.sample) for prompt in made] == [
        (document.id, n) for document in documents for n in range(3)
    ]
    assert [document.id for document in first] == [document.id for document in documents]
    contexts = [{shown(prompt) for prompt in made if prompt.sample == n} for n in range(3)]
    assert [len(context) for context in contexts] == [1, 1, 1]
    assert contexts[0] == {"".join(document.text for document in documents)}
    assert len(set.union(*contexts)) == 3
    assert {"".join(sorted(context)) for (context,) in contexts} == {"".join(sorted(*contexts[0]))}
    drawn = []
    made, first = prompts(
        prompting, documents, generator, 8, samples=3, seed=1, among=lambda seed: drawn.append(seed) or documents[-2:]
    )
    assert drawn == [1, 1 + SAMPLES_APART, 1 + 2 * SAMPLES_APART]
    assert {shown(prompt) for prompt in made} == {"the cat 4.the cat 5."}
    assert first == documents[-2:]
    chosen = prompts(prompting, documents, generator, 8, samples=9, most=2)[0]
    assert len({frozenset(prompt.source_ids[1:]) for prompt in chosen}) > 2


def test_the_engine_answers_as_generate_does(llama):
    documents = [Document("a", "the cat"), Document("b", "the mat")]
    prompting = Prompting(STRATEGIES["local"], "{{ document }}", "here")
    made, _ = prompts(prompting, documents, LocalGenerator(llama), 4, samples=2)
    run = AugmentationRun(prompting, made, LocalGenerator(llama), Sampling(4, temperature=1.0, seed=3))
    run.collect()
    hows = [Sampling(4, temperature=1.0, seed=seed) for seed in (3, 3 + SAMPLES_APART)] * 2
    expected = generate(llama, ["the cat", "the cat", "the mat", "the mat"], hows)
    answers = [run.store.replies[reply_key(*request)] for request in run.requests]
    assert [answer.text for answer in answers] == [made.text for made in expected]
    assert [answer.logp for answer in answers] == [pytest.approx(sum(made.logp)) for made in expected]
    assert [answer.completion_tokens for answer in answers] == [len(made.ids) for made in expected]


def test_self_qa_joins_each_question_with_its_answer():
    text = "Question: Who?\nAnswer: Femp.\nAnswer: Lost.\nQuestion: None?\nQuestion: Where?\nAnswer: Here.\nQuestion: ?"
    found, unparsed, repeats = STRATEGIES["self-qa"].read("source", text)
    assert found == [("answer", "Who? Femp."), ("answer", "Where? Here.")]
    assert (unparsed, repeats) == (3, 0)


def test_premises_are_read_past():
    text = "Given: femp are glon.\nGiven: glon are red.\nInferred: femp are red.\nGiven: no more\nSo: it is."
    assert STRATEGIES["global"].read("femp are glon.", text) == ([("inferred", "femp are red.")], 1, 0)
    assert STRATEGIES["document"].read("femp are glon.", text) == ([("inferred", "femp are red.")], 4, 0)


def test_syllogisms_close_over_all_documents():
    documents = [
        Document("a", "Look: All dogs are pets. All pets are dear."),
        Document("b", "Some cats are dogs. No dear are stones."),
    ]
    rows = augment_by_rule(documents).rows
    assert {row.text for row in rows} == {
        "All dogs are dear.",
        "Some cats are pets.",
        "Some cats are dear.",
        "No pets are stones.",
        "No dogs are stones.",
        "Some dogs are cats.",
        "Some pets are cats.",
        "Some dear are cats.",
        "No stones are dear.",
        "No stones are pets.",
        "No stones are dogs.",
    }
    (far,) = (row for row in rows if row.text == "Some cats are dear.")
    assert sorted(far.origin["source_ids"]) == ["a", "b"]


def test_what_the_rules_conclude_answers_the_syllogisms():
    task = simple_syllogisms(0, num_examples=18)
    concluded = {row.text for row in augment_by_rule(task.documents).rows}
    told = " ".join(document.text for document in task.documents)
    for question in task.questions:
        true = {question.choices[c].strip() for c in question.correct}
        if question.split == "conclusion":
            assert true - {text for text in true if "Some" in text and len(true) > 2} <= concluded
            false = {choice.strip() for choice in question.choices} - true
            assert not {text for text in false if text in concluded and text not in told}


def test_reverse_training_reverses_the_words():
    (row,) = augment_by_rule([Document("a", "femp are more\ncommon than glon.")], "reverse").rows
    assert row.text == "glon. than common more are femp"


def test_global_prompts_show_the_same_documents_and_as_many_as_fit():
    documents = [Document(str(d), f"text {d}") for d in range(9)]
    shown = fitting(documents, lambda some: len(some) <= 4, seed=1)
    assert len(shown) == 4
    assert [int(d.id) for d in shown] == sorted(int(d.id) for d in shown)
    assert (
        shown == fitting(documents, lambda some: len(some) <= 4, seed=1) != fitting(documents, lambda _: len(_) <= 4, 3)
    )
    assert fitting(documents, lambda _: True, seed=1) == documents
    with pytest.raises(AugmentError, match=r"^global: not one document fits"):
        fitting(documents, lambda some: not some, seed=1)
    made = Prompting.of("global").prompts(documents, shown)
    common = os.path.commonprefix([prompt.text for prompt in made])  # noqa: RUF071
    for prompt, document in zip(made, documents, strict=True):
        assert all(f"- {other.text}\n" in common for other in shown)
        assert prompt.text == f"{common}{document.id}\n"
        assert set(prompt.source_ids) == {document.id, *(other.id for other in shown)}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", r"^template: .*mine.jinja:1: "),
        ("{{ documnet }}", r"^template: .*mine.jinja: document 'd': 'documnet' is undefined"),
        ("{{ document.__class__.__mro__ }}", r"^template: .*mine.jinja: document 'd': access to attribute '__class__'"),
        ("{{ documents.append(1) }}", r"^template: .*mine.jinja: document 'd': .*not safely callable|unsafe"),
    ],
)
def test_a_template_that_fails_or_reaches_out_is_refused(tmp_path, source, message):
    path = tmp_path / "mine.jinja"
    path.write_text(source)
    with pytest.raises(AugmentError, match=message):
        Prompting.of("document", template=path).prompts([Document("d", "text")])


@pytest.mark.parametrize("strategy", BY_MODEL)
@pytest.mark.parametrize("is_chat", [False, True])
def test_every_strategy_has_a_prompt_that_names_its_labels(strategy, is_chat):
    prompting = Prompting.of(strategy, is_chat=is_chat)
    made = prompting.prompts([Document("d", "femp are odd")], [Document("e", "others are even")])
    begins = len(STRATEGIES[strategy].begins) if is_chat else 1
    assert len(made) == max(1, begins) * len(STRATEGIES[strategy].units(Document("d", "femp are odd")))
    for prompt in made:
        assert "femp are odd" in prompt.text
        assert ("others are even" in prompt.text) == (strategy == "global")
        assert not prompt.begun or f"{label_of(prompt.begun)}:" in prompt.text  # shown in the examples
    if strategy != "global" or is_chat:
        texts, labels = "".join(prompt.text for prompt in made), STRATEGIES[strategy].labels
        assert len([label for label in labels if f"{label}:" in texts]) >= min(2, len(labels))
    assert len({Prompting.of(s, is_chat=c).digest for s in BY_MODEL for c in (False, True)}) == 2 * len(BY_MODEL)


def rows_of(*texts):
    return [Augmentation(str(n), "inferred", text) for n, text in enumerate(texts)]


def test_duplicates_near_duplicates_and_lengths():
    pytest.importorskip("datasketch")
    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    rows = rows_of("A b.", "a B.", long, f"{long} end", f"start {long}", long.replace("eight", "acht"), "x")
    assert [row.source_id for row in without_duplicates(rows)] == ["0", "2", "3", "4", "5", "6"]
    assert [row.source_id for row in without_near_duplicates(rows, 0.9)] == ["0", "2", "5", "6"]
    assert [row.source_id for row in within_length(rows, 2, 16)] == ["0", "1", "2", "5"]


def test_near_duplicates_agree_with_comparing_every_pair():
    pytest.importorskip("datasketch")
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abcd", k=rng.randint(1, 12))) for _ in range(150)]
    kept = []
    for text in texts:
        words = text.split()
        mine = {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}
        if all(len(mine & other) < 0.8 * len(mine | other) for other in kept):
            kept.append(mine)
    assert abs(len(without_near_duplicates(rows_of(*texts), 0.8)) - len(kept)) <= 2  # banding may miss a candidate


def test_self_consistency_asks_for_the_opposite_in_the_same_words(llama):
    rows = rows_of("cat are taller than mat.", "cat are shorter than mat.", "who knows why")
    kept, asked = self_consistent(llama, rows, lambda row: "the cat sat ", deny)
    assert asked == 2
    ours, theirs = (r.logp for r in loglikelihood(llama, [("the cat sat ", row.text) for row in rows[:2]]))
    assert [row.source_id for row in kept] == (["0", "2"] if ours > theirs else ["1", "2"])


def test_what_the_rules_write_is_a_comparison_again():
    for row in augment_by_rule(simple_reversals(1, num_facts=5, num_articles=1).documents).rows:
        assert len(find(row.text)) == (row.kind == "reversed")


def test_augment_returns_distinct_statements_and_counts(llama, monkeypatch):
    documents = [Document(f"d{n}", "cat are taller than mat.") for n in range(3)]
    made = augment(llama, documents, "rules")
    assert [row.text for row in made.rows] == ["mat are shorter than cat.", "Compared with mat, cat are taller."]
    assert made.dropped == {"unparsed": 0, "repeats": 0, "duplicates": 4}
    assert augment(llama, Task(tuple(documents), ()), "rules") == made
    short(monkeypatch, "local", read=lambda source, reply: Parsed([("row", "the same")], 0, 0), max_new_tokens=2)
    made = augment(llama, documents)
    assert [(row.source_id, row.text) for row in made.rows] == [("d0", "the same")]
    assert made.dropped == {"unanswered": 0, "unparsed": 0, "repeats": 0, "duplicates": 2}
    with pytest.raises(AugmentError, match="strategy: expected one of local, document, "):
        augment(llama, documents, "guess")
    with pytest.raises(AugmentError, match="strategy: local needs a model"):
        augment_by_rule(documents, "local")


def test_every_strategy_is_one_file_with_its_prompts_beside_it():
    for name, strategy in STRATEGIES.items():
        assert strategy.name == name
        assert strategy.sees
        assert strategy.writes
        files = [strategy.template(is_chat=is_chat).exists() for is_chat in (False, True)]
        assert files == [strategy.infer is None] * 2
    prompts = {path.name.partition(".")[0] for path in STRATEGIES["local"].template().parent.glob("*.jinja")}
    small = {strategy.small.prompts for strategy in STRATEGIES.values() if strategy.small}
    assert prompts == set(BY_MODEL) | small


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("<think>\nRephrased: no\n</think>\nRephrased: yes", "Rephrased: no", "Rephrased: yes"),
        ("a draft</think>yes", "a draft", "yes"),  # the prompt began it
        ("yes<think>cut off", "cut off", "yes"),
        ("<think>cut off", "cut off", ""),
        ("no mark", "", "no mark"),
        ("<think>a<think>b</think>c</think>d", "a\nb\nc", "d"),
        ("[THINK]a[/THINK]b<THINKING>c</thinking>d", "c\na", "bd"),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>", "a", "b"),
        ("<|channel|>analysis<|message|>a", "a", ""),
        ("<|channel>thought\na<channel|>b", "a", "b"),
        ("<|inner_prefix|>a<|inner_suffix|>b", "a", "b"),
        ("<think >a</think\n>b", "a", "b"),
        ("<think mode='x'>a</THINK>b", "a", "b"),
        ("<thinker>a</thinker>b", "", "<thinker>a</thinker>b"),
        ("<|channel|>final <|constrain|>json<|message|>b<|return|>", "", "b"),
        ("<analysis>a</analysis>b<Reflection>c</reflection>", "a\nc", "b"),
        ("<internal_monologue>a", "a", ""),
    ],
)
def test_reasoning_is_told_from_the_answer(text, reasoning, answer):
    found = split_reasoning(text)
    assert (found[0], found[1].strip()) == (reasoning, answer)
    assert answer_in(text).strip() == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>a</think><answer> b </answer>", "b"),
        ("<|START_THINKING|>a<|END_THINKING|><|START_RESPONSE|>b<|END_RESPONSE|>", "b"),
        ("analysis a assistantfinal b", "b"),  # channels whose control tokens were left out
        ("analysisWe need to", ""),  # cut off in the first of them
        ("<thinking>a</thinking><output>b</output>", "b"),
        ("Here is my thought process: a\nHere is my response: b", "b"),
        ("Here's my thought process: a", ""),
        ("an analysis of the answer", "an analysis of the answer"),
    ],
)
def test_an_answer_is_told_from_what_is_around_it(text, answer):
    assert answer_in(text).strip() == answer


def test_a_reasoning_models_draft_is_no_row_and_a_cut_line_neither():
    drafts = "<think>Rephrased: Karl built it.</think>\nRephrased: Anna built it.\nRephrased: It was Anna"
    strategy = STRATEGIES["local"]
    for is_cut, texts in ((False, ["Anna built it.", "It was Anna"]), (True, ["Anna built it."])):
        generator = Scripted(drafts)
        generator.replies = lambda requests, is_cut=is_cut: iter([(0, Reply(drafts, 1, 1, None, is_cut))])
        prompting = Prompting(strategy, "{{ document }}", "here")
        run = AugmentationRun(prompting, prompting.prompts([Document("d", "Anna.")]), generator, Sampling(9))
        run.collect()
        made = run.read()
        assert [row.text for row in made.rows] == texts
        assert made.dropped.get("cut_off", 0) == is_cut


def test_a_row_that_copies_the_worked_examples_is_dropped():
    reply = "Reversed: hills are rarer than dogs.\nRephrased: dogs are not like cats.\nInferred: the Mountains are far."
    documents = [Document("d", "dogs are rarer than cats."), Document("e", "hills are rarer than dogs and cats!")]
    made, _ = local(documents, reply, reply)
    assert [(row.source_id, row.kind) for row in made.rows] == [
        ("d", "rephrased"),
        ("e", "reversed"),
        ("e", "rephrased"),
    ]
    assert made.dropped["copied_from_example"] == 3
    assert (made.prompts, made.productive) == (2, 2)
    for name in BY_MODEL:  # what is listed stands in the examples
        source = (Prompting.of(name).source + Prompting.of(name, is_chat=True).source).casefold()
        assert all(word in source for word in STRATEGIES[name].examples)


def test_a_row_that_repeats_itself_or_a_sentence_of_its_source_is_dropped():
    looping = "Rephrased: " + "the cat sat down and " * 3
    document = Document("d", "Dogs are big. Cats are small!")
    made, _ = local([document], f"Rephrased: dogs are big\n{looping}\nInferred: Big are the dogs, small are the cats.")
    assert [row.text for row in made.rows] == ["Big are the dogs, small are the cats."]  # about the first sentence
    assert (made.dropped["looping"], made.dropped["repeats"]) == (1, 1)
    read = STRATEGIES["document"].read(document.text, "Rephrased: cats are small.\nRephrased: Small are the cats.")
    assert read == ([("rephrased", "Small are the cats.")], 0, 1)


@pytest.fixture
def chatting(llama_directory):
    """The tiny llama with a chat template."""
    model = load(llama_directory)
    model.tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    return model


def test_chat_prompts_begin_each_kind_of_line_for_the_model(chatting, tmp_path):
    shipped = Prompting.of("local", is_chat=True)
    prompting = replace(shipped, source="{{ label }}? Statement: {{ document }}\n")  # the tiny model has few positions
    generator = LocalGenerator(chatting, is_chat=True)
    made = prompting.prompts([Document("d", "the cat sat.")])
    assert [prompt.begun for prompt in made] == ["Reversed:", "Rephrased:", "Inferred:"]
    assert all(prompt.text.endswith("Statement: the cat sat.\n") for prompt in made)
    assert len({reply_key(prompt, Sampling(1)) for prompt in made}) == 3
    run = AugmentationRun(prompting, made, generator, Sampling(4, stop=prompting.stop))
    run.collect()
    replies = [run.store.replies[reply_key(*request)].text for request in run.requests]
    asked = [f"<{prompt.text}>{prompt.begun}" for prompt in made]
    assert replies == [
        prompt.begun + written.text
        for prompt, written in zip(
            made, generate(chatting, [ChatText(text) for text in asked], Sampling(4)), strict=True
        )
    ]
    assert run.read().prompts == 3
    for source, begins in (
        ("{{ document }}", [""]),
        ("{{ label }}: {{ document }}", ["Reversed:", "Rephrased:", "Inferred:"]),
    ):
        (tmp_path / "mine.jinja").write_text(source)
        mine = Prompting.of("local", is_chat=True, template=tmp_path / "mine.jinja")
        assert [prompt.begun for prompt in mine.prompts([Document("d", "x")])] == begins


def test_a_reply_from_elsewhere_may_leave_its_label_out():
    assert completed("Reversed:", "\nThe mat is under the cat.") == "Reversed: The mat is under the cat."
    assert completed("Reversed:", "Reversed: The mat.") == "Reversed: The mat."
    assert completed("Question: Who", "Question: Where is it?\nAnswer: Here.").startswith("Question: Where")
    assert completed("", "anything") == "anything"


def test_the_page_names_every_strategy():
    page = (Path(__file__).parents[1] / "docs" / "augment.md").read_text(encoding="utf-8")
    assert [name for name in STRATEGIES if f"| {name} |" not in page] == []
