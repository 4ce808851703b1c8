"""Closed forms of what phases hold in memory, from configs and file headers. Upper estimates, in bytes.

`size` is the bytes of a value as the transformer computes with it (4 for float32).
"""

import re

from linocut.formats.checkpoint import Checkpoint
from linocut.kernels.fusible import HIDDEN_SLICE
from linocut.models.configs import AutoencoderConfig, Flux2Config, Qwen3Config

EDGE_ROWS = 512
"""Tokens that the fused step takes at least at a time (models/flux2_cpu.py)."""
PAGE_CLUSTER = 64 * 1024
"""A page fault in a mapped file brings in its neighbours."""
_ONCE = re.compile(r"(^|\.)(context_embedder|txt_in|embed_tokens)\.")
_PART = re.compile(r"(?:^|\.)((?:single_)?transformer_blocks|(?:double|single)_blocks|layers)\.(\d+)\.")


# ---- weights -------------------------------------------------------------------------------------------------------

def part_of(name: str) -> tuple[str, int] | None:
    """The block or layer that a tensor belongs to: ("layers", 12) for 'model.layers.12.mlp.up_proj.codes'."""
    found = _PART.search(name)
    return None if found is None else (found[1], int(found[2]))


def parts_in_order(checkpoint: Checkpoint) -> list[list[str]]:
    """Names of the tensors of each block or layer, in the order in which they run."""
    parts: dict[tuple[str, int], list[str]] = {}
    for name in checkpoint:
        part = part_of(name)
        if part is not None:
            parts.setdefault(part, []).append(name)
    return [parts[key] for key in sorted(parts, key=lambda key: (key[0].startswith("single"), key[1]))]


def needed_once(checkpoint: Checkpoint) -> list[str]:
    """Names of the tensors that embed the prompt, which a network needs before its first block or layer only."""
    return [name for name in checkpoint if _ONCE.search(name)]


def touched_bytes(checkpoint: Checkpoint, names: list[str], rows_of_table: int) -> int:
    """Bytes of mapped pages that a phase reads of some tensors; of a table of embeddings only rows are looked up."""
    sizes = {name: checkpoint.info(name).nbytes for name in names}
    return sum(min(size, rows_of_table * PAGE_CLUSTER) if "embed_tokens." in name else size
               for name, size in sizes.items())


def streamed_bytes(checkpoint: Checkpoint, parts: list[list[str]]) -> int:
    """What is saved when a part leaves memory as soon as it is done: all but twice the largest one.

    Twice, since pages come and go in clusters.
    """
    each = [sum(checkpoint.info(name).nbytes for name in part) for part in parts]
    return max(0, sum(each) - 2 * max(each, default=0))


def tokenizer_bytes(files: int) -> int:
    """A tokenizer made from so many bytes of files: measured 28 bytes for one; large ones hold much that takes less."""
    return min(32 * files, 4 * files + 115_000_000)


# ---- text encoder --------------------------------------------------------------------------------------------------

def layer_bytes(config: Qwen3Config, tokens: int, size: int) -> int:
    """Return the work of one layer of the text encoder."""
    width, mlp = config.hidden_size, config.intermediate_size
    heads, kv, head = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    # Residual, normed, taps kept and their concatenation; q, k, v with rotated float32 copies; scores; the MLP.
    layer = tokens * (4 * width + 3 * heads * head + 4 * kv * head + 4 * mlp) + 2 * heads * tokens * tokens
    return layer * max(size, 4)


def fused_layer_bytes(config: Qwen3Config, tokens: int, size: int) -> int:
    """The same where layers run fused: buffers for all of them (models/text_encoder_cpu.py), and taps as above."""
    width, mlp = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    floats = 3 * width + 3 * (queries + 2 * keys) + 2 * min(mlp, HIDDEN_SLICE)
    return tokens * (4 * floats + _quantized_bytes(width + queries + mlp) + 2 * width * size)


# ---- transformer ---------------------------------------------------------------------------------------------------

def block_bytes(config: Flux2Config, text: int, image: int, size: int) -> int:
    """Return the work of the largest block of the transformer."""
    width, mlp = config.width, config.mlp_width
    tokens = text + image
    # A single-stream block holds the residual, its modulated copy, the fused projection (3D + 2M), attention's
    # output (D), the gated MLP (2M) and their concatenation; rotated float32 copies of q and k live before that.
    return tokens * max((8 * width + 4 * mlp) * size, (7 * width + 2 * mlp) * size + 5 * width * 4)


def fused_block_bytes(config: Flux2Config, text: int, image: int, rows: int | None, attention_bytes: int) -> int:
    """The same where blocks run fused, `rows` tokens at a time: buffers for all of them (models/flux2_cpu.py).

    `attention_bytes` are those of a value of q, k and v.
    """
    width, mlp, tokens = config.width, config.mlp_width, text + image
    at_work = tokens if rows is None else min(tokens, max(rows, EDGE_ROWS))
    # The residual; q, k and v of all heads; what goes into a branch and what comes out of the attention.
    all_tokens = tokens * (4 * width + 3 * width * attention_bytes + 2 * _quantized_bytes(width))
    # q, k and v as projected; a slice of the MLP; what goes into the last product.
    some_tokens = at_work * (2 * (3 * width + 2 * min(mlp, HIDDEN_SLICE)) + _quantized_bytes(width + mlp))
    # Embedded prompts, rotation tables, and the layers before and after the blocks.
    rest = 4 * (2 * text * width + tokens * config.attention_head_dim + 3 * min(EDGE_ROWS, tokens) * width)
    return all_tokens + some_tokens + rest


def gpu_step_bytes(config: Flux2Config, text: int, image: int) -> int:
    """Return the work of a fused step on a GPU (models/flux2_gpu.py): its memory, and the scratch for a weight."""
    width, mlp, tokens = config.width, config.mlp_width, text + image
    # Residual; a block's widest product; what a branch adds; attention's output, twice while it is turned into rows.
    rows = 4 * width + 2 * (3 * width + 2 * mlp) + 2 * width + 4 * width
    # What goes into a product, with two bytes a value at most; all of them share the memory of the widest.
    rows += 2 * (width + mlp)
    largest = max((3 * width + 2 * mlp) * width, width * (width + mlp))
    edges = 4 * (text * width + tokens * config.attention_head_dim + image * (width + 4 * config.in_channels))
    return tokens * rows + largest + largest // 32 + edges


def _quantized_bytes(values: int) -> int:
    """Return the bytes of activations in int8, with a scale per 128, a sum per 64 and some padding."""
    return values + values // 128 * 4 + values // 64 * 4 + 3 * 64


# ---- decoder -------------------------------------------------------------------------------------------------------

def decode_bytes(config: AutoencoderConfig, width: int, height: int, tile: int | None, size: int) -> int:
    """Return the work of the decoder: its widest layers at full resolution. `size` bytes of a value."""
    channels = config.decoder_widths
    narrow, wide = channels[0], channels[min(1, len(channels) - 1)]
    area = width * height
    if tile is None:
        # The first residual block of the last stage: its input, the input normalised, and the convolution at work.
        work = area * (3 * wide + narrow)
    else:
        # Two whole maps of a residual block and its input at half the resolution; all else is as tall as a strip.
        held = [area * (wide / 4 + 2 * narrow)]
        for stage in range(1, len(channels)):
            inner = channels[min(stage + 1, len(channels) - 1)]
            held.append((area >> (2 * stage)) * (inner + 2 * channels[stage]))
        work = int(max(held)) + 5 * wide * min(tile + 2, height) * width
    # The attention at the lowest resolution holds a few maps of the widest stage; its scores are never written out.
    attention = (area >> (2 * (len(channels) - 1))) * channels[-1] * 8
    return max(work, attention) * size + 2 * area * 3 * 4

