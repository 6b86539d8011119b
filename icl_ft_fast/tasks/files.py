"""Text files as others write them: byte-order marks, line ends, encodings and JSON lines.

Lines end in a line feed whatever a file ends them in, and a mark at a file's beginning, or at that of a line, where
joining files leaves it, is no text. Files are read a line at a time. What was assumed about a file is told to the
caller, who shows it.
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from icl_ft_fast.runtime.durable import replacing
from icl_ft_fast.runtime.errors import UserError

LINE = 2**28  # bytes, or characters in other encodings than UTF-8: a line is shorter
PROBLEMS = 20  # named in one message
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_MARK = "\ufeff"
_BLOCK = 1 << 16
SCANNED = 1 << 26  # bytes that tell a file's encoding; a file may be a device without an end
_PIECE = re.compile(r"[^\n]*\n|[^\n]+")
_POINTER = b"version https://git-lfs"  # a file that Git LFS left in place of the real one
_FORMATS = {  # what files that are no text begin with
    b"PK\x03\x04": "a zip archive, as Excel's and Word's files are: save it as CSV or text",
    b"\xd0\xcf\x11\xe0": "an old Excel or Word file: save it as CSV or text",
    b"\x1f\x8b": "compressed by gzip: unpack it",
    b"BZh": "compressed by bzip2: unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it",
    b"%PDF-": "a PDF: save its text",
    b"PAR1": "a Parquet file: save it as CSV or JSON lines",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
}


class TaskError(UserError):
    """A task file that cannot be used; the message names file, line and field."""


class Problems:
    """What is wrong with files, gathered so that one message names all of it."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.count = 0

    def add(self, problem: object) -> None:
        """Note a problem."""
        self.count += 1
        if len(self.found) < PROBLEMS:
            self.found.append(str(problem))

    def check(self) -> None:
        """Raise TaskError with all problems, if there are any."""
        if self.found:
            more = self.count - len(self.found)
            files = list(dict.fromkeys(_place(problem)[0] for problem in self.found))
            self.found.sort(key=lambda problem: (files.index(_place(problem)[0]), _place(problem)[1]))
            raise TaskError("\n".join([*self.found, *([f"... and {more:,} more"] if more else [])]))


def _place(problem: str) -> tuple[str, int]:
    """The file and line that a problem begins with: one that was found later may stand before."""
    file, _, rest = problem.partition(":")
    line = rest.partition(":")[0]
    return file, int(line) if line.isdecimal() else 0


def read_text(path: str | Path, encoding: str | None = None) -> str:
    """A file's text without a mark, its lines ended by line feeds; raises TaskError.

    Args:
        path: of the file.
        encoding: None for UTF-8, or what the file's mark says.
    """
    return "".join(line for _, line in read_lines(Path(path), encoding))


def read_lines(path: Path, encoding: str | None = None) -> Iterator[tuple[str, str]]:
    """("file:line", line) of each line, read as it is asked for; raises TaskError.

    Args:
        path: of the file.
        encoding: None for UTF-8, or what the file's mark says.
    """
    encoding = _checked(path, encoding)
    numbers = itertools.count(1)
    try:
        with path.open("rb") if encoding == "utf-8" else path.open(encoding=encoding, newline=None) as file:
            for number, raw in _lines(path, file):
                where = f"{path}:{number}"
                line = raw if isinstance(raw, str) else _decoded(where, raw, is_first=number == 1)
                for piece in _PIECE.findall(line.replace("\r\n", "\n").replace("\r", "\n")):
                    yield f"{path}:{next(numbers)}", piece.lstrip(_MARK)
    except UnicodeError as error:
        raise TaskError(f"{path}:{_broken_line(path, encoding)}: not {encoding} text: {error}") from error
    except OSError as error:
        raise TaskError(f"{path}: cannot be read: {error.strerror}") from error


def _lines(path: Path, file: IO[Any]) -> Iterator[tuple[int, Any]]:
    """(number, line) of each line; one that never ends is refused before it has filled the memory."""
    for number in itertools.count(1):
        line = file.readline(LINE)
        if len(line) == LINE:
            raise TaskError(f"{path}:{number}: a line of {LINE:,} bytes or more")
        if not line:
            return
        yield number, line


def _decoded(where: str, raw: bytes, *, is_first: bool) -> str:
    raw = raw.removeprefix(codecs.BOM_UTF8) if is_first else raw
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"byte {error.start + 1} of the line, 0x{raw[error.start]:02x}"
        other = raw[error.start : error.start + 1].decode("cp1252", "replace")
        raise TaskError(f"{where}: not UTF-8 text ({place}; cp1252 reads {other!r} there)") from error


def _checked(path: Path, encoding: str | None) -> str:
    """The encoding by which a file is read; refuses one that the file's first bytes deny."""
    start = _start(path, 64)
    _refuse_formats(path, start)
    marked = next((name for mark, name in _MARKS.items() if start.startswith(mark)), None)
    if encoding is None:
        encoding = marked or "utf-8"
    name = codecs.lookup(encoding).name.removesuffix("-sig")
    if marked is not None and name != marked:
        raise TaskError(f"{path}: begins with the mark of {marked}, not of {encoding}; leave --encoding out")
    if b"\0" in start[:4] and not name.startswith(("utf-16", "utf-32")):
        raise TaskError(
            f"{path}: begins with zero bytes, as utf-16 and utf-32 do without a byte-order mark: save it as UTF-8"
        )
    return name if name == "utf-8" else encoding


def _refuse_formats(path: Path, start: bytes) -> None:
    """Refuse a file that is no text by what it begins with."""
    if start.startswith(_POINTER):
        raise TaskError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull`")
    for magic, name in _FORMATS.items():
        if start.startswith(magic):
            raise TaskError(f"{path}: {name}")


def _start(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise TaskError(f"{path}: cannot be read: {error.strerror}") from error


def _broken_line(path: Path, encoding: str) -> int:
    """The line of a file's first byte that its encoding does not have; a decoder reads ahead of the lines it gives."""
    decoder = codecs.getincrementaldecoder(encoding)()
    line = 1
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            state = decoder.getstate()
            try:
                line += decoder.decode(block).count("\n")
            except UnicodeError:
                decoder.setstate(state)
                for byte in block:
                    try:
                        line += decoder.decode(bytes([byte])).count("\n")
                    except UnicodeError:
                        return line
    return line


def find_encoding(path: Path, tell: Callable[[str], None]) -> str:
    """The encoding of a file: by its mark, its zero bytes, or whether it is UTF-8; else a guess, which is told.

    A file is damaged UTF-8, which reading it refuses, if most of its characters beyond ASCII are UTF-8.

    Raises:
        TaskError: a file that cannot be read, or is in no encoding that can be told.
    """
    start = _start(path, 4096)
    _refuse_formats(path, start)
    if any(start.startswith(mark) for mark in _MARKS):
        return _checked(path, None)
    if b"\0" in start:
        found = _by_zeros(path, start)
    elif _is_utf8(path):
        return "utf-8"
    else:
        found = _legacy(path)
    tell(f"{path}: read as {found}; give --encoding if that is wrong")
    return found


def _by_zeros(path: Path, start: bytes) -> str:
    """The encoding whose zero bytes stand where those of a mostly Latin text in it do; refuses zeros of no encoding."""
    zeros = [start[place::4].count(0) for place in range(4)]
    least, most = sorted((zeros[0] + zeros[2], zeros[1] + zeros[3]))
    is_wide = 4 * sum(zeros) > len(start) and (10 * least < most or min(zeros) == 0)
    if not is_wide and (4 * least > most or _reads_as_utf8(start)):
        line = start[: start.index(0)].count(b"\n") + 1
        raise TaskError(f"{path}:{line}: a zero byte, which no text has: the file is damaged, or is no text")
    if len(start) >= 4 and sum(count > len(start) // 8 for count in zeros) == 3:
        return "utf-32-be" if zeros[0] > zeros[3] else "utf-32-le"
    return "utf-16-be" if zeros[0] + zeros[2] > zeros[1] + zeros[3] else "utf-16-le"


def _reads_as_utf8(start: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return True


def _is_utf8(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    wrong = right = 0
    with path.open("rb") as file:
        while file.tell() < SCANNED and (block := file.read(_BLOCK)):
            if not block.isascii() or wrong:
                text = decoder.decode(block)
                bad = sum("\udc80" <= c <= "\udcff" for c in text)
                wrong, right = wrong + bad, right + sum(c > "\x7f" for c in text) - bad
        if not file.read(1):
            wrong += len(decoder.decode(b"", final=True))
    return not wrong or right >= wrong


def _legacy(path: Path) -> str:
    """An encoding of one or two bytes a character: cp1252, Windows' in the west, where few letters are beyond ASCII."""
    from charset_normalizer import from_bytes

    sample = _start(path, 4 * _BLOCK)
    high = sum(byte > 0x7F for byte in sample)
    if high < 0.3 * (high + sum(map(bytes.isalpha, (sample[i : i + 1] for i in range(len(sample)))))):
        try:
            sample.decode("cp1252")
        except UnicodeDecodeError:
            pass
        else:
            return "cp1252"
    found = from_bytes(sample).best()
    if found is None:
        raise TaskError(f"{path}: unknown encoding; give --encoding, or save it as UTF-8")
    return str(found.encoding)


def read_jsonl(path: Path, problems: Problems | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of each non-empty line; raises TaskError, or adds a line that is none to `problems`."""
    for where, line in read_lines(path):
        if line.strip():
            try:
                yield where, parsed(where, line)
            except TaskError as error:
                if problems is None:
                    raise
                problems.add(error)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; one that names a field twice would lose the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def parsed(where: str, line: str) -> dict[str, Any]:
    """A line's JSON object; raises TaskError."""
    try:
        row = json.loads(line, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise TaskError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write one object a line, replace `path` atomically and return how many; nothing is left if the rows fail."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        return sum(file.write(json.dumps(row, ensure_ascii=False) + "\n") > 0 for row in rows)
