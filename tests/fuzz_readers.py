"""Coverage-guided fuzzing of the readers: `make fuzz`, or `python tests/fuzz_readers.py -max_total_time=60`.

Whatever is in a file, a reader gives what it stands for or raises TaskError; anything else ends the run. libFuzzer's
arguments are taken. Needs the extra `fuzz`.
"""

import struct
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["icl_ft_fast.tasks", "icl_ft_fast.finetuning.data", "icl_ft_fast.runtime", "icl_ft_fast.engine.gguf"]
):
    from icl_ft_fast.engine.gguf import GgufError, read_header
    from icl_ft_fast.finetuning.data import read_examples
    from icl_ft_fast.finetuning.settings import FinetuneError
    from icl_ft_fast.runtime.reasoning import split_reasoning
    from icl_ft_fast.study.prices import PriceError, read_prices
    from icl_ft_fast.tasks import files, own, task
    from icl_ft_fast.tasks.reversal_curse import DESCRIPTIONS, NAMES, REVERSALS, TRAINING, reversal_curse
    from icl_ft_fast.tasks.sentences import split_sentences
    from icl_ft_fast.tasks.tables import Format

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz_readers"))
ENCODINGS = [None, "utf-8", "utf-8-sig", "utf-16", "utf-32-be", "utf-7", "latin-1", "cp1252", "shift_jis", "ascii"]
SUFFIXES = [*own.SUFFIXES, ".pdf"]


def one_input(data: bytes) -> None:
    """Take some bytes for a reader, a format and a file."""
    provider = atheris.FuzzedDataProvider(data)
    reader = provider.ConsumeIntInRange(0, 9)
    form = Format(
        provider.PickValueInList(ENCODINGS),
        provider.PickValueInList([None, ",", ";", "\t"]),
        {"prompt": "frage"} if provider.ConsumeBool() else {},
    )
    path = FOLDER / f"file{provider.PickValueInList(SUFFIXES)}"
    if reader == 4:
        for name in (TRAINING, DESCRIPTIONS, NAMES, REVERSALS):
            (FOLDER / name).write_bytes(provider.ConsumeBytes(provider.ConsumeIntInRange(0, 200)))
    path.write_bytes(provider.ConsumeBytes(provider.remaining_bytes()))
    try:
        if reader == 0:
            documents = tuple(own.iter_documents([path], form))
            task.Task(documents, ()).write(FOLDER / "written")
            assert task.read_documents(FOLDER / "written" / "documents.jsonl") == documents
        elif reader == 1:
            questions = own.read_questions(path, form, provider.PickValueInList([None, 0, 1]))
            task.Task((), questions).write(FOLDER / "written")
            assert task.read_questions(FOLDER / "written" / "questions.jsonl") == questions
        elif reader == 2:
            task.read_documents(path)
        elif reader == 3:
            task.read_questions(path)
        elif reader == 5:
            text = files.read_text(path)
            assert "\r" not in text
            assert all(part in text for part in split_sentences(text, "independent"))
        elif reader == 6:
            assert all(example.where.startswith(str(path)) for example in read_examples(path))
        elif reader == 7:
            read_prices(path)
        elif reader == 8:
            text = files.read_text(path)
            reasoning, answer = split_reasoning(text)
            assert len(reasoning) + len(answer) <= len(text)
        elif reader == 9:
            header, size = read_header(path), path.stat().st_size
            assert all(tensor.start + tensor.num_bytes <= size for tensor in header.tensors)
        else:
            reversal_curse(FOLDER, nonsense_names=provider.remaining_bytes() > 0)
    except (task.TaskError, FinetuneError, PriceError, GgufError) as error:
        assert str(FOLDER) in str(error)  # noqa: PT017


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _named(name: str, kind: int, value: bytes) -> bytes:
    return _string(name) + struct.pack("<I", kind) + value


def seeds() -> Path:
    """A folder of good files for each reader; numbers are taken from the end of an input, bytes from its beginning."""
    folder = FOLDER / "seeds"
    folder.mkdir()
    for f, content in enumerate(
        (
            b'id,text,topic\na,"b ""c""",\n,d,e\n',
            b"prompt,choice1,choice2,answer,also_correct\na,b,c,0,1\nd,e,,,\n",
            b'{"id": "a", "text": "b \\u00fc", "topic": null}\n{"text": "c"}\n',
            b'{"id": "a", "prompt": "b", "choices": ["c", "d"], "answer": 1, "also_correct": [0], "form": "f"}\n',
            b"\xef\xbb\xbfsep=;\r\nNr;Question;A;B;Correct answer\r\n1;a;b;c;B\r\n2;d;e;f;e\r\n",
            b'[{"question": "a", "options": ["b", "c"], "answer": "b"}, {"question": "a", "A": "b", "B": "c"}]',
            "Dr. Smith left.\r\nHe came. \u9686\u5fb7\u3002".encode(),
            b'{"q": {"stem": "a", "choices": [{"text": "b", "label": "1"}, {"text": "c", "label": "2"}]}, "key": "2"}',
            b'{"ctx": "a", "endings": [1, true], "label": [0, 1.0]}\n',
            b'{"goal": "a", "sol1": "b", "sol2": "c", "answer": "Option B"}\n',
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n{"text": "a"}\n',
            b'{"conversations": [{"from": "human", "value": "a"}]}\n{"instruction": "a", "output": "b"}\n',
            b'{"machine_per_hour": 1.5}',
            b"<think>a</think>b[THINK]c<|channel|>final<|message|>d<|end|>",
            b"GGUF"
            + struct.pack("<IQQ", 3, 1, 2)
            + _named("a", 8, _string("b"))
            + _named("c", 9, struct.pack("<IQB", 0, 1, 7))
            + _string("t")
            + struct.pack("<IQIQ", 1, 4, 0, 0)
            + b"\0" * 64,
        )
    ):
        for reader in range(10):
            for suffix in range(len(SUFFIXES)):
                (folder / f"{f}{reader}{suffix}").write_bytes(content + bytes([suffix, 0, 0, 0, reader]))
    return folder


if __name__ == "__main__":
    atheris.Setup([*sys.argv, str(seeds())], one_input)
    atheris.Fuzz()
