# %% [markdown]
# # 4. Augmentation, and whether the documents support it
#
# Augmented fine-tuning trains on documents and on statements that the model draws from them. It is only as good as
# those statements. This page writes some, reads them, and has the model check them against their source.

# %%
from collections import Counter

import icl_ft_fast as iff
from icl_ft_fast.augmentation.steps import self_consistent
from icl_ft_fast.engine.prompting import prompt_context
from icl_ft_fast.tasks.generated import deny, infer
from icl_ft_fast.tasks.reversals import simple_reversals
from icl_ft_fast.tasks.sentences import words_of

model = iff.load("shipped")
task = simple_reversals(seed=0, num_facts=40, num_articles=1)
ledger = iff.Ledger()
made = iff.augment(model, task, "local", ledger=ledger)
print(f"{len(task.documents)} documents, {len(made.rows)} statements in {ledger.seconds['generate']:.1f} s")
print("dropped:", made.dropped)
for row in made.rows[:4]:
    source = next(d.text for d in task.documents if d.id == row.source_id)
    print(f"{row.kind:10} {source!r} -> {row.text!r}")

# %% [markdown]
# ## Are they true?
#
# These documents are simple enough for a rule: `infer` lists all that follows from a comparison. With documents of
# your own there is no such rule; read a sample of the rows.

# %%
entailed = {inference.text.casefold() for inference in infer(task.documents)}
right = [row for row in made.rows if row.text.casefold() in entailed]
print(f"{len(right)} of {len(made.rows)} statements follow from their document")
for row in [row for row in made.rows if row not in right][:3]:
    print("does not follow:", row.text)

# %% [markdown]
# So small a model finds the right relation and copies a name wrongly: rephrasings are right, reversals are not.
# Trained on such rows it still answers reversals ([tutorial 3](3_reversals.py)), because there the relation is
# what counts. On documents of your own a wrong name would be a wrong fact.
#
# ## A check of names
#
# A name that stands in no document and in one statement only was made up. This needs no model.

# %%
told = {word for document in task.documents for word in words_of(document.text)}
times = Counter(word for row in made.rows for word in set(words_of(row.text)))
strange = [row for row in made.rows if any(word not in told and times[word] == 1 for word in words_of(row.text))]
is_right = sum(row in right for row in strange)
print(f"{len(strange)} statements have a word of their own; {is_right} of them follow from their document")

# %% [markdown]
# ## The model's own check
#
# A model can check what it wrote: with the source in front of it, is a statement likelier than its contradiction?
# This needs statements whose contradiction can be written down, as that of "wider than" is "less wide than".
# `icl-ft-fast augment --self-consistent` does the same.


# %%
def source_of(row: iff.Augmentation) -> str:
    """The row's document, as it stands before a question."""
    return prompt_context(model, [d for d in task.documents if d.id == row.source_id])


kept, num_checked = self_consistent(model, made.rows, source_of, deny)
print(f"{num_checked} of {len(made.rows)} statements have a contradiction; {len(made.rows) - len(kept)} were dropped")

# %% [markdown]
# It drops none: the relations are right, and a misspelt name is as misspelt in the contradiction. What the check
# does find is a wrong relation. So here are all reversals as they should be, and their contradictions, which
# should all go.

# %%
truths = [
    iff.Augmentation(document.id, "reversed", inference.text)
    for document in task.documents
    for inference in infer([document])
    if deny(inference.text) is not None
]
lies = [iff.Augmentation(row.source_id, row.kind, deny(row.text)) for row in truths]
for name, rows in (("true", truths), ("false", lies)):
    believed, _ = self_consistent(model, rows, source_of, deny)
    print(f"of {len(rows)} {name} statements {len(believed)} were kept")

# %% [markdown]
# What is left goes into training, as `iff.Example(row.text)` beside the documents; `compare`'s arm `augmented-ft`
# does it without being asked, and its report shows a sample of what it was trained on.
#
# Next: [a trained prefix, and its price](5_trained_prefix.py).
