# %% [markdown]
# # 6. A harness and the server
#
# The scorer also stands behind the tools that you may use already: evaluation harnesses, and clients of OpenAI's
# API. This page runs a task of one's own in lm-evaluation-harness and asks a server. It needs `pip install
# "icl_ft_fast[lm-eval,serve]"`.

# %%
import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

from icl_ft_fast.integrations.lm_eval import IclFtFastLM
from icl_ft_fast.tasks.reversals import simple_reversals

folder = Path("out/tutorials/harness")
folder.mkdir(parents=True, exist_ok=True)
task = simple_reversals(seed=0, num_facts=20, num_articles=1)
context = "Documents:\n" + "\n".join(f"- {d.text}" for d in task.documents) + "\n\nGiven these documents: "

# %% [markdown]
# ## lm-evaluation-harness
#
# A task of the harness is a YAML file and its data. Here the documents stand before every question. On the command
# line this is `icl-ft-fast lm-eval run --model icl-ft-fast --model_args pretrained=shipped --tasks reversals
# --include_path out/tutorials/harness`.

# %%
rows = [{"prompt": q.prompt, "choices": [c.strip() for c in q.choices], "label": q.answer} for q in task.questions]
(folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
(folder / "reversals.yaml").write_text(f"""
task: reversals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder.resolve()}/test.jsonl}}, cache_dir: {folder.resolve()}/cache}}
test_split: test
output_type: multiple_choice
description: {json.dumps(context)}
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}]
""")
model = IclFtFastLM(pretrained="shipped", dtype="float32", device="cpu")
manager = TaskManager(include_path=str(folder), include_defaults=False)
done = lm_eval.simple_evaluate(model, tasks=["reversals"], task_manager=manager, bootstrap_iters=0)
counts = done["config"]["icl_ft_fast"]
print(f"accuracy {done['results']['reversals']['acc,none']:.3f} on {len(rows)} questions")
print(f"{counts['request_tokens']:,} tokens requested, {counts['forwarded_tokens']:,} forwarded")

# %% [markdown]
# The harness's own transformers model would have forwarded all of the requested tokens.
#
# ## The server
#
# `icl-ft-fast serve` answers OpenAI's endpoints, and `/v1/score_choices` for multiple choice. It is started here
# on a free port, and is ready when `/health` answers.

# %%
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{free.getsockname()[1]}"
command = [sys.executable, "-m", "icl_ft_fast.cli", "serve", "shipped", "--port", address.rpartition(":")[2]]
server = subprocess.Popen([*command, "--log-level", "warning"], stderr=subprocess.DEVNULL)
while server.poll() is None:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health") as answer:
        print(answer.read().decode())
        break
    time.sleep(0.2)


def post(path: str, **body: object) -> dict:
    """The server's answer to a request."""
    request = urllib.request.Request(address + path, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


# %% [markdown]
# The first question about the documents reads them; the next ones find them in the cache.

# %%
for question in task.questions[:3]:
    answer = post("/v1/score_choices", context=context, prompt=question.prompt, choices=question.choices)
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    said = question.choices[answer["predicted"]]
    print(f"{question.prompt}{said}  right: {answer['predicted'] == question.answer}, cached tokens: {cached}")

# %% [markdown]
# A client of OpenAI's API works too; completions share the same cache.

# %%
prompt = context + task.questions[0].prompt
written = post("/v1/completions", model="shipped", prompt=prompt, max_tokens=12, stop=["\n"], temperature=0)
print(task.questions[0].prompt + written["choices"][0]["text"])

# %%
server.terminate()
server.wait(timeout=30)
print("stopped")

# %% [markdown]
# [The server](../server.md) has its limits and its options, [harnesses](../harnesses.md) the other ones:
# lighteval, Inspect AI, and those that go through the server.
