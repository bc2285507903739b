"""`rrhf evaluate`: measures a policy, or given responses, on held-out prompts and writes rows.

Each row is a JSON file with its responses next to it (`rrhf.evaluation.results`); `rrhf compare`
puts the rows of several evaluations into a table. A baseline gets its own rows, so that a table can
show values before and after training. Code that has models in memory uses
`rrhf.evaluation.evaluator.Evaluator` directly, as this module does after it has loaded the models.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import rrhf
from rrhf.data.candidate_files import CandidateFile
from rrhf.errors import UserError
from rrhf.evaluation.baseline import (
    GIVEN,
    Baseline,
    is_name_of_another,
    is_own_samples,
    name_of_responses,
    policy_name,
    same_place,
    standing_row,
)
from rrhf.evaluation.checks import check_metrics, check_places, row_name
from rrhf.evaluation.config import EvaluateConfig
from rrhf.evaluation.draft import describe_decoding
from rrhf.evaluation.evaluator import Evaluator
from rrhf.evaluation.inputs import (
    find_world,
    given_responses,
    is_model_folder,
    load_evaluation_data,
)
from rrhf.evaluation.likelihoods import LikelihoodReader
from rrhf.evaluation.models import Models
from rrhf.evaluation.reached import signs_of_nothing
from rrhf.evaluation.results import file_stem, save_row
from rrhf.evaluation.shared import Shared
from rrhf.evaluation.weight_distance import stored_weight_distance, weight_distance
from rrhf.files import made_folder
from rrhf.generation.engine import (
    GenerationEngine,
    announce,
    check_decoding,
    engine_name,
    finish,
    missing_capabilities,
    usage,
)
from rrhf.generation.fitting import Fitting, fit_by_engine, fit_by_tokens
from rrhf.generation.params import prompt_room
from rrhf.manifests import read_manifest
from rrhf.model_paths import accept_edited_models, model_folder
from rrhf.models.loading import context_window
from rrhf.os_errors import explained_os_errors
from rrhf.scoring.build import build_scorer

logger = logging.getLogger(__name__)

# For win rates, the baseline's responses are sampled with another seed than those of rows. With the
# same seed, every response in the baseline's own row would be compared with itself, a tie.
BASELINE_SEED_STEP = 1_000_003


@dataclass(frozen=True)
class EvaluationResult:
    """The rows of an evaluation, and where they were written.

    Attributes:
        rows: one dict for each row.
        files: the file of each row.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)


def evaluate(config: EvaluateConfig) -> EvaluationResult:
    """Load the models, measure, and write the rows.

    Raises:
        UserError: something is missing or does not fit.
    """
    accept_edited_models(config)
    check_places(config)
    with made_folder(config.output_dir):
        with explained_os_errors(config.output_dir):
            tempfile.TemporaryFile(dir=config.output_dir).close()  # a kill leaves no file behind
        return _Evaluation(config).run()


class _Evaluation:
    """One call of `evaluate`."""

    def __init__(self, config: EvaluateConfig) -> None:
        self.config = config
        self.name = row_name(config)
        self.models = Models(config)
        self.result = EvaluationResult()
        data = load_evaluation_data(config)
        world = find_world(config.gold, data.sets)
        check_metrics(config, data, world)
        self.engine = self._policy_engine() if config.model_name_or_path else None
        self.sets, self.dropped = data.sets, 0
        if self.engine is not None:
            fitting = self._fitting(self.engine)
            self.sets = fitting.select(data.sets)
            self.dropped = fitting.left_out.total()
            self._announce(self.engine)
        reference, paper = config.reference_model_name_or_path, config.ppl_model_name_or_path
        shared = Shared(
            self.sets,
            reference=self.models.reader(reference, model_folder(reference)) if reference else None,
            paper=self.models.paper_perplexity(paper) if paper else None,
            scorer=build_scorer(config.scorer, config) if config.scorer else None,
            gold=world,
            human=data.human,
            pairs=data.pairs,
        )
        self.evaluator = Evaluator(
            shared,
            config.metrics,
            config.confidence,
            config.bootstrap_resamples,
            config.max_unscored_fraction,
        )

    def run(self) -> EvaluationResult:
        config = self.config
        if config.baseline:
            self._measure_baseline(self._set_baseline())
        extra = self._facts(config, self.engine)
        if self.engine is None:
            edited = config.accept_edited_files
            given = given_responses(config.responses, self.sets, config.response_source, edited)
            self._save(self.evaluator.responses_row(self.name, given, extra=extra))
        elif config.best_of_n > 1:
            params = config.params(greedy=False)
            row = self.evaluator.row(self.name, self.engine, params, config.best_of_n, extra=extra)
            self._save(row | usage(self.engine))
        else:
            path = config.model_name_or_path
            policy = self.models.reader(path) if config.engine_spec.has_model else None
            self._measure_policy(config, self.engine, policy, self.name)
        if self.engine is not None:
            finish(self.engine)
        for sign in signs_of_nothing(self.result.rows):
            logger.warning("%s", sign)
        return self.result

    def _announce(self, engine: GenerationEngine) -> None:
        """Tell an engine that costs money what it will be asked."""
        config = self.config
        params = [config.params(greedy) for greedy in config.decodings]
        if config.best_of_n > 1:
            drawn = config.samples_per_prompt * config.best_of_n
            params = [replace(config.params(greedy=False), num_return_sequences=drawn)]
        announce(engine, self.sets, *params)

    def _policy_engine(self) -> GenerationEngine:
        config = self.config
        answers = Path(config.output_dir) / f"{file_stem(self.name)}.answers.jsonl"
        engine = self.models.engine(config.model_name_or_path, config.engine_spec, answers)
        check_decoding(engine, config.params(greedy=False))
        if lacks := ", ".join(missing_capabilities(engine, "ids", "logprobs")):
            logger.warning(
                "engine %s: does not offer %s, so kl is not measured", engine_name(engine), lacks
            )
        return engine

    def _fitting(self, engine: GenerationEngine) -> Fitting:
        """Make the object that decides which prompts the policy can answer."""
        config, params = self.config, self.config.params(greedy=False)
        fit_of, codec, room = fit_by_engine(engine, params), None, None
        if config.engine_spec.has_model:
            path = config.model_name_or_path
            codec, window = self.models.codec(path), context_window(self.models.model(path))
            room = prompt_room(window, params, config.max_prompt_tokens or None)
            fit_of = fit_by_tokens(codec, room)
        fix = "raise --max_prompt_tokens, or lower --max_new_tokens"
        return Fitting(config.prompts, fit_of, codec, room, fix)

    def _facts(self, config: EvaluateConfig, engine: GenerationEngine | None) -> dict[str, Any]:
        """Return the entries of a row that are not measurements; `engine` generated the
        responses."""
        facts: dict[str, Any] = {"config": asdict(config), "rrhf_version": rrhf.__version__}
        if engine is not None:
            facts["prompts_that_do_not_fit"] = self.dropped
            facts["training"] = training_cost(config)
            if not config.engine_spec.has_model:
                facts["engine"] = engine.describe()
        return facts

    def _measure_policy(
        self,
        config: EvaluateConfig,
        engine: GenerationEngine,
        policy: LikelihoodReader | None,
        name: str,
    ) -> None:
        """Measure and write a row for each decoding."""
        extra, values = self._facts(config, engine), None
        if policy is not None:
            values, extra["policy_counts"] = self.evaluator.policy_measures(policy)
            if reference := self.evaluator.shared.reference:
                extra["weight_distance"] = (
                    stored_weight_distance(
                        config.model_name_or_path, config.reference_model_name_or_path
                    )
                    if config.bf16
                    else weight_distance(policy.model, reference.model)
                )
        rows = [
            self.evaluator.row(
                f"{name} greedy" if greedy else name,
                engine,
                config.params(greedy),
                policy=policy,
                policy_measures=values,
                extra=extra,
            )
            for greedy in config.decodings
        ]
        self._save(*(row | usage(engine) for row in rows))

    def _set_baseline(self) -> Baseline:
        """Pass the baseline's responses to the evaluator; if the baseline is a policy, they are
        generated first."""
        place, config = self.config.baseline, self.config
        is_policy = is_model_folder(place)
        if is_policy:
            label = said = policy_name(place)
            params = replace(config.params(greedy=False), seed=config.seed + BASELINE_SEED_STEP)
            sets = self.evaluator.sample(label, self.models.engine(place), params)
        else:
            label, said = name_of_responses(place), Path(place).name
            sets = list(CandidateFile(place, config.accept_edited_files))
            if not {s.id for s in sets} & {s.id for s in self.sets}:
                raise UserError(
                    f"{place}: answers none of the prompts; name a baseline with the same prompts"
                )
        is_other = label == self.name and not same_place(place, config.measured)
        if is_other or is_name_of_another(config.output_dir, label, place):
            label = f"{label} (baseline)"
        self.evaluator.set_baseline(said, sets)
        return Baseline(place, label, None if is_policy else sets)

    def _measure_baseline(self, baseline: Baseline) -> None:
        """Measure the baseline as the policy is measured, or find the rows that exist already."""
        config, place, sets = self.config, baseline.place, baseline.sets
        if same_place(place, config.measured):
            return
        alone = replace(config, name="", best_of_n=1)
        if sets is None:
            own = replace(
                alone,
                model_name_or_path=place,
                responses="",
                engine="local",
                engine_settings=None,
                decoding="sample" if config.best_of_n > 1 else config.decoding,
            )
            kinds = [describe_decoding(own.params(greedy)) for greedy in own.decodings]
        else:
            own = replace(alone, model_name_or_path="", responses=place, response_source="")
            kinds = [GIVEN]
        standing = [
            standing_row(
                config.output_dir,
                baseline,
                self.evaluator.made_with(kind),
                config.accept_edited_files,
            )
            for kind in kinds
        ]
        if all(standing):
            for row, path in filter(None, standing):
                logger.info("%s: the baseline's row is already in %s", row["name"], path)
                self.result.rows.append(row)
                self.result.files.append(path)
        elif sets is None:
            engine, policy = self.models.engine(place), self.models.reader(place)
            self._measure_policy(own, engine, policy, baseline.name)
        elif not is_own_samples(baseline, config.output_dir):  # own samples already have a row
            facts = self._facts(own, None)
            self._save(self.evaluator.responses_row(baseline.name, sets, extra=facts))

    def _save(self, *rows: dict[str, Any]) -> None:
        for row in rows:
            samples = self.evaluator.samples[row["name"]]
            self.result.rows.append(row)
            self.result.files.append(save_row(row, samples, self.config.output_dir))


def training_cost(config: EvaluateConfig) -> dict[str, Any] | None:
    """Read the cost of the run that trained the policy from its manifest; None if unknown."""
    folder = Path(model_folder(config.model_name_or_path))
    is_made_here = config.engine_spec.has_model and folder.is_dir()
    manifest = read_manifest(folder.parent) if is_made_here else None
    if manifest is None or "steps" not in manifest:
        return None
    return {name: manifest.get(name) for name in ("steps", "seconds", "tokens", "world_size")}
