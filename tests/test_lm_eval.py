"""The model of lm-evaluation-harness against the harness's own `hf` on the same weights, and where hf is wrong."""

import functools
import json
import logging
import multiprocessing
import os
import random
import shutil
import socket
import tomllib
from datetime import datetime
from pathlib import Path

import pytest
import torch
from conftest import sentences
from hypothesis import given
from hypothesis import strategies as st

lm_eval = pytest.importorskip("lm_eval", reason="comes with the extra lm-eval, which `make test` installs")

from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, CachingLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from icl_ft_fast import cli
from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.contexts import read_header
from icl_ft_fast.engine.generate import GenerateError, Sampling, generate
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.likelihood import ScoreError, loglikelihood
from icl_ft_fast.engine.loading import load
from icl_ft_fast.integrations.lm_eval import IclFtFastLM
from icl_ft_fast.integrations.processes import Processes
from icl_ft_fast.integrations.shared_prefixes import group_by_prefix

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # read by peft
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the harness's and its libraries' own
]

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' and refuse %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
STOPS = {"until": ["the", "\n"], "max_gen_toks": 12}


def hf(folder, **options):
    return HFLM(pretrained=str(folder), device="cpu", **{"dtype": "float32", "batch_size": 4} | options)


def ours(model, **options):
    return IclFtFastLM(model, **options)


@pytest.fixture(scope="module")
def theirs(llama_directory):
    return hf(llama_directory, logits_cache=False)


def instances(kind, arguments):
    return [Instance(kind, {}, args, 0, ("task", number, 1)) for number, args in enumerate(arguments)]


def texts(number=24):
    """Contexts, some shared and some empty, and continuations with and without the space before."""
    rng = random.Random(0)
    contexts = ["", "the cat ", *(text.strip() for text in sentences(5, seed=1))]
    return [(rng.choice(contexts), rng.choice([" ", " ", ""]) + text) for text in sentences(number, seed=2)]


def assert_same(got, expected):
    assert len(got) == len(expected)
    for (logp, is_greedy), (other, flag) in zip(got, expected, strict=True):
        assert logp == pytest.approx(other, rel=0, abs=1e-4)
        assert is_greedy == flag


# The harness's whole path on a task of its own


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    """A five-shot multiple-choice task in local files, and one that generates."""
    folder = tmp_path_factory.mktemp("task")
    rng, lines = random.Random(0), sentences(40, seed=3)
    rows = [{"question": line, "choices": rng.sample(lines, 4), "label": rng.randrange(4)} for line in lines[:18]]
    for split, part in (("train", rows[:6]), ("test", rows[6:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    data = f"""
dataset_path: json
dataset_kwargs:
  cache_dir: {folder}/cache
  data_files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}
fewshot_split: train
test_split: test
fewshot_config: {{sampler: first_n}}
num_fewshot: 2
doc_to_text: "who {{{{question}}}}"
"""
    measured = "".join(f"\n  - {{metric: {name}}}" for name in ("acc", "acc_norm", "acc_mutual_info"))
    choices = 'doc_to_choice: "{{choices}}"\ndoc_to_target: label\noutput_type: multiple_choice'
    (folder / "choose.yaml").write_text(f"task: choose\n{choices}{data}metric_list:{measured}\n")
    written = 'doc_to_target: "{{choices[label]}}"\noutput_type: generate_until'
    kwargs = "generation_kwargs: {until: [the], max_gen_toks: 6, do_sample: false}"
    (folder / "write.yaml").write_text(
        f"task: write\n{written}{data}{kwargs}\nmetric_list:\n  - {{metric: exact_match}}\n"
    )
    return folder


def evaluate(model, folder, **options):
    """Scores and texts of all requests, and the results, of both tasks."""
    done = lm_eval.simple_evaluate(
        model=model,
        tasks=["choose", "write"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )
    if done is None:  # not the first of several processes
        return None
    answers = {
        name: [answer for sample in sorted(samples, key=lambda s: s["doc_id"]) for answer in sample["filtered_resps"]]
        for name, samples in done["samples"].items()
    }
    return answers, done


@pytest.mark.parametrize("chat", [False, True])
def test_a_run_gives_hf_s_answers_and_verdicts(chat, llama_directory, task_folder, theirs):
    model = ours(str(llama_directory), dtype="float32")
    options = {}
    if chat:
        theirs.tokenizer.chat_template = model.tokenizer.chat_template = TEMPLATE
        options = {"apply_chat_template": True, "fewshot_as_multiturn": True, "system_instruction": "the mat"}
    try:
        expected, reference = evaluate(theirs, task_folder, **options)
    finally:
        theirs.tokenizer.chat_template = None
    answers, done = evaluate(model, task_folder, **options)
    assert_same(answers["choose"], expected["choose"])
    assert answers["write"] == expected["write"]
    assert len(answers["choose"]) > 12 * 4  # mutual information asks for the choices alone too
    for name in ("choose", "write"):
        drop = {metric: value for metric, value in reference["results"][name].items() if "stderr" not in metric}
        assert {metric: done["results"][name][metric] for metric in drop} == drop
    counts = done["config"]["icl_ft_fast"]
    assert (counts["over_length_requests"], counts["max_length"]) == (0, 256)
    assert counts["forwarded_tokens"] == model.ledger.forwarded_tokens < counts["request_tokens"] / 3
    assert {type(count) for count in counts.values()} == {int, str}  # the policy's name is the text
    assert done["config"]["model_dtype"] == "torch.float32"


def share(port, directory, folder, rank):
    """What one process of two gives; the first is told everything."""
    place = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ.update(place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    torch.set_num_threads(1)
    done = evaluate(ours(str(directory), device="cpu"), folder, limit=11)
    return done and (done[0], done[1]["samples"], done[1]["config"]["icl_ft_fast"])


def test_two_processes_give_the_answers_of_hf_s_one(llama_directory, task_folder, theirs):
    expected, _ = evaluate(theirs, task_folder, limit=11)
    _, alone = evaluate(ours(llama_directory), task_folder, limit=11)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imports once for both
    with context.Pool(2) as pool:
        shares = pool.imap_unordered(functools.partial(share, port, llama_directory, task_folder), range(2))
        (told,) = filter(None, [shares.next(timeout=240), shares.next(timeout=240)])
    answers, samples, counts = told
    for name in ("choose", "write"):
        assert sorted(sample["doc_id"] for sample in samples[name]) == list(range(11))
    assert_same(answers["choose"], expected["choose"])
    assert answers["write"] == expected["write"]
    before = alone["config"]["icl_ft_fast"]
    assert counts.keys() == before.keys()
    assert counts["request_tokens"] >= before["request_tokens"]  # of both, padding included


def test_an_invariant_model_scores_alike_beside_anything(llama_directory):
    arguments = f"pretrained={llama_directory},dtype=float32,batch_invariant=True,chunk_tokens=9"
    model, pairs = IclFtFastLM.create_from_arg_string(arguments, {"device": "cpu"}), texts()
    assert model.model.batch_invariant
    together = model.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    assert [model.loglikelihood(instances("loglikelihood", [pair]), disable_tqdm=True)[0] for pair in pairs] == together


def test_the_command_line_passes_everything_on(llama_directory, task_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda *_: None)  # it would stay after the test
    arguments = [
        "lm-eval",
        "run",
        "--model",
        "icl-ft-fast",
        "--tasks",
        "choose",
        "--include_path",
        str(task_folder),
        "--device",
        "cpu",
        "--batch_size",
        "auto",
        "--output_path",
        str(tmp_path),
        "--log_samples",
        "--limit",
        "3",
        "--model_args",
        f"pretrained={llama_directory},dtype=float32,max_length=200",
    ]
    assert cli.main(arguments) == 0
    assert "acc_norm" in capsys.readouterr().out
    (results,) = tmp_path.rglob("results_*.json")
    assert json.loads(results.read_text())["config"]["icl_ft_fast"]["max_length"] == 200
    (samples,) = tmp_path.rglob("samples_*.jsonl")
    assert len(samples.read_text().splitlines()) == 3


def test_help_is_ours_and_does_not_load_the_harness(monkeypatch, capsys):
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: pytest.fail("the harness was called"))
    with pytest.raises(SystemExit) as end:
        cli.main(["lm-eval", "--help"])
    assert not end.value.code
    assert "lm-eval run --help" in capsys.readouterr().out


@pytest.mark.parametrize("rest", [["run", "--help"], ["--model", "hf", "--tasks"]])
def test_options_after_the_command_are_the_harness_s(rest, monkeypatch):
    seen = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: seen.extend(__import__("sys").argv))
    assert cli.main(["lm-eval", *rest]) == 0
    assert seen == ["lm-eval", *rest]


def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: IclFtFastLM(str(tmp_path / "none")))
    assert cli.main(["lm-eval", "run"]) == 2
    begun, line = capsys.readouterr().err.splitlines()
    assert begun == "icl-ft-fast lm-eval: starting the harness"  # which says nothing for seconds
    assert line.startswith(f"icl-ft-fast lm-eval: {tmp_path}/none: no such directory or GGUF file")


def test_the_entry_point_is_the_registered_class():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lm_eval.models"]["icl-ft-fast"].partition(":")
    assert getattr(__import__(module, fromlist=[name]), name) is IclFtFastLM
    assert lm_eval.api.registry.get_model("icl-ft-fast") is IclFtFastLM


@pytest.mark.parametrize(
    ("size", "has_cuda", "asked", "expected"),
    [
        (1, True, "cuda:1", "cuda:1"),
        (2, True, "cuda:0", "cuda:1"),
        (2, True, "cpu", "cpu"),
        (1, False, "cuda:0", "cpu"),
    ],
)
def test_the_device_of_a_process(size, has_cuda, asked, expected, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    processes = Processes(alone=True)
    processes.size, processes.local_rank = size, 1
    assert processes.device(asked) == expected
    assert ("no CUDA device here" in caplog.text) == (expected == "cpu" != asked)


# Request by request


@pytest.mark.parametrize("options", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"prefix_token_id": 7}])
def test_likelihoods_are_hf_s(options, llama, llama_directory):
    requests = instances("loglikelihood", [pair for pair in texts() if pair != ("", "")])
    expected = hf(llama_directory, logits_cache=False, **options).loglikelihood(requests, disable_tqdm=True)
    assert_same(ours(llama, **options).loglikelihood(requests, disable_tqdm=True), expected)


@pytest.mark.parametrize("max_length", [None, 20, 7])
def test_rolling_likelihoods_are_hf_s(max_length, llama, llama_directory):
    documents = ["", "the", *(" ".join(sentences(n, seed=n)) for n in (3, 20, 60))]
    requests = instances("loglikelihood_rolling", [(text,) for text in documents])
    expected = hf(llama_directory, max_length=max_length).loglikelihood_rolling(requests, disable_tqdm=True)
    got = ours(llama, max_length=max_length).loglikelihood_rolling(requests, disable_tqdm=True)
    assert got == pytest.approx(expected, rel=1e-6, abs=1e-4)


@pytest.mark.parametrize(
    "settings",
    [STOPS, {"until": "cat", "max_new_tokens": 9}, {"max_gen_toks": 5, "temperature": 0.0, "top_p": 0.5}],
)
def test_texts_are_hf_s(settings, llama, theirs):
    prompts = [text for text in sentences(9, seed=5) if text.strip()]
    requests = instances("generate_until", [(prompt, settings) for prompt in prompts])
    got = ours(llama).generate_until(requests, disable_tqdm=True)
    for request, text in zip(requests, got, strict=True):  # one by one: hf pads to the left in a batch
        assert [text] == theirs.generate_until([request], disable_tqdm=True)
    assert len(set(got)) > 4


def test_requests_with_other_settings_are_not_mixed(llama):
    arguments = [("the cat", {"max_gen_toks": n, "until": u}) for n in (2, 6) for u in (["t"], [])]
    together = ours(llama).generate_until(instances("generate_until", arguments))
    assert together == [ours(llama).generate_until(instances("generate_until", [each]))[0] for each in arguments]
    assert len(set(together)) > 1


@pytest.mark.parametrize("end", [277, "277", " sat"])
def test_reasoning_is_cut_off(end, llama, monkeypatch):
    ids = llama.tokenizer.encode("who knows sat the cat sat on", add_special_tokens=False)
    sat = llama.tokenizer.encode(" sat", add_special_tokens=False)
    assert len(sat) == 1
    lm = ours(llama, think_end_token=str(sat[0]) if end == "277" else sat[0] if end == 277 else end)
    assert lm._text(ids, ()) == "on"
    assert lm._text(ids, ("n",)) == "o"


def test_a_system_message_that_the_template_refuses_is_left_out_as_hf_does_it(llama, theirs, caplog):
    messages = [{"role": role, "content": "the cat"} for role in ("system", "user", "assistant")]
    lm = ours(llama, chat_template_args={"refuse": True}, enable_thinking=False)
    assert lm.chat_template_args == {"refuse": True, "enable_thinking": False}
    theirs.tokenizer.chat_template, before = TEMPLATE, llama.tokenizer.chat_template
    llama.tokenizer.chat_template = TEMPLATE
    theirs.chat_template_args = lm.chat_template_args
    try:
        for ready in (True, False):
            assert lm.apply_chat_template(messages, ready) == theirs.apply_chat_template(messages, ready)
        assert "which is left out" in caplog.text
        assert lm.apply_chat_template(messages[1:]).endswith("<assistant>the cat <assistant>")
    finally:
        theirs.tokenizer.chat_template, llama.tokenizer.chat_template, theirs.chat_template_args = None, before, {}


def test_an_adapter_scores_as_in_hf(llama_directory, tmp_path, tiny_network):
    import peft

    adapted = peft.get_peft_model(
        tiny_network("llama", num_hidden_layers=2), peft.LoraConfig(target_modules=["v_proj"])
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    adapted.save_pretrained(tmp_path)
    requests = instances("loglikelihood", texts(8))
    # hf cuts the embeddings to the tokenizer's size where an adapter is given; with as many tokens it cannot.
    tokenizer = load(llama_directory).tokenizer
    tokenizer.add_tokens([f"<extra{n}>" for n in range(300 - len(tokenizer))])
    reference = hf(llama_directory, peft=str(tmp_path), tokenizer=tokenizer)
    expected = reference.loglikelihood(requests, disable_tqdm=True)
    got = ours(str(llama_directory), peft=str(tmp_path)).loglikelihood(requests, disable_tqdm=True)
    assert_same(got, expected)
    base = ours(str(llama_directory)).loglikelihood(requests, disable_tqdm=True)
    assert abs(base[0][0] - got[0][0]) > 1e-3


# Where others are wrong


def test_equal_ids_split_at_different_points(llama, llama_directory, plain_llama, plain):
    ids = [5, 6, 7, 8, 9, 10]
    rows = [(("a", str(cut)), ids[:cut], ids[cut:]) for cut in range(1, 6)]
    rows += [(("b", str(cut)), ids[:cut], ids[cut:-1] + [11]) for cut in range(1, 6)]
    expected = [plain(plain_llama, context, continuation) for _, context, continuation in rows]
    lm = ours(llama)
    got = lm._loglikelihood_tokens(rows)
    assert_same(got, [(logp.sum().item(), is_greedy) for logp, is_greedy in expected])
    assert lm.ledger.forwarded_tokens == 5
    cached = hf(llama_directory, logits_cache=True)._loglikelihood_tokens(rows, disable_tqdm=True)
    assert max(abs(a - b) for (a, _), (b, _) in zip(cached, got, strict=True)) > 1e-2, "hf is mended: say so in the log"


def test_a_token_that_spans_the_join(llama, tokenizer, plain_llama, plain, theirs):
    pairs = [("the cat who kn", "ows why the cat sat on"), ("the cat", " sat")]
    requests = instances("loglikelihood", pairs)
    assert_same(ours(llama).loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True))
    got = ours(llama, boundary="whole_tokens").loglikelihood(requests)
    whole = tokenizer.encode("the cat who knows why the cat sat on")
    logp, is_greedy = plain(plain_llama, whole[:4], whole[4:])  # BOS, the, cat, who
    assert_same(got[:1], [(logp.sum().item(), is_greedy)])
    assert_same(got[1:], ours(llama).loglikelihood(requests[1:]))


@pytest.mark.parametrize("pair", [("who kn", "ows"), ("the cat", ""), ("", "")])
def test_a_continuation_without_tokens_is_named(pair, llama):
    requests = instances("loglikelihood", [("the", " cat"), pair])
    with pytest.raises(ScoreError, match=r"^task, document 1, request 0: the continuation has no token of its own: "):
        ours(llama).loglikelihood(requests)
    if pair[0] == "who kn":
        (got,) = ours(llama, boundary="whole_tokens").loglikelihood(requests[1:])
        assert_same([got], loglikelihood(llama, [("who", " knows")]))


LONG = [("the cat " * 40, "sat on that"), ("the", " cat"), ("who " * 30, "knows")]


def test_contexts_beyond_max_length_are_cut_as_hf_cuts_them_and_counted(llama, llama_directory, caplog):
    requests = instances("loglikelihood", LONG)
    lm = ours(llama, max_length=20)
    got = lm.loglikelihood(requests)
    assert_same(got, hf(llama_directory, max_length=20).loglikelihood(requests, disable_tqdm=True))
    lengths = [len(context) + len(ids) for context, ids in encoding.encode_pairs(llama.tokenizer, LONG)]
    over = [length - 21 for length in lengths if length > 21]
    assert len(over) == 2
    assert f"2 requests exceed max_length 20 by {sum(over)} tokens in all: overflow=truncate_left" in caplog.text
    counts = lm.get_model_info()["icl_ft_fast"]
    assert (counts["over_length_requests"], counts["over_length_tokens"]) == (2, sum(over))
    caplog.clear()
    lm.loglikelihood(requests[1:2])
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_contexts_beyond_max_length_can_be_skipped(llama, caplog):
    requests = instances("loglikelihood", LONG)
    got = ours(llama, max_length=20, overflow="skip").loglikelihood(requests)
    assert got[0] == got[2] == (-float("inf"), False)
    assert_same(got[1:2], ours(llama).loglikelihood(requests[1:2]))
    assert "2 requests exceed max_length 20" in caplog.text
    assert "overflow=skip" in caplog.text


def test_contexts_beyond_max_length_can_be_an_error(llama):
    lm = ours(llama, max_length=20, overflow="error")
    with pytest.raises(
        ScoreError, match=r"^task, document 0, request 0: 81 tokens of context are 63 more than go into"
    ):
        lm.loglikelihood(instances("loglikelihood", LONG))
    assert lm.ledger == Ledger()


@pytest.mark.parametrize("overflow", ["truncate_left", "error"])
def test_a_continuation_beyond_max_length_is_an_error(overflow, llama):
    with pytest.raises(
        ScoreError, match=r"^task, document 0, request 0: \d tokens of context are .* max_length 5 with"
    ):
        ours(llama, max_length=5, overflow=overflow).loglikelihood(
            instances("loglikelihood", [("the", " cat sat on that mat who knows")])
        )


def test_prompts_leave_room_for_what_is_written(llama, llama_directory, caplog):
    requests = instances("generate_until", [("who knows why " * 10, {"max_gen_toks": 8})])
    expected = hf(llama_directory, max_length=20).generate_until(requests, disable_tqdm=True)
    assert ours(llama, max_length=20).generate_until(requests) == expected
    assert "1 requests exceed max_length 20" in caplog.text
    assert ours(llama, max_length=20, overflow="skip").generate_until(requests) == [""]
    with pytest.raises(ScoreError, match="give overflow=truncate_left or skip"):
        ours(llama, max_length=20, overflow="error").generate_until(requests)


# The harness's cache


class InterruptError(Exception):
    pass


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_results_are_filed_as_they_come_and_not_computed_again(kind, llama, tmp_path, monkeypatch):
    monkeypatch.setattr("icl_ft_fast.engine.generate.RUNNING", 2)
    arguments = {
        "loglikelihood": texts(12),
        "loglikelihood_rolling": [(text,) for text in sentences(12)],
        "generate_until": [(text, {"until": ["zz"], "max_gen_toks": 3}) for text in sentences(12)],
    }[kind]
    requests = instances(kind, arguments)
    whole, filed = ours(llama, chunk_tokens=8), []

    def add_partial(self, attribute, request, result):
        filed.append(request)
        if len(filed) == 5:
            raise InterruptError
        original(self, attribute, request, result)

    original = CacheHook.add_partial
    expected = getattr(whole, kind)(requests)
    monkeypatch.setattr(CacheHook, "add_partial", add_partial)
    cached = CachingLM(ours(llama, chunk_tokens=8), str(tmp_path / "results.db"))
    with pytest.raises(InterruptError):
        getattr(cached, kind)(requests)
    cached.dbdict.close()
    monkeypatch.setattr(CacheHook, "add_partial", original)
    again = ours(llama, chunk_tokens=8)
    cached = CachingLM(again, str(tmp_path / "results.db"))
    got = getattr(cached, kind)(requests)
    cached.dbdict.close()
    assert again.ledger.request_tokens < whole.ledger.request_tokens
    if kind == "loglikelihood":
        assert_same(got, expected)
    elif kind == "generate_until":
        assert got == expected
    else:
        assert got == pytest.approx(expected, abs=1e-4)


def test_a_file_of_another_model_or_of_other_settings_is_refused(llama, llama_directory, tmp_path):
    path = str(tmp_path / "results.db")
    requests = instances("loglikelihood", texts(3))
    first = CachingLM(ours(llama), path)
    first.loglikelihood(requests)
    first.dbdict.close()
    same = ours(str(llama_directory), dtype="float32")
    again = CachingLM(same, path)
    again.loglikelihood(requests)
    again.dbdict.close()
    assert same.ledger == Ledger()
    tuned = load(llama_directory)
    with torch.no_grad():
        tuned.network.lm_head.weight[0, 0] += 1
    for other in (ours(tuned), ours(llama, max_length=100), ours(llama, boundary="whole_tokens")):
        with pytest.raises(
            ValueError, match=r"^use_cache: .*results\.db: holds results of another model or of other set"
        ):
            CachingLM(other, path)


def test_a_template_s_date_is_that_of_the_file_of_results_and_told(llama_directory, tmp_path):
    shutil.copytree(llama_directory, tmp_path / "dated")
    (tmp_path / "dated" / "chat_template.jinja").write_text("{{ strftime_now('%Y-%m-%d') }}{{ messages[0].content }}")

    def shown(file=None, **options):
        lm = ours(tmp_path / "dated", **options)
        cached = CachingLM(lm, str(tmp_path / file)) if file else None
        if cached:
            cached.dbdict.close()
        told = lm.get_model_info()["icl_ft_fast"]["template_date"]
        assert lm.apply_chat_template([{"role": "user", "content": " cat"}]) == f"{told} cat"
        return told

    assert shown("begun", template_date="2024-07-26") == shown("begun") == "2024-07-26"
    assert shown() == shown("other") == datetime.now().date().isoformat()
    assert "template_date" not in ours(llama_directory).get_model_info()["icl_ft_fast"]


def test_a_file_that_another_kind_of_model_filled_is_refused(llama, theirs, tmp_path):
    path = str(tmp_path / "results.db")
    filled = CachingLM(theirs, path)
    try:
        filled.loglikelihood(instances("loglikelihood", texts(2)))
    finally:
        filled.dbdict.close()
        theirs.set_cache_hook(CacheHook(None))
    with pytest.raises(ValueError, match=r"^use_cache: "):
        CachingLM(ours(llama), path)


# Saved contexts


def test_a_second_run_maps_the_worked_examples_that_the_first_one_saved(llama, llama_directory, tmp_path):
    examples = [" ".join(sentences(12, seed=seed)) + "\n" for seed in (5, 6)]
    asked = [(examples[n % 2] + context, continuation) for n, (context, continuation) in enumerate(texts(16))]
    alone = sentences(1, seed=7)[0] * 12
    asked += [(alone, " the cat"), (alone, " why"), ("the cat", " sat")]
    plain = ours(llama)
    expected = plain.loglikelihood(instances("loglikelihood", asked))
    results, runs = [], []
    for folder in ("store", "store", "other"):
        if folder == "store":
            lm = ours(llama, store=str(tmp_path / "store"), store_limit=0.5)
        else:
            lm = IclFtFastLM.create_from_arg_string(f"pretrained={llama_directory},store={tmp_path / 'store'}")
        results.append(lm.loglikelihood(instances("loglikelihood", asked)))
        runs.append(lm.ledger.forwarded_tokens)
    assert_same(results[0], expected)
    assert results[0] == results[1] == results[2]
    saved = [read_header(path).num_tokens for path in (tmp_path / "store").glob("*.safetensors")]
    assert len(saved) == 2
    assert min(saved) > 64
    assert runs[0] - runs[1] == sum(saved)
    assert runs[1] == runs[2]
    assert runs[0] <= plain.ledger.forwarded_tokens + 2


@given(st.lists(st.tuples(st.lists(st.integers(0, 1), max_size=4), st.integers(0, 70)), max_size=8))
def test_beginnings_hold_each_request_once_and_begin_it(rows):
    pairs = [([*ids, *[7] * number, *ids], [1]) for ids, number in rows]
    groups = group_by_prefix(pairs)
    assert sorted(member for members, _ in groups for member in members) == list(range(len(pairs)))
    for members, token in groups:
        assert not token or len(token) >= 64
        assert not token or len({tuple(pairs[member][0]) for member in members}) > 1
        assert all(pairs[member][0][: len(token)] == token for member in members)


# Arguments


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"parallelize": True}, TypeError, "unexpected keyword argument 'parallelize'"),
        ({"overflow": "cut"}, ValueError, r"^overflow: expected one of truncate_left, error, skip, got 'cut'$"),
        ({"boundary": "x"}, ValueError, r"^boundary: expected one of harness, whole_tokens, got 'x'$"),
        ({"max_length": 0}, ValueError, r"^max_length: expected 1 to 256, got 0$"),
        ({"max_length": 257}, ValueError, r"^max_length: expected 1 to 256, got 257$"),
        ({"prefix_token_id": 300}, ValueError, r"^prefix_token_id: expected 0 to 299, got 300$"),
        ({"enable_thinking": True}, ValueError, r"^enable_thinking: needs think_end_token"),
        ({"dtype": "float32", "peft": "x"}, ValueError, r"^dtype, adapter: has no effect on a model that is loaded"),
    ],
)
def test_arguments_that_cannot_be_followed_are_named(options, error, message, llama):
    with pytest.raises(error, match=message):
        IclFtFastLM(llama, **options)


def test_arguments_as_the_harness_passes_them(llama_directory):
    config = {"batch_size": "auto:4", "max_batch_size": 8, "device": "cpu"}
    for lm in (
        IclFtFastLM.create_from_arg_string(f"pretrained={llama_directory},revision=main,max_length=99", config),
        IclFtFastLM.create_from_arg_obj({"pretrained": str(llama_directory), "max_length": 99}, config),
    ):
        assert (lm.batch_size, lm.max_batch_size, lm.device, lm.max_length) == ("auto:4", 8, torch.device("cpu"), 99)


def test_likelihoods_of_a_model_that_thinks_are_refused(llama):
    lm = ours(llama, enable_thinking=True, think_end_token="</think>")
    with pytest.raises(ValueError, match=r"^enable_thinking: task, document 0, request 0: "):
        lm.loglikelihood(instances("loglikelihood", texts(1)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": True, "temperature": 0.0}, "do_sample=true needs a temperature above 0"),
        ({"temperature": 0.7, "typical_p": 0.5}, "typical_p: not served$"),
        ({"num_beams": 4, "length_penalty": 2}, "length_penalty, num_beams: not served$"),
        ({"temperature": 0.7, "top_p": 1.5}, "top_p: expected above 0, at most 1, got 1.5$"),
    ],
)
def test_what_decoding_cannot_follow_is_refused(settings, message, llama):
    with pytest.raises(GenerateError, match=f"^task, document 0, request 0: generation_kwargs: {message}"):
        ours(llama).generate_until(instances("generate_until", [("the", settings)]))


def test_sampled_texts_are_the_engine_s_and_anew_in_each_repeat(llama):
    settings = {
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "seed": 7,
        "no_repeat_ngram_size": 3,
        "max_gen_toks": 9,
        "until": ["cat"],
    }
    requests = instances("generate_until", [("who sat", settings), ("the mat", settings)])
    got = ours(llama).generate_until([request for request in requests for _ in range(3)])
    common = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}
    samplings = [Sampling(9, no_repeat_ngram=3, stop=("cat",), seed=7 + repeat, **common) for repeat in range(3)] * 2
    texts = [written.text for written in generate(llama, ["who sat"] * 3 + ["the mat"] * 3, samplings)]
    assert got == [text.replace("<s>", "") for text in texts]
    assert len(set(got[:3])) == 3
    greedy = {"do_sample": False, "temperature": 0.8, "top_k": 40, "seed": 7, "max_gen_toks": 9}
    assert ours(llama).generate_until(instances("generate_until", [("who sat", greedy)])) == [
        written.text for written in generate(llama, ["who sat"], Sampling(9))
    ]
