"""RRHF: train a policy so that its own likelihoods rank candidates as their scores do.

Two terms (Yuan et al. 2023, arXiv:2304.05302): a hinge over every ordered pair of a prompt's
candidates, and cross-entropy on the best one. With `rrhf_weight` 0 the second is left alone, which
is fine-tuning on the best of N. `rrhf_mode released` is the loss of the program behind the paper's
published numbers, which differs from the paper's (`rrhf.algorithms.rank_losses` says how).

What a candidate file's rows become is in `rrhf.training.methods.rank_examples`; the loop, its
engine and checkpoints are every trainer's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rrhf.algorithms import rank_losses
from rrhf.data.collate import TokenBatch, padded_groups
from rrhf.data.formats import SourceCounts
from rrhf.data.mixing import load_sets
from rrhf.models.forward.logprobs import PolicyOutputs
from rrhf.models.loading import context_window
from rrhf.training.core.loop import run_training
from rrhf.training.core.model_folders import ModelFolders
from rrhf.training.core.setup import (
    Workbench,
    finish_run,
    load_trainable_causal_lm,
    model_writer,
    opened_workbench,
    policy_on_engine,
)
from rrhf.training.core.update import Term
from rrhf.training.methods.data_summary import encoded
from rrhf.training.methods.fitting import RowFitter
from rrhf.training.methods.offline import held_out_evaluation, offline_stream
from rrhf.training.methods.rank_config import RankConfig
from rrhf.training.methods.rank_examples import RankEncoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Grid:
    """A batch as prompts by candidates; weights are 0 for filler prompts."""

    scores: Tensor  # [B, K]
    lengths: Tensor  # [B, K] int64
    valid: Tensor  # [B, K]
    weights: Tensor  # [B]

    @classmethod
    def of(cls, batch: TokenBatch) -> _Grid:
        assert batch.scores is not None, "ranking needs scores"
        scores, valid = padded_groups(batch.scores, batch.prompt_index, batch.num_prompts)
        lengths, _ = padded_groups(batch.response_lengths, batch.prompt_index, batch.num_prompts)
        return cls(scores, lengths, valid, batch.prompt_weights)

    @property
    def best_lengths(self) -> Tensor:
        """[B] tokens of each prompt's best candidate."""
        return rank_losses.of_best_candidate(self.lengths, self.scores, self.valid)


class RankObjective:
    """RRHF's two terms, `rank` and `sft`.

    Args:
        config: mode, weights and reductions.
    """

    def __init__(self, config: RankConfig) -> None:
        self.config = config

    def denominators(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Prompts, ordered pairs or target tokens, as the reductions ask."""
        grid = _Grid.of(batch)
        prompts = grid.weights.sum()
        rank = sft = prompts
        if self.config.rank_reduction == "pair":
            pairs = rank_losses.count_ordered_pairs(grid.scores, grid.valid)
            rank = (pairs * grid.weights).sum()
        if self.config.sft_reduction == "token":
            sft = (grid.best_lengths * grid.weights).sum()
        return {"rank": rank, "sft": sft}

    def __call__(self, outputs: PolicyOutputs, batch: TokenBatch) -> dict[str, Term]:
        """The terms of one micro-batch, with the metrics that show what ranking does."""
        grid = _Grid.of(batch)
        summed, _ = padded_groups(
            outputs.logprobs.sum(-1), batch.prompt_index, batch.num_prompts
        )  # [B, K]
        p = rank_losses.sequence_scores(summed, grid.lengths, self.config.length_penalty)
        if self.config.rrhf_mode == "released":
            widths = batch.prompt_lengths + grid.lengths.max(-1).values
            rank, sft = rank_losses.released_rrhf_loss(
                summed, grid.scores, grid.valid, widths, self.config.length_penalty
            )
        else:
            rank = rank_losses.rrhf_rank_loss(p, grid.scores, grid.valid)
            sft = rank_losses.best_candidate_nll(summed, grid.scores, grid.valid)
            if self.config.sft_reduction == "response":
                sft = sft / grid.best_lengths.clamp_min(1)
        return {
            "rank": Term(
                (rank * grid.weights).sum(), self.config.rrhf_weight, _metrics(p.detach(), grid)
            ),
            "sft": Term((sft * grid.weights).sum()),
        }


def _metrics(p: Tensor, grid: _Grid) -> dict[str, tuple[Tensor, Tensor]]:
    """Totals and counts over real prompts; `p` is the policy's sequence score."""
    scores, valid, weights = grid.scores, grid.valid, grid.weights
    pairs = (rank_losses.count_ordered_pairs(scores, valid) * weights).sum()
    rows = (valid.sum(-1) * weights).sum()

    def over_pairs(per_prompt: Tensor) -> tuple[Tensor, Tensor]:
        return (per_prompt * weights).sum(), pairs

    return {
        "violated_fraction": over_pairs(rank_losses.count_violated_pairs(p, scores, valid)),
        "ranking_accuracy": over_pairs(rank_losses.count_correct_pairs(p, scores, valid)),
        "score_margin": over_pairs(rank_losses.total_margin(p, scores, valid)),
        "ordered_pairs_per_prompt": (pairs, weights.sum()),
        "response_length": ((grid.lengths.sum(-1) * weights).sum(), rows),
    }


def train(config: RankConfig) -> Path:
    """Train on scored candidates; returns the policy folder.

    Raises:
        UserError: the file, the model or a setting is not usable; the text says which and why.
    """
    with opened_workbench(config) as bench:
        read = SourceCounts()
        edited = config.accept_edited_files
        sets = load_sets(
            config.data_path, config.seed, counts=read, accept_edited=edited, columns=config.columns
        )
        held_out = None
        if config.eval_data_path:
            held_out = load_sets(
                config.eval_data_path,
                config.seed,
                accept_edited=edited,
                columns=config.columns,
                columns_may_miss=True,
            )
        model = load_trainable_causal_lm(config)
        window = context_window(model)
        encode = _encoder(config, bench, window)
        examples = encoded(config.data_path, sets, encode, read, columns=config.columns)
        counts: dict[str, Any] = {
            **dict(sorted(encode.counts.items())),
            "read": read.as_dict(),
        }
        _warn_of_ties(config, counts)
        objective = RankObjective(config)
        held_out_examples = None
        if held_out is not None:
            held_out_examples = encoded(
                str(config.eval_data_path),
                held_out,
                _encoder(config, bench, window),
                purpose="evaluating",
            )
        models = ModelFolders({"policy": model_writer(bench, model)})
        policy = policy_on_engine(bench, model)
        outcome = run_training(
            policy,
            objective,
            offline_stream(bench, examples, policy),
            config,
            bench.run,
            bench.parallel,
            held_out_evaluation(bench, objective, held_out_examples),
            models,
            stop=bench.stop,
            held=bench.held,
        )
        return finish_run(
            bench,
            outcome,
            models,
            {"stage": "rank", "data_path": config.data_path, "data": counts},
            num_held_out=len(held_out_examples or ()),
        )


def _warn_of_ties(config: RankConfig, counts: Mapping[str, Any]) -> None:
    """Say it where no prompt has anything to rank."""
    tied, alone = (counts.get(f"prompts_{n}", 0) for n in ("all_tied", "with_one_candidate"))
    if config.rrhf_weight > 0 and tied + alone == counts["prompts_used"]:
        logger.warning(
            "%s: nothing to rank: no prompt has two candidates with different scores (%d prompts "
            "with equal scores alone, %d with one candidate), so the rank term stays zero and only "
            "the SFT term trains; score with another scorer, or sample more responses "
            "(--num_return_sequences of `rrhf generate`)",
            config.data_path,
            tied,
            alone,
        )


def _encoder(config: RankConfig, bench: Workbench, window: int | None) -> RankEncoder:
    fitter = RowFitter(
        bench.codec, config.model_max_length, config.max_response_tokens, config.long_responses
    )
    return RankEncoder(
        fitter,
        config.only_use_provide,
        config.only_use_sample,
        config.stop_response,
        config.rrhf_mode == "released",
        window,
    )
