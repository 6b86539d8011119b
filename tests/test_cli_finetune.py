"""`icl-ft-fast finetune`: TRL's names from a YAML file and the command line, and what is refused."""

import json
import shutil

import pytest

from icl_ft_fast.cli import main
from icl_ft_fast.engine.loading import load
from icl_ft_fast.finetuning.data import read_examples
from icl_ft_fast.finetuning.run import finetune
from icl_ft_fast.finetuning.settings import FinetuneSettings, LoraSettings


@pytest.fixture
def data(tmp_path):
    """A file of rows."""
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"the cat {n}", "completion": " sat on that mat"} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments):
    return main(["finetune", *map(str, arguments)])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_options_from_yaml_and_the_command_line(data, llama_directory, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model_name_or_path: {llama_directory}\ntrain_file: {data}\nmax_steps: 9\nlearning_rate: 1e-2\n"
        "per_device_train_batch_size: 2\nmax_grad_norm: 0.5\ncompletion_only_loss: true\nuse_peft: true\nlora_r: 4\n"
        "lora_target_modules: [q_proj, v_proj]\nreport_to: none\n"
    )
    out = tmp_path / "out"
    assert run("--config", config, "--output_dir", out, "--max_steps", 3, "--seed", 5, "--quiet") == 0
    settings = FinetuneSettings(
        steps=3,
        learning_rate=1e-2,
        batch_size=2,
        clip_norm=0.5,
        completion_only=True,
        lora=LoraSettings(r=4, target_modules=("q_proj", "v_proj")),
    )
    losses = finetune(load(llama_directory), read_examples(data), settings, seed=5).losses
    lines = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(losses)
    assert capsys.readouterr().out == f"3 steps, last loss {losses[-1]:.4f}. Written to {out}\n"
    load(llama_directory, adapter=out)
    again = ("--config", config, "--output_dir", out, "--max_steps", 3, "--seed", 5, "--quiet")
    assert run(*again) == 0
    assert capsys.readouterr().out == f"3 steps, last loss {losses[-1]:.4f}. Written to {out}\n"
    assert run(*again, "--resume_from_checkpoint", "false") == 2
    assert "holds a run already" in capsys.readouterr().err
    assert run(*again[:-2], 6) == 2
    assert "checkpoint-3: cannot be resumed: seed was 5, now 6" in capsys.readouterr().err


def test_validation_epochs_and_a_teacher(data, llama_directory, tmp_path):
    documents = tmp_path / "documents.jsonl"
    documents.write_text(json.dumps({"id": "d", "text": "the cat sat on that mat."}) + "\n")
    assert (
        run(
            "--model_name_or_path",
            llama_directory,
            "--train_file",
            data,
            "--output_dir",
            tmp_path / "out",
            "--quiet",
            "--validation_split",
            0.34,
            "--num_train_epochs",
            1.5,
            "--per_device_train_batch_size",
            2,
            "--eval_steps",
            2,
            "--teacher",
            "icl",
            "--teacher_documents",
            documents,
            "--bf16",
            "true",
        )
        == 0
    )
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    assert (state["global_step"], state["epoch"]) == (3, 1.5)
    assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry] == [2, 3]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max_steps", "many"), "--max_steps: expected int, got 'many'"),
        (("--bf16", "1"), "--bf16: expected boolean, got '1'"),
        (("--lora_r", "4"), "--lora_r: needs --use_peft"),
        (("--num_train_epochs", "1", "--max_steps", "3"), "--num_train_epochs: excludes --max_steps"),
        (("--teacher", "icl"), "--teacher: expected icl, together with --teacher_documents"),
        (("--batch_size", "3"), "unrecognized arguments"),
        (("--max_steps", "0"), "--max_steps: expected at least 1, got 0"),
        (("--validation_split", "nan"), "--validation_split: expected a number above 0 and below 1, got nan"),
        (("--num_train_epochs", "inf"), "--num_train_epochs: expected a number above 0 to 1,000,000,000, got inf"),
        (("--learning_rate", "1e30"), "--learning_rate: expected a number above 0 to 10, got 1e+30"),
        (("--seed", "-1"), "--seed: expected a number from 0 to 2^63 - 1, got -1"),
        (("--adam_beta1", "nan"), "--adam_beta1: expected 0 or more and below 1, got nan"),
        (("--config", "c.yaml"), "c.yaml: batch_size: no such option"),
        (("--config", "d.yaml"), "d.yaml: not valid YAML"),
        (("--config", "e.yaml"), "e.yaml: expected `option: value` lines"),
        (("--train_file", "bad.jsonl"), "bad.jsonl:1: text: expected a string, got 3"),
    ],
)
def test_what_is_refused(arguments, message, data, llama_directory, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("batch_size: 3\n")
    (tmp_path / "d.yaml").write_text("a: [\n")
    (tmp_path / "e.yaml").write_text("- a\n")
    (tmp_path / "bad.jsonl").write_text('{"text": 3}\n')
    needed = ("--model_name_or_path", llama_directory, "--train_file", data, "--output_dir", tmp_path / "out")
    try:
        code = run(*needed, *arguments)
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_required(capsys):
    assert run("--output_dir", "x") == 2
    assert capsys.readouterr().err == "icl-ft-fast finetune: --model_name_or_path: required, here or in --config\n"


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}"])
def test_a_chat_template_that_fails_ends_in_one_line(template, llama_directory, tmp_path, capsys):
    shutil.copytree(llama_directory, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    (tmp_path / "chats.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "mat"}]}) + "\n"
    )
    needed = ("--model_name_or_path", tmp_path / "model", "--train_file", tmp_path / "chats.jsonl")
    assert run(*needed, "--output_dir", tmp_path / "out", "--max_steps", 1) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"icl-ft-fast finetune: {tmp_path / 'chats.jsonl'}:1: messages: chat template: ")
