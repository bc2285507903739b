from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rrhf.worlds.help_desk.recipe import RECIPES
from rrhf.worlds.help_desk.world import HelpDesk
from rrhf.worlds.tiny_model import build_tiny_llama, build_tokenizer, conversation_texts

SMOKE = RECIPES["smoke"].model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    texts = conversation_texts(HelpDesk("smoke").demonstrations(1000))
    return build_tokenizer(texts, 800, folder)


def test_special_tokens_and_size(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert ids == (0, 1, 2)
    assert len(tokenizer) == 800
    assert tokenizer("Have a lovely day.").input_ids[0] > 2
    assert getattr(tokenizer, "chat_template", None) is None


@pytest.mark.parametrize(
    "text",
    [" Sure. You could restart the router.", "\n\nHuman: äß 漢字 🙂  two blanks , .", "a\tb\r\n"],
)
def test_any_text_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_saved_tokenizer_loads_the_same(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    build_tiny_llama(SMOKE, tokenizer).save_pretrained(folder)  # its config must not mislead
    loaded = AutoTokenizer.from_pretrained(folder)
    text = "\n\nHuman: Hello, I am Anna.\n\nAssistant: Sure."
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == text
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 2)


def test_training_is_deterministic(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    texts = conversation_texts(HelpDesk("smoke").demonstrations(1000))
    assert build_tokenizer(texts, 800, tmp_path).get_vocab() == tokenizer.get_vocab()


def test_replies_are_short_in_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    replies = [f" {s.candidates[0].response}" for s in HelpDesk("smoke").demonstrations(300)]
    lengths = [len(ids) for ids in tokenizer(replies).input_ids]
    assert sum(lengths) / len(lengths) < 32
    assert max(lengths) < 80


def test_model_has_the_expected_shape_and_is_seeded(tokenizer: PreTrainedTokenizerFast) -> None:
    before = torch.random.get_rng_state()
    model = build_tiny_llama(SMOKE, tokenizer, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    # embedding 800*96, a layer 4*96^2 + 3*96*256 + 2*96 = 110784, last norm 96, head tied
    assert sum(p.numel() for p in model.parameters()) == 800 * 96 + 3 * 110784 + 96
    assert model.config.eos_token_id == 2 and model.dtype == torch.float32
    again, other = (build_tiny_llama(SMOKE, tokenizer, seed=s) for s in (1, 2))
    weights, same, different = (m.lm_head.weight for m in (model, again, other))
    assert torch.equal(weights, same)
    assert not torch.equal(weights, different)
