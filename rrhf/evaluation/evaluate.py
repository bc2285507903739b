"""`rrhf evaluate`: one policy (or given responses) on held-out prompts, written as rows.

Each row is one JSON with its responses beside it (`rrhf.evaluation.results`); `rrhf compare` puts
rows of several evaluations into a table. Whoever holds models already uses
`rrhf.evaluation.evaluator.Evaluator` instead, which is what this does after loading.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import rrhf
from rrhf.data.candidate_files import CandidateFile
from rrhf.data.chat_format import ChatCodec
from rrhf.errors import UserError
from rrhf.evaluation.config import EvaluateConfig
from rrhf.evaluation.divergence import stored_weight_distance, weight_distance
from rrhf.evaluation.evaluator import Evaluator
from rrhf.evaluation.inputs import (
    EvaluationData,
    find_world,
    given_responses,
    is_model_folder,
    load_evaluation_data,
)
from rrhf.evaluation.likelihoods import LikelihoodReader
from rrhf.evaluation.perplexity import PaperPerplexity
from rrhf.evaluation.results import save_row
from rrhf.files import explained_os_errors, read_manifest
from rrhf.generation.local import LocalEngine
from rrhf.model_paths import check_model_path, model_folder
from rrhf.models.loading import (
    load_causal_lm,
    load_tokenizer,
    resolve_device,
)
from rrhf.records import CandidateSet
from rrhf.scoring.build import RewardModelOptions, build_scorer

logger = logging.getLogger(__name__)

# A baseline is sampled from other random numbers than a row, or its own row would tie with itself.
BASELINE_SEED_STEP = 1_000_003


@dataclass(frozen=True)
class EvaluationResult:
    """Attributes:
    rows: what was measured, one dict a row.
    files: where each row stands.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)


def evaluate(config: EvaluateConfig) -> EvaluationResult:
    """Load, measure, write.

    Raises:
        UserError: something is missing or does not fit.
    """
    _check_places(config)
    data = load_evaluation_data(
        config.prompts,
        config.num_prompts,
        config.human_responses,
        config.pairs,
        config.num_human_responses,
        config.split,
    )
    models = _Models(config)
    engine = models.engine(config.model_name_or_path) if config.model_name_or_path else None
    data, dropped = _fitting(data, engine, config)
    evaluator = _build_evaluator(config, data, models)
    _set_baseline(config, evaluator, models, data)
    extra: dict[str, Any] = {"config": asdict(config), "rrhf_version": rrhf.__version__}
    result = EvaluationResult()
    if engine is None:
        given = given_responses(config.responses, data.sets, config.response_source)
        name = config.name or _name_of_responses(config)
        result.rows.append(evaluator.responses_row(name, given, extra=extra))
    else:
        extra |= {"prompts_that_do_not_fit": dropped, "training": training_cost(config)}
        result.rows.extend(_policy_rows(config, evaluator, engine, extra))
    for row in result.rows:
        result.files.append(save_row(row, evaluator.samples[row["name"]], config.output_dir))
        logger.info("%s: written to %s", row["name"], result.files[-1])
    return result


def _policy_rows(
    config: EvaluateConfig, evaluator: Evaluator, engine: LocalEngine, extra: Mapping[str, Any]
) -> list[dict[str, Any]]:
    name = config.name or policy_name(config.model_name_or_path)
    sampled = config.params(greedy=False)
    if config.best_of_n > 1:
        label = config.name or f"{name} best of {config.best_of_n}"
        return [evaluator.row(label, engine, sampled, config.best_of_n, extra=extra)]
    counts: dict[str, int] = {}
    path = config.model_name_or_path
    reader = LikelihoodReader(engine.model, engine.codec, path, engine=config.engine)
    shared = evaluator.policy_measures(reader, counts)
    extra = {**extra, "policy_counts": counts}
    if evaluator.reference is not None:
        extra["weight_distance"] = (
            stored_weight_distance(config.model_name_or_path, config.reference_model_name_or_path)
            if config.bf16
            else weight_distance(engine.model, evaluator.reference.model)
        )
    rows = []
    if config.decoding != "greedy":
        rows.append(evaluator.row(name, engine, sampled, policy_measures=shared, extra=extra))
    if config.decoding != "sample":
        greedy = config.params(greedy=True)
        label = f"{name} greedy"
        rows.append(evaluator.row(label, engine, greedy, policy_measures=shared, extra=extra))
    return rows


class _Models:
    """Loads every model once, however many parts it plays."""

    def __init__(self, config: EvaluateConfig) -> None:
        self.config = config
        self._loaded: dict[str, Any] = {}

    def model(self, path: str) -> Any:
        folder = Path(model_folder(path))
        key = str(folder.resolve()) if folder.exists() else path
        if key not in self._loaded:
            config = self.config
            model = load_causal_lm(
                path,
                "bfloat16" if config.bf16 else "float32",
                config.attn_implementation,
                config.trust_remote_code,
            )
            self._loaded[key] = model.to(resolve_device())  # type: ignore[arg-type]
        return self._loaded[key]

    def codec(self, path: str) -> ChatCodec:
        tokenizer = load_tokenizer(path, self.config.trust_remote_code)
        return ChatCodec(tokenizer, self.config.chat_format)

    def engine(self, path: str) -> LocalEngine:
        rows = self.config.per_device_eval_batch_size
        room = self.config.max_prompt_tokens or None
        return LocalEngine(self.model(path), self.codec(path), rows, room)


def _check_places(config: EvaluateConfig) -> None:
    """Say what is missing before anything slow happens."""
    for path in (
        config.model_name_or_path,
        config.reference_model_name_or_path,
        config.ppl_model_name_or_path,
    ):
        if path:
            check_model_path(path)
    if config.baseline and is_model_folder(config.baseline):
        check_model_path(config.baseline)
    folder = Path(config.output_dir)
    with explained_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.NamedTemporaryFile(dir=folder, prefix=".probe.").close()


def _fitting(
    data: EvaluationData, engine: LocalEngine | None, config: EvaluateConfig
) -> tuple[EvaluationData, int]:
    """The prompts that the policy can read; how many it cannot."""
    if engine is None:
        return data, 0
    params = config.params(greedy=False)
    kept = [s for s in data.sets if engine.encode_prompt(s, params) is not None]
    dropped = len(data.sets) - len(kept)
    if not kept:
        raise UserError(
            f"{config.prompts}: not one of {dropped} prompts fits; raise max_prompt_tokens or "
            "lower max_new_tokens"
        )
    if dropped:
        logger.warning("%d of %d prompts do not fit and are left out", dropped, len(data.sets))
    return replace(data, sets=kept), dropped


def _build_evaluator(config: EvaluateConfig, data: EvaluationData, models: _Models) -> Evaluator:
    reference = paper = None
    if path := config.reference_model_name_or_path:
        codec = models.codec(path)
        reference = LikelihoodReader(
            models.model(path), codec, model_folder(path), engine=config.engine
        )
    if path := config.ppl_model_name_or_path:
        tokenizer = load_tokenizer(path, config.trust_remote_code)
        paper = PaperPerplexity(
            models.model(path),
            tokenizer,
            config.ppl_max_tokens or None,
            model_folder(path),
            config.engine,
        )
    options = RewardModelOptions(
        **{name: getattr(config, name) for name in RewardModelOptions.__dataclass_fields__}
    )
    return Evaluator(
        data.sets,
        scorer=build_scorer(config.scorer, options) if config.scorer else None,
        gold=find_world(config.gold, data.sets),
        reference=reference,
        human=data.human,
        pairs=data.pairs,
        paper=paper,
        confidence=config.confidence,
        resamples=config.bootstrap_resamples,
        max_unscored_fraction=config.max_unscored_fraction,
    )


def _set_baseline(
    config: EvaluateConfig, evaluator: Evaluator, models: _Models, data: EvaluationData
) -> None:
    if not config.baseline:
        return
    sets: list[CandidateSet]
    if is_model_folder(config.baseline):
        name = policy_name(config.baseline)
        sampled = config.params(greedy=False)
        params = replace(sampled, seed=config.seed + BASELINE_SEED_STEP)
        sets = evaluator.sample(name, models.engine(config.baseline), params)
    else:
        name = Path(config.baseline).name
        sets = list(CandidateFile(config.baseline))
        if not {s.id for s in sets} & {s.id for s in data.sets}:
            raise UserError(
                f"{config.baseline}: answers none of the prompts; name a baseline on the same ones"
            )
    evaluator.set_baseline(name, sets)


def policy_name(path: str) -> str:
    """What a policy is called: its folder, or the run that it is the policy of."""
    folder = Path(path)
    name = folder.resolve().name if folder.exists() else folder.name
    if name == "policy" and folder.exists():
        return folder.resolve().parent.name
    return name or path


def _name_of_responses(config: EvaluateConfig) -> str:
    stem = Path(config.responses).name.removesuffix(".gz").removesuffix(".jsonl")
    return f"{stem.removesuffix('.samples')} {config.response_source}".strip()


def training_cost(config: EvaluateConfig) -> dict[str, Any] | None:
    """What the run that made the policy says that it cost; None where no run is known."""
    folder = Path(model_folder(config.model_name_or_path))
    manifest = read_manifest(folder.parent) if folder.is_dir() else None
    if manifest is None or "steps" not in manifest:
        return None
    return {name: manifest.get(name) for name in ("steps", "seconds", "tokens", "world_size")}
