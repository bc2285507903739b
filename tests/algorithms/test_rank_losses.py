"""RRHF's losses against slow float64 oracles that loop over candidates, pairs and tokens."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rrhf.algorithms import rank_losses

TOLERANCE = 1e-9  # float64 sums of at most a few hundred terms of size 1 to 100


@dataclass
class Prompt:
    """One prompt as nested lists: what the oracles see."""

    logprobs: list[list[float]]  # tokens of each candidate
    scores: list[float]
    query_length: int = 7


def case_prompts() -> dict[str, list[Prompt]]:
    generator = torch.manual_seed(3)

    def tokens(n: int) -> list[float]:
        return (-4 * torch.rand(n, dtype=torch.float64, generator=generator)).tolist()

    return {
        "ragged": [
            Prompt([tokens(4), tokens(9), tokens(2)], [0.3, -1.0, 2.0]),
            Prompt([tokens(6), tokens(1)], [5.0, 7.0], query_length=3),
            Prompt([tokens(n) for n in (3, 3, 8, 5, 2, 12)], [1.0, 0.5, 2.5, -3.0, 0.25, 1.5], 20),
        ],
        "tied": [
            Prompt([tokens(4), tokens(4), tokens(4)], [1.0, 1.0, 1.0]),
            Prompt([tokens(2), tokens(7), tokens(5), tokens(3)], [2.0, 0.0, 2.0, 0.0]),
        ],
        "single": [Prompt([tokens(5)], [0.0]), Prompt([tokens(3), tokens(2)], [1.0, 2.0])],
        # The better candidate is longer: likelier per token, less likely as a whole.
        "length-flipped": [Prompt([[-0.5] * 10, [-1.0] * 4], [1.0, 0.0], query_length=3)],
    }


CASES = sorted(case_prompts())


def grids(prompts: list[Prompt], garbage: float = math.nan) -> dict[str, Tensor]:
    """What the losses take, with `garbage` wherever no candidate is."""
    width = max(len(prompt.scores) for prompt in prompts)
    shape = (len(prompts), width)
    summed = torch.full(shape, garbage, dtype=torch.float64)
    scores = torch.full(shape, garbage, dtype=torch.float64)
    lengths = torch.zeros(shape, dtype=torch.int64)
    valid = torch.zeros(shape, dtype=torch.bool)
    for b, prompt in enumerate(prompts):
        for k, tokens in enumerate(prompt.logprobs):
            summed[b, k] = math.fsum(tokens)
            lengths[b, k] = len(tokens)
            scores[b, k] = prompt.scores[k]
            valid[b, k] = True
    widths = [p.query_length + max(len(t) for t in p.logprobs) for p in prompts]
    return {
        "summed": summed,
        "lengths": lengths,
        "scores": scores,
        "valid": valid,
        "widths": torch.tensor(widths),
    }


def slow_best(prompt: Prompt) -> int:
    best = 0
    for k in range(1, len(prompt.scores)):
        if prompt.scores[k] > prompt.scores[best]:
            best = k
    return best


def slow_sequence_score(tokens: list[float], length_penalty: float) -> float:
    total = 0.0
    for logprob in tokens:
        total += logprob
    return total / len(tokens) ** length_penalty


def slow_paper_loss(prompt: Prompt, length_penalty: float = 1.0) -> tuple[float, float]:
    p = [slow_sequence_score(tokens, length_penalty) for tokens in prompt.logprobs]
    rank = 0.0
    for i in range(len(p)):
        for j in range(len(p)):
            if prompt.scores[i] < prompt.scores[j] and p[i] - p[j] > 0:
                rank += p[i] - p[j]
    sft = 0.0
    for logprob in prompt.logprobs[slow_best(prompt)]:
        sft -= logprob
    return rank, sft


def slow_released_loss(prompt: Prompt, length_penalty: float = 1.0) -> tuple[float, float]:
    """Rows of query and response, padded to the longest, everything counted that is padded."""
    longest = max(len(tokens) for tokens in prompt.logprobs)
    rows = []
    for tokens in prompt.logprobs:
        before = [0.0] * prompt.query_length
        rows.append(before + tokens + [0.0] * (longest - len(tokens)))
    length = float(len(rows[0]))
    p = [sum(row) / length**length_penalty for row in rows]
    rank = 0.0
    for i, j in itertools.product(range(len(p)), repeat=2):
        if prompt.scores[i] < prompt.scores[j]:
            rank += max(0.0, p[i] - p[j])
    row = rows[slow_best(prompt)]
    return rank, -sum(row) / len(row)


def paper_terms(g: dict[str, Tensor], length_penalty: float = 1.0) -> tuple[Tensor, Tensor]:
    p = rank_losses.sequence_scores(g["summed"], g["lengths"], length_penalty)
    return (
        rank_losses.rrhf_rank_loss(p, g["scores"], g["valid"]),
        rank_losses.best_candidate_nll(g["summed"], g["scores"], g["valid"]),
    )


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 0.7, 1.3])
@pytest.mark.parametrize("name", CASES)
def test_paper_loss_equals_the_slow_oracle(name: str, length_penalty: float) -> None:
    prompts = case_prompts()[name]
    rank, sft = paper_terms(grids(prompts), length_penalty)
    for b, prompt in enumerate(prompts):
        slow_rank, slow_sft = slow_paper_loss(prompt, length_penalty)
        assert float(rank[b]) == pytest.approx(slow_rank, abs=TOLERANCE)
        assert float(sft[b]) == pytest.approx(slow_sft, abs=TOLERANCE)


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 1.3])
@pytest.mark.parametrize("name", CASES)
def test_released_loss_equals_the_slow_oracle(name: str, length_penalty: float) -> None:
    prompts = case_prompts()[name]
    g = grids(prompts)
    rank, sft = rank_losses.released_rrhf_loss(
        g["summed"], g["scores"], g["valid"], g["widths"], length_penalty
    )
    for b, prompt in enumerate(prompts):
        slow_rank, slow_sft = slow_released_loss(prompt, length_penalty)
        assert float(rank[b]) == pytest.approx(slow_rank, abs=TOLERANCE)
        assert float(sft[b]) == pytest.approx(slow_sft, abs=TOLERANCE)


def test_the_two_losses_disagree_where_the_better_response_is_longer() -> None:
    # S = (-5, -4), |y| = (10, 4): p = (-.5, -1), so the paper sees no violation. The released
    # program compares (-5, -4) / 13 (3 query + 10 response positions): a violation of 1/13.
    prompts = case_prompts()["length-flipped"]
    g = grids(prompts)
    rank, sft = paper_terms(g)
    assert float(rank) == 0.0 and float(sft) == pytest.approx(5.0)
    rank, sft = rank_losses.released_rrhf_loss(g["summed"], g["scores"], g["valid"], g["widths"])
    assert float(rank) == pytest.approx(1 / 13) and float(sft) == pytest.approx(5 / 13)


def test_released_loss_depends_on_padding_and_the_paper_loss_does_not() -> None:
    # A third candidate, tied with the worst and below both in likelihood, forms no new violation,
    # but it is long, so every row of the prompt is padded further.
    short = Prompt([[-0.5] * 10, [-1.0] * 4], [1.0, 0.0], query_length=3)
    longer = Prompt([*short.logprobs, [-9.0] * 30], [1.0, 0.0, 0.0], query_length=3)
    a, b = grids([short]), grids([longer])
    for one, two in zip(paper_terms(a), paper_terms(b), strict=True):
        assert torch.equal(one, two)
    released = [
        rank_losses.released_rrhf_loss(g["summed"], g["scores"], g["valid"], g["widths"])
        for g in (a, b)
    ]
    assert float(released[1][0] / released[0][0]) == pytest.approx(13 / 33)
    assert float(released[1][1] / released[0][1]) == pytest.approx(13 / 33)


def test_oracles_notice_the_faults_they_are_for() -> None:
    """Negative controls: each classic slip must change the value on the ragged case."""
    prompts = case_prompts()["ragged"]
    g = grids(prompts, garbage=0.0)
    right, _ = paper_terms(g)
    p = rank_losses.sequence_scores(g["summed"], g["lengths"])
    unnormalised = rank_losses.rrhf_rank_loss(g["summed"], g["scores"], g["valid"])
    reversed_order = rank_losses.rrhf_rank_loss(p, -g["scores"], g["valid"])
    padding_counted = rank_losses.rrhf_rank_loss(p, g["scores"], torch.ones_like(g["valid"]))
    for wrong in (unnormalised, reversed_order, padding_counted):
        assert float((wrong - right).abs().max()) > 1e-3


def test_gradients_equal_finite_differences() -> None:
    g = grids(case_prompts()["ragged"], garbage=0.0)

    def loss(summed: Tensor, released: bool) -> Tensor:
        if released:
            terms = rank_losses.released_rrhf_loss(summed, g["scores"], g["valid"], g["widths"])
        else:
            terms = paper_terms({**g, "summed": summed})
        return terms[0].sum() + 0.5 * terms[1].sum()

    for released in (False, True):
        summed = g["summed"].clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda s, r=released: loss(s, r), (summed,))


def test_padding_cannot_make_a_gradient_nan() -> None:
    g = grids(case_prompts()["ragged"], garbage=math.nan)
    summed = g["summed"].clone().requires_grad_()
    rank, sft = paper_terms({**g, "summed": summed})
    (rank.sum() + sft.sum()).backward()
    assert summed.grad is not None
    assert bool(summed.grad[g["valid"]].isfinite().all())
    assert bool((summed.grad[~g["valid"]] == 0).all())


def test_candidate_order_does_not_matter() -> None:
    prompt = case_prompts()["ragged"][2]
    rank, sft = paper_terms(grids([prompt]))
    for order in itertools.permutations(range(6)):
        shuffled = Prompt([prompt.logprobs[k] for k in order], [prompt.scores[k] for k in order])
        other_rank, other_sft = paper_terms(grids([shuffled]))
        assert float(other_rank) == pytest.approx(float(rank), abs=TOLERANCE)
        assert float(other_sft) == pytest.approx(float(sft), abs=TOLERANCE)


def test_only_the_order_of_scores_counts() -> None:
    g = grids(case_prompts()["ragged"])
    rank, sft = paper_terms(g)
    for monotone in (lambda x: 100 * x - 7, torch.exp, torch.atan, lambda x: x**3):
        other = paper_terms({**g, "scores": monotone(g["scores"])})
        assert torch.equal(other[0], rank) and torch.equal(other[1], sft)


def test_sorted_candidates_leave_the_pure_sft_gradient() -> None:
    summed = torch.tensor([[-1.0, -2.0, -3.0]], dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([[2, 2, 2]])
    scores = torch.tensor([[3.0, 2.0, 1.0]])
    rank, sft = paper_terms(
        {"summed": summed, "lengths": lengths, "scores": scores, "valid": scores > 0}
    )
    (rank.sum() + sft.sum()).backward()
    assert float(rank.detach()) == 0.0
    assert summed.grad is not None
    assert summed.grad.tolist() == [[-1.0, 0.0, 0.0]]


def test_equal_likelihoods_give_no_gradient() -> None:
    p = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    scores = torch.tensor([[0.0, 1.0]])
    rank_losses.rrhf_rank_loss(p, scores, scores > -1).sum().backward()
    assert p.grad is not None
    assert p.grad.tolist() == [[0.0, 0.0]]


def test_ties_form_no_pair_and_the_first_best_is_imitated() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0]])
    valid = torch.tensor([[True, True, True, True]])
    assert rank_losses.count_ordered_pairs(scores, valid).tolist() == [3]
    assert rank_losses.best_candidate(scores, valid).tolist() == [1]
    same = torch.full((1, 4), -2.5)
    p = torch.randn(1, 4, generator=torch.manual_seed(1))
    assert rank_losses.rrhf_rank_loss(p, same, valid).tolist() == [0.0]
    assert rank_losses.best_candidate(same, valid).tolist() == [0]
    lowest = torch.tensor([[5.0, -torch.inf]])
    assert rank_losses.best_candidate(lowest, torch.tensor([[False, True]])).tolist() == [1]


def test_a_prompt_without_candidates_adds_nothing() -> None:
    summed = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    none = torch.zeros(1, 2, dtype=torch.bool)
    scores = torch.tensor([[9.0, 1.0]])
    assert rank_losses.rrhf_rank_loss(summed, scores, none).tolist() == [0.0]
    assert rank_losses.best_candidate_nll(summed, scores, none).tolist() == [0.0]
    lengths = torch.tensor([[0, 0]])
    assert rank_losses.sequence_scores(summed, lengths).isfinite().all()


def test_pair_counts_and_margin_equal_loops() -> None:
    for prompts in case_prompts().values():
        g = grids(prompts)
        p = rank_losses.sequence_scores(g["summed"], g["lengths"])
        for b, prompt in enumerate(prompts):
            means = [sum(tokens) / len(tokens) for tokens in prompt.logprobs]
            ordered = violated = correct = 0
            margin = 0.0
            for i, j in itertools.product(range(len(means)), repeat=2):
                if prompt.scores[i] < prompt.scores[j]:
                    ordered += 1
                    violated += means[i] > means[j]
                    correct += means[j] > means[i]
                    margin += means[j] - means[i]
            args = (g["scores"][b : b + 1], g["valid"][b : b + 1])
            row = p[b : b + 1]
            assert rank_losses.count_ordered_pairs(*args).item() == ordered
            assert rank_losses.count_violated_pairs(row, *args).item() == violated
            assert rank_losses.count_correct_pairs(row, *args).item() == correct
            assert rank_losses.total_margin(row, *args).item() == pytest.approx(margin, abs=1e-9)


def test_a_larger_length_penalty_favours_longer_responses() -> None:
    summed, lengths = torch.tensor([[-10.0, -2.0]]), torch.tensor([[10, 2]])
    assert rank_losses.sequence_scores(summed, lengths, 1.0).tolist() == [[-1.0, -1.0]]
    long, short = rank_losses.sequence_scores(summed, lengths, 1.5)[0].tolist()
    assert long > short
    long, short = rank_losses.sequence_scores(summed, lengths, 0.5)[0].tolist()
    assert long < short


def test_the_loss_does_not_change_its_arguments() -> None:
    g = grids(case_prompts()["ragged"], garbage=0.0)
    before = {key: value.clone() for key, value in g.items()}
    first = paper_terms(g)
    rank_losses.released_rrhf_loss(g["summed"], g["scores"], g["valid"], g["widths"])
    second = paper_terms(g)
    assert all(torch.equal(g[key], before[key]) for key in g)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
