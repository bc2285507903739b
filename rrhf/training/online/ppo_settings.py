"""The settings of `rrhf train ppo` and values derived from them; `ppo_checks` checks them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from rrhf.generation.build import ENGINES, EngineSpec
from rrhf.generation.params import FilterOptions, SamplingParams
from rrhf.ranges import BELOW_ONE, COUNT, INDEX, NOT_NEGATIVE, SHARE
from rrhf.scoring.config import RemoteScorerOptions
from rrhf.training.core.config import GroupSettings, TrainingConfig
from rrhf.training.online.methods import METHODS, RankMethodSettings


@dataclass
class PPOSettings(RemoteScorerOptions, FilterOptions, TrainingConfig):
    """Settings of online training: rollouts, rewards and updates."""

    model_name_or_path: str = field(
        metadata={"names": "model", "aliases": ["model_name", "actor_model_name_or_path"]}
    )
    """Folder, run folder or hub name of the policy to start from, which is also the reference."""

    train_datasets: str = field(
        kw_only=True, metadata={"names": "data", "aliases": ["prompts", "data_path", "prompt_file"]}
    )
    """Prompts: a file, a registered name, package.module:name, as name[:proportion[:path]], several
    separated by commas."""

    reward_model_name_or_path: str = field(
        kw_only=True, metadata={"names": "scorer", "aliases": ["scorer"]}
    )
    """What scores responses: a reward model (folder, run or hub name; its tokenizer may differ from
    the policy's), function:module:name, gold:WORLD, package.module:name, judge:PRESET,
    http://HOST/PATH, or several as one (mean:A,B)."""

    method: str = field(default="ppo", metadata={"aliases": ["rl_algorithm"], "registry": METHODS})
    """ppo has a critic, the others have none; rrhf ranks the responses of the current policy
    (OP-k), rank does so by any --objective; or your own OnlineMethod."""

    method_settings: Any = field(default=None, metadata={"settings_of": "method"})

    engine: str = field(default="local", metadata={"registry": ENGINES})
    """What writes the responses: local = the policy in this process; vllm = a vLLM server that is
    running, and is given the policy's weights before each rollout; package.module:name = your own
    engine."""

    engine_settings: Any = field(default=None, metadata={"settings_of": "engine"})

    reward_critic_model_name_or_path: str | None = field(default=None, metadata={"names": "model"})
    """Folder, run folder or hub name of the reward model that the critic starts from; by default
    reward_model_name_or_path."""

    share_trunk: bool | None = None
    """Put the critic's value head, initialised to zero, on the policy's trunk; this saves the
    memory of a second trunk. By default on only if the scorer is not a model that a critic could
    start from."""

    detach_value_trunk: bool = False
    """With share_trunk: the value loss trains only the value head and leaves the policy alone."""

    learning_rate: float = field(default=1e-6, metadata={"aliases": ["actor_learning_rate"]})
    """Peak learning rate of the policy."""

    critic_learning_rate: float = 5e-6
    """Peak learning rate of the critic."""

    critic_weight_decay: float = 0.0
    """AdamW's decoupled weight decay of the critic."""

    critic_lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = (
        "cosine"
    )
    """How the critic's learning rate falls after warm-up."""

    critic_warmup_ratio: float = 0.03
    """Share of the steps over which the critic's learning rate rises from 0."""

    critic_warmup_steps: int = 0
    """Optimiser steps at the start in which only the critic learns."""

    per_device_prompt_batch_size: int = field(
        default=16, metadata={"aliases": ["rollout_mini_batch_size"]}
    )
    """Prompts that one device answers at a time; affects only memory and speed."""

    per_device_train_batch_size: int = 8
    """Responses in one forward on one device (rrhf, rank: prompts with all their responses)."""

    num_return_sequences: int = field(default=0, metadata={"aliases": ["rollout_n"]})
    """Responses to each prompt, all of them trained on; 0 = 4 for methods that compare the
    responses to a prompt (they need at least 2), 1 for the others."""

    rollout_size: int = 128
    """Responses in one rollout, on all devices together."""

    refresh_steps: int = 0
    """Sample for this many optimiser steps at once, in place of rollout_size responses. This is
    semi-online training: the policy that samples is refreshed after every refresh_steps steps, a
    multiple of ppo_epochs. 0 = after every rollout of rollout_size responses."""

    num_rollouts: int = -1
    """Stop after this many rollouts; -1 = num_train_epochs or max_steps determines the number."""

    ppo_epochs: int = field(default=1, metadata={"aliases": ["update_iters"]})
    """Passes over each rollout."""

    max_new_tokens: int = field(default=128, metadata={"aliases": ["max_dec_len"]})
    """Maximum number of tokens in a response, EOS included."""

    min_new_tokens: int = field(default=0, metadata={"aliases": ["min_dec_len"]})
    """Least number of tokens before EOS may be sampled; above 0 the KL is biased."""

    temperature: float = 1.0
    """Divides the logits, in sampling and in every log-prob."""

    kl_coeff: float | None = field(default=None, metadata={"aliases": ["init_kl_coeff"]})
    """Weight of the KL from the policy at the start [0.05]. With --method rank and an objective
    that compares with that policy it is 0 by default, because the objective's own beta holds the
    policy; a value above 0 is then subtracted from the scores as well."""

    kl_in: Literal["reward", "loss"] = "reward"
    """Subtract the KL from the rewards, token by token, or add it to the loss."""

    kl_estimator: Literal["auto", "k1", "k2", "k3", "k3_with_k2_gradient"] = "auto"
    """Estimator of a token's KL; auto: k1 in the reward, k3_with_k2_gradient in the loss."""

    adaptive_kl: bool = field(default=False, metadata={"aliases": ["adaptive_kl_coeff"]})
    """Adjust kl_coeff so that the KL approaches kl_target."""

    kl_target: float = 6.0
    """The KL that adaptive_kl aims for, in nats per response (the sum over its tokens)."""

    kl_horizon: float = 10000.0
    """Number of responses over which adaptive_kl adjusts the coefficient; smaller = faster."""

    clip_range_score: float = 10.0
    """Scores are clipped to +- this value; 0 = no limit."""

    normalize_reward: bool = field(default=False, metadata={"aliases": ["normalize_rewards"]})
    """Subtract the running mean of all scores so far and divide by their deviation."""

    missing_eos_penalty: float = 0.0
    """Subtract this from the score of a response that ends neither in EOS nor at truncate_token."""

    truncate_token: str | None = field(default=None, metadata={"aliases": ["stop_token"]})
    """Cut each response after the first token with this text, such as "."; the response
    then counts as finished, and no EOS is appended."""

    truncate_after: int = 0
    """Number of tokens at the start of a response where truncate_token is ignored."""

    max_unscored_fraction: float = 0.01
    """Stop if the scorer fails on more than this share of a rollout. Responses that exceed a reward
    model's window are left out and counted, whatever their share."""

    gamma: float = 1.0
    """Discount for each token."""

    gae_lambda: float = 0.95
    """Lambda of GAE: 1 = the advantage uses all later rewards; 0 = only the next reward and the
    critic's next value."""

    normalize_advantage: bool = field(default=True, metadata={"aliases": ["normalize_advantages"]})
    """ppo, reinforce_pp: shift and scale the advantages of a rollout to mean 0 and deviation 1."""

    clip_range_ratio: float = field(default=0.2, metadata={"aliases": ["clip_coeff"]})
    """Clip the probability ratio to [1 - clip_range_ratio, 1 + clip_range_ratio]."""

    clip_range_ratio_high: float | None = None
    """The upper clip range, if it should differ from clip_range_ratio."""

    dual_clip: float = 0.0
    """Limit the loss of a token with a negative advantage to dual_clip * |advantage| (usual: 3); 0
    = no limit."""

    clip_range_value: float = 0.2
    """Clip the critic's values to within this distance of the rollout's values; 0 = no clip."""

    vf_coeff: float = 0.1
    """Weight of the value loss."""

    entropy_coeff: float = 0.0
    """Weight of an entropy bonus."""

    loss_reduction: Literal["auto", "token-mean", "sequence-mean", "sequence-sum"] = "auto"
    """token-mean = mean over all tokens; sequence-mean = mean over the responses' means;
    sequence-sum = mean over the responses' sums, divided by max_new_tokens; auto: sequence-mean for
    grpo, sequence-sum for dr_grpo, else token-mean."""

    target_kl: float = 0.0
    """Begin the next rollout once an update has moved the policy this far from the one that sampled
    (k3, nats per token); 0 = never. Not to be confused with kl_target, the target of
    adaptive_kl."""

    ptx_datasets: str | None = field(default=None, metadata={"names": "data"})
    """Demonstrations; each step also trains on a batch of demonstrations, so that the policy stays
    a good language model."""

    ptx_coeff: float = 0.0
    """Weight of the cross-entropy on ptx_datasets, averaged over tokens and computed at the
    sampling temperature."""

    use_ema: bool = False
    """Also keep a moving average of the policy's weights, saved as policy_ema/."""

    ema_beta: float = 0.992
    """average = beta * average + (1 - beta) * weights, after every optimiser step."""

    eval_datasets: str | None = field(default=None, metadata={"names": "data"})
    """Held-out prompts, which are answered and scored at eval_steps and at the end."""

    sample_table_steps: int = 1
    """Write a few responses to samples.jsonl and show them on a terminal: those of the first
    rollout in every N optimiser steps, and those of evaluations; 0 = none."""

    sample_table_rows: int = 4
    """How many responses to show at a time."""

    offload_level: list[str] = field(default_factory=list)
    """What to move from the GPU to the host's memory while it is not needed: any of freeze_model
    (reference, reward model), optimizer (the moments, while responses are sampled and scored) and
    train_model (policy and critic, while frozen models run). Costs time; does not change
    results. An error on a machine without a GPU."""

    RANGES: ClassVar = {
        "critic_learning_rate": NOT_NEGATIVE,
        "critic_weight_decay": NOT_NEGATIVE,
        "critic_warmup_ratio": SHARE,
        "critic_warmup_steps": INDEX,
        "per_device_prompt_batch_size": COUNT,
        "num_return_sequences": INDEX,
        "rollout_size": COUNT,
        "refresh_steps": INDEX,
        "num_rollouts": f"-1 or {COUNT}",
        "ppo_epochs": COUNT,
        "kl_coeff": NOT_NEGATIVE,
        "kl_target": NOT_NEGATIVE,
        "kl_horizon": NOT_NEGATIVE,
        "clip_range_score": NOT_NEGATIVE,
        "missing_eos_penalty": NOT_NEGATIVE,
        "truncate_after": INDEX,
        "max_unscored_fraction": SHARE,
        "gamma": SHARE,
        "gae_lambda": SHARE,
        "clip_range_ratio": SHARE,
        "clip_range_ratio_high": NOT_NEGATIVE,
        "dual_clip": NOT_NEGATIVE,
        "clip_range_value": NOT_NEGATIVE,
        "vf_coeff": NOT_NEGATIVE,
        "entropy_coeff": NOT_NEGATIVE,
        "target_kl": NOT_NEGATIVE,
        "ptx_coeff": NOT_NEGATIVE,
        "ema_beta": BELOW_ONE,
        "sample_table_steps": INDEX,
        "sample_table_rows": COUNT,
    }

    @property
    def counts_epochs(self) -> bool:
        return super().counts_epochs and self.num_rollouts == -1

    @property
    def best_metric(self) -> str:
        return self.metric_for_best_model or "score"

    @property
    def has_critic(self) -> bool:
        return METHODS[self.method].has_critic

    @property
    def token_kl_estimator(self) -> str:
        """The estimator of a token's KL, with `auto` resolved."""
        if self.kl_estimator != "auto":
            return self.kl_estimator
        return "k1" if self.kl_in == "reward" else "k3_with_k2_gradient"

    @property
    def reduction(self) -> str:
        """The reduction of the losses over tokens, with `auto` resolved."""
        if self.loss_reduction != "auto":
            return self.loss_reduction
        return METHODS[self.method].reduction

    @property
    def clip_high(self) -> float:
        high = self.clip_range_ratio_high
        return self.clip_range_ratio if high is None else high

    def is_warm_up(self, steps_done: int) -> bool:
        """Whether only the critic is trained in the step that follows `steps_done` steps."""
        return self.groups()[0].is_frozen(steps_done)

    @property
    def engine_spec(self) -> EngineSpec:
        """The registry's entry of the engine that writes the responses."""
        return ENGINES[self.engine]

    @property
    def ranking(self) -> RankMethodSettings | None:
        """The objective that ranks, and its settings; None for a method with advantages."""
        return METHODS[self.method].ranking(self.method_settings)

    @property
    def compares_responses(self) -> bool:
        """Whether only differences between the responses to one prompt teach anything."""
        ranking = self.ranking
        needs_group = METHODS[self.method].needs_group
        return needs_group if ranking is None else needs_group and ranking.needs_order

    @property
    def prompts_per_rollout(self) -> int:
        """Number of prompts that a rollout of rollout_size responses answers."""
        return self.rollout_size // self.num_return_sequences

    def sampling(self, rollout: int) -> SamplingParams:
        """Return the sampling parameters of a rollout."""
        return SamplingParams.of(self, round=rollout)

    def groups(self) -> list[GroupSettings]:
        """Return the parameter groups of the policy, and of the critic if there is one."""
        from rrhf.models.policy_with_value import VALUE_PREFIX  # flags are read without torch

        policy = GroupSettings(
            "",
            self.learning_rate,
            self.weight_decay,
            self.lr_scheduler_type,
            self.warmup_ratio,
            self.critic_warmup_steps,
        )
        critic = GroupSettings(
            VALUE_PREFIX,
            self.critic_learning_rate,
            self.critic_weight_decay,
            self.critic_lr_scheduler_type,
            self.critic_warmup_ratio,
        )
        return [policy, critic] if self.has_critic else [policy]
