"""`rrhf evaluate`: one policy (or given responses) on held-out prompts, written as rows.

Each row is one JSON file with its responses next to it (`rrhf.evaluation.results`); `rrhf compare`
puts rows of several evaluations into a table. A baseline gets rows of its own, so that a table
shows before and after. Code that has its models in memory uses
`rrhf.evaluation.evaluator.Evaluator` directly, as this module does after loading.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import rrhf
from rrhf.data.candidate_files import CandidateFile
from rrhf.data.chat_format import ChatCodec
from rrhf.data.prompt_formats import PromptFormats
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
from rrhf.evaluation.config import EvaluateConfig
from rrhf.evaluation.draft import describe_decoding
from rrhf.evaluation.evaluator import Evaluator
from rrhf.evaluation.inputs import (
    EvaluationData,
    find_world,
    given_responses,
    is_model_folder,
    load_evaluation_data,
)
from rrhf.evaluation.likelihoods import LikelihoodReader
from rrhf.evaluation.metrics import chosen_metrics
from rrhf.evaluation.metrics.paper_perplexity import PaperPerplexity
from rrhf.evaluation.metrics.spec import NEEDS
from rrhf.evaluation.reached import signs_of_nothing
from rrhf.evaluation.results import require_free_place, save_row
from rrhf.evaluation.weight_distance import stored_weight_distance, weight_distance
from rrhf.files import made_folder
from rrhf.generation.build import LOCAL, EngineOptions, EngineSpec
from rrhf.generation.engine import (
    GenerationEngine,
    check_decoding,
    engine_name,
    missing_capabilities,
)
from rrhf.generation.params import prompt_room
from rrhf.generation.plan import fit_by_engine, fit_by_tokens
from rrhf.manifests import read_manifest
from rrhf.model_paths import accept_edited_models, check_model_path, model_folder
from rrhf.models.loading import (
    LoadOptions,
    context_window,
    load_causal_lm,
    load_tokenizer,
    resolve_device,
)
from rrhf.os_errors import explained_os_errors
from rrhf.records import CandidateSet
from rrhf.scoring.build import RewardModelOptions, build_scorer
from rrhf.worlds import World

logger = logging.getLogger(__name__)

# A baseline is sampled from other random numbers than a row, or its own row would tie with itself.
BASELINE_SEED_STEP = 1_000_003


@dataclass(frozen=True)
class EvaluationResult:
    """Attributes:
    rows: what was measured, one dict a row.
    files: the file of each row.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)


def evaluate(config: EvaluateConfig) -> EvaluationResult:
    """Load, measure, write.

    Raises:
        UserError: something is missing or does not fit.
    """
    accept_edited_models(config)
    _check_places(config)
    with made_folder(config.output_dir):
        with explained_os_errors(config.output_dir):
            tempfile.TemporaryFile(dir=config.output_dir).close()  # no name that a kill could leave
        return _evaluate(config)


def _evaluate(config: EvaluateConfig) -> EvaluationResult:
    data = load_evaluation_data(
        config.prompts,
        config.num_prompts,
        config.human_responses,
        config.pairs,
        config.num_human_responses,
        config.split,
        config.accept_edited_files,
        config.columns,
    )
    world = find_world(config.gold, data.sets)
    _check_metrics(config, data, world)
    models = _Models(config)
    engine = None
    if config.model_name_or_path:
        engine = models.engine(config.model_name_or_path, config.engine_spec)
        check_decoding(engine, config.params(greedy=False))
        if lacks := ", ".join(missing_capabilities(engine, "ids", "logprobs")):
            logger.warning(
                "engine %s: does not offer %s, so kl is not measured", engine_name(engine), lacks
            )
    data, dropped = _fitting(data, engine, config, models)
    evaluator = _build_evaluator(config, data, world, models)
    name = _row_name(config)
    baseline = _set_baseline(config, evaluator, models, data, name)
    result = EvaluationResult()
    if baseline is not None:
        _add_baseline_rows(config, evaluator, models, baseline, dropped, result)
    extra = _facts(config, dropped if engine else None, engine)
    if engine is None:
        edited = config.accept_edited_files
        given = given_responses(config.responses, data.sets, config.response_source, edited)
        rows = [evaluator.responses_row(name, given, extra=extra)]
    elif config.best_of_n > 1:
        sampled = config.params(greedy=False)
        rows = [evaluator.row(name, engine, sampled, config.best_of_n, extra=extra)]
    else:
        policy = models.reader(config.model_name_or_path) if config.engine_spec.has_model else None
        rows = _policy_rows(config, evaluator, engine, policy, name, extra)
    for row in rows:
        result.rows.append(row)
        result.files.append(save_row(row, evaluator.samples[row["name"]], config.output_dir))
    for sign in signs_of_nothing(result.rows):
        logger.warning("%s", sign)
    return result


def _facts(
    config: EvaluateConfig, dropped: int | None, engine: GenerationEngine | None = None
) -> dict[str, Any]:
    """What a row says besides its measurements; `dropped` prompts, for a policy."""
    facts: dict[str, Any] = {"config": asdict(config), "rrhf_version": rrhf.__version__}
    if dropped is not None:
        facts |= {"prompts_that_do_not_fit": dropped, "training": training_cost(config)}
    if engine is not None and not config.engine_spec.has_model:
        facts["engine"] = engine.describe()
    return facts


def _policy_rows(
    config: EvaluateConfig,
    evaluator: Evaluator,
    engine: GenerationEngine,
    policy: LikelihoodReader | None,
    name: str,
    extra: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """One row for each decoding that was asked for."""
    shared, reference = None, evaluator.shared.reference
    if policy is not None:
        shared, counts = evaluator.policy_measures(policy)
        extra = {**extra, "policy_counts": counts}
    if policy is not None and reference is not None:
        distance = (
            stored_weight_distance(config.model_name_or_path, config.reference_model_name_or_path)
            if config.bf16
            else weight_distance(policy.model, reference.model)
        )
        extra = {**extra, "weight_distance": distance}
    return [
        evaluator.row(
            f"{name} greedy" if greedy else name,
            engine,
            config.params(greedy),
            policy=policy,
            policy_measures=shared,
            extra=extra,
        )
        for greedy in (False, True)
        if config.decoding in ("both", "greedy" if greedy else "sample")
    ]


def _check_metrics(config: EvaluateConfig, data: EvaluationData, world: World | None) -> None:
    """Refuse metrics that were asked for and cannot be measured, before anything slow happens.

    Raises:
        UserError: with everything that is missing.
    """
    has_policy = bool(config.model_name_or_path) and config.best_of_n == 1
    there = {
        "scorer": config.scorer,
        "gold": world,
        "judge": config.scorer or world,
        "baseline": config.baseline,
        "reference": config.reference_model_name_or_path,
        "paper": config.ppl_model_name_or_path,
        "human": data.human,
        "pairs": data.pairs,
        "policy": has_policy and config.engine_spec.has_model,
        "samples": has_policy and config.engine_spec.has_model,
    }
    missing = [
        f"{name} needs {' and '.join(NEEDS[need] for need in lacking)}"
        for name, metric in chosen_metrics(config.metrics).items()
        if config.metrics and (lacking := [need for need in metric.needs if not there[need]])
    ]
    if missing:
        raise UserError(
            f"--metrics: {'; '.join(missing)}. Give what is missing, or leave the metric out"
        )


class _Models:
    """Loads every model once, however many roles it has."""

    def __init__(self, config: EvaluateConfig) -> None:
        self.config = config
        self._loaded: dict[str, Any] = {}

    def model(self, path: str) -> Any:
        folder = Path(model_folder(path))
        key = str(folder.resolve()) if folder.exists() else path
        if key not in self._loaded:
            config = self.config
            model = load_causal_lm(path, LoadOptions.of(config, config.bf16))
            self._loaded[key] = model.to(resolve_device())  # type: ignore[arg-type]
        return self._loaded[key]

    def codec(self, path: str) -> ChatCodec:
        tokenizer = load_tokenizer(path, self.config.trust_remote_code)
        return ChatCodec(tokenizer, self.config.chat_format)

    def reader(self, path: str, name: str = "") -> LikelihoodReader:
        codec, layout = self.codec(path), self.config.layout
        return LikelihoodReader(self.model(path), codec, name or path, layout=layout)

    def engine(self, path: str, spec: EngineSpec = LOCAL) -> GenerationEngine:
        config = self.config
        return spec.build(
            EngineOptions(
                path,
                partial(self.model, path),
                partial(self.codec, path),
                config.per_device_eval_batch_size,
                config.max_prompt_tokens or None,
                config.engine_settings,
            )
        )


def _check_places(config: EvaluateConfig) -> None:
    """Say what is missing before anything slow happens."""
    for path in (
        config.model_name_or_path if config.engine_spec.has_model else "",
        config.reference_model_name_or_path,
        config.ppl_model_name_or_path,
    ):
        if path:
            check_model_path(path)
    if config.baseline and is_model_folder(config.baseline):
        check_model_path(config.baseline)
    _require_free_places(config)


def _require_free_places(config: EvaluateConfig) -> None:
    """The rows and the baseline's must not take the manifests of responses in their folder."""
    name, baseline = _row_name(config), config.baseline
    is_policy = bool(config.model_name_or_path) and config.best_of_n == 1
    greedy = [f"{name} greedy"] if is_policy and config.decoding != "sample" else []
    for row in [name, *greedy]:
        require_free_place(row, config.output_dir, "give --name, or another --output_dir")
    if baseline and not same_place(baseline, config.model_name_or_path or config.responses):
        of_responses = not is_model_folder(baseline)
        label = name_of_responses(baseline) if of_responses else policy_name(baseline)
        if label != name:
            require_free_place(label, config.output_dir, "give another --output_dir")


def _fitting(
    data: EvaluationData,
    engine: GenerationEngine | None,
    config: EvaluateConfig,
    models: _Models,
) -> tuple[EvaluationData, int]:
    """The prompts that the policy can read; how many it cannot."""
    if engine is None:
        return data, 0
    params, codec = config.params(greedy=False), None
    fit_of = fit_by_engine(engine, params)
    if config.engine_spec.has_model:
        path = config.model_name_or_path
        codec, window = models.codec(path), context_window(models.model(path))
        room = prompt_room(window, params, config.max_prompt_tokens or None)
        fit_of = fit_by_tokens(codec, room)
    kept = []
    formats, num_cut = PromptFormats(codec), 0
    for s in data.sets:
        formats.add(s)
        fit = fit_of(s)
        if not fit.misfit:
            kept.append(s)
            num_cut += fit.is_cut
    dropped = len(data.sets) - len(kept)
    if not kept:
        raise UserError(
            f"{config.prompts}: not one of {dropped} prompts fits; raise max_prompt_tokens or "
            "lower max_new_tokens"
        )
    if dropped:
        logger.warning("%d of %d prompts do not fit and are left out", dropped, len(data.sets))
    if num_cut:
        logger.warning(
            "%d of %d prompts are too long and lose their beginning (--max_prompt_tokens allows "
            "more)",
            num_cut,
            len(data.sets),
        )
    if empty := formats.counts["empty"]:
        logger.warning("%d of %d prompts ask nothing", empty, len(data.sets))
    formats.tell(config.prompts)
    return replace(data, sets=kept), dropped


def _build_evaluator(
    config: EvaluateConfig, data: EvaluationData, world: World | None, models: _Models
) -> Evaluator:
    reference = paper = None
    if path := config.reference_model_name_or_path:
        reference = models.reader(path, model_folder(path))
    if path := config.ppl_model_name_or_path:
        tokenizer = load_tokenizer(path, config.trust_remote_code)
        paper = PaperPerplexity(
            models.model(path),
            tokenizer,
            config.ppl_max_tokens or None,
            model_folder(path),
            config.layout,
        )
    options = RewardModelOptions(
        **{name: getattr(config, name) for name in RewardModelOptions.__dataclass_fields__}
    )
    return Evaluator(
        data.sets,
        scorer=build_scorer(config.scorer, options) if config.scorer else None,
        gold=world,
        reference=reference,
        human=data.human,
        pairs=data.pairs,
        paper=paper,
        confidence=config.confidence,
        resamples=config.bootstrap_resamples,
        max_unscored_fraction=config.max_unscored_fraction,
        metrics=config.metrics,
    )


def _set_baseline(
    config: EvaluateConfig, evaluator: Evaluator, models: _Models, data: EvaluationData, name: str
) -> Baseline | None:
    """Give the evaluator the responses that win rates are against; returns what they are.

    Args:
        config: names the baseline, or none.
        evaluator: gets the responses.
        models: loads a policy.
        data: the prompts.
        name: of the row that is evaluated, which the baseline's row must not have too.
    """
    if not config.baseline:
        return None
    sets: list[CandidateSet]
    is_policy = is_model_folder(config.baseline)
    if is_policy:
        label = said = policy_name(config.baseline)
        sampled = config.params(greedy=False)
        params = replace(sampled, seed=config.seed + BASELINE_SEED_STEP)
        sets = evaluator.sample(label, models.engine(config.baseline), params)
    else:
        label, said = name_of_responses(config.baseline), Path(config.baseline).name
        sets = list(CandidateFile(config.baseline, config.accept_edited_files))
        if not {s.id for s in sets} & {s.id for s in data.sets}:
            raise UserError(
                f"{config.baseline}: answers none of the prompts; name a baseline on the same ones"
            )
    measured = config.model_name_or_path or config.responses
    is_other = label == name and not same_place(config.baseline, measured)
    if is_other or is_name_of_another(config.output_dir, label, config.baseline):
        label = f"{label} (baseline)"
    evaluator.set_baseline(said, sets)
    return Baseline(config.baseline, label, None if is_policy else sets)


def _add_baseline_rows(
    config: EvaluateConfig,
    evaluator: Evaluator,
    models: _Models,
    baseline: Baseline,
    dropped: int,
    result: EvaluationResult,
) -> None:
    """Measure the baseline as the policy is measured, unless its rows already exist."""
    if same_place(baseline.place, config.model_name_or_path or config.responses):
        return
    greedy = {"greedy": (True,), "sample": (False,), "both": (False, True)}[config.decoding]
    kinds = [
        describe_decoding(config.params(g)) for g in greedy if not (g and config.best_of_n > 1)
    ]
    if baseline.sets is not None:
        kinds = [GIVEN]
    standing = [
        standing_row(
            config.output_dir, baseline, evaluator.made_with(kind), config.accept_edited_files
        )
        for kind in kinds
    ]
    if all(standing):
        for row, path in filter(None, standing):
            logger.info("%s: the baseline's row is already in %s", row["name"], path)
            result.rows.append(row)
            result.files.append(path)
        return
    if baseline.sets is not None:
        if is_own_samples(baseline, config.output_dir):
            return  # they were written with a row of their own
        own = replace(
            config, model_name_or_path="", responses=baseline.place, response_source="", name=""
        )
        rows = [evaluator.responses_row(baseline.name, baseline.sets, extra=_facts(own, None))]
    else:
        own = replace(
            config,
            model_name_or_path=baseline.place,
            engine="local",
            engine_settings=None,
            responses="",
            name="",
            best_of_n=1,
            decoding="sample" if config.best_of_n > 1 else config.decoding,
        )
        engine, policy = models.engine(baseline.place), models.reader(baseline.place)
        rows = _policy_rows(own, evaluator, engine, policy, baseline.name, _facts(own, dropped))
    for row in rows:
        result.rows.append(row)
        result.files.append(save_row(row, evaluator.samples[row["name"]], config.output_dir))


def _row_name(config: EvaluateConfig) -> str:
    if config.name:
        return config.name
    if config.responses:
        return f"{name_of_responses(config.responses)} {config.response_source}".strip()
    name = policy_name(config.model_name_or_path)
    return f"{name} best of {config.best_of_n}" if config.best_of_n > 1 else name


def training_cost(config: EvaluateConfig) -> dict[str, Any] | None:
    """What the run that made the policy says that it cost; None where no run is known."""
    folder = Path(model_folder(config.model_name_or_path))
    is_made_here = config.engine_spec.has_model and folder.is_dir()
    manifest = read_manifest(folder.parent) if is_made_here else None
    if manifest is None or "steps" not in manifest:
        return None
    return {name: manifest.get(name) for name in ("steps", "seconds", "tokens", "world_size")}
