"""Faults in PPO's models, losses and what stands next to them: average, demonstrations, prompts."""

from __future__ import annotations

from .apply import Mutant

ONLINE = "rrhf/training/online/"

ACTORS, AVERAGE, OBJECTIVE, PROMPTS, PTX, COPY = (
    f"{ONLINE}{room}.py" for room in ("actors", "ema", "objective", "prompts", "ptx", "whole_copy")
)

REFERENCE = "rrhf/training/core/reference.py"

RUNS = ("test_online_actors.py",)
TERMS = ("test_objective.py",)

MODEL_FAULTS = [
    Mutant(
        "an entropy bonus moves nothing",
        ACTORS,
        "entropy_has_gradient=config.entropy_coeff > 0",
        "entropy_has_gradient=False",
        RUNS,
    ),
    Mutant(
        "the reference has another temperature",
        REFERENCE,
        "policy_on_engine(bench, model, LogprobOptions(temperature))",
        "policy_on_engine(bench, model)",
        RUNS,
    ),
    Mutant(
        "the policy trains at another temperature",
        ACTORS,
        "LogprobOptions(\n        config.temperature,",
        "LogprobOptions(\n        1.0,",
        RUNS,
    ),
    Mutant(
        "the value loss moves the trunk that it should leave alone",
        ACTORS,
        "ActorCritic(policy, value, config.detach_value_trunk)",
        "ActorCritic(policy, value)",
        RUNS,
    ),
    Mutant(
        "the critic starts from the scorer",
        ACTORS,
        "config.reward_critic_model_name_or_path or config.reward_model_name_or_path",
        "config.reward_model_name_or_path or config.reward_critic_model_name_or_path",
        RUNS,
    ),
    Mutant(
        "the critic forgets the reward model's scale",
        ACTORS,
        "score_normalizer(bare.config)",
        "None",
        RUNS,
    ),
    Mutant(
        "a value model ends at the EOS that it should read",
        ACTORS,
        "return None if pad_id == bench.codec.end_id else pad_id",
        "return pad_id",
        RUNS,
    ),
    Mutant(
        "a critic whose window just fits is refused",
        ACTORS,
        "config.model_max_length > window",
        "config.model_max_length >= window",
        RUNS,
    ),
    Mutant(
        "the average is kept as the best model too",
        ACTORS,
        'unmeasured=("policy_ema",)',
        "unmeasured=()",
        RUNS,
    ),
    Mutant(
        "old average and new weights change their shares",
        AVERAGE,
        "lerp_(weight, 1 - self._beta)",
        "lerp_(weight, self._beta)",
        ("test_ema.py",),
    ),
    Mutant(
        "the average is the weights themselves",
        AVERAGE,
        "n: w.clone() for n, w",
        "n: w for n, w",
        ("test_ema.py",),
    ),
    Mutant(
        "the average begins anew on resuming",
        AVERAGE,
        "if not self._average:",
        "if True:",
        ("test_ema.py",),
    ),
    Mutant(
        "where a checkpoint has no average none is kept",
        AVERAGE,
        "if tensors:  # else the run had no average until now",
        "if True:",
        ("test_ema.py",),
    ),
    Mutant(
        "the second name of a tied weight has no average",
        AVERAGE,
        "self._average.get(first[id(weight)])",
        "self._average.get(name)",
        ("test_ema.py",),
    ),
    Mutant(
        "a whole copy has dropout",
        COPY,
        ".to(parallel.device).eval()",
        ".to(parallel.device)",
        ("test_rollout_edges.py",),
    ),
]

TERM_FAULTS = [
    Mutant(
        "the largest ratio is that of the whole run so far",
        OBJECTIVE,
        "largest, self._largest_ratio = self._largest_ratio, torch.zeros(())",
        "largest = self._largest_ratio",
        TERMS,
    ),
    Mutant(
        "the largest ratio is the last micro-batch's",
        OBJECTIVE,
        "= torch.maximum(self._largest_ratio.to(largest.device), largest)",
        "= largest",
        TERMS,
    ),
    Mutant(
        "fillers are in the losses",
        OBJECTIVE,
        "return batch.response_mask & (batch.row_weights > 0)[:, None]",
        "return batch.response_mask",
        ("test_objective.py", "test_ptx.py"),
    ),
    Mutant(
        "the clip has the same width on both sides",
        OBJECTIVE,
        "config.clip_range_ratio, config.clip_high, config.dual_clip or None",
        "config.clip_range_ratio, config.clip_range_ratio, config.dual_clip or None",
        TERMS,
    ),
    Mutant(
        "the dual clip is off",
        OBJECTIVE,
        "config.clip_high, config.dual_clip or None",
        "config.clip_high, None",
        TERMS,
    ),
    Mutant(
        "values are never clipped",
        OBJECTIVE,
        "limit = config.clip_range_value or None",
        "limit = None",
        TERMS,
    ),
    Mutant(
        "the value loss is not measured by the longest response",
        OBJECTIVE,
        "config.vf_coeff * self._scale",
        "config.vf_coeff",
        TERMS,
    ),
    Mutant(
        "entropy is punished",
        OBJECTIVE,
        "self._term(entropy, mask, config.entropy_coeff)",
        "self._term(entropy, mask, -config.entropy_coeff)",
        TERMS,
    ),
    Mutant(
        "the KL in the loss keeps its first weight",
        OBJECTIVE,
        "self._term(kl, mask, self._controller.coefficient)",
        "self._term(kl, mask, config.kl_coeff)",
        TERMS,
    ),
    Mutant(
        "the policy learns in the critic's warm-up",
        OBJECTIVE,
        "weight = 0.0 if self.policy_is_frozen else weight * self._scale",
        "weight = weight * self._scale",
        TERMS,
    ),
    Mutant(
        "sums over responses are not measured by the longest",
        OBJECTIVE,
        'return 1 / self.config.max_new_tokens if self.config.reduction == "sequence-sum" else 1.0',
        "return 1.0",
        TERMS,
    ),
    Mutant(
        "advantages stand where old log-probs should",
        OBJECTIVE,
        "old, advantages = stored.old_logprobs, stored.advantages",
        "advantages, old = stored.old_logprobs, stored.advantages",
        TERMS,
    ),
    Mutant(
        "the KL in the loss is taken from the old policy",
        OBJECTIVE,
        "outputs.logprobs, stored.reference_logprobs, mask, config",
        "outputs.logprobs, stored.old_logprobs, mask, config",
        TERMS,
    ),
    Mutant(
        "the whole entropy is told, padding included",
        OBJECTIVE,
        "(masked_sum(outputs.entropy.detach(), mask).sum(), mask.sum())",
        "(outputs.entropy.detach().sum(), mask.sum())",
        TERMS,
    ),
    Mutant(
        "prompts keep the candidates that they bring",
        PROMPTS,
        "replace(prompt, candidates=())",
        "replace(prompt)",
        ("test_rollout_edges.py",),
    ),
    Mutant(
        "prompts that do not fit count as cut",
        PROMPTS,
        "return kept, fitting.num_cut",
        "return kept, fitting.num_cut + fitting.left_out.total()",
        ("test_rollout_edges.py",),
    ),
    Mutant(
        "fillers are among the demonstrations' tokens",
        PTX,
        "tokens = (batch.response_lengths * batch.row_weights).sum()",
        "tokens = batch.response_lengths.sum()",
        ("test_objective.py", "test_ptx.py"),
    ),
    Mutant(
        "demonstrations are in the denominators of the experience",
        PTX,
        '{**dict.fromkeys(found, none), "ptx": tokens}',
        '{**found, "ptx": tokens}',
        ("test_ptx.py",),
    ),
    Mutant(
        "the critic takes no part in a step's demonstrations",
        PTX,
        "nothing = nothing + 0.0 * outputs.values.sum()",
        "pass",
        ("test_objective.py", "test_ptx.py"),
    ),
    Mutant(
        "demonstrations move the policy in the critic's warm-up",
        PTX,
        "weight = 0.0 if self._inner.policy_is_frozen else self._coefficient",
        "weight = self._coefficient",
        ("test_ptx.py",),
    ),
    Mutant(
        "fillers are among the demonstrations",
        PTX,
        "total = (totals * batch.row_weights).sum() + nothing",
        "total = totals.sum() + nothing",
        ("test_ptx.py",),
    ),
    Mutant(
        "demonstrations begin anew on resuming",
        PTX,
        "self._demonstrations.load_state_dict(dict(state))",
        "pass",
        ("test_ptx.py",),
    ),
]
