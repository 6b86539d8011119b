"""Strategies that write whole texts or ask on after a reply: what they ask, what becomes rows, and how they resume."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from icl_ft_fast.augmentation.batches import augment_by_model, prompt_batches, prompting_of
from icl_ft_fast.augmentation.generators import LocalGenerator, Reply
from icl_ft_fast.augmentation.prompts import Prompting
from icl_ft_fast.augmentation.run import AugmentationRun, Price, Replying
from icl_ft_fast.augmentation.strategies import STRATEGIES, active_reading, entigraph, self_ask, spa
from icl_ft_fast.augmentation.strategy import LEAST_WORDS, Unit
from icl_ft_fast.engine.generate import Sampling
from icl_ft_fast.runtime.executors import InProcess
from icl_ft_fast.tasks.task import Document

DOCUMENTS = [Document("d", "Anna built the mill in Tolm."), Document("e", "Karl burnt it.")]
LONG = (
    "The mill in Tolm was built by Anna, who lived beside it. It stood by the water until Karl came one night with a "
    "torch, and nobody has built another there since, though many wanted to. "
)


class Answering:
    """A generator whose reply is a function of the prompt."""

    prompts_per_call, is_chat = None, True

    def __init__(self, answer, fingerprint="answering"):
        self.answer, self.fingerprint, self.asked = answer, fingerprint, []

    def prompt_tokens(self, text):
        return len(text.split())

    def replies(self, requests):
        for i, (prompt, _) in enumerate(requests):
            self.asked.append(prompt)
            text = self.answer(prompt)
            yield i, Reply(text.removesuffix("<cut>"), 10, 5, None, text.endswith("<cut>"))


def run_of(strategy, answer, folder=None, documents=DOCUMENTS, is_chat=True):
    prompting, generator = Prompting.of(strategy, is_chat=is_chat), Answering(answer)
    return AugmentationRun(prompting, prompting.prompts(documents), generator, Sampling(99, 1.0), folder)


def entities(prompt):
    if prompt.unit.kind:
        return f"Here is the text:\n{LONG}{prompt.id}."
    return "Entity: Anna\nEntity: the mill\nnothing\nEntity: Tolm\nEntity: Anna\nSummary: Anna built a mill."


def test_spa_asks_for_seven_texts_and_keeps_each_whole():
    made = run_of("spa", lambda prompt: f"Sure, here it is:\n\n{LONG}\n\n1. A  point.\n2. Half a sen<cut>")
    made.collect()
    found = made.read()
    assert [row.kind for row in found.rows] == [*spa.FORMS] * 2
    assert {row.text for row in found.rows} == {f"{LONG.strip()}\n\n1. A point. 2."}
    assert (found.prompts, found.productive, found.dropped["cut_off"]) == (14, 14, 14)
    asked = [prompt.text for prompt in made.generator.asked[:7]]
    assert all(DOCUMENTS[0].text in text for text in asked)
    assert [text.count(i) for text, (_, i) in zip(asked, spa.FORMS.values(), strict=True)] == [1] * 7


def test_a_text_that_is_too_short_is_none():
    for count, kept in ((LEAST_WORDS, 1), (LEAST_WORDS - 1, 0)):
        parsed = STRATEGIES["spa"].parse(Unit("", "", kind="case"), "word " * count)
        assert (len(parsed.statements), parsed.unparsed) == (kept, 1 - kept)


@pytest.mark.parametrize("is_chat", [True, False])
def test_entigraph_asks_about_pairs_and_triples_of_what_a_reply_lists(is_chat):
    run = run_of("entigraph", entities, is_chat=is_chat)
    assert run.estimate(Price()).replies == 2 * (1 + entigraph.PAIRS + entigraph.TRIPLES)  # at most
    run.collect()
    asked = run.generator.asked
    assert [prompt.id for prompt in asked[:2]] == ["d", "e"]
    assert [prompt.id for prompt in asked[2:6]] == ["d#pair0", "d#pair1", "d#pair2", "d#triple0"]
    named = [prompt.unit.variables["entities"] for prompt in asked[2:5]]
    assert sorted(map(sorted, named)) == [["Anna", "Tolm"], ["Anna", "the mill"], ["Tolm", "the mill"]]
    assert all("; ".join(prompt.unit.variables["entities"]) in prompt.text for prompt in asked[2:])
    assert all("Entity" not in prompt.text and DOCUMENTS[0].text in prompt.text for prompt in asked[2:6])
    made = run.read()
    kinds = ["summary", "pair", "pair", "pair", "triple"]
    assert [(row.source_id, row.kind) for row in made.rows] == [(d, kind) for d in "de" for kind in kinds]
    assert made.rows[1].text == f"{LONG}d#pair0."
    assert made.rows[1].origin["source_ids"] == ["d"]
    assert made.dropped == {"unanswered": 0, "unparsed": 2, "repeats": 0}
    assert (made.prompts, made.productive) == (10, 10)
    assert run.estimate(Price()).replies == 0


def test_many_entities_are_drawn_from():
    listed = "\n".join(f"Entity: thing {n}" for n in range(20))
    units = STRATEGIES["entigraph"].follow_up(Unit("", "a text"), listed)
    assert len(units) == entigraph.PAIRS + entigraph.TRIPLES == STRATEGIES["entigraph"].follow_ups
    assert len({(unit.kind, frozenset(unit.variables["entities"])) for unit in units}) == len(units)
    assert units == STRATEGIES["entigraph"].follow_up(Unit("", "a text"), listed)
    assert units != STRATEGIES["entigraph"].follow_up(Unit("", "another"), listed)
    assert STRATEGIES["entigraph"].follow_up(Unit("", "a text"), "Entity: alone") == []


def test_active_reading_carries_out_what_it_lists():
    def answer(prompt):
        return LONG if prompt.unit.kind else "Strategy: Write a rhyme.\nStrategy: Draw a line\nStrategy: cut o<cut>"

    run = run_of("active-reading", answer)
    run.collect()
    assert [prompt.id for prompt in run.generator.asked] == ["d", "e", "d#0", "d#1", "e#0", "e#1"]
    assert "in this way: Draw a line\n" in run.generator.asked[3].text
    assert [(row.source_id, row.kind) for row in run.read().rows] == [("d", "studied"), ("e", "studied")]  # one text


NOTED = Document("n", "Tolm is a mill. Anna built Tolm in 1904, and Karl burnt it.")


def small_run(strategy, answer, documents=(NOTED,)):
    prompting, generator = Prompting.of(strategy, is_chat=True, is_small=True), Answering(answer)
    run = AugmentationRun(prompting, prompting.prompts(documents), generator, Sampling(64, 0.3))
    run.collect()
    return run.generator.asked, run.read()


def test_a_small_models_texts_of_spa_begin_with_what_the_document_is_about():
    asked, made = small_run("spa", lambda prompt: f"{prompt.begun} was built by Anna in 1904, and burnt.")
    assert [prompt.begun for prompt in asked[:2]] == ["Explained: Tolm", "Map: Tolm"]
    assert all(prompt.text.endswith(f"Document: {NOTED.text}\n") for prompt in asked)
    assert [row.kind for row in made.rows] == [*spa.FORMS]
    assert made.rows[0].text == "Tolm was built by Anna in 1904, and burnt."  # without its label
    texts = ["Nothing is named here. It is so.", "The hand of the Ebbel shows the tide.", "没有名字" * 20]
    others, _ = small_run("spa", lambda prompt: "", [Document(f"d{n}", text) for n, text in enumerate(texts)])
    begun = [others[n * len(spa.FORMS)].begun for n in range(3)]
    assert begun == ["Explained: Nothing is", "Explained: Ebbel", "Explained:"]


def test_a_small_model_asks_itself_one_question_a_reply():
    asked, made = small_run("self-ask", lambda prompt: f"{prompt.begun} stands in Tolm?\nAnswer: Anna.")
    assert [prompt.begun for prompt in asked] == ["Question: What", "Question: Which", "Question: Who"]
    assert [row.text for row in made.rows] == [f"{word} stands in Tolm? Anna." for word in ("What", "Which", "Who")]
    assert STRATEGIES["self-ask"].small.temperature == 0.3  # sampled, so that a budget is filled


def test_a_small_models_list_counts_as_far_as_the_document_has_it():
    def answer(prompt):
        text = f"{prompt.begun} stands in the document, and {prompt.id} was built by another."
        return (
            text if prompt.unit.kind else f"{prompt.begun} ANNA\n3. Places\n4. Tolm\n5. karl.\n6. An\n7. {NOTED.text}"
        )

    asked, made = small_run("entigraph", answer)
    assert asked[0].begun == "1. Tolm\n2."
    assert {name for prompt in asked[1:] for name in prompt.unit.variables["entities"]} == {"Tolm", "Anna", "Karl"}
    assert [prompt.unit.kind for prompt in asked[1:]] == ["pair"] * 3 + ["triple"]
    assert asked[4].begun == "About Tolm, Anna and Karl: Tolm"
    assert (made.dropped["unparsed"], made.dropped["repeats"]) == (3, 1)
    assert made.rows[3].text == "Tolm stands in the document, and n#triple0 was built by another."


def test_a_small_model_fills_in_ways_of_studying():
    def answer(prompt):
        said = f"{prompt.id} stands in Tolm, where Anna built it in 1904."
        return f"{prompt.begun} {said}" if prompt.unit.kind else f"{prompt.begun} and more.\nStrategy: Another."

    asked, made = small_run("active-reading", answer)
    count = len(active_reading.BEGUN)
    assert [prompt.begun for prompt in asked[:2]] == ["Strategy: Tell the story of Tolm", "Strategy: Explain why Tolm"]
    assert [prompt.id for prompt in asked[count:]] == [f"n#{n}#text" for n in range(count)]
    assert "\nTask: Tell the story of Tolm and more.\n" in asked[count].text
    assert asked[count].begun == "Text: Tolm"
    assert made.rows[0].text == "Tolm n#0#text stands in Tolm, where Anna built it in 1904."
    assert (made.prompts, made.productive, len(made.rows)) == (2 * count, 2 * count, count)


def test_a_text_that_only_repeats_its_document_or_itself_is_dropped():
    own = " ".join(f"Tolm has {n} wheels and {n} doors." for n in range(9))
    cut = f"It has a door, {'and a door of a door ' * 9}at last."
    some = own[: own.index(" Tolm has 3")]
    _, made = small_run("spa", lambda p: cut if p.id.endswith("case") else some, [Document("n", own)])
    assert made.rows == ()
    assert (made.dropped["repeats"], made.dropped["looping"]) == (len(spa.FORMS) - 1, 1)
    parsed = STRATEGIES["spa"].parse(Unit("", own, kind="case"), f"{own} And it is old.")
    assert (len(parsed.statements), parsed.repeats) == (1, 0)


def test_only_a_small_chat_model_that_is_loaded_here_is_asked_so(llama, monkeypatch):
    tokenizer = SimpleNamespace(chat_template="{{ messages }}", name_or_path="")
    monkeypatch.setattr("icl_ft_fast.augmentation.generators.fix_date", lambda *_: None)
    chat = LocalGenerator(replace(llama, tokenizer=tokenizer), is_chat=True)
    for name in ("spa", "entigraph", "active-reading", "self-ask"):
        published = STRATEGIES[name]
        assert published.temperature == 1.0
        assert prompting_of(name, chat).strategy is published.small
        for generator in (LocalGenerator(llama), Answering(None)):
            assert prompting_of(name, generator).strategy is published
        monkeypatch.setattr("icl_ft_fast.augmentation.batches.SMALL", llama.num_parameters)
        assert prompting_of(name, chat).strategy is published
        monkeypatch.undo()
        monkeypatch.setattr("icl_ft_fast.augmentation.generators.fix_date", lambda *_: None)


def test_self_ask_goes_through_its_rounds_and_says_what_was_asked():
    def answer(prompt):
        number = prompt.unit.variables["round"]
        new = "\n".join(f"Question: q{number}-{i}?\nAnswer: a{i}." for i in range(2))
        return "" if prompt.source_ids == ("e",) else f"{new}\nQuestion: q0-0?\nAnswer: a0."

    run = run_of("self-ask", answer)
    run.collect()
    rounds = [prompt for prompt in run.generator.asked if prompt.source_ids == ("d",)]
    assert [prompt.unit.variables["round"] for prompt in rounds] == [*range(self_ask.ROUNDS)]
    assert [prompt.text.count("\n- q") for prompt in rounds] == [0, 2, 4, 6]
    assert "other side" not in rounds[0].text
    assert "- q0-1?\n- q1-0?\n" in rounds[2].text
    assert "other side" in rounds[2].text
    made = run.read()
    assert [row.text for row in made.rows] == [f"q{n}-{i}? a{i}." for n in range(self_ask.ROUNDS) for i in range(2)]
    assert made.dropped["repeats"] == 4
    assert len(run.generator.asked) == 1 + self_ask.ROUNDS  # an empty reply is asked for again by the next command


def test_it_goes_on_where_it_was_stopped(tmp_path):
    whole = run_of("entigraph", entities)
    whole.collect()
    texts = [(row.kind, row.text) for row in whole.read().rows]
    stops = []
    for limit in (1, 3, 2, 99):
        run = run_of("entigraph", entities, tmp_path)
        run.collect(limit=limit)
        stops.append(len(run.generator.asked))
    assert stops == [1, 3, 2, 4]
    assert [(row.kind, row.text) for row in run.read().rows] == texts
    again = run_of("entigraph", entities, tmp_path)
    again.collect(max_usd=0.0, price=Price(1.0))
    assert again.generator.asked == []


@pytest.fixture
def listing(monkeypatch):
    """A strategy that asks a tiny model on after whatever it replies, two prompts a call."""
    asked_on = lambda unit, reply: [Unit(f"#{n}", reply[:9], kind="pair") for n in range(3)] if not unit.kind else ()  # noqa: E731
    strategy = replace(
        STRATEGIES["entigraph"], follow=asked_on, follow_ups=3, read=STRATEGIES["self-ask"].read, max_new_tokens=5
    )
    strategy = replace(strategy, least_words=0)
    monkeypatch.setattr(LocalGenerator, "prompts_per_call", 2)
    return Prompting(strategy, "{{ document }}", "here")


def stored(run):
    return {key: (reply.text, reply.logp) for key, reply in run.store.replies.items()}


def test_a_models_calls_are_the_same_ones_in_workers_and_after_an_interruption(llama, tmp_path, listing):
    documents, sampling = [Document(str(n), f"the cat {n}") for n in range(3)], Sampling(5, 1.0, seed=3)

    def run(folder=None):
        return AugmentationRun(listing, listing.prompts(documents), LocalGenerator(llama), sampling, folder)

    whole = run()
    whole.collect()
    assert len(whole.store.replies) == 3 * 4
    for limit in (2, 4, 99):  # whole calls
        parts = run(tmp_path)
        parts.collect(limit=limit)
    assert stored(parts) == stored(whole)
    others = run(tmp_path / "others")
    assert others.collect_by(InProcess(), lambda: Replying(LocalGenerator(llama), listing, sampling))
    assert stored(others) == stored(whole)
    assert [row.text for row in others.read().rows] == [row.text for row in whole.read().rows]


def test_a_study_asks_on_too(llama, listing, monkeypatch):
    monkeypatch.setattr(Prompting, "of", lambda *_, **__: listing)
    documents = [Document(str(n), f"the cat {n}") for n in range(3)]
    generator = LocalGenerator(llama)
    batches = prompt_batches(generator, documents, "entigraph")
    made = augment_by_model(generator, batches)
    assert len(batches) == 2
    assert {row.source_id for row in made.rows} == {"0", "1", "2"}
