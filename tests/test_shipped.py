"""The shipped model: its corpus, its tokenizer, its resumable recipe and, where it is, the model itself."""

import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoTokenizer

from icl_ft_fast.augmentation.prompts import Prompting
from icl_ft_fast.augmentation.strategies import STRATEGIES
from icl_ft_fast.augmentation.strategies.global_documents import PREMISE
from icl_ft_fast.engine.loading import load
from icl_ft_fast.engine.prompting import icl_context
from icl_ft_fast.shipped import corpus, lessons, train
from icl_ft_fast.shipped.tokenizer import END_OF_TEXT, PADDING, build_tokenizer, english_words
from icl_ft_fast.study.evaluate import accuracies, answers, select_documents
from icl_ft_fast.tasks import semantic, words
from icl_ft_fast.tasks.comparisons import INVERSE, Comparison, find
from icl_ft_fast.tasks.generated import GENERATORS
from icl_ft_fast.tasks.task import Document

MODEL = Path(corpus.__file__).parent / "model"
SPACE = {opening + close for opening in words.OPENINGS for close in words.CLOSES}
DIRECTIONS = {comparative.split()[0] for comparative in INVERSE}


@pytest.fixture(scope="module")
def shipped_tokenizer():
    return build_tokenizer()


COURSES = {name: corpus.Course(1, 60, 600) for name in lessons.FAMILIES}


def documents(count=400):
    """Seeded documents of all kinds, as segments: of those with branches, the trunk with each."""
    rng = random.Random("documents")
    for _ in range(count):
        trunk, branches = corpus.document(rng, COURSES, copying=0.1, augmenting=0.3, recalling=0.1)
        yield from [trunk + branch for branch in branches] or [trunk]


def text_of(segments):
    return "".join(text for text, _ in segments)


def library():
    """All that is to be known by heart."""
    rng = random.Random("library")
    return {text_of(branch) for _ in range(300) for branch in corpus.known(rng, 400)[1]}


def test_the_corpus_never_writes_a_held_out_word():
    found = set()
    for segments in documents(600):
        found |= set(re.findall(r"\w+", text_of(segments))) & SPACE
    nonsense = found - set(english_words())
    assert len(nonsense) > 5000
    assert not [word for word in nonsense if words.is_held_out(word)]
    assert found.isdisjoint(words.NOT_NONSENSE - set(english_words()))


def test_the_corpus_has_every_kind_of_document():
    texts = list({text.partition("\n\nGiven these")[0]: text for text in map(text_of, documents(800))}.values())
    asked = Prompting.of("global").source.partition("{% endfor %}")[2].partition("{{")[0]
    kinds = {
        "study": sum("\n\nGiven these documents: " in text for text in texts),
        "sentence by sentence": sum(text.startswith("Statement: ") for text in texts),
        "document by document": sum(text.startswith("Document: ") for text in texts),
        "all documents": sum(text.startswith("Documents:\n") and asked in text for text in texts),
        "behind its instruction": sum(text.startswith("Write what follows") for text in texts),
        "names alone": sum(text.startswith(" Note:") for text in texts),
        "by heart": len(library() & set(texts)),
    }
    assert min(kinds.values()) > 10, kinds
    assert 0 < len(texts) - sum(kinds.values()) < 60  # texts alone


def is_compared(texts, statement):
    """Whether a text says so: in the same words, from the other side, or in the rephrasing of either."""
    facts = [fact for text in texts for fact in find(text)]
    return any(statement in (c.statement, c.rephrased) for fact in facts for c in (fact, fact.reversed))


CATEGORICAL = re.compile(r"(All|Some|No) (\w+) are (\w+)\.")


def is_concluded(texts, statement):
    """Whether the statement holds in every world in which the premises do, of the text that names its terms."""
    (claim,) = CATEGORICAL.findall(statement)
    assert statement.partition(" are: ")[0] in {
        f"The relationships between {a} and {b}" for a, b in (claim[1:], claim[:0:-1])
    }
    (premises,) = [CATEGORICAL.findall(text) for text in texts if set(claim[1:]) <= set(re.findall(r"\w+", text))]
    terms = sorted({term for _, *pair in premises for term in pair})
    kinds = [dict(zip(terms, kind, strict=True)) for kind in itertools.product((False, True), repeat=3)]

    def holds(world, quantifier, a, b):
        pairs = {(kind[a], kind[b]) for kind in world}
        return ((True, True) in pairs) if quantifier == "Some" else (True, quantifier == "No") not in pairs

    worlds = [list(itertools.compress(kinds, there)) for there in itertools.product((0, 1), repeat=8)]
    return all(holds(world, *claim) for world in worlds if all(holds(world, *premise) for premise in premises))


SAID = {
    r"(?:all )?(\w+) (?:are a type of|are a kind of|belong to the)() (\w+)\.": "isa",
    r"(?:all )?(\w+) are()(?: always)? (\w+)\.": "property",
    r"(?:it is known that |all )?(\w+) (\w+) (\w+)\.": "relation",
}


def facts_in(text):
    """(kind, subject, verb, object) of each sentence of articles or lines, in their order."""
    plain = re.sub(r"This article is about \w+\.|\(See also: \w+\.\)|^\d+\.|^\*", "", text, flags=re.M)
    for sentence in re.findall(r"[^.\n]+\.", plain):
        match, kind = next(
            (match, kind) for form, kind in SAID.items() if (match := re.fullmatch(form, sentence.strip()))
        )
        yield (kind, *match.groups())


def is_inherited(texts, statement):
    """Whether the statement, in any wording of a question, is in the closure of the articles' sentences."""
    told = set(facts_in("\n".join(texts)))
    parent = {child: above for kind, child, _, above in told if kind == "isa"}
    for kind, subject, verb, object in told:
        below = [subject]
        while below:
            fact = semantic.Fact(kind, below.pop(), object, verb)
            below += [child for child, above in parent.items() if above == fact.subject]
            forward = [f"{fact.fill(wording[kind])} {object}." for wording in (semantic.PLAIN, semantic.REPHRASED)]
            if statement in (*forward, f"{fact.fill(semantic.REVERSED[kind])} {fact.subject}."):
                return True
    return False


def is_rewritten(texts, statement):
    """Whether the right-hand side is what the texts' rules make of the left; a rule, whether the texts state it."""
    if "A" in statement:
        return statement in texts
    rules = dict(text.removesuffix(".").split(" = ") for text in texts)
    name = statement.partition("(")[0]

    def parsed(text):
        head, bracket, rest = text.partition("(")
        if not bracket:
            return (head,)
        depth, parts, start = 0, [], 0
        for i, c in enumerate(rest[:-1] + ","):
            depth += (c == "(") - (c == ")")
            if c == "," and not depth:
                parts.append(parsed(rest[start:i].strip()))
                start = i + 1
        return (head, *parts)

    def shown(tree):
        return tree[0] + (f"({', '.join(map(shown, tree[1:]))})" if tree[1:] else "")

    def filled(tree, arguments):
        if tree[0] == name:
            return transformed(arguments[tree[1][0]])
        if tree[0] in arguments:
            return arguments[tree[0]]
        return (tree[0], *(filled(part, arguments) for part in tree[1:]))

    def transformed(tree):
        if not tree[1:]:
            return parsed(rules[f"{name}({tree[0]})"])
        rule = rules[f"{name}({tree[0]}({', '.join('AB'[: len(tree) - 1])}))"]
        return filled(parsed(rule), dict(zip("AB", tree[1:], strict=False)))

    left, _, right = statement.removesuffix(".").partition(" = ")
    return right == shown(transformed(parsed(left)[1]))


ORACLES = (is_compared, is_concluded, is_inherited, is_inherited, is_rewritten, is_rewritten)


@pytest.mark.parametrize(("family", "oracle"), list(zip(lessons.FAMILIES.values(), ORACLES, strict=True)))
def test_what_a_lesson_says_follows_from_its_texts(family, oracle):
    rng, checked = random.Random(0), 0
    for budget in (60, 150, 400, 900) * 3:
        lesson = family.make(rng, budget)
        written = [text_of(statement).strip() for lines in lesson.lines for _, statement in lines]
        asked = [text_of(statement).strip() for _, statement in lesson.asked]
        for statement in asked + rng.sample(written, min(20, len(written))):
            assert oracle(lesson.texts, statement), statement
        assert {step for step, _ in lesson.asked} <= set(lessons.STEPS)
        assert len(lesson.lines) == len(lesson.texts)
        assert {label for lines in lesson.lines for label, _ in lines} <= {
            *STRATEGIES[family.strategy].labels,
            *([PREMISE] if family.strategy == "global" else []),
        }
        assert len(lesson.texts) == 1 or sum(map(lessons.num_tokens, lesson.texts)) < 1.5 * budget + 60
        checked += len(asked)
    assert checked > 80


@pytest.mark.parametrize(
    ("oracle", "text", "statement"),
    [
        (is_compared, "Note: femp are older than glon.", "glon are older than femp."),
        (is_concluded, "x are: All a are b. Some b are c.", "The relationships between a and c are: Some a are c."),
        (is_inherited, "a\n\na are a type of b. a are red.", "b are red."),
        (is_rewritten, "f(g(A)) = h(f(A)).\nf(a) = b.", "f(g(a)) = h(a)."),
    ],
)
def test_the_oracles_refuse_what_does_not_follow(oracle, text, statement):
    assert not oracle(text.split("\n") if oracle is is_rewritten else [text], statement)


def test_a_syllogisms_augmentation_says_each_claim_for_both_orders_of_its_entities():
    for lines in lessons.categorical(random.Random(0), 300).lines:
        assert [label for label, _ in lines] == ["Rephrased"] * 4 + ["Inferred"] * 2
        opened = [re.match(r" The relationships between (\w+) and (\w+) are: (\w+) ", text_of(s)) for _, s in lines]
        said = [match.groups() for match in opened]
        assert [(b, a, quantifier) for a, b, quantifier in said[::2]] == said[1::2]


def test_what_is_inherited_comes_as_the_parents_article_tells_it_each_behind_its_premise():
    rng, followed = random.Random(0), 0
    for budget in (200, 500, 900) * 4:
        lesson = lessons.hierarchy(rng, budget)
        articles = [list(facts_in(text)) for text in lesson.texts]
        named = {facts[0][1]: facts for facts in articles}  # an article's own facts come first
        for facts, lines in zip(articles, lesson.lines, strict=True):
            category, own = facts[0][1], {fact[2:] for fact in facts if fact[1] == facts[0][1]}
            above = [fact[3] for fact in facts if fact[:2] == ("isa", category)]
            forward = [line for line in lines[2 * len(facts) :] if " include " not in text_of(line[1])]
            derived = [(label, fact) for label, said in forward for fact in facts_in(text_of(said))]
            for parent in set(above) & named.keys():
                expected = [(PREMISE, ("isa", category, "", parent))]
                for kind, subject, verb, object in named[parent]:
                    if subject == parent and (verb, object) not in own:
                        expected += [
                            (PREMISE, (kind, parent, verb, object)),
                            ("Inferred", (kind, category, verb, object)),
                        ]
                assert len(expected) == 1 or derived[: len(expected)] == expected
                followed += len(expected) > 3
    assert followed > 20


def test_what_is_known_by_heart_is_told_forwards_and_always_the_same():
    known = library()
    assert len(known) == len(known | {text_of(branch) for branch in corpus.known(random.Random(1), 5000)[1]})
    assert not [text for text in known if " include " in text]
    assert len([text for text in known if " can be described as " in text]) > 50


def test_an_augmentation_document_is_what_the_prompt_and_a_right_answer_look_like():
    rng = random.Random(0)
    for family in lessons.FAMILIES.values():
        lesson = family.make(rng, 300)
        whole = text_of(corpus.augmentation(rng, lesson, family.strategy, 5000))
        told = [Document("", text) for text in lesson.texts]
        prompts = Prompting.of(family.strategy).prompts(told, told if family.strategy == "global" else ())
        answers = ["".join(f"{label}:{text_of(said)}\n" for label, said in lines) for lines in lesson.lines]
        if family.strategy == "global":
            assert any(whole.startswith(prompt.text + answer) for prompt, answer in zip(prompts, answers, strict=True))
        for prompt, answer in zip(prompts, answers, strict=True):
            assert f"{prompt.source}\n{answer}\n" in whole
            found, unparsed, _ = STRATEGIES[family.strategy].read(prompt.source, answer)
            assert not unparsed
            assert found


def test_segments_of_a_statement_put_the_weight_on_its_direction():
    for comparative in INVERSE:
        fact = Comparison("femp", comparative, "glon")
        for segments, text in (
            (lessons.compared(fact, 0.5), fact.statement),
            (lessons.compared_with(fact, 0.5), fact.rephrased),
        ):
            assert text_of(segments) == f" {text}"
            (direction,) = (segment for segment, weight in segments if weight == lessons.DECISIVE)
            assert direction.split()[0] == comparative.split()[0]
            assert [weight for _, weight in segments].count(0.5) == 1


def test_tokens_are_counted_nearly(shipped_tokenizer):
    for segments in documents(40):
        text = text_of(segments)
        assert lessons.num_tokens(text) == pytest.approx(len(shipped_tokenizer(text)["input_ids"]), rel=0.08, abs=3)


def test_a_nonsense_word_is_two_tokens(shipped_tokenizer):
    drawn = sorted(SPACE - words.NOT_NONSENSE)
    for texts in (drawn, [f" {word}" for word in drawn], [f"- {word}" for word in drawn]):
        skip = 3 if texts[0][0] == "-" else 1
        for word, ids in zip(drawn, shipped_tokenizer(texts)["input_ids"], strict=True):
            pieces = shipped_tokenizer.convert_ids_to_tokens(ids)[skip:]
            assert len(pieces) == 2, (word, pieces)
            assert "".join(pieces) == f"Ġ{word}"
            if words.is_held_out(word):
                assert pieces[0][1:] in words.OPENINGS
                assert pieces[1] in words.CLOSES


def test_an_english_word_is_one_token(shipped_tokenizer):
    for word in english_words():
        assert len(shipped_tokenizer(word)["input_ids"]) == 2, word
    assert len(shipped_tokenizer) < 1000


# Two things the tokenizer does not keep, by design: one space before the text, which it adds where there is none and
# takes off again, and the text of a special token, which becomes that token.
ENCODED = st.text().filter(lambda text: END_OF_TEXT not in text and PADDING not in text)


@settings(deadline=None, max_examples=300)
@given(text=ENCODED)
@example(text="")
@example(text=" femp")
@example(text="  femp  are\n\n- more .\t dangerous 's n't , than\r\nglon\x00.")
@example(text="naïve 日本語 😀 \u2028\x85\ufeff e\u0301")
def test_any_text_round_trips(text, shipped_tokenizer):
    ids = shipped_tokenizer(text)["input_ids"]
    assert ids[0] == shipped_tokenizer.bos_token_id
    assert shipped_tokenizer.bos_token_id not in ids[1:]
    assert shipped_tokenizer.decode(ids, skip_special_tokens=True) == text.removeprefix(" ")
    assert shipped_tokenizer.decode(ids[1:]) == text.removeprefix(" ")


def test_special_tokens(shipped_tokenizer):
    assert (shipped_tokenizer.bos_token_id, shipped_tokenizer.eos_token_id, shipped_tokenizer.pad_token_id) == (0, 0, 1)
    config = train.config(len(shipped_tokenizer))
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 0, 1)
    assert config.max_position_embeddings >= max(c.most for stage in train.CURRICULUM for c in stage.courses.values())
    assert [stage.until for stage in train.CURRICULUM] == sorted(stage.until for stage in train.CURRICULUM)


shipped = pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="icl_ft_fast/shipped/model is not there yet")


@shipped
def test_the_shipped_files_are_small_and_complete():
    sizes = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert sum(sizes.values()) <= 16_000_000, sizes
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= sizes.keys()
    with safe_open(MODEL / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


@shipped
def test_the_shipped_tokenizer_is_the_recipes(shipped_tokenizer):
    kept = AutoTokenizer.from_pretrained(MODEL)
    assert json.loads(kept.backend_tokenizer.to_str()) == json.loads(shipped_tokenizer.backend_tokenizer.to_str())
    assert kept.special_tokens_map == shipped_tokenizer.special_tokens_map


# Least accuracy in context, by split, on the small presets of seeds that docs/results.md does not show.
SEEDS = (7, 8, 9)
IN_CONTEXT = {
    "simple-reversals": {"reversal": 0.95, "trained": 0.95},
    "simple-syllogisms": {"premise": 0.9, "conclusion": 0.8},
    "semantic-structure": {"rephrase": 0.9, "reversal": 0.85, "syllogism": 0.55},
}


@shipped
@pytest.mark.parametrize("name", IN_CONTEXT)
def test_the_shipped_model_draws_conclusions_in_context(name):
    model, preset = load(MODEL), GENERATORS[name].presets["small"]
    right = {"base": Counter(), "icl": Counter()}
    asked = Counter()
    for seed in SEEDS:
        task = GENERATORS[name].make(seed, **preset.arguments)
        asked.update(question.split for question in task.questions)
        documents = select_documents(task.documents, seed, per_topic=preset.study.get("icl_per_topic"))
        for arm, context in (("base", ""), ("icl", icl_context(documents))):
            found = accuracies(answers(model, task.questions, context=context))
            right[arm].update({split: accuracy.correct for split, accuracy in found.items()})
    for split, least in IN_CONTEXT[name].items():
        assert right["icl"][split] >= least * asked[split], split
        assert right["base"][split] < 0.7 * least * asked[split], split


@shipped
def test_the_shipped_model_proves_itself_in_bfloat16():
    """Its first layer's biases round by more than a unit of its embeddings does."""
    assert load(MODEL, dtype="bfloat16").network.dtype == torch.bfloat16
