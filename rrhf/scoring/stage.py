"""Scores a candidate file, row by row; a run that was killed can be continued.

The output does not depend on how often the command was stopped or on how many processes wrote it.
The whole file is divided once into chunks of prompts, for each of which the scorer is called. If
only part of a chunk was written, the whole chunk is scored again, and only its missing rows are
kept. Rows are merged in the file's order. The stage stops with an error if the scorer fails too
often. A candidate that exceeds the window of a reward model is not a failure: it gets no score, and
is counted separately.

The scorers themselves are made by `rrhf.scoring.build`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rrhf.commands import command_of
from rrhf.data.candidate_files import CandidateFile
from rrhf.data.formats import SourceCounts
from rrhf.data.mixing import Mixture, load_sets
from rrhf.ensemble_names import scorer_names
from rrhf.errors import UserError
from rrhf.files import made_folder, sha256_file, with_home_folder
from rrhf.manifests import COMPLETE, manifest_path, read_manifest, write_manifest
from rrhf.model_paths import accept_edited_models
from rrhf.models.loading import resolve_device
from rrhf.progress import Progress
from rrhf.records import CandidateSet
from rrhf.scoring.build import build_scorer, check_scorer, made_by, users_target
from rrhf.scoring.config import ScoreConfig
from rrhf.scoring.part_rows import (
    Scores,
    entries_of,
    lines_of_file,
    lines_of_rows,
    num_failed,
    runs_of,
    scored_row,
)
from rrhf.scoring.scorer import Scorer
from rrhf.scoring.spread import ScoreSpread
from rrhf.signals import StopRequest, caught_signals
from rrhf.stages.fingerprint import fingerprint
from rrhf.stages.part_file import PartAppender
from rrhf.stages.staged_file import GO_ON, StagedFile
from rrhf.user_code import source_file

logger = logging.getLogger(__name__)

# Settings that only divide the work, and affect scores only through the rounding of sums.
_ADJUSTABLE = ("prompts_per_chunk", "max_batch_tokens", "layout")
# Names of the manifest's counts, in the manifest's order.
_COUNTS = (*("candidates", "scored_candidates", "scores_kept", "unscored", "too_long_to_score"),)
_NOT_SETTINGS = (
    *_ADJUSTABLE,
    "output_file",
    "input_file",
    "max_unscored_fraction",
    "accept_edited_files",
    "columns",
    "wait_seconds",
    "scorer_hosts",
)


def score_file(
    config: ScoreConfig,
    rank: int = 0,
    world_size: int = 1,
    local_rank: int = 0,
    make_scorer: Callable[[torch.device], Scorer] | None = None,
) -> Path:
    """Write the scored candidate file, or continue it.

    Every process returns when the whole file is written.

    Args:
        config: the settings.
        rank: number of this process.
        world_size: number of processes that share the prompts.
        local_rank: number of this process on this machine.
        make_scorer: makes a scorer that has no name; `config.scorer` must then describe everything
            on which its scores depend. None = use the scorer that `config.scorer` names.

    Raises:
        UserError: something is missing or does not fit; the file was begun with other settings;
            too many candidates could not be scored.
        StoppedBySignal: SIGTERM or SIGINT was received; finished rows are on disk.
    """
    assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
    output = Path(config.output_file)
    with made_folder(output.parent), caught_signals() as stop:
        return _Stage(config, rank, world_size, local_rank, stop, make_scorer).run()


@dataclass(frozen=True)
class Input:
    """The rows to score.

    Attributes:
        sets: the prompts with their candidates.
        to_score: number of candidates that need a score.
    """

    sets: CandidateFile | Mixture
    to_score: int

    @property
    def file(self) -> CandidateFile | None:
        """The input file, if its lines can be copied to the output with scores added; None if rows
        must be encoded anew."""
        sets = self.sets
        return sets if isinstance(sets, CandidateFile) and sets.is_as_written else None


class _Stage:
    """The part of one call of `score_file` that one process does."""

    def __init__(
        self,
        config: ScoreConfig,
        rank: int,
        world_size: int,
        local_rank: int,
        stop: StopRequest,
        make_scorer: Callable[[torch.device], Scorer] | None,
    ) -> None:
        self.config = config
        self.make_scorer = make_scorer
        self.share = slice(rank, None, world_size)
        self.local_rank = local_rank
        self.stop = stop
        self.output = Path(config.output_file)
        self.staged = StagedFile(
            self.output, "score", rank, stop, config.accept_edited_files, config.wait_seconds
        )
        self.parts = self.staged.parts
        self.counts = SourceCounts()
        self._built: Scorer | None = None

    def run(self) -> Path:
        if self.make_scorer is None:
            accept_edited_models(self.config)
            check_scorer(self.config.scorer, self.config)
        with self.staged.opened_part() as part:
            found = self.stop.run(self._read_input, "nothing was written")
            settings = self._settings(found)
            adjustable = {name: getattr(self.config, name) for name in _ADJUSTABLE}
            self.staged.make(
                settings,
                adjustable,
                prepare=partial(self._scorer, "nothing was written"),
                work=partial(self._score, found, part),
                finish=partial(self._finish, found, settings, adjustable),
            )
        return self.output

    # Before.

    def _read_input(self) -> Input:
        sets = load_sets(self.config.input_file, counts=self.counts, options=self.config)
        if self.config.only_missing:
            to_score = sum(s.scores.count(None) for s in sets)
        elif isinstance(sets, CandidateFile):
            to_score = sets.num_candidates
        else:
            to_score = sum(len(s.candidates) for s in sets)
        return Input(sets, to_score)

    def _settings(self, found: Input) -> dict[str, Any]:
        """Return the settings on which scores depend; resuming with other values is refused."""
        options = {
            item.name: getattr(self.config, item.name)
            for item in fields(self.config)
            if item.name not in _NOT_SETTINGS
        }
        base, scorer = self.config.reward_base, self.config.scorer
        is_given = self.make_scorer is not None
        return {
            **options,
            "scorer_fingerprint": scorer if is_given else scorer_fingerprint(scorer),
            "base_fingerprint": None if base is None else fingerprint(base),
            "input_sha256": found.sets.digest,
        }

    # The work.

    def _chunks(self, found: Input) -> list[range]:
        """Return the positions of this process' prompts, in chunks that are scored together."""
        size, total = self.config.prompts_per_chunk, len(found.sets)
        starts = range(0, total, size)[self.share]
        return [range(start, min(start + size, total)) for start in starts]

    def _score(self, found: Input, part: PartAppender) -> None:
        """Write the rows of this process' chunks that are not on disk yet."""
        places, mine = self.parts.places, self._chunks(found)
        total = sum(len(chunk) for chunk in mine)
        done = [place for chunk in mine for place in chunk if place in places] if places else []
        failed = num_failed((row, held) for row, _, held in self.parts.rows(done))
        self._require_few_failures(failed, found)
        num_done = len(done)
        num_scores, total_score = 0, 0.0
        with Progress("score", total, "prompt", num_done) as progress:
            for chunk in mine:
                missing = places.missing(chunk)
                if not missing:
                    continue
                what_stands = self.staged.what_stands(num_done, total)
                scorer = self._scorer(what_stands)
                sets = found.sets[chunk.start : chunk.stop]
                started = time.monotonic()
                scored = self.stop.run(partial(self._score_chunk, scorer, sets), what_stands)
                seconds = round((time.monotonic() - started) / len(sets), 9)
                rows = []
                for run in runs_of(missing):
                    cut = slice(run.start - chunk.start, run.stop - chunk.start)
                    row = self._part_row(scorer, sets[cut], scored[cut])
                    row |= {"id": run.start, "count": len(run), "seconds": seconds}
                    if found.file is None:
                        row["row"] = list(map(scored_row, sets[cut], scored[cut]))
                    rows.append((row, run))
                    known = [
                        score for scores in scored[cut] for score in scores if score is not None
                    ]
                    num_scores, total_score = num_scores + len(known), total_score + sum(known)
                part.append_all([row for row, _ in rows])
                failed += num_failed(rows)
                num_done += len(missing)
                mean = total_score / max(num_scores, 1)
                progress.advance(len(missing), f"mean {scorer.quantity} {mean:.4g}")
                self._require_few_failures(failed, found)

    def _score_chunk(
        self, scorer: Scorer, sets: Sequence[CandidateSet]
    ) -> list[list[float | None]]:
        """Score the sets; with `only_missing`, existing scores are kept and not computed again."""
        is_kept = self.config.only_missing
        asked = sets
        if is_kept:
            asked = [
                replace(s, candidates=tuple(c for c in s.candidates if c.score is None))
                for s in sets
            ]
        answers = iter(scorer.score([s for s in asked if s.responses]))
        given = [next(answers) if s.responses else [] for s in asked]
        assert next(answers, None) is None, f"{scorer.name} gave a score too many"
        if not is_kept:
            return given
        news = iter([score for scores in given for score in scores])
        return [[next(news) if score is None else score for score in s.scores] for s in sets]

    def _part_row(
        self, scorer: Scorer, sets: Sequence[CandidateSet], scored: Sequence[Scores]
    ) -> dict[str, Any]:
        """Build a row of the part: the scores, and how many were kept or exceed the window."""
        row: dict[str, Any] = {"scores": scored}
        if self.config.only_missing:
            row["kept"] = [len(s.candidates) - s.scores.count(None) for s in sets]
        if any(None in scores for scores in scored):
            row["too_long"] = [
                sum(
                    not scorer.fits(s, candidate)
                    for candidate, score in zip(s.candidates, scores, strict=True)
                    if score is None
                )
                for s, scores in zip(sets, scored, strict=True)
            ]
        return row

    def _require_few_failures(self, failed: int, found: Input) -> None:
        """Stop as soon as too many candidates of the whole file have failed.

        Raises:
            UserError: the scorer failed on more candidates than are allowed.
        """
        allowed = self.config.max_unscored_fraction
        if failed > allowed * found.to_score:
            begun = [manifest_path(self.output), *self.parts.paths()]
            raise UserError(
                f"{self.output}: {failed} of {found.to_score} candidates could not be scored, more "
                f"than --max_unscored_fraction {allowed}. Fix the cause (see the log), remove "
                f"{', '.join(path.name for path in begun)} and begin anew; or continue without "
                "these scores (--only_missing can add them to the output later): "
                + command_of("rrhf score", self.config, max_unscored_fraction=1.0)
            )

    def _require_scores(self, counts: Mapping[str, int], found: Input) -> None:
        """Refuse to finish a file in which no candidate has a score."""
        is_wanted = found.to_score and self.config.max_unscored_fraction < 1
        if is_wanted and counts["unscored"] == counts["candidates"]:
            why = "the log says why"
            if counts["too_long_to_score"]:
                why = (
                    f"{counts['too_long_to_score']} exceed {_window_of(self._scorer(GO_ON))}: use "
                    "a reward model with a longer window, or generate shorter responses to "
                    "shorter prompts (--max_new_tokens, --max_prompt_tokens)"
                )
            raise UserError(
                f"{self.output}: none of {counts['candidates']} candidates has a score; {why}"
            )

    def _scorer(self, what_stands: str) -> Scorer:
        if self._built is None:
            self._built = self.stop.run(self._build, what_stands)
        return self._built

    def _build(self) -> Scorer:
        device = resolve_device()
        if device.type == "cuda":
            device = torch.device("cuda", self.local_rank % torch.cuda.device_count())
        if self.make_scorer is not None:
            return self.make_scorer(device)
        return build_scorer(self.config.scorer, self.config, device)

    # After.

    def _finish(self, found: Input, settings: dict[str, Any], adjustable: dict[str, Any]) -> None:
        """Merge the parts of all processes, and write the manifest of the finished file."""
        scorer = self._scorer(GO_ON)
        mine = (place for chunk in self._chunks(found) for place in chunk)
        places = range(len(found.sets))
        self.parts.wait_for(places, mine, self.stop, GO_ON)
        counts = dict.fromkeys(_COUNTS, 0)
        seconds, spread = 0.0, ScoreSpread(scorer.quantity, scorer.unit)
        file = found.file
        line_of = lines_of_rows(found.sets) if file is None else lines_of_file(file)
        with self.parts.merged(places, line_of) as rows:
            for row, held in rows:
                entries = entries_of(row, held)
                seconds += row["seconds"] * len(held)
                counts["scores_kept"] += sum(entries.get("kept", ()))
                counts["too_long_to_score"] += sum(entries.get("too_long", ()))
                for scores in entries["scores"]:
                    counts["candidates"] += len(scores)
                    counts["unscored"] += scores.count(None)
                    spread.add(scores)
            counts["scored_candidates"] = counts["candidates"] - counts["unscored"]
            self._require_few_failures(counts["unscored"] - counts["too_long_to_score"], found)
            self._require_scores(counts, found)
        details = scorer.describe()
        write_manifest(
            self.output,
            {
                "status": COMPLETE,
                "stage": "score",
                "rows": len(found.sets),
                **self.parts.output_digest.as_dict(),
                **counts,
                "scorer": details.pop("name"),
                "normalized": details.pop("normalized"),
                "scorer_details": details,
                "input": {
                    "input_file": self.config.input_file,
                    "sha256": found.sets.digest,
                    **self.counts.as_dict(),
                    "manifest": _input_manifest(self.config.input_file),
                },
                "settings": settings,
                **adjustable,
                "scorer_seconds": round(seconds, 3),
                "candidates_per_scorer_second": (
                    round(found.to_score / seconds, 1) if seconds else None
                ),
            },
        )
        if self.make_scorer is None and (fault := spread.fault()):
            logger.warning(
                "%s: %s, so ranking and PPO learn nothing from them; check --scorer %s",
                self.output,
                fault,
                self.config.scorer,
            )
        if counts["too_long_to_score"]:
            logger.warning(
                "%d of %d candidates exceed %s: they have no score, so training leaves them out",
                counts["too_long_to_score"],
                counts["candidates"],
                _window_of(scorer),
            )
        logger.info(
            "%s: %d of %d candidates of %d prompts have a %s; %s",
            self.output,
            counts["scored_candidates"],
            counts["candidates"],
            len(found.sets),
            spread.quantity,
            spread,
        )


def _window_of(scorer: Scorer) -> str:
    size = "" if scorer.window is None else f" of {scorer.window} tokens"
    return f"{scorer.name}'s window{size}"


def scorer_fingerprint(spec: str) -> str:
    """Return a hash that changes with the scorer: of a model's files, or of the user's source code.

    For an ensemble, the result contains the hashes of all members.

    Raises:
        UserError: the scorer's name names code that does not exist.
    """
    names = scorer_names(spec)
    if names != [spec]:
        return ",".join(map(scorer_fingerprint, names))
    if made_by(spec)[0] == "judge":
        from rrhf.scoring.judges.scorer import judge_fingerprint

        return judge_fingerprint(spec)
    path = with_home_folder(spec)
    if path.is_file():
        return sha256_file(path)
    if (target := users_target(spec)) is not None:
        source = source_file(target)
        return spec if source is None else sha256_file(source)
    return fingerprint(spec)


def _input_manifest(input_file: str) -> Mapping[str, Any] | None:
    """Read the manifest of the input, which the output's manifest includes; None if there is
    none."""
    return read_manifest(input_file) if Path(input_file).is_file() else None
