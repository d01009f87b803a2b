"""Tiny tokenizers of every kind, trained on a text: byte-level, SentencePiece-style, the same with bytes, word-level.

All put a BOS in front of every text, as Llama tokenizers do.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<unk>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# How Llama 3 cuts text: a stop takes the newlines behind it along, a word the space in front of it.
LLAMA_3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(text: str, **options: Any) -> PreTrainedTokenizerFast:
    """As of Llama 3: a character outside the text is made of several tokens."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(
        backend, trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet), text, options
    )


def sentencepiece_style(text: str, **options: Any) -> PreTrainedTokenizerFast:
    """A space belongs to the word behind it, and is lost where it comes first."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    return _trained(backend, trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL), text, options)


def byte_fallback(text: str, **options: Any) -> PreTrainedTokenizerFast:
    """As of Llama 2: SentencePiece-style, and a character outside the text is made of its bytes."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    return _trained(backend, trainers.BpeTrainer(vocab_size=700, special_tokens=[*SPECIAL, *BYTES]), text, options)


def word_level(text: str, **options: Any) -> PreTrainedTokenizerFast:
    """Words and punctuation; decoded with spaces between all of them."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return _trained(backend, trainers.WordLevelTrainer(special_tokens=SPECIAL), text, options)


KINDS = {"byte-level": byte_level, "sentencepiece": sentencepiece_style, "word-level": word_level}


def _trained(backend: Tokenizer, trainer: Any, text: str, options: dict[str, Any]) -> PreTrainedTokenizerFast:
    trainer.show_progress = False
    backend.train_from_iterator([text], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **options
    )
