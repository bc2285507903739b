"""A row while it is being measured, and what a finished one says about how it was made."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from rrhf.evaluation.bootstrap import Measure, estimate
from rrhf.evaluation.cost import CostMeter
from rrhf.evaluation.likelihoods import RowKey
from rrhf.evaluation.results import SCHEMA_VERSION, measure_to_json
from rrhf.generation.engine import SamplingParams
from rrhf.records import CandidateSet

# Settings of an engine that do not change what a response is drawn from.
_NOT_DECODING = ("num_return_sequences", "seed", "round")


@dataclass
class Draft:
    """What has been measured of a row so far.

    Attributes:
        name: of the row.
        measures: metrics with values by prompt, which get intervals.
        numbers: metrics that are one number of the whole row.
        counts: what was left out, and why.
        notes: what a reader of the numbers must know.
        cost: seconds, passes, tokens.
        reference_logprobs: log-probs of the reference at temperature 1, so far.
    """

    name: str
    measures: dict[str, Measure] = field(default_factory=dict)
    numbers: dict[str, float | None] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    cost: CostMeter = field(default_factory=CostMeter)
    reference_logprobs: dict[RowKey, Tensor] = field(default_factory=dict)

    def as_row(
        self, made_with: Mapping[str, Any], confidence: float, resamples: int
    ) -> dict[str, Any]:
        """The row, ready for JSON."""
        metrics: dict[str, Any] = {
            name: estimate(measure, confidence, resamples).as_dict()
            for name, measure in self.measures.items()
        }
        for name, number in self.numbers.items():
            metrics[name] = {
                "mean": number,
                "low": None,
                "high": None,
                "n": made_with["num_prompts"],
            }
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "metrics": dict(sorted(metrics.items())),
            "made_with": dict(made_with),
            "counts": self.counts,
            "cost": self.cost.as_dict(),
            "notes": self.notes,
            "per_prompt": {
                name: measure_to_json(measure) for name, measure in sorted(self.measures.items())
            },
        }


def describe_decoding(params: SamplingParams, best_of: int = 1) -> dict[str, Any]:
    """What must agree between two rows for their decoding to be the same."""
    settings = asdict(params)
    for name in _NOT_DECODING:
        del settings[name]
    settings["stop_strings"] = list(settings["stop_strings"])
    if best_of > 1:
        return {"kind": f"best-of-{best_of}", **settings, "best_of": best_of}
    if params.num_beams > 1:
        return {"kind": "beam", **settings}
    return {"kind": "sample" if params.do_sample else "greedy", **settings}


def fingerprint(sets: Sequence[CandidateSet]) -> str:
    """16 hex digits that identify prompts and responses, whatever their order."""
    digest = hashlib.sha256()
    for s in sorted(sets, key=lambda s: s.id):
        for text in (s.id, s.query, *(c.response for c in s.candidates)):
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "big") + data)
        digest.update(b"\n")
    return digest.hexdigest()[:16]
