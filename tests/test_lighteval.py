"""lighteval's own command on a local task, against its transformers backend and a plain forward of every request."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import sentences

lighteval = pytest.importorskip("lighteval", reason="has an environment of its own: make harnesses")

from lighteval.models.custom.custom_model import CustomModelConfig
from lighteval.models.model_input import GenerationParameters
from lighteval.models.transformers.transformers_model import TransformersModel, TransformersModelConfig
from lighteval.tasks.requests import Doc

from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.generate import GenerateError
from icl_ft_fast.engine.likelihood import ScoreError
from icl_ft_fast.integrations import lighteval as ours
from icl_ft_fast.integrations.lighteval import IclFtFastModel

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the harness's and its libraries' own
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
LINES = [line.strip() for line in sentences(60, seed=3)]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }} {% endfor %}<assistant>"
TASK = """
from lighteval.metrics.metrics import Metrics
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc

def prompt(line, task_name=None):
    return Doc(task_name=task_name, query="Documents. " + line["question"] + "\\nAnswer:",
               choices=[" " + choice for choice in line["choices"]], gold_index=line["label"])

TASKS_TABLE = [LightevalTaskConfig(
    name="local", prompt_function=prompt, hf_repo={folder!r}, hf_subset="default", hf_avail_splits=["train", "test"],
    evaluation_splits=["test"], few_shots_split="train", few_shots_select="sequential",
    metrics=[Metrics.loglikelihood_acc], generation_size=8, stop_sequence=[],
)]
"""


def doc(number, **settings):
    query = "Documents. " + LINES[number] + "\nAnswer:"
    choices = [f" {line}" for line in LINES[20 + 2 * number : 24 + 2 * number]]
    return Doc(query=query, choices=choices, gold_index=0, task_name="local|0", id=str(number), **settings)


def custom(name, cache, **settings):
    file = ours.__file__
    return IclFtFastModel(
        CustomModelConfig(model_name=str(name), model_definition_file_path=file, cache_dir=str(cache), **settings)
    )


@pytest.fixture
def model(llama_directory, tmp_path):
    return custom(llama_directory, tmp_path)


@pytest.fixture
def theirs(llama_directory, tmp_path):
    return TransformersModel(
        TransformersModelConfig(
            model_name=str(llama_directory),
            dtype="float32",
            device="cpu",
            batch_size=4,
            model_parallel=False,
            cache_dir=str(tmp_path / "hf"),
        )
    )


@pytest.mark.parametrize("chat", [False, True])
def test_likelihoods_are_those_of_lighteval_s_transformers_backend(chat, llama_directory, theirs, model, tmp_path):
    docs = [doc(number) for number in range(8)]
    if chat:
        for each in (theirs, model):
            each.tokenizer.chat_template = TEMPLATE
        model._prompts.use_chat_template = theirs.prompt_manager.use_chat_template = True
        theirs._add_special_tokens = False  # it would put a BOS before what the template wrote
    expected, got = theirs.loglikelihood(docs), model.loglikelihood(docs)
    for mine, other in zip(got, expected, strict=True):
        assert mine.logprobs == pytest.approx(other.logprobs, rel=0, abs=1e-4)
        assert mine.argmax_logits_eq_gold == other.argmax_logits_eq_gold
        assert list(mine.input_tokens) == list(other.input_tokens)
        # theirs are padded to the longest choice, by which token normalization then divides every choice
        assert [list(ids) for ids in mine.output_tokens] == [[t for t in ids if t != -1] for ids in other.output_tokens]
    assert model.ledger.forwarded_tokens < model.ledger.request_tokens / 2


def test_a_chat_has_the_ids_of_its_template(llama_directory, tmp_path):
    shutil.copytree(llama_directory, tmp_path / "chatty")
    dated = TEMPLATE + "{{ strftime_now('%Y') }}{{ enable_thinking }}"
    (tmp_path / "chatty" / "chat_template.jinja").write_text(dated)
    model = custom(f"pretrained={tmp_path / 'chatty'},template_date=1999-01-31,enable_thinking=false", tmp_path)
    asked = doc(0)
    (response,) = model.greedy_until([doc(0, generation_size=2)])
    text = f"<user>{asked.query} <assistant>1999False"
    assert response.input_tokens == model.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_an_unconditioned_query_doubles_the_likelihoods(model, llama, plain_llama, plain):
    (response,) = model.loglikelihood([doc(0, unconditioned_query="Answer:")])
    prompts = [doc(0).query] * 4 + ["Answer:"] * 4
    for prompt, choice, logp in zip(prompts, doc(0).choices * 2, response.logprobs, strict=True):
        context = llama.tokenizer(prompt)["input_ids"]
        continuation = llama.tokenizer(choice, add_special_tokens=False)["input_ids"]
        assert logp == pytest.approx(plain(plain_llama, context, continuation)[0].sum().item(), rel=0, abs=1e-4)
    assert len(response.output_tokens) == 4


def test_rolling_likelihoods_are_sums_over_windows(llama_directory, llama, plain_llama, plain, tmp_path):
    model = custom(f"pretrained={llama_directory},max_length=16", tmp_path)
    text = " ".join(LINES)
    (response,) = model.loglikelihood_rolling([Doc(query=text, choices=[], gold_index=0, task_name="local|0", id="0")])
    ids = [0, *llama.tokenizer(text, add_special_tokens=False)["input_ids"]]
    windows = [(ids[n - 1 : n], ids[n : n + 16]) for n in range(1, len(ids), 16)]
    assert len(windows) > 2
    total = sum(plain(plain_llama, *window)[0].sum().item() for window in windows)
    assert response.logprobs == [pytest.approx(total, rel=1e-6, abs=1e-4)]


def test_texts_are_those_of_transformers(model, llama, plain_llama):
    docs = [doc(number, generation_size=n, stop_sequences=["the"]) for number, n in enumerate((4, 9, 9, 12))]
    for each, response in zip(docs, model.greedy_until(docs), strict=True):
        ids = torch.tensor([llama.tokenizer(each.query)["input_ids"]])
        written = plain_llama.generate(
            ids, max_new_tokens=each.generation_size, do_sample=False, attention_mask=torch.ones_like(ids)
        )
        whole = llama.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        assert response.text == [whole.split("the")[0]]


def test_other_weights_in_the_same_place_get_no_stored_answers(llama_directory, tiny_network, tmp_path):
    folder = tmp_path / "model"
    for seed_scale in (0.1, 0.2):
        network = tiny_network("llama", num_hidden_layers=2, std=seed_scale)
        network.save_pretrained(folder)
        custom(llama_directory, tmp_path).tokenizer.save_pretrained(folder)
        model = custom(folder, tmp_path)
        model.loglikelihood([doc(0)])
        assert model.ledger.forwarded_tokens > 0
    again = custom(folder, tmp_path)
    again.loglikelihood([doc(0)])
    assert again.ledger.forwarded_tokens == 0  # the same weights do


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pretrained={folder},dtyp=x", "^MODEL: unknown options: dtyp$"),
        ("dtype=float32", "no pretrained=... among its options"),
        ("pretrained={folder},overflow=cut", "^overflow: expected one of"),
    ],
)
def test_options_that_cannot_be_followed_are_named(name, message, llama_directory, tmp_path):
    with pytest.raises(ValueError, match=message):
        custom(name.format(folder=llama_directory), tmp_path)


def test_requests_that_cannot_be_followed_are_named(llama_directory, model, tmp_path):
    with pytest.raises(ScoreError, match=r"^local\|0, document 0: choices\[0\]: the continuation has no token"):
        model.loglikelihood([Doc(query="the", choices=[""], gold_index=0, task_name="local|0", id="0")])
    with pytest.raises(GenerateError, match=r"^local\|0, document 0: expected a generation_size, one sample"):
        model.greedy_until([doc(0, generation_size=4, num_samples=2)])
    hot = custom(llama_directory, tmp_path, generation_parameters=GenerationParameters(temperature=1.0))
    with pytest.raises(GenerateError, match=r"^generation_parameters: "):
        hot.greedy_until([doc(0, generation_size=4)])


def test_the_command_runs_a_local_task(llama_directory, tmp_path, llama, plain_llama, plain):
    rows = [{"question": LINES[n], "choices": LINES[20 + n : 24 + n], "label": n % 4} for n in range(14)]
    for split, part in (("train", rows[:4]), ("test", rows[4:])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (tmp_path / "local_task.py").write_text(TASK.replace("{folder!r}", repr(str(tmp_path))))
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [
        str(Path(sys.executable).parent / "lighteval"),
        "custom",
        f"pretrained={llama_directory},dtype=float32",
        ours.__file__,
        "local|2",
        "--custom-tasks",
        "local_task.py",
        "--output-dir",
        "out",
        "--save-details",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    shots = "".join(
        f"Documents. {row['question']}\nAnswer: {row['choices'][row['label']].strip()}\n\n" for row in rows[:2]
    )
    num_right = 0
    for row in rows[4:]:
        scores = []
        for text in row["choices"]:
            context = encoding.encode(llama.tokenizer, [f"{shots}Documents. {row['question']}\nAnswer:"])[0]
            continuation = llama.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
            scores.append(plain(plain_llama, context, continuation)[0].sum().item())
        num_right += scores.index(max(scores)) == row["label"]
    accuracy = json.loads(results.read_text())["results"]["all"]["acc"]
    assert math.isclose(accuracy, num_right / 10), (accuracy, num_right)
