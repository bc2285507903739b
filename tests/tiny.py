"""Tiny real models and tokenizers, built where they are needed."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXTS = [
    "Human: How do I keep my plants alive while I am away? Assistant: You could ask a friend.",
    "I am sorry, but I cannot help with that. Please ask someone else instead.",
    "say it now, and then again: the quick brown fox jumps over the lazy dog 0123456789",
    "### Instruction:\n\nBelow is an instruction.\n\n### Response:\nfirst line\nsecond line",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def byte_level_tokenizer(
    vocab_size: int = 400, chat: bool = False, pad: str | None = "<pad>", bos: bool = True
) -> PreTrainedTokenizerFast:
    """GPT-2's kind: no blank is ever added; with `chat`, a template with its own end of turn."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", *(["<pad>"] if pad == "<pad>" else [])]
    specials += ["<|start|>", "<|end|>"] if chat else []
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    inner.train_from_iterator(TEXTS * 4, trainer)
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token=pad
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    return tokenizer


def sentencepiece_like_tokenizer(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """LLaMA's kind: a blank goes before the first word and is lost when decoding."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    inner.train_from_iterator([t.replace("\n", " ") for t in TEXTS * 4], trainer)
    # Bytes are ordinary words of the vocabulary, so they cannot be given to the trainer as special.
    form = json.loads(inner.to_str())
    words = form["model"]["vocab"]
    words.update({f"<0x{byte:02X}>": len(words) + byte for byte in range(256)})
    inner = Tokenizer.from_str(json.dumps(form))
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_llama(vocab_size: int = 400, seed: int = 0, window: int = 128) -> LlamaForCausalLM:
    """Two layers, 32 wide, grouped heads, random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=window,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def save_tiny(folder: Path, seed: int = 0, chat: bool = False) -> Path:
    """A model folder with tokenizer; returns it."""
    tokenizer = byte_level_tokenizer(chat=chat)
    tiny_llama(len(tokenizer), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
