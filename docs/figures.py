"""Draw the figures of docs/architecture.md from the code: `make figures`.

The prefix tree and the KV cache are those that engine/trie.py makes of the toy requests below; the rooms and who
imports whom are read from tests/test_repo.py and from the package's imports. Only the path of a request is listed by
hand; tests/test_docs.py holds it, and the committed files, against the code. SVG with text as text, in light and dark.
"""

import ast
from html import escape
from pathlib import Path

from icl_ft_fast.engine import trie

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PACKAGE = ROOT / "icl_ft_fast"

# What is asked after a document, as (prompt, choices), a word a token: small enough to be drawn whole.
DOCUMENT = "Bob employs Alice ."
QUESTIONS = [
    ("Alice works for", ["Bob", "Carol Smith"]),
    ("Who pays Alice", ["Bob", "Carol"]),
    ("Who sells tea", ["Bob", "Nobody"]),
]
CHUNK_TOKENS = 5

# One request from iff.score to the innermost loop: where, what happens there, and, where no search for the name
# finds the next step, how the call gets there.
PATH = [
    ("icl_ft_fast/engine/score.py:score", "questions to token ids (encoding.py); one Score a question", ""),
    ("icl_ft_fast/engine/likelihood.py:score_requests", "a log-likelihood for each request, as soon as it is done", ""),
    ("icl_ft_fast/engine/trie.py:build_from_lists", "all requests merged into one prefix tree (csrc/trie.cpp)", ""),
    ("icl_ft_fast/engine/forward.py:forward_chunks", "the plan that fits the memory; the one loop over chunks", ""),
    (
        "icl_ft_fast/engine/model.py:Model.forward_chunk",
        "runs transformers' network on the chunk",
        'transformers calls the attention that is registered as "icl_ft_fast"',
    ),
    ("icl_ft_fast/engine/model.py:_trie_attention", "appends the chunk's keys and values to the KV cache", ""),
    (
        "icl_ft_fast/ops/trie_attention.py:trie_attention",
        "checks shapes, dtypes and devices; carries gradients",
        "torch.ops.icl_ft_fast.trie_attention: torch dispatches by device (ops/dispatch.py)",
    ),
    ("icl_ft_fast/ops/cpu.py:trie_attention", "tensors by DLPack, without a copy (csrc/bindings.cpp checks them)", ""),
    (
        "csrc/trie_attention.cpp:trie_attention",
        "cuts the work into items for threads",
        "versions.h includes the tile's file once for each instruction set",
    ),
    ("csrc/trie_attention_tile.h:attend_tile", "the innermost loop: one tile of queries and keys", ""),
]

LIGHT = {
    "ground": "#ffffff",
    "ink": "#1f2328",
    "muted": "#59636e",
    "line": "#d1d9e0",
    "strong": "#0969da",
    "soft": "#ddf4ff",
    "warm": "#bc4c00",
    "warmsoft": "#fff1e5",
    "on": "#ffffff",
}
DARK = {
    "ground": "#0d1117",
    "ink": "#f0f6fc",
    "muted": "#9198a1",
    "line": "#3d444d",
    "strong": "#4493f8",
    "soft": "#132a4a",
    "warm": "#f0883e",
    "warmsoft": "#33200f",
    "on": "#0d1117",
}


def _rules(colors: dict[str, str]) -> str:
    fills = "".join(f".{name}{{fill:{color}}}" for name, color in colors.items())
    return fills + "".join(f".s-{name}{{stroke:{color}}}" for name, color in colors.items())


STYLE = (
    "text{font:13px system-ui,sans-serif}.mono{font-family:ui-monospace,monospace}.small{font-size:11px}"
    ".bold{font-weight:600}.end{text-anchor:end}.mid{text-anchor:middle}"
    ".none{fill:none}.dash{stroke-dasharray:3 3}"
    + _rules(LIGHT)
    + f"@media(prefers-color-scheme:dark){{{_rules(DARK)}}}"
)


class Drawing:
    """An SVG that grows by shapes; coordinates are whole numbers, so the same figure is the same text."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height = width, height
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img"><title>{escape(title)}</title><style>{STYLE}</style>'
        ]
        self.box(0, 0, width, height, "ground", radius=0)

    def box(self, x: int, y: int, width: int, height: int, look: str, radius: int = 4) -> None:
        """A rectangle; `look` are classes."""
        self.parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" class="{look}"/>')

    def text(self, x: int, y: int, text: object, look: str = "ink") -> None:
        """A line of text on the baseline y."""
        self.parts.append(f'<text x="{x}" y="{y}" class="{look}">{escape(str(text))}</text>')

    def line(self, points: str, look: str = "none s-muted") -> None:
        """A path, in SVG's own words."""
        self.parts.append(f'<path d="{points}" class="{look}"/>')

    def arrow(self, x: int, y: int, to_y: int, look: str) -> None:
        """Straight down, with a head."""
        self.line(f"M{x} {y}V{to_y - 6}", f"none s-{look}")
        self.line(f"M{x - 5} {to_y - 7}h10l-5 7z", look)

    def svg(self) -> str:
        """The whole file."""
        return "\n".join([*self.parts, "</svg>\n"])


def toy() -> tuple[trie.Trie, list[str]]:
    """The prefix tree of the toy requests, and the word of each token id."""
    ids: dict[str, int] = {}

    def encode(text: str) -> list[int]:
        return [ids.setdefault(word, len(ids)) for word in text.split()]

    requests = [(encode(f"{DOCUMENT} {prompt}"), encode(choice)) for prompt, choices in QUESTIONS for choice in choices]
    return trie.build_from_lists(requests), list(ids)


def prefix_tree() -> str:
    """The rows in pre-order with what is said of them, beside the matrix of which row sees which."""
    tree, words = toy()
    token, depth, end = tree.token.tolist(), tree.depth.tolist(), tree.end.tolist()
    parent = tree.parent.tolist()
    scored: dict[int, list[str]] = {}
    for row, target in zip(tree.scored_row.tolist(), tree.scored_token.tolist(), strict=True):
        scored.setdefault(row, []).append(words[target])
    rows, step, top, indent = len(token), 26, 92, 34
    tree_x, scored_x, numbers_x, matrix_x = 60, 374, 520, 610
    out = Drawing(matrix_x + rows * 22 + 24, top + rows * step + 64, "A prefix tree and which row may attend to which")
    out.text(24, 32, "Six requests, one prefix tree", "ink bold")
    out.text(24, 52, f"Document: {DOCUMENT} Three questions after it, two choices each.", "muted small")
    for x, title in ((24, "row"), (tree_x, "token"), (scored_x, "scored here"), (numbers_x, "depth")):
        out.text(x, top - 10, title, "muted small")
    out.text(numbers_x + 46, top - 10, "end", "muted small")
    for row in range(rows):
        y = top + row * step
        x = tree_x + depth[row] * indent
        if row:
            up = top + parent[row] * step
            if parent[row] == row - 1:
                out.line(f"M{x - indent + 12} {up + 22}V{y + 11}H{x}")
            else:
                out.line(f"M{x - indent + 12} {up + 22}V{y + 11}H{x}", "none s-line")
        word = words[token[row]]
        out.text(24, y + 15, row, "muted mono small")
        out.box(x, y, 18 + 8 * len(word), 22, "soft s-strong")
        out.text(x + 9, y + 15, word)
        if row in scored:
            out.text(scored_x, y + 15, ", ".join(scored[row]), "warm")
        out.text(numbers_x + 16, y + 15, depth[row], "ink mono mid")
        out.text(numbers_x + 56, y + 15, end[row], "ink mono mid")
        for key in range(rows):
            sees = key <= row < end[key]
            look = "strong" if key == row else "soft s-strong" if sees else "none s-line"
            out.box(matrix_x + key * 22, y + 1, 20, 20, look, radius=3)
    for key in range(rows):
        out.text(matrix_x + key * 22 + 10, top - 10, key, "muted mono small mid")
    out.text(matrix_x, 52, "which row (down) sees which (across)", "muted small")
    below = top + rows * step + 22
    out.text(24, below, "Row i sees row j if and only if j <= i < end[j].", "ink bold")
    note = "A scored word that nothing follows has no row: its probability comes from the row it is written beside."
    out.text(24, below + 20, note, "muted small")
    return out.svg()


def kv_cache() -> str:
    """What is in the KV cache while each chunk is forwarded, and what stays of the chunk before."""
    tree, words = toy()
    plan = trie.plan(tree, CHUNK_TOKENS)
    word = [words[token] for token in tree.token.tolist()]
    wide, left, step = 72, 150, 100
    out = Drawing(
        left + plan.capacity * wide + 24, 84 + len(plan.chunks) * step, "The KV cache while three chunks are forwarded"
    )
    out.text(24, 32, f"The same tree in chunks of {CHUNK_TOKENS} tokens: the KV cache is a stack", "ink bold")
    out.text(
        24, 52, "Before each chunk the cache is compacted to the ancestors that its rows still see.", "muted small"
    )
    held: list[int] = []  # the row at each position
    for number, chunk in enumerate(plan.chunks):
        y = 84 + number * step
        keep, own = chunk.keep.tolist(), list(range(chunk.first_row, chunk.last_row))
        out.text(24, y + 22, f"chunk {number + 1}", "ink bold")
        out.text(24, y + 40, f"rows {own[0]} to {own[-1]}", "muted small")
        kept = [held[position] for position in keep]
        for position in range(plan.capacity):
            x = left + position * wide
            out.box(x, y, wide - 6, 46, "none s-line dash")
            if position < len(kept) + len(own):
                row = [*kept, *own][position]
                is_own = position >= len(kept)
                out.box(x, y, wide - 6, 46, "strong" if is_own else "soft s-strong")
                out.text(x + wide // 2 - 3, y + 20, word[row], f"{'on' if is_own else 'ink'} mid")
                out.text(x + wide // 2 - 3, y + 37, row, f"{'on' if is_own else 'muted'} small mono mid")
        held = [*kept, *own]
        if number + 1 < len(plan.chunks):
            stays = set(plan.chunks[number + 1].keep.tolist())
            gone = [word[row] for position, row in enumerate(held) if position not in stays]
            out.text(left, y + 68, f"then dropped: {', '.join(gone) or 'nothing'}", "warm small")
    y = 84 + len(plan.chunks) * step - 24
    out.box(left, y - 11, 14, 14, "soft s-strong", radius=2)
    out.text(left + 20, y, "cached ancestors", "muted small")
    out.box(left + 150, y - 11, 14, 14, "strong", radius=2)
    note = f"the chunk's own tokens; {plan.capacity} positions are the most that the cache ever holds here"
    out.text(left + 170, y, note, "muted small")
    return out.svg()


def request_path() -> str:
    """One request from iff.score to the innermost loop, with the jumps that no search finds."""
    step, top = 64, 76
    out = Drawing(860, top + len(PATH) * step + 8, "One request from iff.score to the innermost loop")
    out.text(24, 32, "One request, from iff.score to the innermost loop", "ink bold")
    out.text(24, 52, "Orange: the next step is found by no search for its name.", "warm small")
    for number, (where, what, jump) in enumerate(PATH):
        y = top + number * step
        out.box(24, y, 812, 36, "soft s-strong")
        out.text(38, y + 23, number + 1, "muted small mono")
        out.text(64, y + 23, where, "ink mono small bold")
        out.text(430, y + 23, what, "ink small")
        if number + 1 < len(PATH):
            out.arrow(84, y + 36, y + step, "warm" if jump else "muted")
            if jump:
                out.text(100, y + 55, jump, "warm small")
    return out.svg()


def rooms() -> dict[str, str]:
    """The rooms that tests/test_repo.py knows, lowest first, and what each is for; "" is the facade."""
    source = ast.parse((ROOT / "tests" / "test_repo.py").read_text(encoding="utf-8"))
    for node in source.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "ROOMS":
            found: dict[str, str] = ast.literal_eval(node.value)
            return found
    raise LookupError("tests/test_repo.py: no ROOMS")


def room_of(dotted: str) -> str:
    """The room of a module, by its name without the package's."""
    return "ops.triton" if dotted.startswith("ops.triton") else dotted.partition(".")[0]


def imports() -> dict[str, set[str]]:
    """The rooms that each room imports."""
    found: dict[str, set[str]] = {name: set() for name in rooms()}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        mine = room_of(".".join(parts)) if parts[0] != "__init__" else ""
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if names == ["icl_ft_fast"]:
                names = [f"icl_ft_fast.{alias.name}" for alias in node.names]
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                first, _, rest = name.partition(".")
                if first == "icl_ft_fast" and room_of(rest) in found:
                    found[mine].add(room_of(rest))
    return {mine: theirs - {mine, ""} for mine, theirs in found.items()}


def floors() -> list[list[str]]:
    """The rooms by floor, lowest first: a room stands one floor above the highest that it imports."""
    below, level = imports(), dict[str, int]()
    for name in rooms():  # imports go to earlier rooms only
        level[name] = 1 + max((level[other] for other in below[name]), default=-1)
    level[""] = max(level.values()) + 1  # what users import; it opens onto all floors
    return [[name for name in level if level[name] == floor] for floor in range(max(level.values()) + 1)]


def house() -> str:
    """The rooms on their floors, each with its sentence and what it imports."""
    sentences, below, levels = rooms(), imports(), floors()
    step, top = 102, 76
    out = Drawing(940, top + len(levels) * step + 8, "The rooms of the package, by floor")
    out.text(24, 32, "The rooms: imports go down only", "ink bold")
    out.text(24, 52, "A room stands one floor above the highest room that it imports.", "muted small")
    for number, names in enumerate(reversed(levels)):
        y, wide = top + number * step, 892 // len(names)
        for place, name in enumerate(names):
            x = 24 + place * wide
            out.box(x, y, wide - 8, step - 10, "soft s-strong" if name else "warmsoft s-warm")
            out.text(x + 12, y + 20, title(name), "ink bold mono")
            width = (wide - 28) // 6
            for at, text in enumerate(_wrap(sentences[name], width)):
                out.text(x + 12, y + 37 + 14 * at, text, "ink small")
            order = [other for other in sentences if other in below[name]]
            told = f"imports {', '.join(map(title, order)) or 'nothing of ours'}"
            for at, text in enumerate(_wrap(told if name else "imports each room as its names are used", width)):
                out.text(x + 12, y + 71 + 14 * at, text, "muted small")
    return out.svg()


def title(room: str) -> str:
    """The folder of a room, below icl_ft_fast/ but for the native code."""
    return {"": "icl_ft_fast", "_C": "csrc"}.get(room, room.replace(".", "/"))


def _wrap(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) + 1 > width and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


FIGURES = {"prefix-tree.svg": prefix_tree, "kv-cache.svg": kv_cache, "request.svg": request_path, "rooms.svg": house}


def main() -> None:
    """Write the figures that have changed."""
    for name, draw in FIGURES.items():
        path, drawn = DOCS / "figures" / name, draw()
        path.parent.mkdir(exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != drawn:
            path.write_text(drawn, encoding="utf-8")
            print(f"docs/figures/{name} written")


if __name__ == "__main__":
    main()
