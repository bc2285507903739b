"""One seed of the comparison of methods, stage by stage, from one SFT policy and one reward model.

Each method is one entry of `METHODS`: its stages, its last policy, and the title of its curve.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rrhf.errors import UserError
from rrhf.report.training_cost import TrainingCost, cost_of
from rrhf.studies.change import Change
from rrhf.studies.method_table import METHODS
from rrhf.studies.online_settings import POINTS
from rrhf.studies.rows import Row, RowPlan, evaluate_rows
from rrhf.studies.stages import STAGE_FILE, Stages

BEST_OF_ON_CURVE = (2, 4, 8, 16)


@dataclass(frozen=True)
class SeedResult:
    """The evaluation rows and costs of all methods, for one seed.

    Attributes:
        rows: method -> its row with sampled responses.
        greedy: method -> its row with greedy responses; best-of-N has no such row.
        curves: title -> rows in the order of training, beginning with SFT.
        costs: method -> the cost of its training.
    """

    rows: dict[str, Row]
    greedy: dict[str, Row]
    curves: dict[str, list[Row]]
    costs: dict[str, TrainingCost]


class MethodsStudy(Stages):
    """The comparison's stages.

    Args:
        methods: keys of `METHODS`, including SFT.
        others: as in `Stages`.
        settings: see `Change`; a method without settings here uses those of the world's recipe.

    Attributes:
        is_brief: measure only sampled responses: no greedy rows and no likelihoods of given texts.
        num_points: number of policies that an online training saves, as points of its curve.
    """

    is_brief = False
    num_points = POINTS

    def __init__(
        self,
        methods: Sequence[str],
        *others: Any,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(*others)
        self.change = Change(settings or {})
        self.methods = {key: METHODS[key] for key in METHODS if key in methods}
        for key, method in self.methods.items():
            known = {*self.recipe.online.methods, *([method.online] if settings else [])}
            if method.online and method.online not in known:
                raise UserError(
                    f"--methods {key}: the recipe of the world {self.world.name} has no settings "
                    f"for {method.online}; it has {', '.join(self.recipe.online.methods) or 'none'}"
                )
        self._stages = list(dict.fromkeys(s for m in self.methods.values() for s in m.stages))
        self.num_stages = 5 + len(self._stages) + 2

    def run(self) -> SeedResult:
        """Run all stages; return the results of this seed."""
        self.prepare()
        for name in self._stages:
            self.method_stage(name, self.num_points)
        self.stage("evaluation", "evaluate on held-out prompts", self._measured_rows)
        self.stage("curves", "evaluate the policies between", self._measured_curves)
        result = self._result()
        self.finish()
        return result

    # Rows.

    def _row_plans(self) -> dict[str, RowPlan]:
        return {
            key: RowPlan(m.title, m.policy, best_of=m.best_of) for key, m in self.methods.items()
        }

    def _greedy_plans(self) -> dict[str, RowPlan]:
        return {
            key: RowPlan(f"{m.title} greedy", m.policy, is_greedy=True)
            for key, m in self.methods.items()
            if m.best_of == 1 and not self.is_brief
        }

    def _measured_rows(self) -> list[Row]:
        plan = [*self._row_plans().values(), *self._greedy_plans().values()]
        folder, samples = self.folder / "evaluation", self.recipe.test_samples
        return evaluate_rows(self, plan, folder, samples, has_likelihoods=not self.is_brief)

    def _curve_plans(self) -> dict[str, list[RowPlan]]:
        """Return the points of each curve by its title, from SFT to the method's last policy.

        A point that is also a row of the table has the plan of that row, so it is measured only
        once.
        """
        known = {(plan.policy, plan.best_of): plan for plan in self._row_plans().values()}
        curves: dict[str, list[RowPlan]] = {}
        for method in self.methods.values():
            if not method.curve:
                continue
            points = [RowPlan("SFT", "sft")]
            if method.best_of > 1:
                points += [RowPlan(f"best of {n}", "sft", best_of=n) for n in BEST_OF_ON_CURVE]
            elif method.online:
                points += [
                    RowPlan(f"{method.title} step {step}", folder)
                    for step, folder in self._policies_of(method.policy)
                ]
                points.append(RowPlan(method.title, method.policy))
            else:
                rounds = [s for s in method.stages if s.startswith("rrhf")]
                points += [RowPlan(f"RRHF round {i}", s) for i, s in enumerate(rounds, 1)]
            curves[method.curve] = [known.get((p.policy, p.best_of), p) for p in points]
        return curves

    def _policies_of(self, stage: str) -> list[tuple[int, str]]:
        """Return (step, folder) of the policies that were saved during training, except the
        last."""
        found = []
        for path in (self.place(stage) / "policies").glob("step-*"):
            number = re.fullmatch(r"step-(\d+)", path.name)
            if number:
                found.append((int(number[1]), f"{stage}/policies/{path.name}"))
        return sorted(found)[: self.num_points - 1]

    def _measured_curves(self) -> list[Row]:
        folder = self.folder / "curves"
        return evaluate_rows(self, self._between(), folder, samples=1, has_likelihoods=False)

    def _between(self) -> list[RowPlan]:
        """Return the points of curves that are not rows of the table, without duplicates."""
        rows = set(self._row_plans().values())
        points = [point for curve in self._curve_plans().values() for point in curve]
        return [point for point in dict.fromkeys(points) if point not in rows]

    def _result(self) -> SeedResult:
        """Collect the results of this seed from the folders, once everything is measured."""
        plans, greedy = self._row_plans(), self._greedy_plans()
        measured = self._measured_rows()
        by_plan = dict(zip([*plans.values(), *greedy.values()], measured, strict=True))
        by_plan |= dict(zip(self._between(), self._measured_curves(), strict=True))
        return SeedResult(
            {key: by_plan[plan] for key, plan in plans.items()},
            {key: by_plan[plan] for key, plan in greedy.items()},
            {
                title: [by_plan[point] for point in points]
                for title, points in self._curve_plans().items()
            },
            {
                key: cost_of([self.place(stage) for stage in method.stages], STAGE_FILE)
                for key, method in self.methods.items()
            },
        )
