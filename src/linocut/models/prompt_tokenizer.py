"""From prompts to token ids: Qwen3's chat template around the prompt, a fixed length, padding on the right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from linocut.errors import FormatError, ModelNotFoundError, UsageError

# One user turn, then the start of an answer whose thinking is already over (chat template with thinking off).
TEMPLATE = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
# The same for transformers' tokenizers: what Qwen3's own template does to the conversations that occur here.
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
PAD_TOKEN = "<|endoftext|>"
TEMPLATE_TOKENS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")


class PromptTokenizer:
    """Turns prompts into ids and masks of a fixed length, exactly as transformers does for FLUX.2 klein."""

    def __init__(self, tokenizer: Tokenizer, length: int) -> None:
        """`length` is the number of tokens of every row. The tokenizer is taken over: its padding and truncation
        are set here.
        """
        if length < 1:
            raise UsageError(f"text length must be at least 1 token, found {length}")
        needed = (PAD_TOKEN, *TEMPLATE_TOKENS)
        missing = [token for token in needed if tokenizer.token_to_id(token) is None]
        if missing:
            raise FormatError("the tokenizer lacks special tokens of Qwen3", expected=" ".join(needed),
                              found=f"no {' '.join(missing)}", advice="use the tokenizer that came with the model")
        tokenizer.enable_truncation(length, direction="right")
        tokenizer.enable_padding(direction="right", length=length, pad_id=tokenizer.token_to_id(PAD_TOKEN),
                                 pad_token=PAD_TOKEN)
        self.tokenizer, self.length = tokenizer, length

    @classmethod
    def from_folder(cls, path: str | Path, length: int) -> PromptTokenizer:
        """Open `tokenizer.json` in a folder (or given itself)."""
        file = Path(path)
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise ModelNotFoundError(f"{file}: no tokenizer.json; the model folder is incomplete, fetch it again")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the tokenizers package raises plain Exception for a malformed file
            raise FormatError("not a readable tokenizer.json", path=file, expected="a file of the tokenizers package",
                              found=str(error).splitlines()[0][:200]) from error
        return cls(tokenizer, length)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; ids lie below it."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    def count(self, prompt: str) -> int:
        """Tokens that the prompt needs with its template; more than `length` means the end is cut off."""
        encoding = self.tokenizer.encode(TEMPLATE.format(prompt=prompt))
        return sum(sum(part.attention_mask) for part in (encoding, *encoding.overflowing))

    def kept(self, prompt: str) -> int:
        """Characters of the prompt that are read; fewer than it has if its end is cut off."""
        encoding = self.tokenizer.encode(TEMPLATE.format(prompt=prompt))
        end = max((end for _, end in encoding.offsets), default=0)
        return min(max(0, end - len(TEMPLATE.partition("{prompt}")[0])), len(prompt))

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(ids, mask), LongTensors [B, length]; the mask is 1 for text and 0 for padding.

        A prompt that is too long is cut at the end, template included, as transformers does.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        encodings = self.tokenizer.encode_batch([TEMPLATE.format(prompt=prompt) for prompt in prompts])
        ids = torch.tensor([encoding.ids for encoding in encodings], dtype=torch.long)
        mask = torch.tensor([encoding.attention_mask for encoding in encodings], dtype=torch.long)
        return ids.reshape(-1, self.length), mask.reshape(-1, self.length)
