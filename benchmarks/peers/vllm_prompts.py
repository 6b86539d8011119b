"""vLLM on a Job: whole prompts, its prefix cache on, with prompt log-probabilities or, so that it is used, without."""

import json
import os
import sys
import time
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

from vllm import LLM, SamplingParams


def main() -> None:
    """Answer the Job named on the command line."""
    job, wants_logp = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2] == "vllm"
    llm = LLM(
        job["model"],
        dtype=job["dtype"],
        skip_tokenizer_init=True,
        enable_prefix_caching=True,
        max_model_len=16_384,
        max_num_seqs=4,
        enforce_eager=True,
    )
    sampling = SamplingParams(max_tokens=1, detokenize=False, prompt_logprobs=0 if wants_logp else None)

    def ask(prompts: list[list[int]]) -> list:
        return llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)

    start = time.perf_counter()
    ask([job["context"]])
    once = time.perf_counter() - start
    seconds, results = [], []
    for prompt, choices in list(zip(job["prompts"], job["choices"], strict=True))[: job["sample"]]:
        start = time.perf_counter()
        outputs = ask([job["context"] + prompt + choice for choice in choices])
        seconds.append(time.perf_counter() - start)
        if wants_logp:
            results.append(
                [
                    sum(output.prompt_logprobs[-len(choice) + i][token].logprob for i, token in enumerate(choice))
                    for output, choice in zip(outputs, choices, strict=True)
                ]
            )
    print(json.dumps({"once": 0.0 if wants_logp else once, "seconds": seconds, "logp": results}))


if __name__ == "__main__":
    main()
