"""An engine outside the package that repeats given texts and tells nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rrhf.generation.build import EngineSpec
from rrhf.generation.engine import Capabilities, Sample, SamplingParams
from rrhf.records import CandidateSet


class CannedTexts:
    """Repeats its texts, one after the other; prompts of more than 200 letters do not fit."""

    capabilities = Capabilities(seeds=True)

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def describe(self) -> dict[str, Any]:
        return {"engine": "canned", "texts": list(self.texts)}

    def fits(self, prompt: CandidateSet, params: SamplingParams) -> bool:
        return len(prompt.query) <= 200

    def generate(
        self, prompts: Sequence[CandidateSet], params: SamplingParams
    ) -> Iterator[tuple[int, list[Sample]]]:
        texts = [self.texts[i % len(self.texts)] for i in range(params.num_return_sequences)]
        for place in reversed(range(len(prompts))):
            yield place, [Sample(None, None, None, "stop", text) for text in texts]


@dataclass
class CannedSettings:
    """What is repeated."""

    text: str = "You could ask a friend."
    """The response to everything."""


CANNED = EngineSpec(
    lambda options: CannedTexts(options.settings.text), CannedSettings, has_model=False
)
