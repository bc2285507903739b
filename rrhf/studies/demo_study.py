"""One seed of the demonstration: ranking offline, twice, and PPO to compare with.

SFT and reward model -> round-1/ -> best-of-n/ and rrhf/ -> round-2/ -> rrhf-2/ -> evaluation/
                     -> ppo/ ------------------------------------------------------^
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rrhf.studies.rows import RowPlan, evaluate_rows, load_rows
from rrhf.studies.stages import Stages

STAGES_OF = {
    "sft": (),
    "best-of-n": ("round-1", "best-of-n"),
    "rrhf": ("round-1", "rrhf"),
    "rrhf-2": ("round-1", "rrhf", "round-2", "rrhf-2"),
    "ppo": ("ppo",),
}
"""The stages behind each policy after SFT and reward model, its candidates included."""


class DemoStudy(Stages):
    """The demonstration's stages."""

    num_stages = 12

    def run(self) -> list[dict[str, Any]]:
        """Run all stages; returns the rows of the table."""
        self.prepare()
        self.stage("round-1", "sample and score candidates", lambda: self.candidates(1, "sft"))
        self.stage(
            "best-of-n",
            "train on the best alone (rank weight 0)",
            lambda: self.train_rank("best-of-n", "round-1", "sft", on_best=True),
        )
        self.stage("rrhf", "train by RRHF", lambda: self.train_rank("rrhf", "round-1", "sft"))
        self.stage("round-2", "sample and score again", lambda: self.candidates(2, "rrhf"))
        self.stage(
            "rrhf-2",
            "train by RRHF, round 2",
            lambda: self.train_rank("rrhf-2", "round-2", "rrhf", is_later=True),
        )
        self.stage("ppo", "train by PPO", lambda: self.train_online("ppo", "ppo"))
        self.stage("evaluation", "evaluate on held-out prompts", self._evaluate)
        return load_rows(self._evaluate())

    def _evaluate(self) -> list[Path]:
        best_of = self.recipe.samples_per_prompt
        plan = [
            RowPlan("SFT", "sft"),
            RowPlan("SFT greedy", "sft", is_greedy=True),
            RowPlan(f"best of {best_of}", "sft", best_of=best_of),
            RowPlan(f"best-of-{best_of} fine-tuning", "best-of-n"),
            RowPlan("RRHF", "rrhf"),
            RowPlan("RRHF greedy", "rrhf", is_greedy=True),
            RowPlan("RRHF round 2", "rrhf-2"),
            RowPlan("RRHF round 2 greedy", "rrhf-2", is_greedy=True),
            RowPlan("PPO", "ppo"),
            RowPlan("PPO greedy", "ppo", is_greedy=True),
        ]
        return evaluate_rows(
            self,
            plan,
            self.folder / "evaluation",
            samples=self.recipe.test_samples,
            extra=lambda row: {
                "training": {name: self.seconds[name] for name in STAGES_OF[row.policy]}
            },
        )
