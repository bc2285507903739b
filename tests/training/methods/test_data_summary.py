"""What became of a trainer's data is said in a sentence, each kind of case once."""

import logging

import pytest
from evaluation_cases import prompt, reply
from tiny import byte_level_tokenizer

from rrhf.data.chat_format import ChatCodec
from rrhf.data.formats import SourceCounts
from rrhf.errors import UserError
from rrhf.training.methods.data_summary import _CASES, counted, encoded
from rrhf.training.methods.fitting import RowFitter
from rrhf.training.methods.rank_examples import RankEncoder
from rrhf.training.methods.reward_examples import PreferenceEncoder
from rrhf.training.methods.sft import SFTEncoder


def fitter(length: int = 40, **options: object) -> RowFitter:
    return RowFitter(ChatCodec(byte_level_tokenizer()), length, **options)


def scored(text: str, score: float | None):
    return reply(text).__class__(text, "policy:x", score, "stop")


def test_the_data_are_a_sentence_and_no_dictionary(caplog):
    caplog.set_level(logging.INFO, "rrhf")
    read = SourceCounts(read=6, kept=4)
    read.dropped["empty_reply"] = 2
    sets = [
        prompt("a dog", scored("yes", 1.0), scored("no", 0.0)),
        prompt("a fox", scored("yes", 1.0), scored("no", None)),
        prompt("friends", scored("yes", 1.0), scored("no", None)),
        prompt("plants", scored("yes " * 30, 1.0), scored("no", 0.0)),
    ]
    examples = encoded("DATA", sets, RankEncoder(fitter()), read)
    (said,) = [r.getMessage() for r in caplog.records if r.name.startswith("rrhf.training")]
    assert said == (
        "DATA: training on 4 prompts with 6 candidates from 6 rows; "
        "2 rows left out (empty reply); "
        f"2 candidates left out without a score (first: prompt {sets[1].id}); "
        f"2 prompts with one candidate, so nothing to rank (first: prompt {sets[1].id}); "
        f"1 response cut at the end to fit, and trained without an end (first: prompt {sets[3].id})"
    )
    assert len(examples) == 4


@pytest.mark.parametrize("encoder", [RankEncoder, PreferenceEncoder])
def test_data_that_yield_nothing_are_refused_with_the_reason(encoder):
    sets = [prompt("a dog", scored("yes", None)), prompt("a fox", scored("yes " * 30, None))]
    if encoder is PreferenceEncoder:
        sets = [prompt("a dog", scored("yes", 1.0), scored("no", 1.0))]
    with pytest.raises(UserError, match=r"DATA: none of the .* left out.*first: prompt") as error:
        encoded("DATA", sets, encoder(fitter()))
    assert "{" not in str(error.value)


def test_every_case_that_is_counted_has_its_words(caplog):
    caplog.set_level(logging.INFO, "rrhf")
    long = "How do I keep " + "dogs and foxes " * 9
    sets = [prompt(long, reply("yes")), prompt("a", reply("yes " * 30)), prompt("b", reply("x"))]
    encoder = SFTEncoder(fitter(long_responses="drop"))
    encoded("DATA", sets, encoder, purpose="evaluating")
    told = caplog.records[-1].getMessage()
    assert told.startswith("DATA: evaluating on 1 prompt;") and "_" not in told.replace(
        "--model_max_length", ""
    )
    cases = {case for case in encoder.fitter.counts if case not in ("prompts", "prompts_used")}
    assert len(cases) == 3 and cases <= _CASES.keys()


def test_numbers_agree_with_their_nouns():
    assert counted(1, "prompt") == "1 prompt" and counted(1234, "row") == "1,234 rows"
