# %% [markdown]
# # 1. Score questions beside transformers
#
# A model answers a multiple-choice question with the choice that it finds most likely. Here the same questions are
# scored twice: by transformers, one forward for each choice, and by `icl_ft_fast`, which computes every distinct
# prefix of tokens once. The log-likelihoods are the same; the work is not.
#
# The model is the small one that comes with the package. It knows sentences about nonsense words, such as "glon
# are less dangerous than femp."

# %%
import time
from importlib.resources import files

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

import icl_ft_fast as iff
from icl_ft_fast.tasks.reversals import simple_reversals

task = simple_reversals(seed=0, num_facts=20, num_articles=1)
print(len(task.documents), "documents, the first one:", task.documents[0].text)
print(len(task.questions), "questions, the first one:", task.questions[0].prompt, task.questions[0].choices)

# %% [markdown]
# ## By transformers
#
# All documents stand before each question. Each choice is one request: context, prompt and choice go through the
# network together, and the log-probabilities of the choice's tokens are added up.

# %%
folder = str(files("icl_ft_fast.shipped") / "model")
tokenizer = AutoTokenizer.from_pretrained(folder)
network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
context = "Documents:\n" + "\n".join(f"- {d.text}" for d in task.documents) + "\n\nGiven these documents: "


@torch.no_grad()
def log_likelihood(before: str, choice: str) -> float:
    """Sum of the log-probabilities of the choice's tokens."""
    start = tokenizer(before, return_tensors="pt").input_ids
    whole = tokenizer(before + choice, return_tensors="pt").input_ids
    logp = network(whole).logits[0, :-1].log_softmax(-1)
    tokens = whole[0, 1:]
    return logp[torch.arange(len(tokens)), tokens][start.shape[1] - 1 :].sum().item()


began = time.perf_counter()
plain = [[log_likelihood(context + q.prompt, choice) for choice in q.choices] for q in task.questions]
plain_s = time.perf_counter() - began
print(f"{sum(map(len, plain))} forwards, {plain_s:.1f} s")

# %% [markdown]
# ## By icl_ft_fast
#
# `load` takes the name of the shipped model, a folder with a checkpoint, a GGUF file or a hub id. The ledger
# counts the work.

# %%
model, ledger = iff.load("shipped", dtype="float32"), iff.Ledger()
began = time.perf_counter()
scores = iff.score(model, task.questions, context=context, ledger=ledger)
ours_s = time.perf_counter() - began
print(f"{ours_s:.2f} s, {plain_s / ours_s:.0f} times as fast")
print(f"{ledger.request_tokens:,} tokens requested, {ledger.forwarded_tokens:,} forwarded")

# %% [markdown]
# ## The same numbers
#
# Both compute in float32 and add in another order, so the sums differ in the last digits, and by no more than
# that.

# %%
far = max(abs(a - b) for mine, score in zip(plain, scores, strict=True) for a, b in zip(mine, score.logp, strict=True))
print(f"largest difference of a choice's log-likelihood: {far:.1e} nats")
assert far < 1e-4
print(sum(bool(score.is_correct) for score in scores), "of", len(scores), "questions right")

# %% [markdown]
# ## Where the time went
#
# transformers reads the documents again for each choice. Here they are read once, whatever the number of
# questions.

# %% alt="Tokens forwarded by number of questions: a steep line for transformers, a nearly flat one for icl_ft_fast"
request = ledger.request_tokens / len(task.questions)
shared = len(tokenizer(context).input_ids)
own = (ledger.forwarded_tokens - shared) / len(task.questions)
figure = Figure(figsize=(6, 3), layout="constrained")
axes = figure.add_subplot()
axes.plot([0, 1000], [0, 1000 * request / 1e6], label="transformers")
axes.plot([0, 1000], [shared / 1e6, (shared + 1000 * own) / 1e6], label="icl_ft_fast")
axes.set(xlabel="questions about the same documents", ylabel="million tokens forwarded")
axes.legend()
figure

# %% [markdown]
# Next: [your own documents, to a decision](2_documents_to_decision.py).
