"""Beams against enumeration of every sequence, a slow second implementation, and transformers."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rrhf.generation.local.beam_search import BeamSearch
from rrhf.generation.local.incremental import IncrementalModel
from rrhf.generation.params import SamplingParams

beam_params = partial(SamplingParams, do_sample=False, min_new_tokens=0)

END = 0


class Table:
    """A random language model on a tiny vocabulary: log-probs of the next token by history."""

    def __init__(self, vocabulary: int, seed: int, sharpness: float = 1.5) -> None:
        self.vocabulary = vocabulary
        self.seed = seed
        self.sharpness = sharpness
        self._known: dict[tuple[int, ...], torch.Tensor] = {}

    def next(self, history: tuple[int, ...]) -> torch.Tensor:
        if history not in self._known:
            code = sum((t + 1) * 31**place for place, t in enumerate(history))
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + code)
            logits = torch.randn(self.vocabulary, generator=generator) * self.sharpness
            self._known[history] = torch.log_softmax(logits, -1)
        return self._known[history]

    def total(self, tokens: tuple[int, ...]) -> float:
        return sum(float(self.next(tokens[:t])[token]) for t, token in enumerate(tokens))


def search(tables, settings, end_ids=(END,), stops=None):
    """Run the search over tables; returns the finished search."""
    runner = BeamSearch(len(tables), settings, end_ids, stops)
    histories = [() for _ in tables for _ in range(settings.num_beams)]
    owners = [table for table in tables for _ in range(settings.num_beams)]
    for _ in range(settings.max_new_tokens):
        logprobs = torch.stack([o.next(h) for o, h in zip(owners, histories, strict=True)])
        rows, tokens = runner.advance(logprobs)
        histories = [
            (*histories[row], token)
            for row, token in zip(rows.tolist(), tokens.tolist(), strict=True)
        ]
        owners = [owners[row] for row in rows.tolist()]
        if runner.is_done:
            break
    assert runner.is_done, "the last step ends everything"
    return runner


def every_sequence(vocabulary: int, length: int):
    """Every sequence that ends with END or at the length."""
    for size in range(1, length + 1):
        for tokens in itertools.product(range(vocabulary), repeat=size):
            if END in tokens[:-1]:
                continue
            if tokens[-1] == END or size == length:
                yield tokens


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(6))
def test_with_room_for_all_the_best_are_exact(seed, length_penalty):
    vocabulary, length = 4, 4
    table = Table(vocabulary, seed)
    settings = beam_params(num_beams=200, length_penalty=length_penalty, max_new_tokens=length)
    assert sum(1 for _ in every_sequence(vocabulary, length)) < 200
    found = search([table], settings).best(0, 5)
    ranked = sorted(
        every_sequence(vocabulary, length),
        key=lambda tokens: table.total(tokens) / len(tokens) ** length_penalty,
        reverse=True,
    )
    assert [h.tokens for h in found] == ranked[:5]
    for hypothesis in found:
        assert hypothesis.score == pytest.approx(table.total(hypothesis.tokens), abs=1e-5)
        assert sum(hypothesis.logprobs) == pytest.approx(hypothesis.score, abs=1e-5)
        ended = hypothesis.tokens[-1] == END
        assert hypothesis.finish_reason == ("stop" if ended else "length")


def test_one_beam_is_greedy():
    for seed in range(5):
        table = Table(6, seed)
        (found,) = search([table], beam_params(num_beams=1, max_new_tokens=7)).best(0, 1)
        greedy: tuple[int, ...] = ()
        while len(greedy) < 7 and END not in greedy:
            greedy = (*greedy, int(table.next(greedy).argmax()))
        # after its first END one beam is done: nothing open is likelier than the likeliest
        assert found.tokens == greedy


# ---- diverse beams against a second implementation ---------------------------------------------


def slow_diverse_beams(table, settings, length_penalty, end_ids=(END,)):
    """Written from the definition, group by group and token by token, with lists of tuples."""
    groups = settings.num_beam_groups
    width = settings.num_beams // groups
    open_beams = [[((), 0.0)] for _ in range(groups)]
    ended = [[] for _ in range(groups)]
    done = [False] * groups
    for step in range(1, settings.max_new_tokens + 1):
        taken = [0] * table.vocabulary
        for group in range(groups):
            if done[group]:
                continue
            candidates = []
            for tokens, score in open_beams[group]:
                for token in range(table.vocabulary):
                    if token in end_ids and step <= settings.min_new_tokens:
                        continue
                    cost = settings.diversity_penalty * taken[token]
                    value = score + float(table.next(tokens)[token]) - cost
                    candidates.append(((*tokens, token), value))
            candidates.sort(key=lambda candidate: -candidate[1])
            going_on = []
            for rank, (tokens, value) in enumerate(candidates):
                if tokens[-1] in end_ids or step == settings.max_new_tokens:
                    if rank < width:
                        ended[group].append((value / len(tokens) ** length_penalty, tokens))
                elif len(going_on) < width:
                    going_on.append((tokens, value))
            ended[group] = sorted(ended[group], reverse=True)[:width]
            open_beams[group] = going_on
            for tokens, _ in going_on:
                taken[tokens[-1]] += 1
            if not going_on:
                done[group] = True
            elif len(ended[group]) == width:
                best = max(value for _, value in going_on) / step**length_penalty
                done[group] = best <= ended[group][-1][0]
            if done[group]:
                open_beams[group] = []
                # the tokens that a group takes at the step at which it is done lead nowhere
                for tokens, _ in going_on:
                    taken[tokens[-1]] -= 1
        if all(done):
            break
    return sorted((item for group in ended for item in group), reverse=True)


@pytest.mark.parametrize(("beams", "groups"), [(4, 4), (4, 2), (6, 3), (6, 2), (3, 1), (8, 4)])
@pytest.mark.parametrize("penalty", [0.3, 1.0, 5.0])
def test_diverse_beams_equal_a_slow_second_implementation(beams, groups, penalty):
    for seed in range(8):
        for length_penalty in (0.0, 1.0):
            table = Table(7, seed, sharpness=1.0)
            settings = beam_params(
                num_beams=beams,
                num_beam_groups=groups,
                diversity_penalty=penalty if groups > 1 else 0.0,
                length_penalty=length_penalty,
                max_new_tokens=6,
                min_new_tokens=seed % 3,
            )
            wanted = slow_diverse_beams(table, settings, length_penalty)
            found = search([table], settings).best(0, beams)
            assert [h.tokens for h in found] == [tokens for _, tokens in wanted]
            for hypothesis, (score, _) in zip(found, wanted, strict=True):
                assert hypothesis.ranking_score(length_penalty) == pytest.approx(score, abs=1e-5)


def test_the_penalty_counts_how_often_earlier_groups_took_a_token():
    """Four groups of one beam; by hand.

    Log-probs at the first step: a -0.1, b -1.15, c -2.3, then -inf. With penalty 1: group 1 takes
    a (-0.1); group 2: a -1.1, b -1.15 -> a; group 3: a -2.1, b -1.15 -> b; group 4: a -2.1,
    b -2.15, c -2.3 -> a.
    """
    logprobs = torch.tensor([-math.inf, -0.1, -1.15, -2.3])
    settings = beam_params(num_beams=4, num_beam_groups=4, diversity_penalty=1.0, max_new_tokens=5)
    runner = BeamSearch(1, settings, {END})
    rows, tokens = runner.advance(logprobs.expand(4, -1))
    assert tokens.tolist() == [1, 1, 2, 1]
    assert rows.tolist() == [0, 1, 2, 3]


def test_without_penalty_all_groups_do_the_same():
    table = Table(6, 3)
    settings = beam_params(num_beams=6, num_beam_groups=3, max_new_tokens=5)
    found = search([table], settings).best(0, 6)
    plain = search([table], beam_params(num_beams=2, max_new_tokens=5)).best(0, 2)
    assert {h.tokens for h in found} == {h.tokens for h in plain}


def test_logprobs_are_without_penalty():
    paid = []
    for seed in range(5):
        table = Table(6, seed)
        settings = beam_params(
            num_beams=4, num_beam_groups=4, diversity_penalty=0.25, max_new_tokens=5
        )
        for hypothesis in search([table], settings).best(0, 4):
            total = table.total(hypothesis.tokens)
            assert sum(hypothesis.logprobs) == pytest.approx(total, abs=1e-5)
            paid.append((total - hypothesis.score) / 0.25)
    assert paid == pytest.approx([round(times) for times in paid], abs=1e-4)
    assert max(paid) > 1.5


# ---- many prompts, ends, rules ------------------------------------------------------------------


def test_prompts_side_by_side_do_not_touch_each_other():
    tables = [Table(6, seed, sharpness=0.5 + seed / 2) for seed in range(7)]
    settings = beam_params(num_beams=4, num_beam_groups=2, diversity_penalty=0.7, max_new_tokens=9)
    together = search(tables, settings)
    for place, table in enumerate(tables):
        alone = search([table], settings)
        assert together.best(place, 4) == alone.best(0, 4)


def test_a_prompt_that_is_done_leaves():
    sure = Table(5, 0)
    sure._known[()] = torch.log_softmax(torch.tensor([50.0, 0.0, 0.0, 0.0, 0.0]), -1)
    runner = BeamSearch(2, beam_params(num_beams=1, max_new_tokens=9), {END})
    other = torch.log_softmax(torch.tensor([0.0, 9.0, 0.0, 0.0, 0.0]), -1)
    rows, tokens = runner.advance(torch.stack([sure.next(()), other]))
    assert runner.searching == [1]
    assert rows.tolist() == [1] and tokens.tolist() == [1]


def test_every_prompt_gets_as_many_as_it_has_beams():
    for seed in range(20):
        for groups in (1, 2, 4):
            settings = beam_params(
                num_beams=4,
                num_beam_groups=groups,
                diversity_penalty=1.0 if groups > 1 else 0.0,
                max_new_tokens=1 + seed % 6,
            )
            runner = search([Table(9, seed, sharpness=3.0)], settings)
            assert len(runner.best(0, 4)) == 4


def test_a_stop_rule_ends_like_an_end_id():
    """Token 3 as an end id, and the same by rule, give the same hypotheses."""
    for seed in range(10):
        table = Table(6, seed)
        settings = beam_params(num_beams=3, max_new_tokens=6)
        by_id = search([table], settings, end_ids=(END, 3))
        by_rule = search([table], settings, stops=lambda prompt, tokens: tokens[-1] == 3)
        assert by_rule.best(0, 3) == by_id.best(0, 3)


def test_no_end_before_min_new_tokens():
    table = Table(5, 2, sharpness=0.1)
    settings = beam_params(num_beams=4, max_new_tokens=8, min_new_tokens=5, length_penalty=0.0)
    found = search([table], settings).best(0, 4)
    assert min(len(h.tokens) for h in found) >= 6


# ---- transformers -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        initializer_range=0.1,
        eos_token_id=END,
        bos_token_id=None,
        pad_token_id=END,
    )
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data[END] *= 4.0  # an end that is sometimes likely, often not
    return model


def model_search(model, prompts, settings, end_ids):
    runner = BeamSearch(len(prompts), settings, end_ids)
    incremental = IncrementalModel(model, pad_id=END)
    with torch.no_grad():
        handles, logits = incremental.read(prompts)
        owners = [handle for handle in handles for _ in range(settings.num_beams)]
        incremental.arrange([None] * len(owners), owners)
        logits = logits[owners]
        while True:
            rows, tokens = runner.advance(torch.log_softmax(logits, -1))
            if runner.is_done:
                return runner
            incremental.arrange(rows.tolist(), [])
            logits = incremental.step(tokens)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("end_ids", [(END,), (END, 7, 9)])
@pytest.mark.parametrize("num_beams", [2, 4])
def test_plain_beams_equal_transformers(model, length_penalty, end_ids, num_beams):
    torch.manual_seed(0)
    prompts = [torch.randint(1, 64, (size,)).tolist() for size in (3, 9, 5, 7, 4, 12)]
    settings = beam_params(
        num_beams=num_beams, length_penalty=length_penalty, max_new_tokens=16, min_new_tokens=1
    )
    runner = model_search(model, prompts, settings, end_ids)
    ended_early = 0
    for place, prompt in enumerate(prompts):
        outputs = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            num_beams=num_beams,
            num_return_sequences=num_beams,
            do_sample=False,
            length_penalty=length_penalty,
            max_new_tokens=16,
            min_new_tokens=1,
            eos_token_id=list(end_ids),
            output_scores=True,
            return_dict_in_generate=True,
        )
        found = runner.best(place, num_beams)
        for rank, hypothesis in enumerate(found):
            wanted = outputs.sequences[rank, len(prompt) :].tolist()
            assert list(hypothesis.tokens) == wanted[: len(hypothesis.tokens)]
            assert set(wanted[len(hypothesis.tokens) :]) <= {END}, "what follows is padding"
            score = float(outputs.sequences_scores[rank])
            assert hypothesis.ranking_score(length_penalty) == pytest.approx(score, abs=1e-4)
        ended_early += sum(h.finish_reason == "stop" for h in found)
    # a penalty above 1 favours the longest
    assert ended_early > 0 or length_penalty > 1, "some end by themselves"
