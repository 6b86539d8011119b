"""The study as one call: what the settings leave to the model, accuracy by step, and who writes the augmentations."""

import json
import shlex
from dataclasses import replace

import pytest
from transformers.utils import logging

from icl_ft_fast.augmentation.prompts import Prompting
from icl_ft_fast.augmentation.strategies import STRATEGIES
from icl_ft_fast.augmentation.strategy import AugmentError, Parsed
from icl_ft_fast.cli import main as cli
from icl_ft_fast.engine.generate import Sampling, generate
from icl_ft_fast.engine.loading import load
from icl_ft_fast.engine.prompting import ProtocolError, prompt_context
from icl_ft_fast.finetuning.settings import FinetuneSettings, LoraSettings
from icl_ft_fast.report.derived import Derived
from icl_ft_fast.study import compare as study
from icl_ft_fast.study import evaluate
from icl_ft_fast.study.compare import StudyOptions, compare
from icl_ft_fast.study.results import read_results
from icl_ft_fast.study.settings import StudySettings
from icl_ft_fast.tasks.reversals import simple_reversals
from icl_ft_fast.tasks.task import Document, Task

TASK = simple_reversals(0, num_facts=2, num_articles=1)
TRAINING = FinetuneSettings(steps=3, batch_size=2, learning_rate=1e-3, warmup_steps=1)
SETTINGS = StudySettings(arms=("ft",), seeds=(0,), finetune=TRAINING)


def results_of(model, settings, **options):
    """A study without its query costs."""
    return compare(model, TASK, settings, options=StudyOptions(measure_s=0, **options))


def concerns_of(results):
    """What is said before the tables, beside that a random model is at chance."""
    return [text for text in Derived(results, "s").concerns if "above chance" not in text]


def test_large_models_train_adapters_unless_all_weights_are_asked_for(llama, monkeypatch):
    assert study.settled(llama, SETTINGS).finetune.lora is None
    monkeypatch.setattr(study, "LORA_FROM", llama.num_parameters)
    told = []
    assert results_of(llama, SETTINGS, tell=told.append).settings["finetune"]["lora"]["r"] == 16
    assert told == [
        f"fine-tuning: LoRA adapters of rank 16, the default from {llama.num_parameters:,} parameters on; "
        "use_peft false trains all weights"
    ]
    mine = replace(SETTINGS, finetune=replace(TRAINING, lora=LoraSettings(r=2)))
    assert study.settled(llama, mine).finetune.lora.r == 2
    for settings in (SETTINGS, mine):
        assert study.settled(llama, replace(settings, use_peft=False)).finetune.lora is None


def test_accuracy_by_step_changes_nothing_else(llama):
    plain, watched = (results_of(llama, replace(SETTINGS, eval_steps=n)).runs[0] for n in (None, 2))
    assert plain.curve == ()
    assert [point.step for point in watched.curve] == [2, 3]
    assert watched.curve[-1].accuracy == {split: found.value for split, found in watched.accuracy.items()}
    assert watched.losses == plain.losses
    assert watched.counts["request_tokens"] == plain.counts["request_tokens"]
    assert watched.counts["phases"]["train"]["flops"] == plain.counts["phases"]["train"]["flops"]
    again = replace(SETTINGS, eval_steps=2, finetune=replace(TRAINING, steps=2))
    assert watched.curve[0].accuracy == {s: a.value for s, a in results_of(llama, again).runs[0].accuracy.items()}


def short(monkeypatch, read):
    """Prompts that fit the tiny model, and replies of a few tokens."""
    strategy = replace(STRATEGIES["document"], max_new_tokens=6, read=read, is_lines=False)
    monkeypatch.setattr(Prompting, "of", lambda *_, **__: Prompting(strategy, "{{ document }}", "short"))


AUGMENTED = replace(SETTINGS, arms=("augmented-ft",), strategy="document")


def test_another_model_writes_the_augmentations(llama, llama_directory, tmp_path, tiny_network, monkeypatch):
    short(monkeypatch, lambda source, reply: Parsed([("row", reply)], 0, 0))
    logging.disable_progress_bar()
    other = tiny_network("llama", num_hidden_layers=1, std=0.2)
    other.save_pretrained(tmp_path / "other")
    load(llama_directory).tokenizer.save_pretrained(tmp_path / "other")
    texts = [document.text for document in TASK.documents]
    for generator, name in ((llama, ""), (load(tmp_path / "other"), str(tmp_path / "other"))):
        (run,) = results_of(llama, replace(AUGMENTED, generator=name)).runs
        expected = generate(generator, texts, Sampling(6, stop=("\n\n",)))
        assert [sample.text for sample in run.samples] == [made.text for made in expected]
        assert run.counts["phases"]["generate"]["decoded_tokens"] == sum(len(made.ids) for made in expected)


def test_an_augmentation_without_a_row_is_an_error_and_one_with_few_says_so_first(llama, monkeypatch):
    short(monkeypatch, lambda source, reply: Parsed([], 1, 0))
    with pytest.raises(AugmentError, match=r"^strategy: document: 2 prompts gave no row, 2 unparsed; try another"):
        results_of(llama, AUGMENTED)
    first = TASK.documents[0].text
    short(monkeypatch, lambda source, reply: Parsed([("row", "a b")] * (source == first), 0, 0))
    assert concerns_of(results_of(llama, AUGMENTED)) == []  # one of two
    task = simple_reversals(0, num_facts=3, num_articles=1)
    short(monkeypatch, lambda source, reply: Parsed([("row", "a b")] * (source == task.documents[0].text), 0, 0))
    results = compare(llama, task, AUGMENTED, options=StudyOptions(measure_s=0))
    (concern,) = concerns_of(results)
    assert concern.startswith("augmented: only 1 of 3 prompts gave a row (1 rows): its augmentation failed")


def test_a_training_that_ended_in_its_warm_up_says_so(llama):
    settings = replace(SETTINGS, finetune=replace(TRAINING, warmup_steps=3))
    (concern,) = concerns_of(results_of(llama, settings))
    assert concern.startswith("fine-tuned: 3 steps are no more than the 3 of the warm-up")


def test_documents_without_room_for_a_question_are_refused_with_the_number_that_fits(llama):
    questions = TASK.questions
    long = Task(tuple(Document(f"d{n}", "the cat sat on the mat. " * 4) for n in range(20)), questions)
    settings = replace(SETTINGS, arms=("base", "icl"))
    with pytest.raises(
        ProtocolError, match=r"^icl_tokens: documents and the longest question take [\d,]+ tokens"
    ) as told:
        compare(llama, long, settings, options=StudyOptions(measure_s=0))
    room = int(str(told.value).split("; ")[1].split()[0])
    assert 0 < room < llama.max_positions
    fits = replace(settings, icl_tokens=room)
    assert len(compare(llama, long, fits, options=StudyOptions(measure_s=0)).runs) == 2


def test_the_results_show_a_prompt_as_the_model_reads_it(llama):
    settings = results_of(llama, replace(SETTINGS, arms=("base",))).settings
    question = TASK.questions[0]
    assert settings["template"] == "base"  # there is no chat template
    assert settings["prompt"].endswith(f"Given these documents: {question.prompt}[{question.choices[question.answer]}]")
    assert settings["boundary"].startswith("... ")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_trained_models_are_kept_and_the_winner_s_command_is_told(llama_directory, tmp_path, capsys):
    """Weights or adapters, one folder for arms with the same training; not over another study's, nor too late."""
    TASK.write(tmp_path / "task")
    run = ["compare", "--model", str(llama_directory), "--task", str(tmp_path / "task"), "--seeds", "0", "--steps", "3"]
    run += ["--measure-seconds", "1e-3", "--template", "base", "--normalization", "sum"]

    def keep(name, kept, *more):
        return cli([*run, "--out", str(tmp_path / name), "--keep-models", str(tmp_path / kept), *more])

    assert keep("full", "kept", "--arms", "base,ft,ft+icl") == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["ft-seed0"]
    served = shlex.split(told.partition(": icl-ft-fast serve ")[2])
    assert served in ([str(tmp_path / "kept" / "ft-seed0")], [str(llama_directory)])
    results = read_results(tmp_path / "full" / "results.json")
    (answered,) = [run for run in results.runs if run.arm == "ft"]
    model = load(tmp_path / "kept" / "ft-seed0")
    again = evaluate.answers(model, TASK.questions, context=prompt_context(model, [], "base"))
    for one, other in zip(answered.answers, again, strict=True):
        assert one.probability == pytest.approx(other.probability, abs=1e-6)

    assert keep("full", "kept", "--arms", "base,ft,ft+icl") == 0  # a rerun: the model is its own
    assert keep("lora", "kept", "--arms", "ft", "--lora_r", "2") == 2
    assert "ft-seed0: holds a model of another study" in capsys.readouterr().err
    assert keep("lora", "adapters", "--arms", "ft", "--lora_r", "2") == 0
    assert json.loads((tmp_path / "adapters/ft-seed0/adapter_config.json").read_text())["r"] == 2
    assert load(tmp_path / "adapters" / "ft-seed0").fingerprint() != load(llama_directory).fingerprint()
    assert keep("full", "late", "--arms", "base,ft,ft+icl") == 2
    assert "ft-seed0: not there, though its run is finished" in capsys.readouterr().err
