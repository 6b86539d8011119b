# ruff: noqa: RUF001
"""Chat templates: one chat is one list of token ids, whoever encodes it, on ten kinds of tokenizers."""

import copy
import itertools
import json
import pickle
import shutil
from dataclasses import replace
from datetime import datetime
from functools import partial
from types import SimpleNamespace

import pytest
import tokenizer_kinds
from transformers.utils import chat_template_utils

from icl_ft_fast.augmentation.generators import LocalGenerator
from icl_ft_fast.cli import main
from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.generate import Generation
from icl_ft_fast.engine.loading import load
from icl_ft_fast.engine.prompting import prompt_context
from icl_ft_fast.finetuning import run as finetune_run
from icl_ft_fast.finetuning.data import Example, encode
from icl_ft_fast.finetuning.run import finetune
from icl_ft_fast.finetuning.settings import FinetuneError, FinetuneSettings, RunOptions
from icl_ft_fast.integrations.protocol import ChatMessage, ChatRequest
from icl_ft_fast.integrations.server import _Service
from icl_ft_fast.runtime import templates
from icl_ft_fast.runtime.templates import ChatText, fix_date, render_chat
from icl_ft_fast.study import compare as study
from icl_ft_fast.study import questions
from icl_ft_fast.study.compare import StudyOptions, compare
from icl_ft_fast.study.settings import StudySettings
from icl_ft_fast.tasks.task import Document, Question, Task

TURNS = (("user", "who knows the fox?"), ("assistant", "Paris knows."), ("user", "why?"), ("assistant", "über 42"))


def messages(turns):
    return [{"role": role, "content": content} for role, content in turns]


def ids_of(tokenizer, turns, **options):
    """What transformers makes of a chat, and with it TRL and every engine that follows it."""
    return tokenizer.apply_chat_template(messages(turns), tokenize=True, return_dict=False, **options)


@pytest.fixture(params=list(tokenizer_kinds.KINDS))
def kind(request):
    """A tokenizer of each kind."""
    return tokenizer_kinds.make(request.param)


def test_training_scoring_serving_and_augmentation_have_the_same_ids(kind):
    tokenizer = kind
    (example,) = encode(tokenizer, [Example(turns=TURNS)], 10_000)
    assert example.ids == ids_of(tokenizer, TURNS)
    assert example.is_target == [False] + [True] * (len(example.ids) - 1)

    prompted = ids_of(tokenizer, TURNS[:1], add_generation_prompt=True)
    service = SimpleNamespace(tokenizer=tokenizer)
    service._encode, service._rendered = (partial(call, service) for call in (_Service._encode, _Service._rendered))
    asked = ChatRequest(model="m", messages=[ChatMessage(role=r, content=c) for r, c in TURNS[:1]])
    assert _Service._conversation(service, asked)[0] == prompted
    generator = LocalGenerator(SimpleNamespace(tokenizer=tokenizer), is_chat=True)
    assert encoding.encode(tokenizer, [generator._whole(TURNS[0][1])]) == [prompted]

    model = SimpleNamespace(tokenizer=tokenizer, name="m")
    for documents in ([], [Document("d", "Paris is the capital of France.")]):
        context = prompt_context(model, documents, "chat")
        assert encoding.encode(tokenizer, [context]) == [tokenizer(context, add_special_tokens=False)["input_ids"]]
        ((before, choice),) = encoding.encode_pairs(tokenizer, [(context + "the fox is", " lazy")], whole_tokens=True)
        assert before + choice == tokenizer(f"{context}the fox is lazy", add_special_tokens=False)["input_ids"]


def test_many_chats_that_begin_alike_are_encoded_as_each_alone(kind):
    tokenizer = kind
    long = render_chat(tokenizer, messages([("user", "the quick brown fox jumps over the lazy dog. " * 200)]))
    texts = [long + end for end in ("a", "b", " c", "\nd")]
    assert encoding.encode(tokenizer, texts) == [encoding.encode(tokenizer, [text])[0] for text in texts]


def learned(tokenizer, turns, **options):
    """The text of a chat's tokens, [in brackets] where a loss is taken under completion_only."""
    (example,) = encode(tokenizer, [Example(turns=turns, **options)], 10_000, completion_only=True)
    text = ""
    for is_target, run in itertools.groupby(zip(example.is_target, example.ids, strict=True), key=lambda pair: pair[0]):
        piece = tokenizer.decode([token for _, token in run])
        text += f"[{piece}]" if is_target else piece
    return text


def test_completions_of_a_template_that_opens_a_thought():
    """DeepSeek-R1's: the generation prompt ends in <think>, which no turn of the chat shows."""
    tokenizer = tokenizer_kinds.make("deepseek")
    turns = (*TURNS[:1], ("assistant", "<think>hm</think>Paris."), *TURNS[2:])
    assert learned(tokenizer, turns) == (
        "<｜begin▁of▁sentence｜><｜User｜>who knows the fox?<｜Assistant｜>[Paris.<｜end▁of▁sentence｜>]"
        "<｜User｜>why?<｜Assistant｜>[über 42<｜end▁of▁sentence｜>]"
    )
    assert learned(tokenizer, turns, context_turns=3).count("[") == 1


def test_completions_of_a_template_that_forgets_thoughts():
    """Qwen3's: thoughts are shown behind the last question, an empty one too, and left out before it."""
    tokenizer = tokenizer_kinds.make("qwen")
    turns = (*TURNS[:1], ("assistant", "<think>hm</think>Paris."), TURNS[2], ("assistant", "<think>ha</think>über"))
    first = "<|im_start|>user\nwho knows the fox?<|im_end|>\n<|im_start|>assistant\n"
    second = "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
    assert learned(tokenizer, turns) == (
        f"{first}[Paris.<|im_end|>\n]{second}[<think>\nha\n</think>\n\nüber<|im_end|>\n]"
    )
    assert learned(tokenizer, TURNS) == (
        f"{first}[Paris knows.<|im_end|>\n]{second}[<think>\n\n</think>\n\nüber 42<|im_end|>\n]"
    )
    assert learned(tokenizer, TURNS[:2]) == f"{first}[<think>\n\n</think>\n\nParis knows.<|im_end|>\n]"


def test_completions_are_the_assistants_turns(kind):
    tokenizer = kind
    (example,) = encode(tokenizer, [Example(turns=TURNS)], 10_000, completion_only=True)
    runs = itertools.groupby(zip(example.is_target, example.ids, strict=True), key=lambda pair: pair[0])
    learned = [
        tokenizer.decode([token for _, token in run], skip_special_tokens=True) for is_target, run in runs if is_target
    ]
    assert len(learned) == 2
    for text, (_, content) in zip(learned, TURNS[1::2], strict=True):
        assert content.replace(" ", "") in text.replace(" ", "")
        assert "user" not in text


def test_a_chat_text_stays_one():
    text = ChatText("a ")
    assert isinstance(text + "b", ChatText)
    assert isinstance(text.rstrip(), ChatText)
    assert (text + "b", text.rstrip()) == ("a b", "a")
    assert type(copy.deepcopy(text)) is type(pickle.loads(pickle.dumps(text))) is ChatText


DATED = "{{ '<s>' }}Today: {{ strftime_now('%d %b %Y %H:%M') }}\n" + tokenizer_kinds.PLAIN


@pytest.fixture
def on(monkeypatch):
    """A function that sets the day."""

    def set_day(day):
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return cls.fromisoformat(f"{day}T10:11:12")

        for module in (templates, chat_template_utils, study):
            monkeypatch.setattr(module, "datetime", Clock)

    return set_day


@pytest.fixture
def dated(llama_directory, tmp_path):
    """A folder of a model whose chat template writes the date."""
    shutil.copytree(llama_directory, tmp_path / "dated")
    (tmp_path / "dated" / "chat_template.jinja").write_text(DATED)
    return tmp_path / "dated"


def test_a_date_is_fixed(dated, on, monkeypatch):
    tokenizer = load(dated).tokenizer
    on("2026-11-29")
    assert render_chat(tokenizer, messages(TURNS[:1])).startswith("<s>Today: 29 Nov 2026 10:11\n")
    assert fix_date(tokenizer) == "2026-11-29"
    on("2026-11-30")
    assert render_chat(tokenizer, messages(TURNS[:1])).startswith("<s>Today: 29 Nov 2026 00:00\n")
    assert fix_date(tokenizer) == "2026-11-29"
    assert fix_date(tokenizer, "2024-07-26") == "2024-07-26"
    assert render_chat(tokenizer, messages(TURNS[:1])).startswith("<s>Today: 26 Jul 2024")
    assert fix_date(tokenizer_kinds.make("qwen"), "2024-07-26") is None
    monkeypatch.setattr(tokenizer, "chat_template", "{{ strftime_now('%A %a %B %b %d %%B') }}")
    monkeypatch.setattr(templates, "_DAYS", ("",) * 4 + ("Day-of-ours",))  # not the locale's
    assert render_chat(tokenizer, messages(TURNS)) == "Day-of-ours Day July Jul 26 %B"
    for other in (tokenizer, tokenizer_kinds.make("qwen")):
        with pytest.raises(templates.DateError, match="template_date: expected YYYY-MM-DD, got 'today'"):
            fix_date(other, "today")


def test_training_is_resumed_on_another_day(dated, on, tmp_path, monkeypatch):
    settings, chat = FinetuneSettings(steps=2, batch_size=1, save_steps=1), [Example(turns=TURNS[:2])]

    def run(name, settings=settings):
        return finetune(load(dated), chat, settings, options=RunOptions(output_dir=tmp_path / name, resume=True)).losses

    on("2026-11-29")
    whole = run("whole")
    with monkeypatch.context() as patch:
        patch.setattr(finetune_run, "finish", lambda _: None)
        patch.setattr(finetune_run.RunState, "is_over", property(lambda state: state.progress.step == 1))
        with pytest.raises(AttributeError):
            run("cut")
    on("2026-12-01")
    assert run("cut") == whole
    recorded = json.loads((tmp_path / "cut" / "checkpoint-2" / "run.json").read_text())
    assert recorded["template_date"] == "2026-11-29"
    assert run("other") != whole
    assert run("set", replace(settings, template_date="2026-11-29")) == whole
    with pytest.raises(FinetuneError, match="template_date was"):
        run("cut", replace(settings, template_date="2026-12-01"))


def test_a_study_has_the_date_of_its_first_day(dated, on, tmp_path, monkeypatch):
    question = Question("q", "who", (" cat", " mat"), answer=0)
    task = Task((Document("d", "the cat sat on that mat."),), (question,))
    settings = StudySettings(arms=("base", "icl"), seeds=(0,), template="chat")

    def run(name, **options):
        options = StudyOptions(measure_s=0, arguments="a", **options)
        return compare(load(dated), task, settings, out=tmp_path / name, options=options)

    on("2026-11-29")
    whole = run("whole")
    assert whole.settings["template_date"] == "2026-11-29"
    assert "Today: 29 Nov 2026" in whole.settings["chat_prompt"]

    def dies(run):
        raise KeyError(run.arm)

    with pytest.raises(KeyError, match="base"):
        run("cut", on_run=dies)
    on("2026-11-30")
    again = run("cut")
    assert again.settings == whole.settings
    assert [r.answers for r in again.runs] == [r.answers for r in whole.runs]
    assert run("other").settings["template_date"] == "2026-11-30"


def test_augmentation_is_resumed_with_the_date_of_its_first_reply(dated, on, tmp_path, capsys):
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "documents.jsonl").write_text('{"id": "d", "text": "the cat sat"}\n')
    question = {"id": "q", "prompt": "who", "choices": [" cat", " mat"], "answer": 0}
    (tmp_path / "task" / "questions.jsonl").write_text(json.dumps(question) + "\n")
    (tmp_path / "short.jinja").write_text("{{ document }}")

    def run(name, *more):
        options = ["--prompt-template", tmp_path / "short.jinja", "--max-new-tokens", 2, "--chat", *more]
        given = ["augment", "--task", tmp_path / "task", "--model", dated, "--out", tmp_path / name, *options]
        assert main([str(part) for part in given]) == 2  # no row of a random model's replies
        told = capsys.readouterr().out.partition("wrote the date ")[2][:10]
        report = json.loads((tmp_path / name / "report.json").read_text())
        return report["template_date"], told, len(list((tmp_path / name / "replies").iterdir()))

    on("2026-11-29")
    assert run("a") == ("2026-11-29", "2026-11-29", 1)
    on("2026-11-30")
    assert run("a") == ("2026-11-29", "2026-11-29", 1)
    assert run("b") == ("2026-11-30", "2026-11-30", 1)
    assert run("a", "--template-date", "2024-07-26", "--overwrite") == ("2024-07-26", "2024-07-26", 2)
    generator = LocalGenerator(load(dated), is_chat=True, template_date="2024-07-26")
    assert (generator.date, LocalGenerator(generator.model).date) == ("2024-07-26", None)


def test_arguments_of_a_template_reach_training_and_studies(dated, on):
    (dated / "chat_template.jinja").write_text("{{ '<s>' }}{{ mood }}" + tokenizer_kinds.PLAIN)
    chat = [Example(turns=TURNS[:2])]

    def losses(**settings):
        return finetune(load(dated), chat, FinetuneSettings(steps=1, batch_size=1, **settings)).losses

    assert losses() == losses(chat_template_kwargs={}) != losses(chat_template_kwargs={"mood": "why"})
    task = Task((Document("d", "the cat sat"),), (Question("q", "who", (" cat", " mat"), answer=0),))

    def prompt(**settings):
        settings = StudySettings(arms=("base",), seeds=(0,), template="chat", **settings)
        return compare(load(dated), task, settings, options=StudyOptions(measure_s=0)).settings["chat_prompt"]

    assert prompt(chat_template_kwargs={"mood": "why"}) == prompt().replace("<s>", "<s>why")


def test_questions_are_written_with_the_date_of_their_first_day(dated, on, tmp_path, monkeypatch, capsys):
    (dated / "chat_template.jinja").write_text(DATED + "{{ mood }}")
    shown = []

    def written(model, prompts, sampling, **_):
        shown.extend(prompts)
        return [Generation("Question: who sat\nAnswer: the cat", (2,), (0.0,), "eos") for _ in prompts]

    monkeypatch.setattr(questions, "generate", written)
    monkeypatch.setattr(questions, "_fitting", lambda model, texts, more: [True] * len(texts))
    (tmp_path / "documents.jsonl").write_text('{"id": "d", "text": "the cat sat on that mat."}\n')
    command = ["task", "questions", str(tmp_path), "--model", str(dated), "--chat-template-kwargs", '{"mood": "sad"}']
    for day, more, seen in (
        ("2026-11-29", (), "29 Nov 2026"),
        ("2026-11-30", ("--max-new-tokens", "9"), "29 Nov 2026"),
        ("2026-11-30", ("--template-date", "2024-07-26"), "26 Jul 2024"),
    ):
        on(day)
        assert main([*command, *more]) == 2  # no wrong choices for the one question
        assert shown[-1].startswith(f"<s>Today: {seen}")
        assert "sad" in shown[-1]
        wrote = datetime.strptime(seen, "%d %b %Y").date().isoformat()
        assert f"wrote the date {wrote}; --template-date sets it" in capsys.readouterr().out
    assert len(shown) == 3
