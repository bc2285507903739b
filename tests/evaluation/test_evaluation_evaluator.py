"""The evaluator with tiny real models: rows agree with what is counted by hand."""

import json
import math
from dataclasses import replace

import pytest
import torch
from engine_cases import CannedTexts
from evaluation_cases import prompt, reader, reply, slow_logprobs
from scorer_cases import ByLength
from tiny import byte_level_tokenizer, tiny_llama

from rrhf.data.chat_format import ChatCodec
from rrhf.data.views import pairs as pairs_view
from rrhf.evaluation.evaluator import Evaluator
from rrhf.evaluation.likelihoods import LikelihoodReader
from rrhf.evaluation.metrics.kl import best_of_n_bound
from rrhf.evaluation.paper_perplexity import PaperPerplexity
from rrhf.evaluation.shared import Shared, fingerprint
from rrhf.generation.engine import Sample, SamplingParams, answers
from rrhf.generation.local.engine import LocalEngine
from rrhf.records import CHOSEN_SOURCE, REJECTED_SOURCE, Candidate
from rrhf.scoring.gold import GoldScorer
from rrhf.worlds.help_desk.world import HelpDesk

SAMPLED = SamplingParams(num_return_sequences=2, max_new_tokens=6, seed=3)
GREEDY = SamplingParams(num_return_sequences=1, max_new_tokens=6, do_sample=False)
PROMPTS = [prompt(f"How do I keep my {word} alive?") for word in ("plants", "dog", "fox", "friend")]


def engine(seed=0):
    tokenizer = byte_level_tokenizer()
    return LocalEngine(tiny_llama(len(tokenizer), seed), ChatCodec(tokenizer))


class Encoded(LocalEngine):
    """The engine, writing what its codec gives for one text or two, token by token."""

    def generate(self, prompts, params):
        for place, s in enumerate(prompts):
            yield place, [self.sample(s, text, params) for text in ("ask", "a friend")]

    def sample(self, s, text, params):
        ids = torch.tensor(self.codec.encode_response(s, text, "length"))
        given = torch.full(ids.shape, -1.0)
        return Sample(self.encode_prompt(s, params), ids, given, "length", text)


def policy_of(engine):
    return LikelihoodReader(engine.model, engine.codec)


def row_of(evaluator, name, engine, params, **options):
    """Of an engine whose policy is at hand."""
    return evaluator.row(name, engine, params, policy=policy_of(engine), **options)


def test_a_policy_does_not_diverge_from_itself():
    row = row_of(Evaluator(Shared(PROMPTS, reference=reader(0))), "sft", engine(0), SAMPLED)
    assert row["metrics"]["kl"]["mean"] == pytest.approx(0.0, abs=1e-5)
    assert row["metrics"]["kl_k3"]["mean"] == pytest.approx(0.0, abs=1e-5)
    assert row["notes"] == []


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_kl_is_read_on_the_sampled_tokens_at_the_sampling_temperature(temperature):
    policy, reference = engine(0), reader(1)
    params = replace(SAMPLED, temperature=temperature)
    row = row_of(Evaluator(Shared(PROMPTS, reference=reference)), "p", policy, params)
    means = []
    for s, written in zip(PROMPTS, answers(policy, PROMPTS, params), strict=True):
        prompt_ids = policy.encode_prompt(s, params)
        ratios = []
        for sample in written:
            ids = sample.token_ids.tolist()
            ours = slow_logprobs(policy.model, prompt_ids, ids, temperature)
            theirs = slow_logprobs(reference.model, prompt_ids, ids, temperature)
            ratios.append(sum(ours) - sum(theirs))
        means.append(sum(ratios) / len(ratios))
    assert row["metrics"]["kl"]["mean"] == pytest.approx(sum(means) / len(means), abs=1e-3)
    assert row["metrics"]["kl"]["mean"] > 1


def test_what_the_reference_read_at_another_temperature_is_not_its_perplexity():
    """Perplexities are at temperature 1, whatever responses were sampled at."""
    evaluator, policy = Evaluator(Shared(PROMPTS, reference=reader(1))), engine()
    row = row_of(
        evaluator, "p", Encoded(policy.model, policy.codec), replace(SAMPLED, temperature=0.5)
    )
    other = Evaluator(Shared(PROMPTS, reference=reader(1)))
    fresh = other.responses_row("again", evaluator.samples["p"])
    for one in (row, fresh):
        assert one["counts"]["responses_that_do_not_fit"] == 0
    assert row["metrics"]["kl"]["mean"] != 0
    assert row["metrics"]["ppl_reference"] == fresh["metrics"]["ppl_reference"]
    # The same tokens were read twice, so that what was read first could have been taken.
    assert row["cost"]["passes"]["reference"] == 16


def test_a_row_counts_its_responses_by_prompt_first():
    evaluator = Evaluator(Shared(PROMPTS, scorer=ByLength(), reference=reader(1)))
    row = row_of(evaluator, "p", engine(0), SAMPLED)
    samples = evaluator.samples["p"]
    assert [len(s.candidates) for s in samples] == [2] * 4
    assert {c.source for s in samples for c in s.candidates} == {"policy:p"}
    by_prompt = [sum(len(c.response) for c in s.candidates) / 2 for s in samples]
    assert row["metrics"]["reward"]["mean"] == pytest.approx(sum(by_prompt) / 4)
    assert row["metrics"]["reward"]["n"] == 4
    cut = [c.finish_reason == "length" for s in samples for c in s.candidates]
    assert row["metrics"]["without_eos"]["mean"] == pytest.approx(sum(cut) / 8)
    assert row["cost"]["passes"] == {"policy": 8, "scorer": 8, "reference": 16}
    assert row["cost"]["generated_tokens"] <= 8 * 6


def test_a_row_is_ready_for_json_and_the_same_when_made_again():
    def again():
        evaluator = Evaluator(Shared(PROMPTS, scorer=ByLength(), reference=reader(1)))
        row = row_of(evaluator, "p", engine(0), SAMPLED, extra={"training": {"steps": 3}})
        del row["cost"]
        return json.dumps(row)

    assert again() == again()
    assert json.loads(again())["training"] == {"steps": 3}


def test_greedy_rows_say_that_their_kl_is_no_expectation():
    row = row_of(Evaluator(Shared(PROMPTS, reference=reader(1))), "p", engine(0), GREEDY)
    assert row["made_with"]["decoding"]["kind"] == "greedy"
    assert "greedy" in row["notes"][0]


def test_the_best_of_n_is_chosen_from_n_samples_by_the_scorer():
    evaluator = Evaluator(Shared(PROMPTS, scorer=ByLength(), reference=reader(0)))
    row = row_of(evaluator, "bo3", engine(0), SAMPLED, best_of=3)
    drawn = answers(engine(0), PROMPTS, replace(SAMPLED, num_return_sequences=6))
    for s, written in zip(evaluator.samples["bo3"], drawn, strict=True):
        texts = [sample.text for sample in written]
        best = [max(texts[:3], key=len), max(texts[3:], key=len)]
        assert [c.response for c in s.candidates] == best
    assert row["made_with"]["decoding"]["kind"] == "best-of-3"
    assert row["metrics"]["kl_bound"]["mean"] == best_of_n_bound(3)
    assert "kl" not in row["metrics"]
    assert row["cost"]["serving_passes_per_response"] == 6.0


def test_the_win_rate_is_against_the_baselines_responses():
    evaluator = Evaluator(Shared(PROMPTS, scorer=ByLength()))
    row = evaluator.row("before", CannedTexts("xx"), SAMPLED)
    assert "win_reward" not in row["metrics"]
    evaluator.set_baseline("sft", evaluator.sample("sft", CannedTexts("x", "xxx"), SAMPLED))
    row = evaluator.row("p", CannedTexts("xxx", "xxxx"), SAMPLED)
    # xxx meets x and xxx: won, tied; xxxx wins twice: 3.5 of 4
    assert row["metrics"]["win_reward"]["mean"] == 3.5 / 4
    assert row["metrics"]["tie_reward"]["mean"] == 1 / 4
    assert row["made_with"]["baseline"].startswith("sft#")
    assert "win_gold" not in row["metrics"]


def test_gold_and_win_by_gold_where_the_world_knows_it():
    world = HelpDesk("smoke")
    prompts = world.prompts("test")[:6]
    evaluator = Evaluator(Shared(prompts, scorer=GoldScorer("help_desk"), gold=world))
    evaluator.set_baseline("bad", [replace(s, candidates=(reply("Go away."),)) for s in prompts])
    good = {s.id: s for s in world.references("GOOD", len(world.prompts("test")))}
    row = evaluator.responses_row("good", [good[s.id] for s in prompts], kind="human")
    expected = [world.gold(good[s.id], good[s.id].candidates[0]) for s in prompts]
    assert row["metrics"]["gold"]["mean"] == pytest.approx(sum(expected) / 6)
    assert row["metrics"]["reward"]["mean"] == pytest.approx(sum(expected) / 6)
    assert row["metrics"]["win_gold"]["mean"] == 1.0
    assert row["metrics"]["part_myth"]["mean"] == 0.0
    assert row["made_with"]["decoding"] == {"kind": "human"}


def test_likelihoods_of_the_policy_stand_in_its_row():
    human = [replace(s, candidates=(reply("You could ask a friend."),)) for s in PROMPTS]
    pair = (Candidate("dog", CHOSEN_SOURCE), Candidate("lazy fox", REJECTED_SOURCE))
    pairs = [replace(s, candidates=pair) for s in PROMPTS]
    policy = engine(0)
    tokenizer = policy.codec.tokenizer
    paper = PaperPerplexity(tiny_llama(len(tokenizer), 5), tokenizer)
    evaluator = Evaluator(Shared(PROMPTS, human=human, pairs=pairs, paper=paper))
    row = row_of(evaluator, "p", policy, GREEDY)
    nats = tokens = 0.0
    for s in human:
        ids = policy.codec.encode_response(s, s.candidates[0].response)
        nats -= sum(slow_logprobs(policy.model, policy.codec.encode_prompt(s), ids))
        tokens += len(ids)
    assert row["metrics"]["ppl_human"]["mean"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert row["metrics"]["pi_accuracy"]["n"] == 4
    assert row["metrics"]["ppl_paper"]["mean"] < row["metrics"]["ppl_paper_e"]["mean"]
    assert row["cost"]["passes"]["policy_likelihood"] == 4 + 2 * 4


def test_pairs_and_references_of_one_prompt_are_one_prompt():
    texts = ("dog", "lazy fox", "You could ask a friend.")
    scored = tuple(replace(reply(text), score=float(i)) for i, text in enumerate(texts))
    ranked = [replace(s, candidates=scored) for s in PROMPTS[:2]]
    human = [
        replace(s, id=f"{s.id}-{i}", candidates=(reply(texts[i]),)) for s in PROMPTS for i in (0, 1)
    ]
    evaluator = Evaluator(Shared(PROMPTS, human=human, pairs=pairs_view(ranked)))
    assert len(evaluator.shared.pairs) == 6
    row = row_of(evaluator, "p", engine(0), GREEDY)
    assert row["metrics"]["pi_accuracy"]["n"] == 2
    assert row["metrics"]["ppl_human"]["n"] == 4


def test_an_engine_that_tells_nothing_of_its_tokens_is_measured_by_its_texts():
    evaluator = Evaluator(Shared(PROMPTS, scorer=ByLength(), reference=reader(0)))
    row = evaluator.row("endpoint", CannedTexts("You could ask."), SAMPLED)
    assert "kl" not in row["metrics"]
    assert row["metrics"]["ppl_reference"]["mean"] > 1
    assert row["metrics"]["length"]["mean"] > 1


def test_empty_responses_divide_nothing_by_zero():
    evaluator = Evaluator(Shared(PROMPTS, scorer=ByLength(), reference=reader(0)))
    evaluator.set_baseline("same", evaluator.sample("same", CannedTexts(""), SAMPLED))
    row = evaluator.row("mute", CannedTexts(""), SAMPLED)
    metrics = row["metrics"]
    assert metrics["empty"]["mean"] == 1.0
    assert metrics["words"]["mean"] == metrics["length"]["mean"] == 0.0
    assert metrics["distinct_1"]["mean"] is None
    assert metrics["win_reward"]["mean"] == 0.5
    assert math.isfinite(metrics["ppl_reference"]["mean"])  # the EOS alone


def test_another_vocabulary_gives_a_note_instead_of_a_kl():
    tokenizer = byte_level_tokenizer(vocab_size=300)
    policy = LocalEngine(tiny_llama(len(tokenizer)), ChatCodec(tokenizer))
    row = row_of(Evaluator(Shared(PROMPTS, reference=reader(0))), "p", policy, SAMPLED)
    assert "kl" not in row["metrics"]
    assert "vocabularies" in row["notes"][0]


def test_prompts_without_a_given_response_are_counted():
    evaluator = Evaluator(Shared(PROMPTS, scorer=ByLength()))
    row = evaluator.responses_row("file", [replace(PROMPTS[1], candidates=(reply("xx"),))])
    assert row["counts"]["prompts_without_response"] == 3
    assert row["metrics"]["reward"] == {"mean": 2.0, "low": None, "high": None, "n": 1}


def test_measures_of_a_policy_can_be_handed_to_its_other_decoding():
    human = [replace(s, candidates=(reply("You could ask a friend."),)) for s in PROMPTS]
    evaluator = Evaluator(Shared(PROMPTS, human=human))
    shared, counts = evaluator.policy_measures(reader(0))
    row = evaluator.row("p", CannedTexts("x"), GREEDY, policy_measures=shared)
    assert (
        row["metrics"]["ppl_human"]
        == row_of(evaluator, "q", engine(0), GREEDY)["metrics"]["ppl_human"]
    )
    assert counts == {"human_responses_that_do_not_fit": 0}


def test_fingerprints_know_prompts_and_responses_and_no_order():
    sets = [replace(s, candidates=(reply("x"),)) for s in PROMPTS]
    assert fingerprint(sets) == fingerprint(sets[::-1])
    assert fingerprint(sets) != fingerprint(sets[1:])
    assert fingerprint(sets) != fingerprint(PROMPTS)
    joined = prompt("a", reply("xy"), reply("z")), prompt("a", reply("x"), reply("yz"))
    assert fingerprint(joined[:1]) != fingerprint(joined[1:])
