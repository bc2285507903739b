"""Settings for a model of 0.4M weights on a written world, on which the worlds' recipes are based.

The online methods draw as many responses as one round of offline ranking (four for each alignment
prompt), in rollouts of a hundred, and make two passes over each rollout, as offline ranking does
over its candidates. Scores are normalised to deviation 1 during training, so that a KL coefficient
means the same for every reward model. PPO's critic is made from a reward model that never saw an
unfinished response, so its values are useless at first. Only the critic is therefore trained during
the first two rollouts, and with `gae_lambda` 1 an advantage does not depend on the critic's values
at later tokens.
"""

from __future__ import annotations

from rrhf.worlds.recipe import OnlineRecipe, Recipe, TinySize

_RRHF = {"rrhf_weight": 0.1, "sft_reduction": "response"}


def tiny_recipe(model: TinySize, max_new_tokens: int, num_rollouts: int) -> Recipe:
    """Return a recipe for replies of at most `max_new_tokens` tokens."""
    return Recipe(
        model=model,
        chat_format="hh",
        max_new_tokens=max_new_tokens,
        samples_per_prompt=4,
        test_samples=2,
        training={
            "model_max_length": 192,
            "min_learning_rate_ratio": 0.1,
            "warmup_ratio": 0.05,
            "group_by_length": True,
        },
        sft={
            "num_train_epochs": 2,
            "per_device_train_batch_size": 16,
            "learning_rate": 3e-3,
            "weight_decay": 0.05,
        },
        reward={
            "num_train_epochs": 1,
            "per_device_train_batch_size": 16,
            "learning_rate": 1e-3,
            "regularization": 1e-3,
            "normalizer_type": "RunningMeanStd",
        },
        rank={"num_train_epochs": 2.0, "per_device_train_batch_size": 8, "learning_rate": 5e-4},
        later_rounds={"num_train_epochs": 1.0},
        rrhf=_RRHF,
        online=OnlineRecipe(
            samples_per_prompt=4,
            rollout_size=100,
            num_rollouts=num_rollouts,
            minibatch_responses=25,
            minibatch_prompts=5,
            shared={
                "ppo_epochs": 2,
                "learning_rate": 5e-4,
                "warmup_ratio": 0.1,
                "min_learning_rate_ratio": 0.1,
                "normalize_reward": True,
                "clip_range_score": 5.0,
                "missing_eos_penalty": 1.0,
            },
            methods={
                "ppo": {
                    "kl_coeff": 0.1,
                    "critic_learning_rate": 1e-3,
                    "critic_warmup_ratio": 0.1,
                    "critic_warmup_steps": 16,
                    "vf_coeff": 0.1,
                    "gae_lambda": 1.0,
                },
                "rloo": {"kl_coeff": 0.1},
                "grpo": {"kl_coeff": 0.1},
                "rrhf": {"kl_coeff": 0.2, "method_settings": _RRHF},
            },
        ),
    )
