"""Rows on disk come back as they were; what is no row is told."""

import json

import pytest
from evaluation_cases import prompt, reply

from rrhf.data.candidate_files import read_candidate_sets
from rrhf.errors import UserError
from rrhf.evaluation.bootstrap import Measure, estimate
from rrhf.evaluation.evaluator import Evaluator
from rrhf.evaluation.results import (
    file_stem,
    load_row,
    measure_from_json,
    measure_to_json,
    save_row,
)
from rrhf.evaluation.shared import Shared

SETS = [prompt("a", reply("xx")), prompt("b", reply("y", reason="length"))]


def test_a_measure_comes_back_with_the_same_estimate():
    for measure in (
        Measure({"a": 0.1, "b": 1 / 3, "c": 7.0}),
        Measure({"a": 3.0, "b": 2.0}, {"a": 4.0, "b": 9.0}, "exp"),
    ):
        again = measure_from_json(json.loads(json.dumps(measure_to_json(measure))))
        assert estimate(again) == estimate(measure)


def test_a_row_and_its_responses_come_back(tmp_path):
    evaluator = Evaluator(Shared(SETS))
    row = evaluator.responses_row("the data: own", SETS)
    path = save_row(row, evaluator.samples["the data: own"], tmp_path / "new")
    assert path.name == "the_data_own.json"
    assert load_row(path) == json.loads(json.dumps(row))
    assert list(read_candidate_sets(tmp_path / "new" / "the_data_own.samples.jsonl")) == SETS


@pytest.mark.parametrize(
    ("name", "stem"),
    [("SFT greedy", "SFT_greedy"), ("../up", "up"), ("a/b:c", "a_b_c"), ("...", "row"), ("é", "é")],
)
def test_a_name_becomes_a_file_name_inside_the_folder(name, stem):
    assert file_stem(name) == stem


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[1]", "not the result of an evaluation"),
        ('{"name": "a"}', "not the result of an evaluation"),
        (
            '{"name": "a", "metrics": {}, "made_with": {}, "per_prompt": {}, "schema_version": 9}',
            "schema_version 9",
        ),
    ],
)
def test_what_is_no_row_is_told(tmp_path, text, words):
    path = tmp_path / "row.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=words) as error:
        load_row(path)
    assert str(path) in str(error.value)
