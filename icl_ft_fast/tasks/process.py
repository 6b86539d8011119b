"""Process knowledge (Lampinen et al. 2025, appendix B.5): a transform of expressions, tested on new compositions.

From the paper: a pseudo-mathematical transform "similar to taking a derivative, but with uncommon rules"; some
combinations of rules are trained, others held out. Its rules and sizes are unpublished: the language, the rules and
the numbers here are ours. Functions of one or two arguments over atoms are rewritten from the outside in, each by a
rule of its own; the documents state the rules and show worked examples of one and of two nested functions.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass, replace

from icl_ft_fast.tasks import words
from icl_ft_fast.tasks.generator import NO_ENGLISH, Preset, TaskGenerator
from icl_ft_fast.tasks.task import Document, Question, Task

# An expression is an atom or (function, argument, ...). In a rule's result "A" and "B" are the function's arguments,
# "F" is the function itself, "G" and "H" another of one and of two arguments, and (T, x) is the transform of x.
Expression = str | tuple["Expression", ...]
T = "T"
RULES_OF_ONE: tuple[Expression, ...] = (
    ("G", (T, "A")),
    ("F", ("F", (T, "A"))),
    ("H", "A", (T, "A")),
    ("F", ("G", (T, "A"))),
    (T, "A"),
    ("H", (T, "A"), (T, "A")),
    ("G", ("F", (T, "A"))),
)
RULES_OF_TWO: tuple[Expression, ...] = (
    ("F", (T, "B"), (T, "A")),
    ("H", (T, "A"), "B"),
    ("F", "A", (T, "B")),
    ("G", ("F", (T, "A"), (T, "B"))),
    ("H", "B", (T, "A")),
)
CHOICES = 4


@dataclass(frozen=True)
class Language:
    """The transform's name, what it makes of each atom, and each function's number of arguments and rule."""

    name: str
    atoms: dict[str, str]
    arity: dict[str, int]
    rules: dict[str, Expression]

    def transform(self, expression: Expression, rules: dict[str, Expression]) -> Expression:
        """The expression rewritten by `rules`."""
        if isinstance(expression, str):
            return self.atoms[expression]
        return self._fill(rules[str(expression[0])], dict(zip("AB", expression[1:], strict=False)), rules)

    def _fill(self, rule: Expression, argument: dict[str, Expression], rules: dict[str, Expression]) -> Expression:
        if isinstance(rule, str):
            return argument.get(rule, rule)
        if rule[0] == T:
            return self.transform(argument[str(rule[1])], rules)
        return (rule[0], *(self._fill(part, argument, rules) for part in rule[1:]))

    def render(self, expression: Expression) -> str:
        """The expression in function notation."""
        if isinstance(expression, str):
            return self.name if expression == T else expression
        return f"{self.render(expression[0])}({', '.join(map(self.render, expression[1:]))})"


def process(
    seed: int = 0,
    *,
    num_functions: tuple[int, int] = (6, 4),
    num_atoms: int = 8,
    num_examples: int = 6,
    num_questions: int = 100,
    exclude: Collection[str] = (),
) -> Task:
    """Generate the task; the same arguments give the same task.

    Args:
        seed: of the words, the rules, what is held out and every order.
        num_functions: of one and of two arguments; at least 2 and 2, at most 7 and 5 (a rule each).
        num_atoms: at least 4.
        num_examples: worked examples of each combination of an outer and an inner function, at most `num_atoms - 1`.
        num_questions: at most so many a split.
        exclude: nonsense words not to draw, see words.sample_words().

    Returns:
        A document for each rule, example and atom. Splits: "trained" (examples of the documents), "new atoms" (trained
        combinations on other atoms) and "held out" (the quarter of the combinations that no document shows, as many
        questions on each as there are atoms). Four choices; the wrong ones follow other rules or none. A question's
        form counts the arguments, "1 in 2" being a function of one argument inside a function of two; its topic is the
        combination.

    Raises:
        ValueError: an argument out of its range.
    """
    for name, count, low, high in (
        ("num_functions[0]", num_functions[0], 2, len(RULES_OF_ONE)),
        ("num_functions[1]", num_functions[1], 2, len(RULES_OF_TWO)),
        ("num_atoms", num_atoms, 4, 100),
        ("num_examples", num_examples, 1, num_atoms - 1),
        ("num_questions", num_questions, 1, 10**6),
    ):
        if not low <= count <= high:
            raise ValueError(f"{name}: expected {low} to {high}, got {count}")
    rng = random.Random(seed)
    language = sample_language(rng, num_functions, num_atoms, exclude=exclude)
    atoms, functions = list(language.atoms), list(language.arity)
    pairs = [(outer, inner) for outer in functions for inner in functions]
    held_out = _held_out(rng, pairs, len(pairs) // 4)
    examples: list[Expression] = [(f, *rng.sample(atoms, language.arity[f])) for f in functions for _ in range(3)]
    asked: dict[str, list[Expression]] = {"trained": [], "new atoms": [], "held out": []}
    for outer, inner in pairs:
        if (outer, inner) in held_out:
            asked["held out"] += compositions(rng, language, outer, inner, num_atoms)
        else:
            mine = compositions(rng, language, outer, inner, num_examples + 1)
            examples += mine[:-1]
            asked["trained"] += mine[:-1]
            asked["new atoms"].append(mine[-1])
    placeholders = "AB"
    facts: list[tuple[str, Expression, Expression]] = [
        (f"rule-{f}", (T, (f, *placeholders[: language.arity[f]])), language.rules[f]) for f in functions
    ]
    facts += [(f"atom-{a}", (T, a), language.atoms[a]) for a in atoms]
    facts += [
        (f"example{i}", (T, e), language.transform(e, language.rules)) for i, e in enumerate(dict.fromkeys(examples))
    ]
    documents = [Document(name, f"{language.render(left)} = {language.render(right)}.") for name, left, right in facts]
    rng.shuffle(documents)
    questions = [
        _question(rng, language, f"{split.replace(' ', '-')}{i}", expression, split)
        for split, expressions in asked.items()
        for i, expression in enumerate(rng.sample(expressions, min(num_questions, len(expressions))))
    ]
    return Task(tuple(documents), tuple(questions))


def sample_language(
    rng: random.Random,
    num_functions: tuple[int, int],
    num_atoms: int,
    *,
    held_out: bool = True,
    exclude: Collection[str] = (),
) -> Language:
    """A transform, in words of the held-out part or of the training part, see words.sample_words()."""
    one, two = num_functions
    name, *rest = words.sample_words(rng, 1 + one + two + num_atoms, held_out=held_out, exclude=exclude)
    unary, binary, atoms = rest[:one], rest[one : one + two], rest[one + two :]
    shifted = atoms[1:] + atoms[:1]
    rules = {}
    for mine, templates in ((unary, RULES_OF_ONE), (binary, RULES_OF_TWO)):
        for function, template in zip(mine, rng.sample(templates, len(mine)), strict=True):
            names = {"F": function}
            names["G"] = rng.choice([f for f in unary if f != function])
            names["H"] = rng.choice([f for f in binary if f != function])
            rules[function] = _renamed(template, names)
    arity = dict.fromkeys(unary, 1) | dict.fromkeys(binary, 2)
    return Language(name, dict(zip(atoms, shifted, strict=True)), arity, rules)


def _renamed(template: Expression, names: dict[str, str]) -> Expression:
    if isinstance(template, str):
        return names.get(template, template)
    return tuple(_renamed(part, names) for part in template)


def _held_out(rng: random.Random, pairs: list[tuple[str, str]], count: int) -> set[tuple[str, str]]:
    """`count` pairs such that every function is still seen outside and inside in those that remain."""
    chosen: set[tuple[str, str]] = set()
    for outer, inner in rng.sample(pairs, len(pairs)):
        rest = [pair for pair in pairs if pair not in chosen and pair != (outer, inner)]
        if len(chosen) < count and outer in {a for a, _ in rest} and inner in {b for _, b in rest}:
            chosen.add((outer, inner))
    return chosen


def compositions(rng: random.Random, language: Language, outer: str, inner: str, count: int) -> list[Expression]:
    """`count` distinct expressions with `inner` as the first argument of `outer`."""
    made: dict[Expression, None] = {}
    while len(made) < count:
        atoms = rng.sample(list(language.atoms), 3)
        inside = (inner, *atoms[: language.arity[inner]])
        made[(outer, inside, *atoms[2 : 1 + language.arity[outer]])] = None
    return list(made)


def _question(rng: random.Random, language: Language, question_id: str, expression: Expression, split: str) -> Question:
    """The transform of an expression against what other rules, or none, would make of it."""
    truth = language.transform(expression, language.rules)
    outer, inner, arity = str(expression[0]), str(expression[1][0]), language.arity
    same_atoms = replace(language, atoms={atom: atom for atom in language.atoms})
    arguments = (language.transform(argument, language.rules) for argument in expression[1:])
    wrong = dict.fromkeys([(outer, *arguments), same_atoms.transform(expression, language.rules)])
    for function in (outer, inner):
        for other, rule in language.rules.items():
            if arity[other] <= arity[function]:
                wrong[language.transform(expression, language.rules | {function: rule})] = None
    wrong.pop(truth, None)
    if len(wrong) < CHOICES - 1:  # the prompt's own words please a model that only copies, so they come last
        wrong[expression] = None
    choices = [truth, *rng.sample(list(wrong), CHOICES - 1)]
    rng.shuffle(choices)
    return Question(
        question_id,
        f"{language.render((T, expression))} =",
        tuple(f" {language.render(c)}." for c in choices),
        choices.index(truth),
        split,
        topic=f"{outer}-{inner}",
        form=f"{arity[inner]} in {arity[outer]}",
    )


GENERATOR = TaskGenerator(
    process,
    {
        "paper": Preset(NO_ENGLISH, {"strategy": "global"}),
        "small": Preset(
            {"num_functions": (2, 2), "num_atoms": 4, "num_examples": 1, "num_questions": 40},
            {"strategy": "global", "samples": 4},
        ),
    },
)
