"""Scorers: the shared contract, and what each of them promises alone."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_cases import conversation, language_model_folder, reward_model_folder
from transformers import AutoTokenizer

from rrhf.algorithms.normalizers import RunningMeanStd
from rrhf.data.chat_format import ChatCodec
from rrhf.errors import UserError
from rrhf.models.forward import onednn_linear
from rrhf.models.reward_model import RewardModel, load_reward_model
from rrhf.records import Candidate, CandidateSet, Message, set_id
from rrhf.scoring.build import RewardModelOptions, build_scorer
from rrhf.scoring.function import FunctionScorer
from rrhf.scoring.reward_model import RewardModelScorer, row_batch
from rrhf.scoring.scorer import Scorer
from rrhf.worlds.help_desk.world import HelpDesk

# float32 sums in another order, scores of order 1
CLOSE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reward_model_folder(tmp_path_factory.mktemp("rm") / "rm")


@pytest.fixture(scope="module")
def scorer(folder: Path) -> RewardModelScorer:
    return RewardModelScorer(folder)


def some_sets() -> list[CandidateSet]:
    """Ragged groups: one without candidates, an empty response, cut and complete ones."""
    return [
        conversation("how do I keep plants alive", "ask a friend", "", "no " * 20),
        conversation("why"),
        conversation("say it again", "say it now, and then again", finish_reason="length"),
        conversation("and then", *(f"the quick brown fox {i}" for i in range(5))),
    ]


def text_length(prompts: list[str], responses: list[str], messages: list[Any]) -> list[float]:
    return [float(len(response)) for response in responses]


def direct(folder: Path, prompt: Sequence[int], response: Sequence[int]) -> float:
    """The oracle: the folder's classifier on one unpadded row, read at its last position."""
    model = load_reward_model(folder)
    model.config.pad_token_id = None
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, 0])


@pytest.mark.parametrize("which", ["reward_model", "function", "gold", "ensemble"])
def test_every_scorer_keeps_the_contract(which: str, folder: Path) -> None:
    if which == "reward_model":
        made: Scorer = build_scorer(str(folder))
    elif which == "function":
        made = build_scorer("function:test_scoring:text_length")
    elif which == "ensemble":
        made = build_scorer(f"mean:{folder}@0/1,function:test_scoring:text_length@10/5")
    else:
        made = build_scorer("gold:help_desk")
    sets = HelpDesk("smoke", 0).pairs("train", 3) + some_sets()
    scores = made.score(sets)
    assert [len(row) for row in scores] == [len(s.candidates) for s in sets]
    assert all(s is None or math.isfinite(s) for row in scores for s in row)
    assert all(s is not None for row in scores[:3] for s in row)
    backwards = made.score(sets[::-1])[::-1]
    for one, other in zip(scores, backwards, strict=True):
        assert one == pytest.approx(other, abs=CLOSE)
    assert isinstance(made.name, str) and made.normalized in (True, False)
    assert made.score([]) == []


def test_a_score_is_the_model_s_at_the_last_token(folder: Path, scorer: RewardModelScorer) -> None:
    codec = ChatCodec(AutoTokenizer.from_pretrained(folder))
    for s, mine in zip(some_sets(), scorer.score(some_sets()), strict=True):
        prompt = codec.encode_prompt(s)
        for candidate, score in zip(s.candidates, mine, strict=True):
            response = codec.encode_response(s, candidate.response, candidate.finish_reason)
            assert score == pytest.approx(direct(folder, prompt, response), abs=CLOSE)


def test_a_cut_response_has_no_end_and_an_empty_one_is_its_end_alone(
    folder: Path, scorer: RewardModelScorer
) -> None:
    s = conversation("why", "ask")
    codec = ChatCodec(AutoTokenizer.from_pretrained(folder))
    prompt, word = codec.encode_prompt(s), codec.encode_response(s, "ask", "length")
    cases = [("ask", "stop", [*word, codec.end_id]), ("ask", "length", word)]
    cases += [("", "stop", [codec.end_id]), ("", "length", [codec.end_id])]
    for text, reason, ids in cases:
        row = replace(s, candidates=(Candidate(text, finish_reason=reason),))
        [[score]] = scorer.score([row])
        assert score == pytest.approx(direct(folder, prompt, ids), abs=CLOSE), (text, reason)


def test_scores_do_not_depend_on_batches_or_order(folder: Path, scorer: RewardModelScorer) -> None:
    sets = some_sets() * 3
    together = scorer.score(sets)
    small = RewardModelScorer(folder, RewardModelOptions(max_batch_tokens=1))
    order = list(range(len(sets)))
    random.Random(0).shuffle(order)
    shuffled = small.score([sets[i] for i in order])
    for place, row in zip(order, shuffled, strict=True):
        assert row == pytest.approx(together[place], abs=CLOSE)


def test_padded_batches_are_sorted_by_length_and_bounded_by_tokens(folder: Path) -> None:
    widths: list[tuple[int, int]] = []
    scorer = RewardModelScorer(folder, RewardModelOptions(max_batch_tokens=120, layout="padded"))
    inner = scorer.model.forward

    def watched(batch: Any) -> torch.Tensor:
        lengths = batch.prompt_lengths + batch.response_lengths
        assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)
        widths.append((len(lengths), int(lengths.max())))
        return inner(batch)

    scorer.model.forward = watched  # type: ignore[method-assign]
    scorer.score(some_sets() * 4)
    assert len(widths) > 3
    assert all(rows * width <= 120 or rows == 1 for rows, width in widths)
    assert [width for _, width in widths] == sorted((w for _, w in widths), reverse=True)


@pytest.mark.parametrize("layout", ["shared_prefix", "dense_mask"])
@pytest.mark.parametrize("score_at", ["last_token", "first_eos"])
def test_prompts_pass_once_and_give_the_scores_of_padded_rows(
    layout: str, score_at: str, folder: Path
) -> None:
    """Under any bound of a batch; a prompt that was cut for one of its responses stands alone."""
    long = [Message("user", "old " * 9), Message("assistant", "gone"), Message("user", "why")]
    cut = replace(conversation("", "yes", "no " * 5, "the quick brown " * 9), messages=tuple(long))
    sets = [*some_sets(), cut]
    expected = RewardModelScorer(
        folder, RewardModelOptions(score_at=score_at, max_length=90, layout="padded")
    )
    right = expected.score(sets)
    assert expected.unscored == {}
    whole = len(expected.codec.encode_prompt(cut))
    lengths = [len(expected.codec.encode_response(cut, c.response)) for c in cut.candidates]
    assert min(lengths) <= 90 - whole < max(lengths)
    for bound in (1, 150, 16384):
        made = RewardModelScorer(
            folder,
            RewardModelOptions(
                score_at=score_at, max_length=90, max_batch_tokens=bound, layout=layout
            ),
        )
        for one, other in zip(made.score(sets), right, strict=True):
            assert one == pytest.approx(other, abs=CLOSE)


def test_a_group_takes_as_many_tokens_as_it_has(folder: Path) -> None:
    scorer = RewardModelScorer(folder)
    seen: list[int] = []
    scorer.model.model.model.register_forward_pre_hook(
        lambda _, __, arguments: seen.append(arguments["input_ids"].numel()), with_kwargs=True
    )
    prompt, responses = [0, *range(10, 60)], [[60 + k, 61, 1] for k in range(5)]
    scores = scorer._rows.score_rows([[*prompt, *response] for response in responses])
    assert seen == [51 + 15]
    assert scores == pytest.approx([direct(folder, prompt, r) for r in responses], abs=CLOSE)


def test_rows_beyond_a_window_that_layers_do_not_tell_go_padded(folder: Path) -> None:
    scorer = RewardModelScorer(folder)
    scorer._rows._window = scorer.model.window = 20
    sizes: list[tuple[int, ...]] = []
    scorer.model.model.model.register_forward_pre_hook(
        lambda _, __, arguments: sizes.append(tuple(arguments["input_ids"].shape)),
        with_kwargs=True,
    )
    rows = [[0, *range(10, 10 + length)] for length in (9, 25, 11, 26)]
    scores = scorer._rows.score_rows(rows)
    assert sizes[0] == (2, 27) and len(sizes) == 2
    assert scores == pytest.approx([direct(folder, row, []) for row in rows], abs=CLOSE)


@pytest.mark.skipif(not onednn_linear.gains_here(), reason="PyTorch's own products are as fast")
def test_large_layers_go_through_onednn_meanwhile(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer, calls = RewardModelScorer(folder), 0
    before, product = scorer.score(some_sets()), onednn_linear.multiply

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return product(*arguments)

    monkeypatch.setattr(onednn_linear, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(onednn_linear, "multiply", counted)
    for one, other in zip(scorer.score(some_sets()), before, strict=True):
        assert one == pytest.approx(other, abs=CLOSE)
    assert calls == 2 * 7  # layers, and linear layers in each
    assert not any("forward" in vars(module) for module in scorer.model.modules())


@pytest.mark.parametrize("pad", ["<pad>", "</s>", None])
def test_a_tokenizer_may_lack_a_pad_token_or_share_it_with_eos(
    pad: str | None, tmp_path: Path
) -> None:
    folder = reward_model_folder(tmp_path / "rm", pad=pad)
    codec = ChatCodec(AutoTokenizer.from_pretrained(folder))
    for s, mine in zip(some_sets(), RewardModelScorer(folder).score(some_sets()), strict=True):
        for candidate, score in zip(s.candidates, mine, strict=True):
            ids = codec.encode_response(s, candidate.response, candidate.finish_reason)
            right = direct(folder, codec.encode_prompt(s), ids)
            assert score == pytest.approx(right, abs=CLOSE)


def test_long_prompts_lose_whole_turns_and_responses_are_never_cut(
    folder: Path, scorer: RewardModelScorer, caplog: pytest.LogCaptureFixture
) -> None:
    old = [Message("user", "old " * 9), Message("assistant", "gone " * 9)]
    last = Message("user", "ask a friend")
    long = CandidateSet("a", "", (*old, last), (Candidate("yes"),))
    short = CandidateSet("b", "", (last,), (Candidate("yes"),))
    window = RewardModelScorer(folder, RewardModelOptions(max_length=40))
    assert window.score([long])[0] == pytest.approx(window.score([short])[0], abs=CLOSE)
    assert scorer.score([long])[0] != pytest.approx(scorer.score([short])[0], abs=1e-3)

    too_long = replace(short, candidates=(Candidate("yes"), Candidate("no " * 60)))
    crowded = CandidateSet("c", "", (Message("user", "old " * 60),), (Candidate("yes"),))
    with caplog.at_level(logging.WARNING):
        scores = window.score([too_long, crowded])
    assert scores[0][0] is not None and scores[0][1] is None and scores[1] == [None]
    assert window.unscored == {"response_does_not_fit": 1, "last_turn_does_not_fit": 1}
    assert "response does not fit in 40 tokens" in caplog.text
    assert [window.fits(too_long, c) for c in too_long.candidates] == [True, False]
    assert not window.fits(crowded, crowded.candidates[0])
    assert sum(window.unscored.values()) == 2, "asking counts nothing"


def test_raw_text_is_cut_on_the_left_to_make_room(folder: Path) -> None:
    s = CandidateSet("a", "old " * 60 + "friend:", None, (Candidate(" yes"),))
    scorer = RewardModelScorer(folder, RewardModelOptions(max_length=20))
    codec = scorer.codec
    response = codec.encode_response(s, " yes")
    prompt = codec.encode_prompt(s, 20 - len(response))
    assert prompt is not None and len(prompt) == 20 - len(response)
    assert scorer.score([s])[0][0] == pytest.approx(direct(folder, prompt, response), abs=CLOSE)


def test_the_window_is_the_models_own_where_it_has_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_reward_model(folder).config
    window = config.max_position_embeddings
    scorer = RewardModelScorer(folder)
    assert scorer.describe()["max_length"] == window
    asked, codec = conversation("why"), scorer.codec
    room = window - len(codec.encode_prompt(asked) or ())
    texts = {len(codec.encode_response(asked, "z" * n)): "z" * n for n in range(1, 3 * window)}
    (fits,), (crowded,) = scorer.score([conversation("why", texts[room + n]) for n in (0, 1)])
    assert fits is not None and crowded is None
    long = replace(conversation("how? " * 20, "z"), id="long")  # and no less is taken
    assert RewardModelScorer(folder, RewardModelOptions(max_length=window)).score(
        [long]
    ) == scorer.score([long])
    monkeypatch.setattr("rrhf.scoring.reward_model.context_window", lambda model: 4096)
    assert RewardModelScorer(folder).describe()["max_length"] == 4096
    monkeypatch.setattr("rrhf.scoring.reward_model.context_window", lambda model: None)
    assert RewardModelScorer(folder).describe()["max_length"] == 2048
    assert (
        RewardModelScorer(folder, RewardModelOptions(max_length=5000)).describe()["max_length"]
        == 5000
    )


def test_first_eos_is_refused_where_the_prompt_holds_an_end(tmp_path: Path) -> None:
    """Read there, every response to a prompt would have the same score."""
    folder = reward_model_folder(tmp_path / "rm", chat=True)
    with pytest.raises(UserError, match="--score_at first_eos: the chat template"):
        RewardModelScorer(folder, RewardModelOptions(score_at="first_eos"))


def test_first_eos_reads_the_end_of_a_response_that_has_one(tmp_path: Path) -> None:
    folder = reward_model_folder(tmp_path / "rm")
    s = conversation("why", "ask a friend", "do not")
    at_first = RewardModelScorer(folder, RewardModelOptions(score_at="first_eos")).score([s])[0]
    assert at_first == pytest.approx(RewardModelScorer(folder).score([s])[0], abs=CLOSE)
    assert at_first[0] != at_first[1]


def test_the_reward_model_s_own_template_is_used(tmp_path: Path) -> None:
    plain = reward_model_folder(tmp_path / "plain")
    chat = reward_model_folder(tmp_path / "chat", chat=True)
    as_hh = reward_model_folder(tmp_path / "as_hh", chat=True, chat_format="hh")
    texts = [
        RewardModelScorer(f).codec.prompt_text(conversation("why")) for f in (plain, chat, as_hh)
    ]
    assert texts[0] == texts[2] == "\n\nHuman: why\n\nAssistant:"
    assert texts[1].startswith("<|start|>user\nwhy<|end|>")
    forced = RewardModelScorer(chat, RewardModelOptions(reward_chat_format="hh"))
    assert forced.codec.prompt_text(conversation("why")) == texts[0]


def test_the_normaliser_is_applied_by_the_scorer_alone(tmp_path: Path) -> None:
    normalizer = RunningMeanStd()
    normalizer.update(torch.tensor([1.0, 2.0, 6.0]))  # mean 3, variance 14 / 3
    folder = reward_model_folder(tmp_path / "rm", normalizer=normalizer)
    raw, scaled = (
        RewardModelScorer(folder, RewardModelOptions(normalize=False)),
        RewardModelScorer(folder),
    )
    assert (raw.normalized, scaled.normalized) == (False, True)
    for one, other in zip(raw.score(some_sets()), scaled.score(some_sets()), strict=True):
        assert other == pytest.approx([(x - 3) / math.sqrt(14 / 3) for x in one], abs=CLOSE)


def test_a_score_that_is_not_finite_is_none_and_counted(folder: Path) -> None:
    scorer = RewardModelScorer(folder)
    with torch.no_grad():
        scorer._rows._model.model.score.weight.fill_(math.nan)
    assert scorer.score([conversation("why", "a", "b")]) == [[None, None]]
    assert scorer.unscored == {"score_not_finite": 2}


def test_bf16_scores_are_near(folder: Path, scorer: RewardModelScorer) -> None:
    coarse = RewardModelScorer(folder, RewardModelOptions(bf16=True))
    assert next(coarse._rows._model.model.model.parameters()).dtype == torch.bfloat16
    for one, other in zip(coarse.score(some_sets()), scorer.score(some_sets()), strict=True):
        # bfloat16 keeps 8 bits: a few percent of scores of order 1 after two layers
        assert one == pytest.approx(other, abs=0.15)


def test_rows_may_be_a_single_token(folder: Path) -> None:
    model = RewardModel(load_reward_model(folder))
    batch = row_batch([[7], [7, 8, 9]], 2, torch.device("cpu"))
    with torch.no_grad():
        scores = model(batch).tolist()
    right = [direct(folder, [7], []), direct(folder, [7, 8, 9], [])]
    assert scores == pytest.approx(right, abs=CLOSE)


def test_mistakes_are_told(folder: Path, tmp_path: Path) -> None:
    base = language_model_folder(tmp_path / "lm")
    with pytest.raises(UserError, match="not a reward model"):
        build_scorer(str(base))
    with pytest.raises(UserError, match="has 256 positions"):
        RewardModelScorer(folder, RewardModelOptions(max_length=257))
    with pytest.raises(UserError, match="--score_at"):
        RewardModelScorer(folder, RewardModelOptions(score_at="middle"))
    with pytest.raises(UserError, match="--max_batch_tokens 0"):
        build_scorer(str(folder), RewardModelOptions(max_batch_tokens=0))
    with pytest.raises(UserError, match="gold:help_desk"):
        build_scorer("gold:moon")
    with pytest.raises(UserError, match="no such model folder"):
        build_scorer("./nothing")


# A function as a scorer.


def call(function: Any, sets: list[CandidateSet]) -> list[list[float | None]]:
    globals()["_called"] = function
    return FunctionScorer("test_scoring:_called").score(sets)


def test_a_function_is_called_with_three_equal_lists() -> None:
    calls: list[tuple[list[Any], ...]] = []

    def function(prompts: list[Any], responses: list[Any], messages: list[Any]) -> list[int]:
        calls.append((prompts, responses, messages))
        return list(range(len(prompts)))

    raw = CandidateSet(set_id("q"), "q", None, (Candidate(" r"),))
    first = conversation("why", "a", "b")
    assert call(function, [first, raw]) == [[0.0, 1.0], [2.0]]
    asked = [{"role": "user", "content": "why"}]
    assert calls == [([first.query, first.query, "q"], ["a", "b", " r"], [asked, asked, None])]


def test_none_and_nan_are_counted_and_numbers_of_any_kind_taken() -> None:
    values = [None, math.nan, torch.tensor(2.0), True, -math.inf]

    def function(prompts: list[Any], responses: list[Any], messages: list[Any]) -> tuple[Any, ...]:
        return tuple(values)

    globals()["_called"] = function
    scorer = FunctionScorer("test_scoring:_called")
    assert scorer.score([conversation("why", *"abcde")]) == [[None, None, 2.0, 1.0, None]]
    assert scorer.unscored == {"function_gave_none": 1, "score_not_finite": 2}


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], "returned 1 results for 2 responses"),
        (3, "must return a list of numbers"),
        (["a", 1], "result 0 is 'a', not a number"),
        ([1, [2]], r"result 1 is \[2\], not a number"),
        (["1", "2"], "result 0 is '1', not a number"),
    ],
)
def test_what_a_function_gives_is_checked(result: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(lambda prompts, responses, messages: result, [conversation("why", "a", "b")])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nothing_here:score", "cannot be imported"),
        ("math:nothing", "has no function 'nothing'"),
        ("math:pi", "has no function 'pi'"),
        ("math", "module:function"),
    ],
)
def test_functions_that_are_not_there_are_told(target: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FunctionScorer(target)


def test_a_module_in_the_current_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_own_rules.py").write_text("def score(p, r, m):\n    return [0.5] * len(r)\n")
    monkeypatch.chdir(tmp_path)
    assert FunctionScorer("my_own_rules:score").score([conversation("a", "b")]) == [[0.5]]


def test_gold_knows_its_own_world_only() -> None:
    [pair] = HelpDesk("smoke", 0).pairs("train", 1)
    scores = build_scorer("gold:help_desk").score([pair, conversation("why is the sky blue", "so")])
    assert all(isinstance(s, float) for s in scores[0]) and scores[1] == [None]
