"""A whole study in one flat script: the library's parts, and no `compare`.

    python examples/whole_study.py                       # 12 facts, 100 steps; the numbers on the screen
    python examples/whole_study.py --out study.json      # and in a file
    python examples/whole_study.py --out study.json --check

Five ways of answering questions about facts that a model was never told: nothing (base), all facts in context (icl),
the four that BM25 finds (rag), training on the facts (ft), training also on what the model writes about each
(augmented-ft). Read it from top to bottom; nothing is hidden in a framework. `--check` then runs `compare` with the
same seed and ends with exit code 1 unless it answers every question alike and every loss is equal.

Copy it where `compare` does not do what you want: another way to prompt, train or price is one block here.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import icl_ft_fast as iff
from icl_ft_fast.engine.prompting import prompt_context
from icl_ft_fast.study.amortise import Line, break_even
from icl_ft_fast.study.evaluate import select_documents
from icl_ft_fast.study.retrieval import Bm25, in_shared_order, retrieve
from icl_ft_fast.tasks.reversals import simple_reversals

options = argparse.ArgumentParser(description="A study without compare.")
options.add_argument("--model", default="shipped", help="checkpoint folder, GGUF file, hub id, or the shipped model")
options.add_argument("--facts", type=int, default=12, help="comparisons to tell the model")
options.add_argument("--steps", type=int, default=100, help="optimizer steps of each training")
options.add_argument("--seed", type=int, default=0, help="of the facts and of training")
options.add_argument("--queries", type=int, default=10_000, help="to decide for")
options.add_argument("--out", type=Path, help="write what was found here, as JSON")
options.add_argument("--check", action="store_true", help="compare with the library's own study")
given = options.parse_args()

# The model and the task -----------------------------------------------------------------------------------------------

model = iff.load(given.model, dtype="float32")
task = simple_reversals(given.seed, num_facts=given.facts, num_articles=1)
questions = task.questions
training = iff.FinetuneSettings(steps=given.steps, learning_rate=1e-3, lr_scheduler_type="linear")


# One question behind one text, for every way --------------------------------------------------------------------------


def answer(answering: iff.Model, contexts: list[str]) -> tuple[list[int], float]:
    """The predicted choice of each question behind its own context, and seconds a question."""
    predicted = [0] * len(questions)
    began = time.perf_counter()
    for context in dict.fromkeys(contexts):  # questions with the same context are scored together
        asked = [q for q, its in enumerate(contexts) if its == context]
        for q, score in zip(asked, iff.score(answering, [questions[q] for q in asked], context=context), strict=True):
            predicted[q] = score.predicted
    return predicted, (time.perf_counter() - began) / len(questions)


found: dict[str, dict] = {}


def note(arm: str, answering: iff.Model, contexts: list[str], setup_s: float = 0.0, losses: tuple = ()) -> None:
    """Ask, and keep what a way of answering made of it."""
    predicted, query_s = answer(answering, contexts)
    found[arm] = {"predicted": predicted, "setup_s": setup_s, "query_s": query_s, "losses": list(losses)}


# base: the question alone ---------------------------------------------------------------------------------------------

nothing = [""] * len(questions)
note("base", model, nothing)

# icl: all documents before each question, in a seeded order -----------------------------------------------------------

context = prompt_context(model, select_documents(task.documents, given.seed))
note("icl", model, [context] * len(questions))
tokens = model.tokenizer(context.rstrip())["input_ids"]
began = time.perf_counter()
iff.prefill(model, tokens)
reading_s = time.perf_counter() - began

# rag: the four documents that share most words with the question ------------------------------------------------------

began = time.perf_counter()
retriever = Bm25([document.text for document in task.documents])
hits = in_shared_order(retrieve(retriever, [q.prompt for q in questions], 4, len(task.documents)))
passages = [prompt_context(model, [task.documents[d] for d in its]) for its in hits]
note("rag@4", model, passages, setup_s=time.perf_counter() - began)

# ft: trained on the documents, asked without them ---------------------------------------------------------------------

documents = [iff.Example(document.text) for document in task.documents]
began = time.perf_counter()
tuned = iff.finetune(model, documents, training, seed=given.seed)
note("ft", tuned.model, nothing, time.perf_counter() - began, tuned.losses)

# augmented-ft: trained also on what the model writes about each sentence ----------------------------------------------

began = time.perf_counter()
written = iff.augment(model, task, "local", seed=given.seed)
rows = [iff.Example(row.text) for row in written.rows]
tuned = iff.finetune(model, [*documents, *rows], training, seed=given.seed)
note("augmented-ft", tuned.model, nothing, time.perf_counter() - began, tuned.losses)

# Accuracy by kind of question, with Wilson intervals ------------------------------------------------------------------

for way in found.values():
    right = [p in q.correct for p, q in zip(way["predicted"], questions, strict=True)]
    way["accuracy"] = {}
    for split in task.splits:
        of_split = [is_right for is_right, q in zip(right, questions, strict=True) if q.split == split]
        way["accuracy"][split] = iff.Accuracy(sum(of_split), len(of_split))
    way["all"] = iff.Accuracy(sum(right), len(right))

# What n queries cost, and from how many on training is cheaper --------------------------------------------------------

lines = {arm: Line(way["setup_s"], 0.0, way["query_s"]) for arm, way in found.items()}
lines["icl"] = Line(0.0, reading_s, found["icl"]["query_s"], cache_lifetime=1)  # reads for every query
lines["icl cached"] = Line(0.0, reading_s, found["icl"]["query_s"], cache_lifetime=math.inf)

print(f"{len(task.documents)} documents, {len(questions)} questions, {len(written.rows)} augmentations\n")
print(f"{'':14}{'accuracy':>10}{'95% interval':>16}{'':4}" + "".join(f"{split:>10}" for split in task.splits))
for arm, way in found.items():
    low, high = way["all"].interval
    by_split = "".join(f"{way['accuracy'][split].value:10.2f}" for split in task.splits)
    print(f"{arm:14}{way['all'].value:10.3f}{f'{low:.2f} to {high:.2f}':>16}{'':4}{by_split}")
print()
for arm in ("ft", "augmented-ft"):
    for rival in ("icl", "icl cached"):
        number = break_even(lines[arm], lines[rival])
        told = "never costs less than" if number is None else f"costs less from {number + 1:,.0f} queries on than"
        print(f"{arm} {told} {rival}")

# The decision: the cheapest way within two points of the most accurate ------------------------------------------------

accuracy = {arm: found[arm.removesuffix(" cached")]["all"].value for arm in lines}
best = max(accuracy.values())
good = [arm for arm in lines if accuracy[arm] >= best - 0.02]
chosen = min(good, key=lambda arm: lines[arm].cost(given.queries))
cost_s = lines[chosen].cost(given.queries)
print(f"\nFor {given.queries:,} queries: {chosen}, {cost_s:,.1f} s, accuracy {accuracy[chosen]:.3f}")

if given.out is not None:
    kept = {
        arm: {name: way[name] for name in ("predicted", "losses", "setup_s", "query_s")} for arm, way in found.items()
    }
    given.out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")

# The same study by compare, for the same seed -------------------------------------------------------------------------

if given.check:
    settings = iff.StudySettings(
        arms=tuple(found), seeds=(given.seed,), strategy="local", finetune=training, use_peft=False
    )
    results = iff.compare(model, task, settings, options=iff.StudyOptions(measure_s=0))
    for run in results.runs:
        mine, theirs = found[run.arm], {answer.question_id: answer.predicted for answer in run.answers}
        alike = sum(theirs[q.id] == p for q, p in zip(questions, mine["predicted"], strict=True))
        if alike < len(questions) or list(run.losses) != mine["losses"]:
            raise SystemExit(f"{run.arm}: {alike} of {len(questions)} answers as compare gives them, or other losses")
    print(f"compare gives the same {len(questions)} answers under each of {', '.join(found)}, and the same losses")
