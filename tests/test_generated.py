"""The paper's data sets: each question's truth and each wrong choice's falsehood proved from the documents alone."""

import ast
import itertools
import random
import re
from collections import Counter
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_ft_fast.engine.prompting import icl_context
from icl_ft_fast.finetuning.settings import FinetuneSettings
from icl_ft_fast.shipped.tokenizer import build_tokenizer
from icl_ft_fast.study.evaluate import select_documents
from icl_ft_fast.study.settings import StudySettings
from icl_ft_fast.tasks import comparisons, words
from icl_ft_fast.tasks.files import TaskError, write_jsonl
from icl_ft_fast.tasks.generated import GENERATORS
from icl_ft_fast.tasks.process import process
from icl_ft_fast.tasks.reversal_curse import DESCRIPTIONS, HUB_FOLDER, NAMES, REVERSALS, TRAINING, reversal_curse
from icl_ft_fast.tasks.reversals import simple_reversals
from icl_ft_fast.tasks.semantic import SPLITS, semantic_structure
from icl_ft_fast.tasks.syllogisms import FORMS, simple_syllogisms
from icl_ft_fast.tasks.task import Task

CURSE = Path(__file__).parents[2] / "shared" / "data" / "reversal_curse"
NONSENSE = {
    word
    for word in (opening + close for opening in words.OPENINGS for close in words.CLOSES)
    if words.is_held_out(word) and word not in words.NOT_NONSENSE
}
GENERATED = [
    pytest.param(generator.make, preset, id=f"{name}-{key}")
    for name, generator in GENERATORS.items()
    if generator.reads is None
    for key, preset in generator.presets.items()
]


def texts(task):
    return [document.text for document in task.documents] + [
        question.prompt + choice for question in task.questions for choice in question.choices
    ]


def claims(question):
    """(statement, whether it is correct) of each choice."""
    return [(question.prompt + choice, c in question.correct) for c, choice in enumerate(question.choices)]


@pytest.mark.parametrize(("make", "preset"), GENERATED)
def test_generated_tasks_follow_their_seed_and_read_back(make, preset, tmp_path):
    task = make(5, **preset.arguments)
    assert task == make(5, **preset.arguments) != make(6, **preset.arguments)
    task.write(tmp_path)
    assert Task.read(tmp_path) == task
    for question in task.questions:
        assert len(set(question.choices)) == len(question.choices)
        assert all(choice[0] == " " and choice[-1] == "." for choice in question.choices)
        assert not question.prompt.endswith(" ")
        assert question.topic
        assert (question.form is None) == (make is simple_reversals)


@pytest.mark.parametrize(("make", "preset"), GENERATED)
def test_no_excluded_word_is_drawn(make, preset):
    drawn = set(re.findall(r"\b[a-z]+\b", " ".join(texts(make(3, **preset.arguments))))) & NONSENSE
    assert bool(drawn & words.ENGLISH) == ("exclude" not in preset.arguments)
    unwanted = {*drawn, *preset.arguments.get("exclude", ())}
    other = make(3, **{**preset.arguments, "exclude": unwanted})
    assert set(re.findall(r"\b[a-z]+\b", " ".join(texts(other)))) & NONSENSE & unwanted == set()


@pytest.mark.parametrize("module", ["comparisons", "reversals", "syllogisms", "semantic", "process"])
def test_no_word_of_a_template_is_a_nonsense_word(module):
    tree = ast.parse((Path(words.__file__).parent / f"{module}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert len(strings) > 5
    assert not NONSENSE & set(re.findall(r"\b[A-Za-z]+\b", " ".join(strings)))


@pytest.mark.parametrize(("make", "preset"), GENERATED)
def test_the_position_of_the_answer_gives_nothing_away(make, preset):
    answers = [q.answer / (len(q.choices) - 1) for seed in range(4) for q in make(seed, **preset.arguments).questions]
    assert abs(sum(answers) / len(answers) - 0.5) < 4 * 0.5 / len(answers) ** 0.5


@pytest.mark.parametrize("name", [name for name, generator in GENERATORS.items() if "small" in generator.presets])
def test_small_presets_fit_the_shipped_context(name):
    generator, tokenizer = GENERATORS[name], build_tokenizer()
    preset = generator.presets["small"]
    for seed in range(5):
        task = generator.make(seed, **preset.arguments)
        per_topic, subsample = preset.study.get("icl_per_topic"), preset.study.get("icl_subsample", 1)
        chosen = select_documents(task.documents, 0, per_topic=per_topic, subsample=subsample)
        context = icl_context(chosen)
        longest = max(len(tokenizer(q.prompt + choice)["input_ids"]) for q in task.questions for choice in q.choices)
        assert len(tokenizer(context)["input_ids"]) + longest <= 2048
        assert {document.topic for document in chosen} == {document.topic for document in task.documents}


def test_reversals_of_which_some_are_told():
    task = simple_reversals(0, num_facts=10, num_articles=2, reversed_fraction=0.4)
    assert Counter(q.split for q in task.questions) == {"trained": 10, "reversal": 6}
    assert len(task.documents) == 28
    told = {fact for document in task.documents for fact in comparisons.find(document.text)}
    for question in task.questions:
        for statement, is_correct in claims(question):
            (fact,) = comparisons.find(statement)
            assert (fact in told or fact.reversed in told) == is_correct
            assert (fact in told) == (is_correct and question.split == "trained")
    with pytest.raises(ValueError, match=r"^reversed_fraction: expected at least 0 and below 1, got 1$"):
        simple_reversals(0, reversed_fraction=1)


STATEMENT = re.compile(r"(All|Some|No) (\w+) are (\w+)\.")


def holds(statement, extension):
    """Whether a statement is true of sets of things."""
    quantifier, subject, object = statement
    common = extension[subject] & extension[object]
    return {"All": common == extension[subject], "Some": bool(common), "No": not common}[quantifier]


def entailed(premises, names):
    """Every statement about two of the names that is true in each model of the premises.

    Three things are enough: a premise needs one at most ("some"), and so does a statement's falsehood.
    """
    subsets = [frozenset(part) for n in range(4) for part in itertools.combinations(range(3), n)]
    models = [dict(zip(names, sets, strict=True)) for sets in itertools.product(subsets, repeat=3)]
    models = [model for model in models if all(holds(premise, model) for premise in premises)]
    possible = [(q, *pair) for q in ("All", "Some", "No") for pair in itertools.permutations(names, 2)]
    return {statement for statement in possible if all(holds(statement, model) for model in models)}


def test_syllogisms_are_entailed_and_their_rivals_are_not():
    task = simple_syllogisms(0)
    assert len(task.documents) == 69
    assert Counter(q.split for q in task.questions) == {"conclusion": 69, "premise": 69}
    assert set(Counter(q.form for q in task.questions if q.split == "premise").values()) == {7, 8}
    assert {question.form for question in task.questions} == set(FORMS)
    by_topic = {document.topic: document.text for document in task.documents}
    assert len(by_topic) == 69
    used = []
    for question in task.questions:
        text = by_topic[question.topic]
        names = re.fullmatch(r"The relationships between (\w+), (\w+) and (\w+) are: .*", text).groups()
        premises = STATEMENT.findall(text)
        assert len(premises) == 2
        if question.split == "premise":
            used += names
        found = {STATEMENT.search(statement).groups(): is_correct for statement, is_correct in claims(question)}
        pair = re.fullmatch(r"The relationships between (\w+) and (\w+) are:", question.prompt).groups()
        assert found.keys() == {(q, *order) for q in ("All", "Some", "No") for order in (pair, pair[::-1])}
        truths = entailed(premises, names)
        assert {statement for statement, is_correct in found.items() if is_correct} == truths & found.keys()
        assert (len(truths & found.keys() & set(premises)) > 0) == (question.split == "premise")
    assert len(used) == len(set(used)) == 3 * 69


def test_the_forms_are_all_that_are_valid():
    """Every pair of premises with a conclusion is one of FORMS; a mirrored pair is another order of the same."""
    valid = set()
    figures = {"1": ("MP", "SM"), "2": ("PM", "SM"), "3": ("MP", "MS"), "4": ("PM", "MS")}
    moods = {"A": "All", "I": "Some", "E": "No"}
    for (figure, pairs), major, minor, mood in itertools.product(figures.items(), "AIE", "AIE", "AIE"):
        premises = [(moods[major], *pairs[0]), (moods[minor], *pairs[1])]
        if (moods[mood], "S", "P") in entailed(premises, "SMP"):
            valid.add(major + minor + mood + figure)
    assert valid == set(FORMS)


WORD = f"(?:(?:{'|'.join(words.OPENINGS)})(?:{'|'.join(words.CLOSES)}))"  # of them, those in NONSENSE


class Told:
    """What the articles say, read back by patterns of this file's own, and what follows by chaining forward."""

    PATTERNS = (
        ("isa", r"(W) are a (?:type|kind) of (W)\."),
        ("isa", r"all (W) belong to the (W)\."),
        ("property", r"(?<!about )(?:all )?(W) are (?:always )?(W)\."),
        ("relation", r"(?:all |it is known that )?(W) (W) (W)\."),
    )

    def __init__(self, task):
        self.facts, self.sentences = set(), {}
        for document in task.documents:
            spans = {}
            for kind, pattern in self.PATTERNS:
                for match in re.finditer(rf"\b{pattern.replace('W', WORD)}", document.text):
                    assert set(match.groups()) <= NONSENSE
                    subject, *verb, object = match.groups()
                    spans[match.span()] = (kind, subject, *verb, object)
            self.sentences[document.id] = len(spans)
            self.facts |= set(spans.values())
        self.derived, self.steps = set(self.facts), dict.fromkeys(self.facts, 1)
        for step in itertools.count(2):
            new = {
                (rule[0], isa[1], *rule[2:])
                for isa in self.facts
                if isa[0] == "isa"
                for rule in self.derived
                if rule[1] == isa[2]
            } - self.derived
            if not new:
                break
            self.derived |= new
            self.steps |= dict.fromkeys(new, step)
        self.alike = {(kind, *verb): [] for kind, _, *verb, _ in self.facts}
        for fact in self.facts:
            self.alike[(fact[0], *fact[2:-1])].append(fact)
        self.above = {(fact[1], fact[2]) for fact in self.derived if fact[0] == "isa"}

    @staticmethod
    @cache
    def in_papers_sizes():
        """One such task and what it tells: a second each."""
        task = semantic_structure(0)
        return task, Told(task)

    def akin(self, a, b):
        return a == b or (a, b) in self.above or (b, a) in self.above

    def possible(self, claim):
        """Whether the claim, or one about anything above or below what it names, is told or follows."""
        kind, subject, *verb, object = claim
        if kind == "isa":
            return self.akin(subject, object)
        return any(
            self.akin(fact[1], subject) and (self.akin(fact[-1], object) if verb else fact[-1] == object)
            for fact in self.alike[(kind, *verb)]
        )


CLAIMS = (
    (r"(W) are classified as (W)\.", "isa", ""),
    (r"(W) can be described as (W)\.", "property", ""),
    (r"what (W) (W) are (W)\.", "relation", ""),
    (r"things that are (W) include (W)\.", "property", "back"),
    (r"those that (W) (W) include (W)\.", "relation", "back"),
    (r"(W) include (W)\.", "isa", "back"),
    (r"(W) are a type of (W)\.", "isa", ""),
    (r"(W) are (W)\.", "property", ""),
    (r"(W) (W) (W)\.", "relation", ""),
)


def read_claim(text):
    """A question's statement as (kind, subject, perhaps verb, object), and whether it is told backwards."""
    for pattern, kind, direction in CLAIMS:
        if match := re.fullmatch(pattern.replace("W", WORD), text):
            parts = list(match.groups())
            if direction:
                parts = [parts[-1], *parts[:-1]]
            return (kind, *parts), bool(direction)
    raise AssertionError(text)


SMALL = {name: generator.presets.get("small") for name, generator in GENERATORS.items()}


@pytest.mark.parametrize(
    ("seed", "arguments"),
    [(0, {}), *((seed, SMALL["semantic-structure"].arguments) for seed in range(3))],
)
def test_semantic_structure_is_proved_by_chaining_forward(seed, arguments):
    task = semantic_structure(seed, **arguments)
    told = Told(task) if arguments else Told.in_papers_sizes()[1]
    wordings = {text for document in task.documents for text in re.split(r"(?<=\.) ", document.text)}
    mentions = Counter(fact[1] for fact in told.facts) + Counter(fact[-1] for fact in told.facts)
    for question in task.questions:
        for statement, is_correct in claims(question):
            claim, backwards = read_claim(statement)
            assert claim[0] == question.form
            assert statement not in wordings
            if not is_correct:
                assert not told.possible(claim), statement
                continue
            steps = told.steps[claim]
            assert backwards == (question.split == "reversal") or question.split == "holdout"
            premises = {"rephrase": steps == 1, "reversal": steps == 1, "syllogism": steps == 2, "deduction": steps > 2}
            assert premises.get(question.split, mentions[claim[1]] == 1 and (steps > 1 or backwards))


def test_the_fewest_categories_have_enough_properties():
    for seed in (116, 369):  # whose chains inherit nearly all that there are
        assert semantic_structure(seed, num_categories=12, num_articles=12, num_questions=1).questions


def test_each_article_alone_tells_every_fact_of_its_category():
    task = semantic_structure(3, num_categories=12, num_articles=36, sentences=(1, 3))
    articles = [document for document in task.documents if document.id.startswith("article")]
    own = {}
    for article in articles:
        mine = {fact for fact in Told(Task((article,), ())).facts if fact[1] == article.topic}
        assert own.setdefault(article.topic, mine) == mine
    assert len(own) == 12
    assert max(map(len, own.values())) > 3


def test_semantic_structure_has_the_papers_sizes():
    task, told = Told.in_papers_sizes()
    articles = [document for document in task.documents if document.id.startswith("article")]
    assert len(articles) == 2200
    assert len(task.documents) - len(articles) == 110
    assert {told.sentences[article.id] for article in articles} == set(range(4, 21))
    assert task.splits == SPLITS
    assert Counter(q.split for q in task.questions) == dict.fromkeys(SPLITS, 200)
    for split in SPLITS:
        forms = Counter(question.form for question in task.questions if question.split == split)
        assert forms.keys() == {"isa", "property", "relation"}
    categories = {name for fact in told.facts if fact[0] == "isa" for name in fact[1:]}
    assert len(categories) == 110
    own = Counter(fact[1] for fact in told.facts if fact[0] == "property")
    assert set(own.values()) == set(range(1, 7))
    held_out = {name for name in categories if sum(name in fact for fact in told.facts) == 1}
    assert len(held_out & (categories - own.keys())) == 11
    verbs = {fact[2] for fact in told.facts if fact[0] == "relation"}
    adjectives = {fact[-1] for fact in told.facts if fact[0] == "property"}
    assert len(categories | verbs | adjectives) == len(categories) + len(verbs) + len(adjectives)
    asked = [d.text for d in task.documents if d.id.startswith("qa")]
    pairs = [pair for text in asked for pair in re.findall(r"Question: (.*)\nAnswer: (\w+)\.", text)]
    for question, answer in pairs:  # each is a told fact
        subject = next(word for word in re.findall(r"\w+", question) if word in categories)
        assert any(fact[1] == subject and fact[-1] == answer for fact in told.facts), question


def test_rivals_of_semantic_questions_are_true_of_others_and_give_nothing_away():
    task, told = Told.in_papers_sizes()
    for question in task.questions:
        for statement, _ in claims(question):
            claim, backwards = read_claim(statement)
            side = (claim[0], *claim[1:-1][1:], claim[1]) if backwards else (claim[0], *claim[2:])
            others = {(f[0], *f[1:-1][1:], f[1]) if backwards else (f[0], *f[2:]) for f in told.facts}
            assert question.split == "holdout" or side in others, statement
    counts = Counter(choice for question in task.questions for choice in question.choices)
    mentioned = Counter(word for document in task.documents for word in re.findall(r"\w+", document.text))
    rarest = [min(q.choices, key=lambda c: mentioned[c[1:-1]]) == q.choices[q.answer] for q in task.questions]
    commonest = [max(q.choices, key=lambda c: counts[c]) == q.choices[q.answer] for q in task.questions]
    for guess in (rarest, commonest):
        assert sum(guess) / len(guess) < 0.4


def test_what_the_documents_mention_most_does_not_answer_what_is_inherited():
    right, asked = 0.0, 0
    for seed in range(20):
        task = semantic_structure(seed, **SMALL["semantic-structure"].arguments)
        mentioned = Counter(word for document in task.documents for word in re.findall(r"\w+", document.text))
        for question in task.questions:
            if question.split in ("syllogism", "deduction", "holdout"):
                counts = [mentioned[choice[1:-1]] for choice in question.choices]
                right += (counts[question.answer] == max(counts)) / counts.count(max(counts))
                asked += 1
    assert right / asked < 0.33  # 0.49 where articles went on to relatives


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (simple_syllogisms, {"num_examples": 0}, "num_examples: expected at least 1, got 0"),
        (
            simple_syllogisms,
            {"num_examples": 700},
            "count: at most 1764 distinct nonsense words can be drawn, got 2100",
        ),
        (semantic_structure, {"num_categories": 11}, "num_categories: expected at least 12, got 11"),
        (semantic_structure, {"num_articles": 9}, "num_articles: expected at least 110, one a category, got 9"),
        (semantic_structure, {"sentences": (5, 4)}, "sentences: expected (least, most) with 1 <= least <= most, got"),
        (semantic_structure, {"num_questions": 0}, "num_questions: expected at least 1, got 0"),
        (process, {"num_functions": (1, 2)}, "num_functions[0]: expected 2 to 7, got 1"),
        (process, {"num_functions": (3, 6)}, "num_functions[1]: expected 2 to 5, got 6"),
        (process, {"num_atoms": 3}, "num_atoms: expected 4 to 100, got 3"),
        (process, {"num_examples": 8}, "num_examples: expected 1 to 7, got 8"),
        (process, {"num_questions": 0}, "num_questions: expected 1 to 1000000, got 0"),
    ],
)
def test_bad_arguments(make, arguments, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        make(0, **arguments)


def rewrite(text, rules):
    """The text with every transform carried out, by replacing strings; `rules` are the documents' own equations."""
    name = next(iter(rules)).partition("(")[0]
    while name in text:
        start = text.rindex(name + "(")  # the last one has none inside it
        end = closing(text, start + len(name))
        inside = text[start + len(name) + 1 : end]
        if "(" not in inside:
            result = rules[f"{name}({inside})"]
        else:
            function, arguments = inside.partition("(")[0], split_arguments(inside)
            pattern = f"{name}({function}({', '.join('AB'[: len(arguments)])}))"
            result = rules[pattern]
            for letter, argument in zip("AB", arguments, strict=False):
                result = re.sub(rf"\b{letter}\b", argument, result)
        text = text[:start] + result + text[end + 1 :]
    return text


def closing(text, opening):
    """Where the parenthesis that opens at `opening` closes."""
    depth = 0
    for i in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if not depth:
            return i
    raise AssertionError(text)


def split_arguments(call):
    """The arguments of f(a, b), cut at the commas of the outermost level."""
    parts, depth = [""], 0
    for letter in call[call.index("(") + 1 : -1]:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


@pytest.mark.parametrize(("seed", "arguments"), [(0, {}), *((seed, SMALL["process"].arguments) for seed in range(20))])
def test_the_process_is_proved_by_its_stated_rules(seed, arguments):
    task = process(seed, **arguments)
    equations = {d.id: d.text.removesuffix(".").split(" = ") for d in task.documents}
    rules = {left: right for key, (left, right) in equations.items() if not key.startswith("example")}
    examples = {left: right for key, (left, right) in equations.items() if key.startswith("example")}
    nested = re.compile(r"\w+\((\w+)\((\w+)\(")
    for left, right in examples.items():
        assert rewrite(left, rules) == right
    shown = {match.groups() for left in examples if (match := nested.match(left))}
    functions = {function for pair in shown for function in pair}
    assert {outer for outer, _ in shown} == {inner for _, inner in shown} == functions
    assert len(shown) == len(functions) ** 2 - len(functions) ** 2 // 4
    for question in task.questions:
        left = question.prompt.removesuffix(" =")
        truth = rewrite(left, rules)
        for statement, is_correct in claims(question):
            assert (statement == f"{left} = {truth}.") == is_correct
        assert (left in examples) == (question.split == "trained")
        assert (nested.match(left).groups() in shown) == (question.split != "held out")
        assert question.topic == "-".join(nested.match(left).groups())
    if arguments:
        held_out = Counter(q.topic for q in task.questions if q.split == "held out")
        assert set(held_out.values()) == {arguments["num_atoms"]}
    else:
        assert Counter(q.split for q in task.questions) == {"trained": 100, "new atoms": 75, "held out": 100}


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(2, 7), st.integers(2, 5), st.integers(4, 9))
def test_any_language_has_three_wrong_results(seed, one, two, atoms):
    task = process(seed, num_functions=(one, two), num_atoms=atoms, num_examples=atoms - 1)
    assert all(len(set(question.choices)) == 4 for question in task.questions)


def write_curse(folder):
    """A tiny folder in the layout of the Reversal Curse data."""
    tested, targets = ["Ann Bole", "Cy Dent", "Eve Ford", "Gus Hay"], ["Ida Jot", "Kit Low", "Max Noe", "Oz Pim"]
    rows = [{"prompt": f"{name} is", "completion": f" the {name[0]} of it."} for name in tested]
    write_jsonl(folder / DESCRIPTIONS, rows)
    named = [{"prompt": f"The {name[0]} of it is", "completion": f" {name}"} for name in targets]
    write_jsonl(folder / NAMES, named)
    write_jsonl(folder / REVERSALS, [{"prompt": f"The {n[0]} of it is", "completion": f" {n}"} for n in tested])
    smiling = [row | {"completion": row["completion"] + " now smiles."} for row in named]
    write_jsonl(folder / TRAINING, [*rows, *smiling])
    return folder


@pytest.fixture
def curse(tmp_path):
    return write_curse(tmp_path)


def test_reading_a_small_reversal_curse(curse):
    task = reversal_curse(curse)
    assert [document.text for document in task.documents][::4] == [
        "Ann Bole is the A of it.",
        "The I of it is Ida Jot now smiles.",
    ]
    assert Counter(q.split for q in task.questions) == dict.fromkeys(
        ("trained", "trained names", "reversal", "reversal targets"), 4
    )
    ann = {q.split: q for q in task.questions if q.topic == "Ann Bole"}
    assert sorted(ann["trained"].choices) == [f" the {letter} of it." for letter in "ACEG"]
    assert ann["reversal"].prompt == "The A of it is"
    assert set(ann["reversal targets"].choices) - {" Ann Bole"} < {" Ida Jot", " Kit Low", " Max Noe", " Oz Pim"}
    assert {q.choices[q.answer] for q in ann.values()} == {" Ann Bole", " the A of it."}
    assert reversal_curse(curse, 1) == reversal_curse(curse, 1) != task


def test_nonsense_names_are_no_words_of_the_data(curse, monkeypatch):
    names = words.sample_words(random.Random("any"), 40)
    (curse / TRAINING).write_text((curse / TRAINING).read_text().replace("smiles", " ".join(names)))
    monkeypatch.setattr(words, "sample_word", lambda rng, held_out: rng.choice([*names, *spare]))
    spare = words.OPENINGS[:50]
    task = reversal_curse(curse, nonsense_names=True, exclude=spare[:30])
    drawn = {part.lower() for q in task.questions if q.split == "reversal" for c in q.choices for part in c.split()}
    assert drawn <= set(spare[30:])


def test_the_reversal_curse_from_the_hub(curse, tmp_path, monkeypatch):
    """A cache of the hub as its client writes it; nothing here is reached over a network."""
    cache = tmp_path / "hub" / "datasets--some--curse"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(TaskError, match=rf"^some/curse: neither a folder nor .* {HUB_FOLDER}/{TRAINING}: \w.*$"):
        reversal_curse("some/curse")
    snapshot = cache / "snapshots" / ("0" * 40) / HUB_FOLDER
    snapshot.mkdir(parents=True)
    write_curse(snapshot)
    assert reversal_curse("some/curse", 3) == reversal_curse(curse, 3)
    with pytest.raises(TaskError, match=r"^no such/a/b: neither a folder nor a dataset on the hub .*: Repo id must "):
        reversal_curse("no such/a/b")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (TRAINING, b'{"prompt": "a", "completion": 3}', ":1: completion: expected a string, got 3"),
        (TRAINING, b"", ": empty: expected at least one JSON object"),
        (NAMES, b'\n{"completion": " A B"}', ":2: prompt: missing"),
        (REVERSALS, b'{"prompt": "x", "completion": "  "}', ":1: completion: expected more than spaces"),
        (REVERSALS, b'{"prompt": "x", "completion": " Ann Bole"}\n', None),
        (
            DESCRIPTIONS,
            b'{"prompt": "Zoe is", "completion": " x"}',
            f":1: prompt: names nobody who is asked for in {REVERSALS}",
        ),
        (
            DESCRIPTIONS,
            b'{"prompt": "Cy Dent is", "completion": " x"}',
            ":1: completion: fewer than 3 wrong choices for it in the 'trained' split",
        ),
    ],
)
def test_bad_reversal_curse_files_name_line_and_field(name, content, message, curse):
    (curse / name).write_bytes(content)
    with pytest.raises(TaskError) as caught:
        reversal_curse(curse)
    if message is None:  # the other file is the one that does not fit
        name, message = DESCRIPTIONS, f":2: prompt: names nobody who is asked for in {REVERSALS}"
    assert str(caught.value) == f"{curse / name}{message}"


def test_a_missing_reversal_curse_file(curse):
    (curse / NAMES).unlink()
    with pytest.raises(TaskError, match=rf"{NAMES}: cannot be read: No such file or directory$"):
        reversal_curse(curse)


ROWS = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.sampled_from(["Ann Bole is", "", "The A of it is"]) | st.text(max_size=5) | st.none(),
        "completion": st.sampled_from([" Ann Bole", "Ida Jot x", " "]) | st.text(max_size=5) | st.integers(),
    },
)


@settings(deadline=None, max_examples=100)
@given(
    name=st.sampled_from([TRAINING, NAMES, REVERSALS, DESCRIPTIONS]),
    rows=st.lists(ROWS, max_size=6),
    nonsense=st.booleans(),
)
def test_reading_the_reversal_curse_raises_nothing_but_task_errors(name, rows, nonsense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("curse")
    write_curse(folder)
    write_jsonl(folder / name, rows)
    try:
        task = reversal_curse(folder, nonsense_names=nonsense)
    except TaskError as error:
        assert str(error).startswith(str(folder))  # noqa: PT017
    else:
        assert all(len(question.choices) == 4 for question in task.questions)


@pytest.mark.skipif(not CURSE.is_dir(), reason=f"no data in {CURSE}")
@pytest.mark.parametrize("nonsense", [False, True])
def test_the_real_reversal_curse(nonsense):
    task, plain = reversal_curse(CURSE, nonsense_names=nonsense), reversal_curse(CURSE)
    assert len(task.documents) == 3600
    splits = ("trained", "trained names", "reversal", "reversal targets")
    assert Counter(q.split for q in task.questions) == dict.fromkeys(splits, 300)
    people = {split: {q.topic for q in task.questions if q.split == split} for split in splits}
    assert all(len(group) == 30 for group in people.values())
    assert people["trained"] == people["reversal"] == people["reversal targets"]
    written = [document.text for document in task.documents]
    targets = {c[1:] for q in task.questions if q.split == "reversal targets" for c in q.choices} - people["reversal"]
    assert len(targets) == 60
    assert people["trained names"] < targets
    for name in targets:  # each does end a training prompt and begin a completion
        assert any(name in text and not text.startswith(name) for text in written)
    for name in people["reversal"]:  # asked names only ever lead to descriptions
        assert sum(name in text for text in written) == 30
    uniform = {c[1:] for q in task.questions if q.split == "reversal" for c in q.choices}
    assert len(uniform) == 90
    originals = {q.topic for q in plain.questions} | {c[1:] for q in plain.questions for c in q.choices if len(c) < 30}
    if nonsense:
        assert not any(name in text for text in texts(task) for name in originals if re.fullmatch(r"\w+ \w+", name))
        assert all(word.lower() in NONSENSE for name in uniform for word in name.split())


def test_presets_override_settings_that_there_are():
    study, training = ({f.name for f in fields(kind)} for kind in (StudySettings, FinetuneSettings))
    for name, generator in GENERATORS.items():
        for key, preset in generator.presets.items():
            assert preset.study.keys() <= study - {"finetune"}, f"{name} {key}"
            assert preset.finetune.keys() <= training, f"{name} {key}"
