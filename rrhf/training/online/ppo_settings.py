"""What `rrhf train ppo` can be told, and what follows from it; nothing is refused here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rrhf.generation.params import SamplingParams
from rrhf.training.core.config import GroupSettings, TrainingConfig
from rrhf.training.online.methods import METHODS


@dataclass
class PPOSettings(TrainingConfig):
    """Rollouts, rewards and the update of online training."""

    model_name_or_path: str = field(
        metadata={"names": "model", "aliases": ["model_name", "actor_model_name_or_path"]}
    )
    """Folder, run folder or hub name of the policy to start from; it is the reference too."""

    train_datasets: str = field(
        kw_only=True, metadata={"names": "data", "aliases": ["prompts", "data_path", "prompt_file"]}
    )
    """Prompts: a file, a registered name, name[:proportion[:path]], several with commas."""

    reward_model_name_or_path: str = field(
        kw_only=True, metadata={"names": "scorer", "aliases": ["scorer"]}
    )
    """What scores responses: folder, run folder or hub name of a reward model (its tokenizer may
    differ from the policy's), function:module:name, gold:WORLD, or package.module:name of a Scorer
    of your own."""

    method: str = field(default="ppo", metadata={"aliases": ["rl_algorithm"], "registry": METHODS})
    """ppo has a critic, the others have none; rrhf ranks the responses of the live policy (OP-k);
    or one of your own."""

    method_settings: Any = field(default=None, metadata={"settings_of": "method"})

    reward_critic_model_name_or_path: str | None = field(default=None, metadata={"names": "model"})
    """Folder, run folder or hub name of the reward model that the critic starts from; by default
    reward_model_name_or_path."""

    share_trunk: bool | None = None
    """Put a value head, zero at first, on the policy's own trunk: less memory than a second one. By
    default only where the scorer is no model that a critic could start from."""

    detach_value_trunk: bool = False
    """With share_trunk: the value loss trains its head alone, and moves nothing of the policy."""

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
    """Optimiser steps at the start in which the critic learns alone."""

    per_device_prompt_batch_size: int = field(
        default=16, metadata={"aliases": ["rollout_mini_batch_size"]}
    )
    """Prompts that one device samples for at a time; only memory and speed depend on it."""

    per_device_train_batch_size: int = 8
    """Responses in one forward on one device (rrhf: prompts with all their responses)."""

    num_return_sequences: int = field(default=0, metadata={"aliases": ["rollout_n"]})
    """Responses to each prompt, all of them trained on; 0 = 4 for methods that compare the
    responses to one prompt, which need 2 at least, and 1 for the others."""

    rollout_size: int = 128
    """Responses in one rollout, on all devices together."""

    num_rollouts: int = -1
    """Stop after this many rollouts; -1 = as many as num_train_epochs or max_steps ask for."""

    ppo_epochs: int = field(default=1, metadata={"aliases": ["update_iters"]})
    """Passes over each rollout."""

    max_new_tokens: int = field(default=128, metadata={"aliases": ["max_dec_len"]})
    """Most tokens of a response, EOS included."""

    min_new_tokens: int = field(default=0, metadata={"aliases": ["min_dec_len"]})
    """EOS is not allowed before so many tokens. Above 0 the KL is biased, like under a filter."""

    temperature: float = 1.0
    """Divides the logits, in sampling and in every log-prob."""

    top_p: float = 1.0
    """Sample from the smallest set of tokens with this mass; below 1 the KL is biased."""

    top_k: int = 0
    """Sample from so many likeliest tokens; 0 = all. Otherwise the KL is biased."""

    repetition_penalty: float = 1.0
    """Penalty on tokens that were used before; other than 1 the KL is biased."""

    kl_coeff: float = field(default=0.05, metadata={"aliases": ["init_kl_coeff"]})
    """Weight of the KL from the reference, the policy as it was at the start."""

    kl_in: Literal["reward", "loss"] = "reward"
    """Take the KL off the rewards token by token, or add it to the loss."""

    kl_estimator: Literal["auto", "k1", "k2", "k3", "k3_with_k2_gradient"] = "auto"
    """Estimator of a token's KL; auto: k1 in the reward, k3_with_k2_gradient in the loss."""

    adaptive_kl: bool = field(default=False, metadata={"aliases": ["adaptive_kl_coeff"]})
    """Let the coefficient follow kl_target."""

    kl_target: float = 6.0
    """KL that adaptive_kl steers to: nats per response (the sum over its tokens)."""

    kl_horizon: float = 10000.0
    """Responses over which adaptive_kl acts; smaller is faster."""

    clip_range_score: float = 10.0
    """Scores are held within +- this; 0 = no limit."""

    normalize_reward: bool = field(default=False, metadata={"aliases": ["normalize_rewards"]})
    """Subtract the running mean of all scores so far and divide by their deviation."""

    missing_eos_penalty: float = 0.0
    """Taken off the score of a response that ends neither in EOS nor at truncate_token."""

    truncate_token: str | None = field(default=None, metadata={"aliases": ["stop_token"]})
    """Cut each response behind the first token that is this text, such as "."; it then counts as
    ended, without an EOS being put there."""

    truncate_after: int = 0
    """Tokens of a response that truncate_token leaves alone."""

    max_unscored_fraction: float = 0.01
    """Stop where the scorer fails on more than this share of a rollout; what exceeds a reward
    model's window is left out and counted, whatever its share."""

    gamma: float = 1.0
    """Discount for each token."""

    gae_lambda: float = 0.95
    """1 trusts the rewards alone, 0 the critic's next value alone."""

    normalize_advantage: bool = field(default=True, metadata={"aliases": ["normalize_advantages"]})
    """ppo, reinforce_pp: bring the advantages of a rollout to mean 0 and deviation 1."""

    clip_range_ratio: float = field(default=0.2, metadata={"aliases": ["clip_coeff"]})
    """How far the probability ratio may move down, and up, before the clip holds it."""

    clip_range_ratio_high: float | None = None
    """How far up, where that should differ from clip_range_ratio."""

    dual_clip: float = 0.0
    """Hold the loss of a bad token at this times its advantage (usual: 3); 0 = not held."""

    clip_range_value: float = 0.2
    """How far a value may move from what it was in the rollout; 0 = no clip."""

    vf_coeff: float = 0.1
    """Weight of the value loss."""

    entropy_coeff: float = 0.0
    """Weight of an entropy bonus."""

    loss_reduction: Literal["auto", "token-mean", "sequence-mean", "sequence-sum"] = "auto"
    """Mean over all tokens, over responses' means, or over responses' sums divided by
    max_new_tokens; auto: sequence-mean for grpo, sequence-sum for dr_grpo, else token-mean."""

    target_kl: float = 0.0
    """Go on to the next rollout once an update moved the policy this far from the one that sampled
    (k3, nats per token); 0 = never. Not kl_target, which is adaptive_kl's."""

    ptx_datasets: str | None = field(default=None, metadata={"names": "data"})
    """Demonstrations: each step adds a batch of them, so that the policy stays a language model."""

    ptx_coeff: float = 0.0
    """Weight of their cross-entropy, the mean over tokens, at the temperature of the sampling."""

    use_ema: bool = False
    """Also keep a moving average of the policy's weights, saved as policy_ema/."""

    ema_beta: float = 0.992
    """average = beta * average + (1 - beta) * weights, after every optimiser step."""

    eval_datasets: str | None = field(default=None, metadata={"names": "data"})
    """Prompts that are answered and scored at eval_steps and at the end."""

    sample_table_steps: int = 1
    """Write a few responses to samples.jsonl, and show them on a terminal: of the first rollout in
    every so many optimiser steps, and of evaluations; 0 = none."""

    sample_table_rows: int = 4
    """How many."""

    offload_level: list[str] = field(default_factory=list)
    """What to move from the GPU to the host's memory while it is not needed: any of freeze_model
    (reference, reward model), optimizer (its moments, while responses are sampled and scored) and
    train_model (policy and critic, while frozen models run). Costs time, changes no result. Refused
    on a machine without a GPU."""

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
        """The estimator, `auto` resolved."""
        if self.kl_estimator != "auto":
            return self.kl_estimator
        return "k1" if self.kl_in == "reward" else "k3_with_k2_gradient"

    @property
    def reduction(self) -> str:
        """Of the losses over tokens, `auto` resolved."""
        if self.loss_reduction != "auto":
            return self.loss_reduction
        return METHODS[self.method].reduction

    @property
    def clip_high(self) -> float:
        high = self.clip_range_ratio_high
        return self.clip_range_ratio if high is None else high

    def is_warm_up(self, steps_done: int) -> bool:
        """Whether the critic learns alone in the step after so many."""
        return self.groups()[0].is_frozen(steps_done)

    @property
    def prompts_per_rollout(self) -> int:
        return self.rollout_size // self.num_return_sequences

    def sampling(self, rollout: int) -> SamplingParams:
        """How the responses of a rollout are drawn."""
        return SamplingParams(
            num_return_sequences=self.num_return_sequences,
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            round=rollout,
        )

    def groups(self) -> list[GroupSettings]:
        """The policy's weights, and the critic's where there is one."""
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
