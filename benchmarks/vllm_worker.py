"""Writes responses with vLLM on one thread, and tells the CPU seconds that it took.

Runs in vLLM's own environment and knows nothing of rrhf: `benchmarks.sampler_vllm` starts it. The
first argument holds the settings of `vllm.LLM` as JSON; then each line of the standard input holds
prompts (lists of ids) and, for each prompt, the lengths of its responses; each line of the output
the seconds, and the ids and log-probs of each response.
"""

import json
import os
import sys
import time

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # or the time of another process would not be counted
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="ERROR",
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
)
answers = os.dup(1)
os.dup2(2, 1)  # what vLLM prints is no answer

from vllm import LLM, SamplingParams, __version__  # noqa: E402, I001
import torch  # noqa: E402


def answer(value: object) -> None:
    os.write(answers, json.dumps(value).encode() + b"\n")


def main() -> None:
    llm = LLM(**json.loads(sys.argv[1]), disable_log_stats=True)
    torch.set_num_threads(1)
    answer({"version": __version__})
    for line in sys.stdin:
        job = json.loads(line)
        prompts, settings = [], []
        for ids, lengths in zip(job["prompts"], job["lengths"], strict=True):
            is_even = len(set(lengths)) == 1
            for length in lengths[:1] if is_even else lengths:
                prompts.append({"prompt_token_ids": ids})
                settings.append(
                    SamplingParams(
                        n=len(lengths) if is_even else 1,
                        max_tokens=length,
                        ignore_eos=True,
                        detokenize=False,
                        logprobs=0,
                    )
                )
        llm.reset_prefix_cache()
        started = time.process_time()
        found = llm.generate(prompts, settings, use_tqdm=False)
        seconds = time.process_time() - started
        written = [
            [list(one.token_ids), [next(iter(at.values())).logprob for at in one.logprobs]]
            for request in found
            for one in request.outputs
        ]
        answer({"seconds": seconds, "responses": written})


main()
