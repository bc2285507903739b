"""Oracles: perplexities by hand on fixed nats, and token by token in float64."""

import math

import pytest
from evaluation_cases import prompt, reader, reply, slow_logprobs
from tiny import byte_level_tokenizer, tiny_llama

from rrhf.errors import UserError
from rrhf.evaluation.bootstrap import estimate
from rrhf.evaluation.metrics.perplexity import perplexity_measure, response_perplexity
from rrhf.evaluation.paper_perplexity import (
    PaperPerplexity,
    clean_for_paper,
    paper_measures,
)


def test_perplexity_is_exp_of_nats_per_token_over_all_responses():
    # a: 6 + 2 nats over 3 + 1 tokens, b: 4 nats over 4 tokens; exp(12 / 8)
    measure = perplexity_measure(["a", "a", "b"], [6.0, 2.0, 4.0], [3, 1, 4])
    assert estimate(measure).mean == pytest.approx(math.exp(1.5))
    assert measure.values == {"a": 8.0, "b": 4.0}
    assert measure.weights == {"a": 4.0, "b": 4.0}


def test_a_response_without_tokens_counts_nowhere():
    measure = perplexity_measure(["a", "b"], [0.0, 2.0], [0, 1])
    found = estimate(measure)
    assert (found.mean, found.n) == (pytest.approx(math.exp(2.0)), 1)


def test_the_papers_conventions_on_fixed_nats():
    # Prompt a has texts of ln 2 and 3 nats a token, prompt b one of 1.
    measures = paper_measures({"a": [math.log(2), 3.0], "b": [1.0]})
    two = ((2 ** math.log(2) + 2**3) / 2 + 2) / 2
    e = ((2 + math.exp(3)) / 2 + math.e) / 2
    assert estimate(measures["ppl_paper"]).mean == pytest.approx(two)
    assert estimate(measures["ppl_paper_e"]).mean == pytest.approx(e)


def test_published_base_two_and_base_e_are_far_apart():
    # 21.46 in the paper's table is 2 ** nats; the same nats give about 83 with e.
    nats = math.log2(21.46)
    measures = paper_measures({"a": [nats]})
    assert estimate(measures["ppl_paper"]).mean == pytest.approx(21.46)
    assert estimate(measures["ppl_paper_e"]).mean == pytest.approx(83.4, abs=0.2)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [("a\nb", "a b"), ("\n\n a \n", "a"), ("a\n\nb", "a  b"), ("", ""), (" \n ", "")],
)
def test_line_breaks_become_blanks_and_ends_go(text, cleaned):
    assert clean_for_paper(text) == cleaned


@pytest.mark.parametrize("max_tokens", [None, 4])
def test_the_papers_perplexity_reads_the_bare_text_after_bos(max_tokens):
    tokenizer = byte_level_tokenizer()
    model = tiny_llama(len(tokenizer))
    paper = PaperPerplexity(model, tokenizer, max_tokens)
    texts = ["\nfirst line\nsecond line ", "the quick brown fox", "dog"]
    found = paper.mean_nats(texts)
    for text, nats in zip(texts, found, strict=True):
        cleaned = text.replace("\n", " ").strip()
        ids = tokenizer(cleaned, add_special_tokens=False).input_ids[:max_tokens]
        slow = slow_logprobs(model, [tokenizer.bos_token_id], ids)
        assert nats == pytest.approx(-sum(slow) / len(slow), abs=1e-5)


def test_an_empty_text_is_one_blank_as_the_script_has_it():
    tokenizer = byte_level_tokenizer()
    model = tiny_llama(len(tokenizer))
    blank = tokenizer(" ", add_special_tokens=False).input_ids
    slow = slow_logprobs(model, [tokenizer.bos_token_id], blank)
    found = PaperPerplexity(model, tokenizer).mean_nats(["", " \n"])
    assert found == pytest.approx([-sum(slow) / len(slow)] * 2, abs=1e-5)


def test_the_papers_perplexity_averages_texts_not_tokens():
    tokenizer = byte_level_tokenizer()
    paper = PaperPerplexity(tiny_llama(len(tokenizer)), tokenizer)
    s = prompt("dog", reply("the quick brown fox jumps over the lazy dog"), reply("a"))
    nats = paper.mean_nats([c.response for c in s.candidates])
    found = estimate(paper.measures([s])["ppl_paper"]).mean
    assert found == pytest.approx((2 ** nats[0] + 2 ** nats[1]) / 2)


def test_a_text_longer_than_the_window_is_cut():
    tokenizer = byte_level_tokenizer()
    paper = PaperPerplexity(tiny_llama(len(tokenizer), window=16), tokenizer)
    text = "0 1 2 3 4 5 6 7 8 9 " * 5
    ids = tokenizer(text.strip(), add_special_tokens=False).input_ids[:15]
    slow = slow_logprobs(paper.model, [0], ids)
    assert paper.mean_nats([text])[0] == pytest.approx(-sum(slow) / 15, abs=1e-5)


def test_special_tokens_inside_a_text_stay_text():
    tokenizer = byte_level_tokenizer()
    paper = PaperPerplexity(tiny_llama(len(tokenizer)), tokenizer)
    ids = tokenizer("a</s>", add_special_tokens=False, split_special_tokens=True).input_ids
    assert len(ids) > 2
    slow = slow_logprobs(paper.model, [0], ids)
    assert paper.mean_nats(["a</s>"])[0] == pytest.approx(-sum(slow) / len(ids), abs=1e-5)


def test_without_bos_a_text_begins_after_eos_and_without_both_nowhere():
    tokenizer = byte_level_tokenizer()
    model = tiny_llama(len(tokenizer))
    tokenizer.bos_token = None
    ids = tokenizer("dog", add_special_tokens=False).input_ids
    slow = slow_logprobs(model, [tokenizer.eos_token_id], ids)
    found = PaperPerplexity(model, tokenizer).mean_nats(["dog"])[0]
    assert found == pytest.approx(-sum(slow) / len(slow), abs=1e-5)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="neither BOS nor EOS"):
        PaperPerplexity(model, tokenizer)


def test_responses_are_read_given_their_prompt_with_their_end():
    policy = reader()
    sets = [
        prompt("How do I keep my plants alive?", reply("You could ask."), reply("", reason="stop")),
        prompt("now", reply("the quick brown", reason="length"), reply("", reason="length")),
    ]
    nats = tokens = 0.0
    for s in sets:
        for candidate in s.candidates:
            ids = policy.codec.encode_response(s, candidate.response, candidate.finish_reason)
            nats -= sum(slow_logprobs(policy.model, policy.codec.encode_prompt(s), ids))
            tokens += len(ids)
    measure, dropped = response_perplexity(policy, sets)
    assert dropped == 0
    assert estimate(measure).mean == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_responses_that_do_not_fit_are_counted():
    policy = reader(window=24)
    sets = [prompt("dog", reply("fox"), reply("0 1 2 3 4 5 6 7 8 9 " * 3))]
    measure, dropped = response_perplexity(policy, sets)
    assert dropped == 1
    assert measure.weights is not None and measure.weights[sets[0].id] > 0
