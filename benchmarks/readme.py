"""Write the demo's output into README.md, between its markers: `python -m benchmarks.readme`."""

import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"<!-- demo -->\n.*?<!-- /demo -->", re.DOTALL)


def main() -> None:
    """Run the demo as a user does and replace the block."""
    command = [sys.executable, "-m", "icl_ft_fast.cli", "demo", "--quiet"]
    environment = {**os.environ, "COLUMNS": "100"}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    block = f"<!-- demo -->\n```text\n{output.strip()}\n```\n<!-- /demo -->"
    text, count = BLOCK.subn(lambda _: block, README.read_text(encoding="utf-8"))
    if count != 1:
        raise SystemExit(f"{README}: expected one <!-- demo --> block, found {count}")
    README.write_text(text, encoding="utf-8")
    print(f"{README.name} updated")


if __name__ == "__main__":
    main()
