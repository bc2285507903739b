"""The engine whose responses a vLLM server next to this process writes.

The prompts' ids are sent, and ids with their log-probs come back; text is decoded here. Each prompt
is one request with its own seed, which derives from (seed, round, prompt id), and vLLM numbers the
samples of a request from that seed. Work that is repeated after a failure therefore repeats the
same requests.

Outside training, the server must have the weights of the policy's folder: eight canaries are scored
on both sides before the first responses and after each call's, because another command may give the
server other weights at any time. A server that has others is given the policy's, if it takes
weights.
In training, the caller gives the server new weights by `load` before each rollout, and calls
`require_same` after it. A call returns nothing before the server proved to be the one whose weights
were checked, so a restarted server's responses are never used.

Left out on purpose: beam search; text-only servers (`--engine openai_server`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rrhf.data.collate import EncodedSet, collate
from rrhf.errors import UserError
from rrhf.generation.build import EngineOptions
from rrhf.generation.engine import Capabilities, Sample, SamplingParams
from rrhf.generation.params import check_params, prompt_room
from rrhf.generation.samples import require_fit, sample_of
from rrhf.generation.vllm.canaries import (
    COARSE_BOUND,
    FLOAT32_BOUND,
    Canaries,
    WrongWeights,
    canary_prompts,
)
from rrhf.generation.vllm.http import ServerFault
from rrhf.generation.vllm.server import Choice, Served, VLLMServer
from rrhf.generation.vllm.settings import VLLMSettings
from rrhf.models.eval_mode import eval_mode
from rrhf.models.forward.logprobs import LogprobOptions, Policy
from rrhf.models.loading import context_window
from rrhf.models.untied import write_untied_folder
from rrhf.os_errors import explained_os_errors
from rrhf.records import CandidateSet

logger = logging.getLogger(__name__)


class VLLMEngine:
    """Samples from a vLLM server.

    Args:
        options: the policy, and the server's settings.

    Attributes:
        server: sends the requests.
        capabilities: log-probs are at the sampling temperature in training, where the weights that
            the server is given are made for that; otherwise only if the temperature is 1.
    """

    def __init__(self, options: EngineOptions) -> None:
        assert isinstance(options.settings, VLLMSettings), "the settings of --engine vllm"
        self._options, self.settings = options, options.settings
        self.server = VLLMServer(options.settings)
        self._served = self.server.require(options.is_live)
        if folder := self.sync_folder():  # a training would notice only at its first rollout
            with explained_os_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryDirectory(dir=folder).cleanup()
        self._checked: Served | None = None  # the server whose weights were found right
        self.capabilities = Capabilities(
            ids=True,
            logprobs=options.is_live or options.temperature == 1.0,
            seeds=True,
            live_weights=options.is_live,
        )

    def describe(self) -> dict[str, Any]:
        """Describe the engine, with what the server serves."""
        served = self._served
        return {"engine": "vllm", "model": served.root, "dtype": served.dtype}

    # What fits.

    def fits(self, prompt: CandidateSet, params: SamplingParams) -> bool:
        """Whether the prompt, without its oldest turns if need be, leaves room for a response."""
        return self._encode(prompt, params) is not None

    def _encode(self, prompt: CandidateSet, params: SamplingParams) -> list[int] | None:
        return self._options.codec().encode_prompt(prompt, self._room(params)) or None

    def _room(self, params: SamplingParams) -> int | None:
        """Return the longest prompt that fits, in tokens.

        Raises:
            UserError: the server's window is too small for what the settings allow.
        """
        options = self._options
        window = context_window(options.model() if options.is_live else options.model_name_or_path)
        room = prompt_room(window, params, options.max_prompt_tokens)
        needed = params.max_new_tokens + (room or 1)
        if needed > self._served.window:
            raise UserError(
                f"--engine vllm: the server takes {self._served.window} tokens, but prompts of up "
                f"to {room} tokens and responses of {params.max_new_tokens} need {needed}; start "
                f"it with --max_model_len {needed}, or allow shorter prompts or responses"
            )
        return room

    # Responses.

    def generate(
        self, prompts: Sequence[CandidateSet], params: SamplingParams
    ) -> Iterator[tuple[int, list[Sample]]]:
        """Yield the index and the N samples of each prompt, once all are there.

        Raises:
            ServerFault: in training: the server failed; its responses are dropped.
            UserError: a prompt does not fit, or the server failed more than `server_retries` times.
        """
        check_params(params)
        if self._options.is_live:
            yield from enumerate(self._draw(prompts, params))
            return
        for left in range(self.settings.server_retries, -1, -1):
            try:
                self._ensure_weights()
                samples = self._draw(prompts, params)
                if self.settings.check_weights:
                    self.require_same()
                else:
                    self._require_same_instance()
                break
            except ServerFault as fault:
                self.give_up_or_wait(fault, left)
        yield from enumerate(samples)

    def give_up_or_wait(self, fault: ServerFault, left: int) -> None:
        """Wait until the server answers again; give up if no repetition is left.

        Raises:
            UserError: no repetition is left, or the server does not come back.
        """
        where = f"--engine vllm: the server at {self.settings.base_url}"
        if not left:
            raise UserError(
                f"{where} {fault}; this was repeated --server_retries "
                f"{self.settings.server_retries} times. See the server's own log"
            ) from fault
        logger.warning("%s %s; its responses are dropped and drawn again", where, fault)
        self._checked = None  # what failed may be a request that another program's sync aborted
        self._served = self.server.wait()

    def _draw(self, prompts: Sequence[CandidateSet], params: SamplingParams) -> list[list[Sample]]:
        """Draw the samples of all prompts, several requests at a time.

        Raises:
            ServerFault: a request failed.
        """
        jobs = []
        for prompt in prompts:
            ids = self._encode(prompt, params)
            jobs.append((prompt, require_fit(prompt, ids, self._room(params))))
        at_a_time = max(1, self._options.max_batch_rows // params.num_return_sequences)
        pool = ThreadPoolExecutor(min(at_a_time, max(1, len(jobs))))
        try:
            answers = [pool.submit(self._answer, prompt, ids, params) for prompt, ids in jobs]
            return [answer.result() for answer in answers]
        finally:  # also after a signal: the threads end as soon as their connections do
            pool.shutdown(wait=False, cancel_futures=True)
            with self.server.http.hang_up():
                pool.shutdown()

    def _answer(self, prompt: CandidateSet, ids: list[int], params: SamplingParams) -> list[Sample]:
        codec = self._options.codec()
        stops = (*codec.stop_strings(prompt), *params.stop_strings)
        asked = self._request(prompt, stops, params)
        (choices,) = self.server.complete(self._served, [ids], asked)
        return [self._sample(prompt, ids, stops, choice) for choice in choices]

    def _request(
        self, prompt: CandidateSet, stops: Sequence[str], params: SamplingParams
    ) -> dict[str, Any]:
        """Return vLLM's sampling parameters; nothing is left to the server's defaults."""
        # In training, the output layer of the server's weights is divided by the temperature.
        temperature = 1.0 if self._options.is_live else params.temperature
        sampled = {
            "temperature": temperature,
            "top_k": params.top_k,
            "top_p": params.top_p,
            "seed": request_seed(params, prompt.id),
        }
        return {
            "n": params.num_return_sequences,
            "max_tokens": params.max_new_tokens,
            "min_tokens": params.min_new_tokens,
            "repetition_penalty": params.repetition_penalty,
            "ignore_eos": True,  # the codec's end ids count, not those of the server's model
            "stop_token_ids": sorted(self._options.codec().end_ids),
            "stop": list(stops),
            **(sampled if params.do_sample else {"temperature": 0.0}),
        }

    def _sample(
        self, prompt: CandidateSet, ids: list[int], stops: Sequence[str], choice: Choice
    ) -> Sample:
        logprobs = torch.tensor(choice.logprobs) if self.capabilities.logprobs else None
        end = "stop" if choice.finish_reason == "stop" else "length"
        written = torch.tensor(choice.token_ids), logprobs, end
        return sample_of(self._options.codec(), prompt, ids, stops, written)  # type: ignore[arg-type]

    # Weights.

    @property
    def retries(self) -> int:
        return self.settings.server_retries

    def sync_folder(self) -> Path | None:
        """Return the folder in which weights are passed; None = within the run folder."""
        return Path(self.settings.sync_folder) if self.settings.sync_folder else None

    def wait(self) -> None:
        """Wait until the server answers again.

        Raises:
            UserError: it does not come back.
        """
        self._served = self.server.wait()

    def load(self, policy_folder: Path) -> dict[str, float]:
        """Give the server the weights of a folder, and compare canaries with the live policy.

        Args:
            policy_folder: from `write_untied_folder`.

        Raises:
            WrongWeights: the server's log-probs are not the policy's.
            ServerFault: the server failed.
        """
        self._checked = None
        self._served = self.server.describe()
        self.server.resume()
        self._canaries.warm(self._served)
        self.server.load(policy_folder)
        found = self._canaries.check(self._served)
        self._require_same_instance()
        self._checked = self._served
        return asdict(found)

    def require_same(self) -> None:
        """Check that the server still has the policy's weights.

        Raises:
            WrongWeights: it was restarted, or its log-probs are no longer the policy's.
            ServerFault: the server failed.
        """
        self._require_same_instance()
        self._canaries.check(self._served, are_new=False)

    def _require_same_instance(self) -> None:
        if (now := self.server.describe()).instance != self._served.instance:
            self._served, self._checked = now, None
            raise WrongWeights("was restarted, and has the weights that it was started with")

    def _ensure_weights(self) -> None:
        """Outside training: compare canaries with a server that is new or failed, and give it the
        policy's weights if it has others."""
        if not self.settings.check_weights or self._checked == self._served:
            return
        if self._served.takes_weights:
            self.server.resume()
        try:
            self._canaries.check(self._served)
        except WrongWeights as wrong:
            if not self._served.takes_weights:
                raise UserError(
                    f"--engine vllm: the server at {self.settings.base_url} serves "
                    f"{self._served.root} and {wrong}. Start one with `rrhf engine vllm start "
                    f"{self._options.model_name_or_path}`"
                ) from wrong
            logger.info("the vLLM server has other weights; it is given those of the policy")
            with tempfile.TemporaryDirectory(dir=self.settings.sync_folder or None) as folder:
                write_untied_folder(Path(folder) / "policy", self._options.model())
                self.load(Path(folder) / "policy")
        self._checked = self._served

    @cached_property
    def _canaries(self) -> Canaries:
        codec = self._options.codec()
        window = min(self._served.window, context_window(self._options.model()) or 1 << 30)
        return Canaries(self.server, canary_prompts(codec, window), self._score, self.bound)

    @property
    def bound(self) -> float:
        """Largest difference between server and policy that is accepted, nats per token."""
        weights = next(self._options.model().parameters())
        is_exact = weights.dtype == torch.float32 and self._served.dtype in ("float32", "")
        return self.settings.canary_tolerance or (FLOAT32_BOUND if is_exact else COARSE_BOUND)

    @torch.no_grad()
    def _score(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Compute log-probs under the policy, in the precision of its weights."""
        model, codec = self._options.model(), self._options.codec()
        temperature = self._options.temperature if self._options.is_live else 1.0
        policy = Policy(model, LogprobOptions(temperature))
        device = next(model.parameters()).device
        with eval_mode(model), torch.autocast(device.type, enabled=False):
            return [
                policy(
                    collate([EncodedSet(list(ids[:1]), [list(ids[1:])])], codec.pad_id).to(device)
                )
                .logprobs[0]
                .cpu()
                for ids in sequences
            ]


def request_seed(params: SamplingParams, prompt_id: str) -> int:
    """Return the seed of a prompt's request; vLLM adds the index of the sample to it."""
    key = json.dumps([params.seed, params.round, prompt_id]).encode("ascii")
    return int.from_bytes(hashlib.shake_256(key).digest(8), "little") >> 2
