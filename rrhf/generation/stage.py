"""`rrhf generate`: writes a candidate file of responses to prompts.

The command can be resumed, and several processes can share the prompts. The file does not depend on
how often the command was stopped or on how many processes wrote it. Batches are formed once from
the whole list of prompts; if only part of a batch was written, the whole batch is generated again,
and only its missing rows are kept. Rows are merged in the order of the prompts. If the settings
differ when a file is continued, the command refuses and lists the differences; only the batch size
may change, because it affects the responses only through rounding.

Left out on purpose: scores (`rrhf.scoring`), and finding out the number of this process (the
command line does that).
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from rrhf.data.candidate_rows import candidate_set_to_row
from rrhf.data.chat_format import ChatCodec
from rrhf.data.formats import SourceCounts
from rrhf.errors import UserError
from rrhf.files import made_folder
from rrhf.generation.build import EngineOptions
from rrhf.generation.config import GenerateConfig
from rrhf.generation.engine import (
    GenerationEngine,
    Sample,
    announce,
    check_decoding,
    finish,
    responses,
    usage,
)
from rrhf.generation.plan import Plan, plan_prompts
from rrhf.manifests import COMPLETE, write_manifest
from rrhf.model_paths import accept_edited_models, check_model_path
from rrhf.models.loading import LoadOptions, load_causal_lm, load_tokenizer, resolve_device
from rrhf.progress import Progress
from rrhf.records import CHOSEN_SOURCE, REJECTED_SOURCE, Candidate, CandidateSet
from rrhf.signals import StopRequest, caught_signals
from rrhf.stages.fingerprint import fingerprint
from rrhf.stages.journal import journal_path
from rrhf.stages.part_file import PartAppender
from rrhf.stages.staged_file import GO_ON, StagedFile

__all__ = ["GenerateConfig", "generate_file"]

logger = logging.getLogger(__name__)

_FAILED = "not_given:"
_COUNTED = {
    "dataset_responses": "responses of the data added",
    "empty_responses": "samples are empty",
    "duplicates_removed": "repeated responses left out",
}


def generate_file(
    config: GenerateConfig, rank: int = 0, world_size: int = 1, local_rank: int = 0
) -> Path:
    """Write the candidate file, or continue where an earlier call stopped.

    Every process returns when the whole file is complete.

    Args:
        config: the settings.
        rank: number of this process.
        world_size: number of processes that share the prompts.
        local_rank: number of this process on this machine.

    Raises:
        UserError: something is missing or does not fit; the file was begun with other settings.
        StoppedBySignal: SIGTERM or SIGINT was received; finished rows are on disk.
    """
    assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
    output = Path(config.output_file)
    accept_edited_models(config)
    if config.engine_spec.has_model:
        check_model_path(config.model_name_or_path)
    if config.engine_spec.is_remote and world_size > 1:
        raise UserError(
            f"--engine {config.engine}: sends many requests at once from one process, but "
            f"{world_size} processes were started; start the command without a launcher"
        )
    with made_folder(output.parent), caught_signals() as stop:
        return _Stage(config, rank, world_size, local_rank, stop).run()


def _kind(failure: str) -> str:
    """Return the first word of a failure: refusal, content_filter, too_long, failed, ..."""
    return failure.partition(":")[0]


class _Stage:
    """The part of one call of `generate_file` that one process does."""

    def __init__(
        self,
        config: GenerateConfig,
        rank: int,
        world_size: int,
        local_rank: int,
        stop: StopRequest,
    ) -> None:
        self.config = config
        self.share = slice(rank, None, world_size)
        self.world_size = world_size
        self.local_rank = local_rank
        self.stop = stop
        self.output = Path(config.output_file)
        self.staged = StagedFile(
            self.output, "generate", rank, stop, config.accept_edited_files, config.wait_seconds
        )
        self.parts = self.staged.parts
        self.params = config.sampling_params()
        self.is_remote = config.engine_spec.is_remote
        self.counts = SourceCounts()
        self.has_model = config.engine_spec.has_model
        self._first_failures: dict[str, str] = {}  # kind -> prompt and reason
        self._codec = cache(self._load_codec)
        self._engine = cache(lambda: stop.run(self._build, GO_ON))

    def run(self) -> Path:
        with self.staged.opened_part() as part:
            engine = None if self.has_model else self._engine()
            plan = self.stop.run(
                lambda: plan_prompts(
                    self.config, self.counts, self._codec() if engine is None else None, engine
                ),
                "nothing was written",
            )
            settings = self._settings(plan)
            self.staged.make(
                settings,
                {"per_device_prompt_batch_size": self.config.per_device_prompt_batch_size},
                prepare=partial(self._prepare, plan),
                work=partial(self._answer, plan, part),
                finish=partial(self._finish, plan, settings),
            )
            if self.is_remote:
                finish(self._engine())
        return self.output

    # Before.

    def _settings(self, plan: Plan) -> dict[str, Any]:
        """Return the settings on which responses depend; resuming with other values is refused."""
        config = self.config
        own: dict[str, Any] = {}
        if self.has_model:
            chat = self._codec().describe()
            own["chat"] = {key: value for key, value in chat.items() if key != "tokenizer"}
        else:
            own["engine_described"] = self._engine().describe()
        return {
            "model": fingerprint(config.model_name_or_path),
            "prompts": plan.digest,
            "num_prompts": config.num_prompts,
            "sampling": asdict(self.params) | {"stop_strings": list(self.params.stop_strings)},
            **own,
            "max_prompt_tokens": config.max_prompt_tokens,
            "add_dataset_responses": config.add_dataset_responses,
            **({"keep_candidates": True} if config.keep_candidates else {}),
            "deduplicate": config.deduplicate,
            "source": config.source,
            "engine": config.engine,
            "bf16": config.bf16,
            "attn_implementation": config.attn_implementation,
        }

    # The work.

    def _prepare(self, plan: Plan) -> None:
        """Load the model before anything is written, so that an error leaves no file behind."""
        self.parts.read_on(is_start=True)
        if left := self._left(plan):
            engine = self._engine()
            prompts = [p for batch in left for p in plan.prompts_of(batch)]
            self._tell_repeated(prompts)
            announce(engine, prompts, self.params)

    def _tell_repeated(self, prompts: Sequence[CandidateSet]) -> None:
        """Warn if the kept responses already hold some of the source whose responses are added."""
        source = self.config.source
        count = sum(any(c.source == source for c in prompt.candidates) for prompt in prompts)
        if count and self.config.keep_candidates:
            logger.warning(
                "%s already has responses of %s to %d prompts; further ones are added",
                self.config.prompts,
                source,
                count,
            )

    def _batches(self, plan: Plan) -> list[list[int]]:
        """Return the batches of this process."""
        return plan.batches[self.share]

    def _left(self, plan: Plan) -> list[list[int]]:
        """Return the batches of this process that are not complete on disk; a server is asked
        for what is missing of them."""
        known, left = self.parts.places, []
        for batch in self._batches(plan):
            missing = [position for position in batch if plan.ids[position] not in known]
            if missing:
                left.append(missing if self.is_remote else batch)
        return left

    def _answer(self, plan: Plan, part: PartAppender) -> None:
        """Write the rows of this process that are not on disk yet."""
        batches = self._left(plan)
        if not batches:
            return
        engine = self._engine()
        mine = [position for batch in self._batches(plan) for position in batch]
        done = sum(plan.ids[position] in self.parts.places for position in mine)
        tokens, engine_seconds = 0, 0.0
        with Progress("generate", len(mine), "prompt", done) as progress:
            for batch in batches:
                prompts = plan.prompts_of(batch)
                found = responses(engine, prompts, self.params)
                while True:
                    started = time.monotonic()
                    answer = self.stop.run(
                        partial(next, found, None), self.staged.what_stands(done, len(mine))
                    )
                    seconds = time.monotonic() - started
                    engine_seconds += seconds
                    if answer is None:
                        break
                    prompt, written = prompts[answer[0]], answer[1]
                    tokens += sum(one.num_tokens for one in written)
                    rate = f"{tokens / max(engine_seconds, 1e-9):.4g} tokens/s"
                    if prompt.id not in self.parts.places:
                        part.append(self._part_row(prompt, written, seconds))
                        done += 1
                        progress.advance(figures=rate if tokens else "")

    def _load_codec(self) -> ChatCodec:
        tokenizer = load_tokenizer(self.config.model_name_or_path, self.config.trust_remote_code)
        return ChatCodec(tokenizer, self.config.chat_format)

    def _load_policy(self) -> Any:
        """Load the policy onto this process' GPU, or onto the CPU if there is no GPU."""
        config, device = self.config, resolve_device()
        if device.type == "cuda":
            device = torch.device("cuda", self.local_rank % torch.cuda.device_count())
        model = load_causal_lm(config.model_name_or_path, LoadOptions.of(config, config.bf16))
        return model.to(device)  # type: ignore[arg-type]

    def _build(self) -> GenerationEngine:
        config = self.config
        rows_each = max(config.num_return_sequences, config.num_beams)
        engine = config.engine_spec.build(
            EngineOptions(
                config.model_name_or_path,
                self._load_policy,
                self._codec,
                config.per_device_prompt_batch_size * rows_each,
                config.max_prompt_tokens,
                config.engine_settings,
                config.temperature,
                answers_file=journal_path(self.output),
            )
        )
        check_decoding(engine, self.params)
        return engine

    def _part_row(
        self, prompt: CandidateSet, samples: Sequence[Sample], seconds: float
    ) -> dict[str, Any]:
        """Build a row of this process' part: the candidate row with its counts."""
        # Scores in the data, if any, are not on the scale of the scorer that comes next.
        given = [replace(candidate, score=None) for candidate in prompt.candidates]
        human = [c for c in given if c.source in (CHOSEN_SOURCE, REJECTED_SOURCE)]
        failures = Counter(_kind(sample.failure) for sample in samples if sample.failure)
        candidates = [
            Candidate(sample.text, self.config.source, None, sample.finish_reason)
            for sample in samples
            if not sample.failure
        ]
        num_new = len(candidates)
        if self.config.keep_candidates:
            candidates = given + candidates
        elif self.config.add_dataset_responses:
            candidates += human
        first_of: dict[str, Candidate] = {}
        for candidate in candidates:
            first_of.setdefault(" ".join(candidate.response.split()), candidate)
        kept = list(first_of.values())
        row = CandidateSet(
            prompt.id,
            prompt.query,
            prompt.messages,
            tuple(kept if self.config.deduplicate else candidates),
            prompt.origin,
        )
        written = [sample for sample in samples if not sample.failure]
        reasons = Counter(sample.finish_reason for sample in written)
        unknown = any(sample.known_tokens is None for sample in written)
        return {
            "id": prompt.id,
            "row": candidate_set_to_row(row),
            "counts": {
                "candidates": len(row.candidates),
                "samples": num_new,
                **({} if unknown else {"tokens": sum(one.num_tokens for one in written)}),
                **{f"{_FAILED}{kind}": count for kind, count in failures.items()},
                "empty_responses": sum(not sample.text.strip() for sample in written),
                "ended_by_themselves": reasons["stop"],
                "cut_at_max_new_tokens": reasons["length"],
                "dataset_responses": len(candidates) - num_new,
                "dataset_candidates_left_out": len(given) - (len(candidates) - num_new),
                "duplicates": len(candidates) - len(kept),
                "duplicates_removed": len(candidates) - len(row.candidates),
            },
            **({"failures": [one.failure for one in samples if one.failure]} if failures else {}),
            "seconds": seconds,
        }

    # After.

    def _finish(self, plan: Plan, settings: dict[str, Any]) -> None:
        """Merge the parts of all processes; the manifest marks the file as complete."""
        if self.world_size > 1:
            logger.info("waiting for the other processes")
        mine = [plan.ids[position] for batch in self._batches(plan) for position in batch]
        self.parts.wait_for(plan.ids, mine, self.stop, GO_ON)
        counts: Counter[str] = Counter()
        seconds = 0.0
        with self.parts.merged(plan.ids) as rows:
            for row, _ in rows:
                counts.update(row["counts"])
                seconds += row["seconds"]
                for name in row["counts"]:
                    if name.startswith(_FAILED):
                        self._first_failures.setdefault(name, f"{row['id']}: {row['failures'][0]}")
            if self._first_failures and not counts["samples"]:
                raise UserError(
                    f"{self.output}: no prompt got a response "
                    f"(prompt {next(iter(self._first_failures.values()))}); correct the settings, "
                    "and choose another --output_file, since this one keeps what failed"
                )
        write_manifest(self.output, self._manifest(plan, settings, counts, seconds))
        self._tell(plan, counts, seconds)

    def _tell(self, plan: Plan, counts: Mapping[str, int], seconds: float) -> None:
        """Log a summary; warn if no response ends by itself."""
        samples, ended, tokens = (
            counts[name] for name in ("samples", "ended_by_themselves", "tokens")
        )
        parts = [
            f"{samples:,} responses to {len(plan.ids):,} prompts, "
            + (f"{tokens / max(samples, 1):.1f} tokens each on average, " if tokens else "")
            + f"{ended / max(samples, 1):.0%} ended by themselves"
        ]
        if seconds and tokens:
            parts.append(f"{tokens / seconds:.0f} tokens/s")
        for name, words in _COUNTED.items():
            if counts[name]:
                parts.append(f"{counts[name]:,} {words}")
        for name, count in counts.items():
            if name.startswith(_FAILED):
                logger.warning(
                    "%d responses are missing (%s; first: prompt %s): they were not given, and "
                    "nothing stands in their place",
                    count,
                    name.removeprefix(_FAILED),
                    self._first_failures[name],
                )
        if samples and not ended:
            logger.warning(
                "no response ends: all %d were cut at --max_new_tokens %d; raise the limit, or use "
                "a fine-tuned policy that ends its answers (see also --chat_format)",
                samples,
                self.params.max_new_tokens,
            )
        logger.info("%s: %s", self.output, "; ".join(parts))

    def _manifest(
        self, plan: Plan, settings: dict[str, Any], counts: Mapping[str, int], seconds: float
    ) -> dict[str, Any]:
        config = self.config
        not_given = {
            name.removeprefix(_FAILED): count
            for name, count in counts.items()
            if name.startswith(_FAILED)
        }
        return {
            "status": COMPLETE,
            "stage": "generate",
            "rows": len(plan.ids),
            **self.parts.output_digest.as_dict(),
            **{name: count for name, count in counts.items() if not name.startswith(_FAILED)},
            **({"not_given": not_given} if not_given else {}),
            "dropped_prompts": plan.dropped,
            **plan.counts,
            "input": {"prompts": config.prompts, "sha256": plan.digest, **self.counts.as_dict()},
            "engine": f"{config.engine}:{config.model_name_or_path}",
            "settings": settings,
            "per_device_prompt_batch_size": config.per_device_prompt_batch_size,
            "seed": config.seed,
            "engine_seconds": round(seconds, 3),
            "tokens_per_engine_second": round(counts["tokens"] / seconds, 1)
            if seconds and "tokens" in counts
            else None,
            **(usage(self._engine()) if self.is_remote else {}),
            "scorer": None,
        }
