# %% [markdown]
# # 2. From documents to a decision
#
# You have documents and questions about them. Should a model read the documents at every call, retrieve a part of
# them, or be fine-tuned? The documents here are `examples/handbook`: 60 documents of an invented company, 218
# questions. Run this from the repository's folder.
#
# The model is the shipped one, so that nothing has to be downloaded. It reads no English: the point of this page
# is to see how the study says so. Give the folder, GGUF file or hub id of a real model in `MODEL`, and the same
# lines decide for that one.

# %%
import os
from dataclasses import replace

import icl_ft_fast as iff
from icl_ft_fast.report import charts
from icl_ft_fast.report.verdict import why_none
from icl_ft_fast.tasks.check import check

name = os.environ.get("MODEL", "shipped")
task = iff.Task.read("examples/handbook")
print(task.documents[1].text)
print(task.questions[0].prompt, "...", task.questions[0].choices[task.questions[0].answer])
print({split: sum(q.split == split for q in task.questions) for split in task.splits})

# %% [markdown]
# ## Look at the questions first
#
# A study of bad questions says nothing. The check finds answers that stand in the documents word for word,
# questions that repeat each other, and choices that can be guessed from their length. On the command line:
# `icl-ft-fast task check examples/handbook`.

# %%
found = check(task.documents, task.questions)
print("answers that stand in the documents word for word:", sum(map(len, found.leaked.values())))
print("questions that repeat another:", len(found.same_questions))
print(f"picking the longest choice is right in {found.longest_is_right:.0%}, at random in {found.chance:.0%}")

# %% [markdown]
# ## Can the model answer at all?
#
# `base` asks without the documents, `icl` with them in context, `rag` with the four passages that BM25 finds,
# `oracle` with the one document that has the answer. None of these trains. `oracle` cannot be had in practice;
# where it fails too, neither retrieval nor a longer context will help.
#
# The handbook is longer than the shipped model's 4,096 tokens, so `icl_tokens` says how much of it to show. 56
# questions of the two kinds that state a fact directly are enough for a first look.

# %%
asked = [q for q in task.questions if q.split in ("recall", "rephrase")][::2]
first = replace(task, questions=tuple(asked))
settings = iff.StudySettings(arms=("base", "icl", "rag@4", "oracle"), seeds=(0,), icl_tokens=600)
options = iff.StudyOptions(measure_s=1, task_name="handbook")
results = iff.compare(iff.load(name), first, settings, options=options, out="out/tutorials/handbook")
study = iff.Study.of(results, "handbook")
for arm in settings.arms:
    accuracy = study.accuracy(arm)
    low, high = accuracy.interval
    print(f"{arm:8} {accuracy.correct:2} of {accuracy.total} right, 95% interval {low:.2f} to {high:.2f}, chance 0.25")

# %% alt="Accuracy of each way of answering on the handbook with its 95% interval, and chance"
charts.draw(study.derived)[0].figure

# %% [markdown]
# ## The decision
#
# `verdict` takes the number of queries that will be asked in all. It names a way only where the accuracies carry
# it.

# %%
verdict = study.verdict(30_000)
print(verdict.text if verdict else why_none(study.derived))

# %% [markdown]
# With the shipped model no way is above chance, and the study says that instead of naming the cheapest. The next
# step would be another model, not more training. A small real model already differs: SmolLM2-135M-Instruct answers
# about a third of the handbook's questions without the documents, and nearly all with the right document in front
# of it. `make real` runs the whole study on that model, and [its page](../results-real.md) has the outcome.
#
# With a model that reads the documents the study goes on with training; the [quickstart](../quickstart.md) has the
# commands. What training does can be seen on the shipped model where it knows the language: in [the paper's
# reversals](3_reversals.py).
