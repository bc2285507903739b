"""How often a row is parsed and encoded, from what `generate` writes to the first training step."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rank_settings import rank_config
from tiny import save_tiny
from trainer_cases import same_weights

from rrhf.data.candidate_files import CandidateFile, write_candidate_sets
from rrhf.data.candidate_rows import parse_candidate_set
from rrhf.generation.config import GenerateConfig
from rrhf.generation.stage import generate_file
from rrhf.scoring.config import ScoreConfig
from rrhf.scoring.stage import score_file
from rrhf.training.methods import offline, rank
from rrhf.training.methods.rank_examples import RankEncoder

NUM_PROMPTS = 30
BATCH = 2


def varied(prompts: list[str], responses: list[str], messages: list[Any]) -> list[float]:
    """A scorer that tells responses apart."""
    return [len(response) % 7 + place * 1e-3 for place, response in enumerate(responses)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def generated(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated")
    prompts = folder / "prompts.jsonl"
    asked = (f"\n\nHuman: ask for plant {n:02d}\n\nAssistant:" for n in range(NUM_PROMPTS))
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
    config = GenerateConfig(
        model, str(prompts), str(folder / "raw.jsonl"), max_new_tokens=3, num_return_sequences=2
    )
    return generate_file(config)


def score(generated: Path, output: Path) -> Path:
    scorer = f"function:{__name__}:varied"
    config = ScoreConfig(input_file=str(generated), output_file=str(output), scorer=scorer)
    return score_file(config)


def train(model: str, data: Path, out: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-2,
        "model_max_length": 120,
        "max_steps": 1,
        **changes,
    }
    return rank.train(rank_config(str(model), str(out), data_path=str(data), **values))


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the JSON parser was given the row of each prompt."""
    counts: Counter[str] = Counter()
    raw_decode = json.JSONDecoder.raw_decode

    def counted(self: json.JSONDecoder, text: str, idx: int = 0) -> Any:
        counts.update(re.findall(r'"query": "[^"]*(plant \d\d)', text))
        return raw_decode(self, text, idx)

    monkeypatch.setattr(json.JSONDecoder, "raw_decode", counted)
    return counts


def test_a_row_is_parsed_once_to_score_it_and_once_to_train_on_it(
    model: str,
    generated: Path,
    tmp_path: Path,
    parsed: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scored = score(generated, tmp_path / "scored.jsonl")
    assert set(parsed.values()) == {1} and len(parsed) == NUM_PROMPTS
    monkeypatch.setattr(offline, "WORTH_LEAVING", 0)
    train(model, scored, tmp_path / "run")
    again = [plant for plant, count in parsed.items() if count > 2]
    assert len(again) == BATCH, "what a step uses is read when it is used"
    assert sorted(parsed.values()) == [2] * (NUM_PROMPTS - BATCH) + [3] * BATCH


def test_a_short_run_encodes_what_it_uses_and_ends_with_the_same_weights(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = tmp_path / "scored.jsonl"
    rows = [
        {"query": f"ask {n}", "responses": ["help", "a friend"], "scores": [n % 3, 1]}
        for n in range(NUM_PROMPTS)
    ]
    write_candidate_sets(scored, (parse_candidate_set(row, "") for row in rows))
    encoded: list[int] = []
    encode = RankEncoder._example

    def counted(self: RankEncoder, chosen: Any) -> Any:
        encoded.append(1)
        return encode(self, chosen)

    monkeypatch.setattr(RankEncoder, "_example", counted)
    train(model, scored, tmp_path / "long", max_steps=3)
    assert len(encoded) == NUM_PROMPTS + 3 * BATCH
    encoded.clear()
    monkeypatch.setattr(offline, "WORTH_LEAVING", 0)
    train(model, scored, tmp_path / "short", max_steps=3)
    assert len(encoded) == 3 * BATCH
    assert same_weights(tmp_path / "short" / "policy", tmp_path / "long" / "policy")
    manifests = [
        json.loads((tmp_path / n / "manifest.json").read_text()) for n in ("short", "long")
    ]
    assert manifests[0]["data"] == manifests[1]["data"], "nothing was to be cut"


def test_rows_that_a_stage_wrote_are_hashed_and_not_parsed_to_open_them(
    generated: Path, tmp_path: Path, parsed: Counter[str]
) -> None:
    file = CandidateFile(generated)
    assert not parsed and len(file) == NUM_PROMPTS and file.num_candidates == 2 * NUM_PROMPTS
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(generated.read_bytes())
    checked = CandidateFile(copy)  # nobody vouches for it
    assert set(parsed.values()) == {1}
    assert list(checked) == list(file) and checked.digest == file.digest
    assert b"".join(file.lines()) == b"".join(checked.lines()) == generated.read_bytes()
