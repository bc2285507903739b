"""`rrhf train ppo`: PPO with human feedback, critic-free methods and online RRHF.

The policy answers prompts, and a scorer scores the answers. The score minus a penalty for moving
away from the reference is the reward. A few passes of the common training loop then update policy
and critic. The parts are in `rrhf.training.online`. Source: Ouyang et al. 2022, arXiv:2203.02155,
with the implementation details of Huang et al. 2024, arXiv:2403.17031.

`--method rrhf` trains on the same rollouts with the ranking objective instead: OP-k of the RRHF
paper, where the policy that samples is refreshed every `rollout_size / batch` steps. `--method
rank` does so with any objective of `rrhf train rank`.

Under FSDP2 and DeepSpeed the trained actor-critic is sharded over the ranks. The frozen reference,
the reward model and a copy of the policy to sample from are whole on each rank.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from torch import nn

from rrhf.algorithms.kl import KLController
from rrhf.algorithms.normalizers import Normalizer, RunningMeanStd
from rrhf.data.chat_format import ChatCodec
from rrhf.data.formats import SourceCounts
from rrhf.data.mixing import load_sets
from rrhf.data.views import demonstrations
from rrhf.errors import UserError
from rrhf.generation.build import EngineOptions
from rrhf.generation.engine import GenerationEngine
from rrhf.records import CandidateSet
from rrhf.scoring.build import RewardModelOptions, build_scorer, check_scorer
from rrhf.training.core.hooks import Hook
from rrhf.training.core.loop import run_training
from rrhf.training.core.offload import TRAIN, HostStore, Offload, require_device_memory
from rrhf.training.core.offload_levels import parse_levels
from rrhf.training.core.phases import Phases, as_table, over_ranks, peak_meter
from rrhf.training.core.reference import frozen_copy
from rrhf.training.core.setup import Workbench, finish_run, opened_workbench
from rrhf.training.core.streams import EncodedExamples, OfflineStream, StepCut
from rrhf.training.core.update import Objective
from rrhf.training.methods.fitting import RowFitter
from rrhf.training.methods.kept_reference import kept_logprobs
from rrhf.training.methods.offline import step_cut
from rrhf.training.methods.rank import RankObjective
from rrhf.training.methods.sft import SFTEncoder
from rrhf.training.online.actors import build_root, model_folders
from rrhf.training.online.ema import WeightAverage
from rrhf.training.online.experience import build_experience
from rrhf.training.online.no_learning import NoLearning
from rrhf.training.online.objective import PPOObjective
from rrhf.training.online.ppo_checks import EVALUATION_MEASURES
from rrhf.training.online.ppo_config import PPOConfig
from rrhf.training.online.prompts import fitting_prompts
from rrhf.training.online.ptx import Ptx, PtxObjective
from rrhf.training.online.rollout import RolloutWriter, UnusableRollout
from rrhf.training.online.sample_table import SampleTable
from rrhf.training.online.step_hooks import CriticWarmUp, LargestRatio, RolloutPasses
from rrhf.training.online.stream import PPOStream

logger = logging.getLogger(__name__)

EVALUATION_ROUND = 1_000_000_000
"""Number of the sampling round of evaluations; no rollout has so large a number, so evaluations and
rollouts use different random draws."""


def train(config: PPOConfig) -> Path:
    """Train the policy on its own responses; return the policy folder.

    Raises:
        UserError: the prompts, a model or a setting is not usable; the message says which and why.
    """
    scoring = RewardModelOptions(
        bf16=config.bf16,
        layout=config.layout,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
        scorer_hosts=config.scorer_hosts,
    )
    check_scorer(config.reward_model_name_or_path, scoring)
    if config.engine_spec.check is not None:
        config.engine_spec.check(config.engine_settings, True)
    with opened_workbench(config) as opened, _offload(config, opened) as offload:
        phases = Phases(
            peak_meter(opened.parallel.device), offload.enter if offload.levels else None
        )
        bench = replace(opened, phases=phases)
        read = SourceCounts()
        prompts = load_sets(config.train_datasets, config.seed, counts=read, options=config)
        held_out: Sequence[CandidateSet] = ()
        if config.eval_datasets:
            others = config.for_other_data()
            held_out = load_sets(config.eval_datasets, config.seed, options=others)
        root = build_root(config, bench)
        # With LoRA, the reference is the trained policy with its adapters off.
        reference = None if config.use_lora else frozen_copy(bench, config.temperature)
        if reference is not None:
            offload.add_frozen(reference, {"reference"})
        scorer = build_scorer(config.reward_model_name_or_path, scoring, bench.parallel.device)
        if scorer.model is not None:
            offload.add_frozen(scorer.model, {"score"})
        reading = {"read", TRAIN} if reference is not None else {"read", "reference", TRAIN}
        offload.add_trained(root.policy, {"generate", *reading})
        if root.value is not None:
            offload.add_trained(root.value, {"read", TRAIN})
        writer = RolloutWriter(root, reference, scorer, config, bench, partial(_engine, config))
        fitting, num_cut = fitting_prompts(prompts, writer, config.train_datasets)
        controller = KLController(
            config.kl_coeff or 0.0,
            config.kl_target if config.adaptive_kl else None,
            config.kl_horizon,
        )
        ranking = config.ranking
        ppo_objective = None if ranking else PPOObjective(config, controller)
        normalizer: Normalizer | None = RunningMeanStd() if config.normalize_reward else None
        cut = step_cut(bench, root)
        samples = SampleTable(
            bench.run.samples if bench.parallel.is_main else None,
            config.sample_table_steps,
            config.sample_table_rows,
        )
        signs = NoLearning(config)
        stream = PPOStream(fitting, writer, config, controller, normalizer, cut, [samples, signs])
        passes = RolloutPasses(stream, config.target_kl)
        hooks: list[Hook] = [offload, signs, passes]
        evaluate = None
        if held_out:
            asked, _ = fitting_prompts(held_out, writer, str(config.eval_datasets))
            evaluate = _evaluation(asked, writer, config, controller, stream, samples)
        objective: Objective
        if ranking is not None:
            objective = RankObjective(
                ranking.spec.build(ranking.objective_settings),
                None if ranking.reference == "none" else kept_logprobs,
                ranking.humanline_interval,
            )
        if ppo_objective is not None:
            objective = ppo_objective
            warm_up = CriticWarmUp(ppo_objective, config)
            hooks += [LargestRatio(ppo_objective, bench.parallel), warm_up]
            if config.ptx_datasets:
                objective = PtxObjective(ppo_objective, config.ptx_coeff)
                hooks.append(Ptx(_demonstrations(config, bench, stream.total_steps, cut)))
        average = None
        if config.use_ema:
            average = WeightAverage(root.policy, config.ema_beta, bench.parallel)
            hooks.append(average)
        hooks.append(samples)
        models = model_folders(bench, root, average)
        outcome = run_training(root, objective, stream, bench, evaluate, models, hooks)
        signs.finish(stream.rollout_number + 1, stream.rollout_metrics)
        if passes.rollouts_cut:
            logger.info(
                "%d rollouts passed --target_kl %g: %d steps were skipped",
                passes.rollouts_cut,
                config.target_kl,
                passes.steps_skipped,
            )
        spent = over_ranks(bench.parallel.gather([phases.total]))
        logger.info(
            "time and memory by phase:\n%s",
            as_table(spent, phases.seconds, phases.meter.what),
        )
        return finish_run(
            bench,
            outcome,
            models,
            {
                "stage": "ppo",
                "method": config.method,
                "objective": ranking and ranking.objective,
                "objective_reference": ranking and ranking.reference,
                "train_datasets": config.train_datasets,
                "scorer": scorer.name,
                "scores_are_normalized": scorer.normalized,
                "data": {
                    "read": read.as_dict(),
                    "prompts": len(fitting),
                    "prompts_left_out": len(prompts) - len(fitting),
                    "prompts_cut": num_cut,
                    "responses": dict(sorted(stream.counts.items())),
                },
                "kl_coefficient": controller.coefficient,
                "last_rollout": stream.rollout_metrics,
                "phases": {name: asdict(one) for name, one in spent.items()},
                "peak_memory": phases.meter.what,
                "score_normalizer": (
                    None if stream.normalizer is None else stream.normalizer.state_dict()
                ),
            },
            num_rollout_prompts=stream.prompts_per_rollout,
        )


def _engine(
    config: PPOConfig, model: nn.Module, codec: ChatCodec, max_batch_rows: int, room: int
) -> GenerationEngine:
    """Build the engine that writes the responses of rollouts with the weights of `model`."""
    return config.engine_spec.build(
        EngineOptions(
            config.model_name_or_path,
            lambda: model,
            lambda: codec,
            max_batch_rows,
            room,
            config.engine_settings,
            config.temperature,
            is_live=True,
        )
    )


@contextlib.contextmanager
def _offload(config: PPOConfig, bench: Workbench) -> Iterator[Offload]:
    parallel, levels = bench.parallel, parse_levels(config.offload_level)
    spread = levels - {"freeze_model"}
    if parallel.is_sharded and spread:
        raise UserError(
            f"--offload_level {' '.join(sorted(spread))}: {parallel.kind} shards the trained "
            "models over the ranks and offloads them itself: ask for offloading in the launch file "
            "(fsdp_offload_params: true, or offload_optimizer_device: cpu); freeze_model works "
            "with every launch"
        )
    require_device_memory(levels, parallel.device)
    with contextlib.closing(Offload(levels, HostStore(parallel.device))) as offload:
        if levels:
            logger.info(
                "offload_level: %s: in host memory while not needed", ", ".join(sorted(levels))
            )
        yield offload


def _evaluation(
    prompts: Sequence[CandidateSet],
    writer: RolloutWriter,
    config: PPOConfig,
    controller: KLController,
    stream: PPOStream,
    samples: SampleTable,
) -> Callable[[nn.Module], dict[str, float]]:
    """Build the function that answers and scores each held-out prompt, always with the same seeds.

    If too few responses get a score, the function warns and returns no metrics, so that the
    training goes on.
    """
    has_warned = False

    def evaluate(model: nn.Module) -> dict[str, float]:
        nonlocal has_warned
        try:
            rollout = writer.write(prompts, EVALUATION_ROUND, samples_per_prompt=1)
        except UnusableRollout as error:
            if not has_warned:
                has_warned = True
                logger.warning(
                    "step %d: --eval_datasets %s gives no figures: %s; this is the only warning",
                    stream.steps_done,
                    config.eval_datasets,
                    error.reason,
                )
            return {}
        experience = build_experience(rollout.rows, config, controller.coefficient)
        samples.show_evaluation(stream.steps_done, prompts, rollout.rows, experience)
        found = experience.metrics
        return {name: found[name] for name in EVALUATION_MEASURES}

    return evaluate


def _demonstrations(
    config: PPOConfig, bench: Workbench, total_steps: int, cut: StepCut
) -> OfflineStream:
    """Build the stream of demonstrations (`--ptx_datasets`), in batches as large as those of
    experience."""
    assert config.ptx_datasets is not None, "called only with --ptx_datasets"
    sets = demonstrations(
        load_sets(config.ptx_datasets, config.seed, options=config.for_other_data())
    )
    encode = SFTEncoder(RowFitter(bench.codec, config.model_max_length))
    examples = EncodedExamples(sets, encode)
    return OfflineStream(examples, cut, max_steps=total_steps, seed=config.seed)
