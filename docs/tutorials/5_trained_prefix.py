# %% [markdown]
# # 5. A trained prefix, and its price
#
# Between reading all documents at every call and changing the weights there is a third way: a short prefix of keys
# and values, trained so that the model answers behind it as it would behind the documents
# ([Cartridges](https://arxiv.org/abs/2506.06266)). The weights stay as they are. One server can hold many
# prefixes.

# %%
import time
from pathlib import Path

import icl_ft_fast as iff
from icl_ft_fast.engine.prompting import prompt_context
from icl_ft_fast.tasks.reversals import simple_reversals

model = iff.load("shipped")
task = simple_reversals(seed=0, num_facts=12, num_articles=1)
documents = prompt_context(model, task.documents)
tokens = model.tokenizer(documents.rstrip()).input_ids
print(len(tokens), "tokens of documents")

# %% [markdown]
# ## Train it
#
# The model writes conversations about the documents. Then 32 slots are trained so that behind them it predicts
# those conversations as it does behind the documents.

# %%
ledger = iff.Ledger()
settings = iff.PrefixSettings(conversations=256, steps=80, batch_size=16)
prefix = iff.train_prefix(model, task, 32, settings, ledger=ledger)
print({name: f"{seconds:.1f} s" for name, seconds in ledger.seconds.items()})
print(f"loss: {prefix.losses[0]:.2f} at first, {prefix.losses[-1]:.2f} at the end, nats a token")

# %% [markdown]
# ## Ask behind it
#
# A saved context and a trained prefix are asked about in the same way: a store holds both, and `context` says
# which stands before the question.

# %%
store = iff.ContextStore(Path("out/tutorials/contexts"), model, max_bytes=10**9)
store.add(prefix.context)


def ask(context: str, store: iff.ContextStore | None = None) -> tuple[dict[str, int], float]:
    """Right answers by split, and seconds a question, the context not counted."""
    ledger = iff.Ledger()
    scores = iff.score(model, task.questions, context=context, store=store, ledger=ledger)
    right = dict.fromkeys(task.splits, 0)
    for question, score in zip(task.questions, scores, strict=True):
        right[question.split] += bool(score.is_correct)
    return right, ledger.seconds["query"] / len(scores)


ways = {"no documents": ask(""), "all documents": ask(documents), "32 trained slots": ask(f"{prefix.key} ", store)}
for name, (right, seconds) in ways.items():
    print(f"{name:18} {right}, of 12 each; {seconds * 1000:.2f} ms a question")

# %% [markdown]
# ## What it costs
#
# The prefix costs its training once. Then each question stands behind 32 tokens, not behind all of the documents:
# that much less memory for keys and values, and no reading of the documents wherever they are not in the cache
# yet.

# %%
began = time.perf_counter()
read = iff.prefill(model, tokens)
reading_s = time.perf_counter() - began
training_s = sum(ledger.seconds.values())
print(f"memory: {read.nbytes / 1e6:.2f} MB for the documents, {prefix.context.nbytes / 1e6:.2f} MB for the prefix")
print(f"once: {training_s:.1f} s to train the prefix; each time: {reading_s:.2f} s to read the documents")
print(f"so the training is paid back after {training_s / reading_s:,.0f} readings of the documents that it saves")

# %% [markdown]
# That is many readings of 12 short documents; of long ones it is fewer. So short a training suffices for so few
# facts. [Ways of answering](../ways.md) has the measurements with more documents, and `compare --arms
# icl,prefix,compacted` puts the prefix beside its rivals on documents of your own.
#
# Next: [a harness and the server](6_harness_and_server.py).
