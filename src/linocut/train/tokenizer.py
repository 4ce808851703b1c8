"""Train a small tokenizer of the kind that Qwen3 uses: byte-level BPE with Qwen2's way of cutting words."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from linocut.errors import UsageError
from linocut.models.prompt_tokenizer import CHAT_TEMPLATE, PAD_TOKEN

# The published cutting rule of Qwen2 and Qwen3: contractions, words with one leading mark, single digits, marks, space.
WORD_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
SPECIAL_TOKENS = (PAD_TOKEN, "<|im_start|>", "<|im_end|>")
THINKING_TOKENS = ("<think>", "</think>")  # ordinary added tokens in Qwen3: kept whole, but not marked special


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn merges from captions. The result has at most `vocab_size` tokens, the five of Qwen3 last.

    The same captions in the same order give the same tokenizer. Any text can be encoded: all 256 bytes are tokens.
    """
    added = len(SPECIAL_TOKENS) + len(THINKING_TOKENS)
    if vocab_size < 256 + added:
        raise UsageError(f"vocab_size must be at least {256 + added} (256 bytes, {added} special tokens), "
                         f"found {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - added, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINKING_TOKENS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write `tokenizer.json`, and `tokenizer_config.json` so that transformers opens the folder as well."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {"tokenizer_class": "Qwen2Tokenizer", "pad_token": PAD_TOKEN, "eos_token": "<|im_end|>",
              "unk_token": None, "bos_token": None, "add_prefix_space": False, "model_max_length": 131072,
              "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
