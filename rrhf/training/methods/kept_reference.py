"""Computes the log-probs of the reference policy once, before training, and keeps them on disk.

The name of a file is a hash of everything that its numbers depend on: config and weights of the
starting policy, token ids of the examples, precision of the forward pass. Other rows, another
tokenizer, chat format or length limit give other ids, so a file is never used for examples that it
was not made for. Layout and attention implementation only change the rounding of sums and are not
part of the name.

The policy itself computes the log-probs, before it is distributed and trained: no second model is
loaded. `rrhf.stages` shares the work among ranks and continues it after a kill. No file is deleted,
since other runs may use it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rrhf.data.collate import EncodedSet, TokenBatch, collate
from rrhf.errors import UserError
from rrhf.files import made_folder
from rrhf.manifests import COMPLETE, write_manifest
from rrhf.models.eval_mode import eval_mode
from rrhf.models.forward.logprobs import Policy
from rrhf.models.weights_digest import weights_digest
from rrhf.progress import Progress
from rrhf.signals import caught_signals
from rrhf.stages.part_file import PartAppender
from rrhf.stages.parts import POLL_SECONDS, is_held
from rrhf.stages.staged_file import GO_ON, StagedFile
from rrhf.training.core.reference import Reference
from rrhf.training.core.setup import Workbench
from rrhf.training.core.streams import GROUPING_STEPS, EncodedExamples
from rrhf.training.core.token_batches import Size, even_batches, micro_batches
from rrhf.training.methods.offline import step_cut
from rrhf.training.methods.reference_files import (
    NUMBER,
    WithReference,
    describe_others,
    folder_of,
    is_whole,
)

logger = logging.getLogger(__name__)

_STAGE = "reference_logprobs"


def kept_logprobs(batch: TokenBatch) -> Tensor:
    """Return [N, R] log-probs under the reference policy, which the examples of a batch hold."""
    assert batch.reference_logprobs is not None, "the examples came without a reference"
    return batch.reference_logprobs


class KeptReference:
    """Adds the log-probs of the starting policy to examples, read from a file, or computed and
    saved.

    Every rank must build and call the object, before the policy is distributed or trained.

    Args:
        bench: the opened run.
        policy: the policy at the start of the run; with LoRA, its adapters are switched off.
    """

    def __init__(self, bench: Workbench, policy: Policy) -> None:
        self._bench, self._policy = bench, policy
        self._digest = weights_digest(policy.model) if bench.parallel.is_main else ""

    def __call__(
        self, examples: EncodedExamples, source: str, indices: Sequence[int] | None = None
    ) -> WithReference:
        """Return the examples with their log-probs.

        Args:
            examples: the examples.
            source: the data file or mixture, as the user named it; the file of log-probs is kept
                next to it.
            indices: indices of the examples that need log-probs, ascending; None = all examples.

        Raises:
            UserError: a log-prob is not finite, the file cannot be written, or a rank was lost.
            StoppedBySignal: a signal was received; the log-probs computed so far are on disk.
        """
        parallel = self._bench.parallel
        indices = range(len(examples)) if indices is None else indices
        digest, counts = _described(examples, indices)
        settings = {
            "policy": self._digest,
            "examples": digest,
            "precision": "bfloat16" if self._bench.config.bf16 else "float32",
        }
        settings = parallel.gather([settings])[0]
        name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        file = folder_of(source, self._bench.run.path) / f"{name}.f32"
        told = f"{source}: reference log-probs of {len(indices):,} prompts"
        if parallel.gather([parallel.is_main and is_whole(file)])[0]:
            logger.info("%s: kept in %s", told, file)
        else:
            others = describe_others(file.parent, settings)
            logger.info("%s: computed now and kept in %s%s", told, file, others)
            _Pass(self._bench, self._policy, examples, indices, counts).write(file, settings)
            parallel.barrier()
        return WithReference(examples, indices, counts, file)


def _described(examples: EncodedExamples, indices: Sequence[int]) -> tuple[str, list[int]]:
    """Return a hash of these examples' token ids, and each example's number of response tokens."""
    if len(indices) == len(examples) and examples.sizes is not None:
        return examples.ids_sha256, [sum(size.responses) for size in examples.sizes]
    digest, counts = hashlib.sha256(), []
    for index in indices:
        example = examples[index]
        digest.update(example.packed_ids())
        counts.append(sum(map(len, example.response_ids)))
    return digest.hexdigest(), counts


class _Pass:
    """Computes this rank's share of the log-probs, and writes it."""

    def __init__(
        self,
        bench: Workbench,
        policy: Policy,
        examples: EncodedExamples,
        indices: Sequence[int],
        counts: Sequence[int],
    ) -> None:
        self._bench, self._policy = bench, policy
        self._examples, self._indices, self._counts = examples, indices, counts
        self._cut = step_cut(bench, policy)

    def write(self, file: Path, settings: Mapping[str, str]) -> None:
        """Compute and write this rank's share; return when the shares of all ranks are merged."""
        stop, parallel = self._bench.stop, self._bench.parallel
        wait_seconds = self._bench.config.ddp_timeout
        staged = StagedFile(file, _STAGE, parallel.rank, stop, wait_seconds=wait_seconds)
        with made_folder(file.parent), caught_signals(stop):
            self._wait_for_other_run(staged)
            parallel.barrier()  # before any rank of this run begins
            with staged.opened_part() as part:
                staged.make(
                    settings,
                    adjustable={},
                    prepare=lambda: None,
                    work=lambda: self._compute(staged, part),
                    finish=lambda: self._merge(staged, settings),
                )

    def _wait_for_other_run(self, staged: StagedFile) -> None:
        """Wait while another run, for example with another learning rate, makes the same file."""
        part = staged.parts.path_of(0)
        if is_held(part):
            logger.info("%s: another run is computing this file; waiting", staged.output)
        while is_held(part):
            self._bench.stop.raise_if_received("nothing was begun")
            time.sleep(POLL_SECONDS)

    def _groups(self) -> list[range]:
        """Return the places of this rank's examples, in groups; batches do not cross groups."""
        parallel, size = self._bench.parallel, self._cut.per_device_train_batch_size
        if self._cut.budget is not None:
            size *= GROUPING_STEPS
        starts = range(0, len(self._indices), size)[parallel.rank :: parallel.world_size]
        return [range(start, min(start + size, len(self._indices))) for start in starts]

    def _batches(self, places: Sequence[int]) -> Iterator[dict[int, EncodedSet]]:
        """Yield the examples at these places in batches of training's size, each as place ->
        example."""
        sets = {place: self._examples[self._indices[place]] for place in places}
        if self._cut.budget is None:
            cut = even_batches(len(places), self._cut.per_device_train_batch_size)
        else:
            cut = micro_batches([Size.of(one) for one in sets.values()], self._cut.budget)
        for chosen in cut[0]:
            yield {places[i]: sets[places[i]] for i in chosen}

    def _compute(self, staged: StagedFile, part: PartAppender) -> None:
        """Append the log-probs of this rank's examples that are not on disk yet."""
        bench, known, groups = self._bench, staged.parts.places, self._groups()
        total = sum(map(len, groups))
        done = sum(place in known for group in groups for place in group)
        device, home = bench.parallel.device, next(self._policy.parameters()).device
        frozen = None if bench.config.use_lora else self._policy
        reference = Reference(frozen, self._policy.to(device), bench.parallel)
        with eval_mode(self._policy), Progress("reference", total, "prompt", done) as progress:
            for group in groups:
                missing = known.missing(group)
                for sets in self._batches(missing) if missing else ():
                    bench.stop.raise_if_received(staged.what_stands(done, total))
                    batch = collate(list(sets.values()), bench.codec.pad_id).to(device)
                    part.append_all(self._rows(sets, reference(batch).cpu()))
                    done += len(sets)
                    progress.advance(len(sets))
        self._policy.to(home)

    def _rows(self, sets: Mapping[int, EncodedSet], logprobs: Tensor) -> list[dict[str, Any]]:
        """Return a row of the part file for each example of a batch: its place and log-probs."""
        rows, padded = [], iter(logprobs)
        for place, one in sets.items():
            numbers = torch.cat([next(padded)[: len(ids)] for ids in one.response_ids])
            if not numbers.isfinite().all():
                raise UserError(
                    f"{self._bench.config.model_name_or_path}: gives log-probs that are not finite "
                    f"(first: training example {self._indices[place]}), so it cannot be the "
                    "reference; check its weights"
                )
            text = base64.b64encode(numbers.numpy().astype(NUMBER).tobytes()).decode("ascii")
            rows.append({"id": place, "logprobs": text})
        return rows

    def _merge(self, staged: StagedFile, settings: Mapping[str, str]) -> None:
        """Write the file from the parts of all ranks, then its manifest."""
        places, mine = range(len(self._indices)), (p for group in self._groups() for p in group)
        staged.parts.wait_for(places, mine, self._bench.stop, GO_ON)
        with staged.parts.merged(places, _numbers_of) as rows:
            for _ in rows:
                pass
        write_manifest(
            staged.output,
            {
                "status": COMPLETE,
                "stage": _STAGE,
                "prompts": len(places),
                "tokens": sum(self._counts),
                **staged.parts.output_digest.as_dict(),
                "settings": settings,
            },
        )


def _numbers_of(row: Mapping[str, Any], line: bytes, places: Sequence[int]) -> bytes:
    return base64.b64decode(row["logprobs"])
