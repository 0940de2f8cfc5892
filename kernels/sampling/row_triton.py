"""What all sampling kernels read of a row: its record, and its logits as the draw sees them."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from pdray.kernels.sampling import draw, history, rows
from pdray.kernels.sampling.rows import RowFlag

NAMES = list(rows.RECORD.names or ())
WORDS = tl.constexpr(rows.WORDS)
TEMPERATURE = tl.constexpr(NAMES.index("temperature"))
MIN_P = tl.constexpr(NAMES.index("min_p"))
TOP_P = tl.constexpr(NAMES.index("top_p"))
REPETITION = tl.constexpr(NAMES.index("repetition"))
PRESENCE = tl.constexpr(NAMES.index("presence"))
FREQUENCY = tl.constexpr(NAMES.index("frequency"))
FLAGS = tl.constexpr(NAMES.index("flags"))
TOP_K = tl.constexpr(NAMES.index("top_k"))
SLOT = tl.constexpr(NAMES.index("slot"))
MIN_TOKENS = tl.constexpr(NAMES.index("min_tokens"))
MASK = tl.constexpr(NAMES.index("mask"))
NUM_LOGPROBS = tl.constexpr(NAMES.index("num_logprobs"))
SEED = tl.constexpr(NAMES.index("seed"))
POSITION = tl.constexpr(NAMES.index("position") + 1)

LATE = tl.constexpr(int(RowFlag.LATE))
PENALIZED = tl.constexpr(int(RowFlag.PENALIZED))
ENDS_BANNED = tl.constexpr(int(RowFlag.ENDS_BANNED))
MASKED = tl.constexpr(int(RowFlag.MASKED))
REPORTED = tl.constexpr(int(RowFlag.REPORTED))
BIASED = tl.constexpr(int(RowFlag.BIASED))
SHIFTED = tl.constexpr(int(RowFlag.PENALIZED | RowFlag.BIASED))  # logits may become numbers that their dtype has not

SEEN = tl.constexpr(history.PROMPT | history.COUNT)
COUNT = tl.constexpr(history.COUNT)
END = tl.constexpr(history.END)
BIAS, BIAS_SHIFT = tl.constexpr(history.BIAS), tl.constexpr(history.BIAS_SHIFT)
BIASES = tl.constexpr(history.BIASES)
LARGEST_LOGIT = tl.constexpr(draw.LARGEST_LOGIT)
MIN_TEMPERATURE = tl.constexpr(draw.MIN_TEMPERATURE)
MAX_TEMPERATURE = tl.constexpr(draw.MAX_TEMPERATURE)


@triton.jit
def load_int(records_ptr, row, FIELD: tl.constexpr):
    return tl.load(records_ptr + row * WORDS + FIELD)


@triton.jit
def load_float(records_ptr, row, FIELD: tl.constexpr):
    return tl.load(records_ptr + row * WORDS + FIELD).to(tl.float32, bitcast=True)


@triton.jit
def load_long(records_ptr, row, FIELD: tl.constexpr):
    low = tl.load(records_ptr + row * WORDS + FIELD).to(tl.int64) & 0xFFFFFFFF
    return (tl.load(records_ptr + row * WORDS + FIELD + 1).to(tl.int64) << 32) | low


@triton.jit
def clamp_temperature(temperature):
    """What to divide by; 1 where greedy."""
    return tl.where(temperature > 0, tl.minimum(tl.maximum(temperature, MIN_TEMPERATURE), MAX_TEMPERATURE), 1.0)


@triton.jit
def load_changes(records_ptr, row, history_ptr, masks_ptr, VOCAB_SIZE: tl.constexpr):
    """What load_logits() does to the row: flags, where its words and its mask are, and its penalties."""
    flags = load_int(records_ptr, row, FLAGS)
    is_early = load_long(records_ptr, row, POSITION) < load_int(records_ptr, row, MIN_TOKENS)
    flags = tl.where(is_early, flags, flags & ~ENDS_BANNED)
    history_ptr += load_int(records_ptr, row, SLOT).to(tl.int64) * (BIASES + VOCAB_SIZE) + BIASES
    masks_ptr += load_int(records_ptr, row, MASK).to(tl.int64) * (VOCAB_SIZE // 32 + 1)
    repetition = load_float(records_ptr, row, REPETITION)
    presence = load_float(records_ptr, row, PRESENCE)
    frequency = load_float(records_ptr, row, FREQUENCY)
    return flags, history_ptr, masks_ptr, repetition, presence, frequency


@triton.jit
def load_logits(row_ptr, history_ptr, mask_ptr, token_ids, inside, flags, repetition, presence, frequency):
    """Logits with bias, penalties, bans and mask, float32, as draw.clean_logits() has them; -inf where not ``inside``.

    Products and sums are rounded one by one, as in sample.py: kernels are launched without fusing them.
    """
    x = tl.load(row_ptr + token_ids, mask=inside, other=float("-inf")).to(tl.float32)
    if (flags & (PENALIZED | ENDS_BANNED | BIASED)) != 0:
        word = tl.load(history_ptr + token_ids, mask=inside, other=0)
        if (flags & BIASED) != 0:
            place = (word & BIAS) >> BIAS_SHIFT
            bias = tl.load(history_ptr - place, mask=place > 0, other=0)
            x += bias.to(tl.float32, bitcast=True)
        if (flags & PENALIZED) != 0:
            count = (word & COUNT).to(tl.float32)
            x = tl.where((word & SEEN) != 0, tl.where(x > 0, tl.div_rn(x, repetition), x * repetition), x)
            x -= frequency * count
            x -= tl.where(count > 0, presence, presence * 0.0)
        if (flags & ENDS_BANNED) != 0:
            x = tl.where((word & END) != 0, float("-inf"), x)
    if (flags & MASKED) != 0:
        bits = tl.load(mask_ptr + token_ids // 32, mask=inside, other=0)
        x = tl.where(((bits >> (token_ids % 32)) & 1) != 0, x, float("-inf"))
    return tl.minimum(tl.where(x > -LARGEST_LOGIT, x, float("-inf")), LARGEST_LOGIT)


@triton.jit
def load_raw_logits(row_ptr, token_ids, inside):
    """Logits as draw.clean_logits() has them; -inf where not ``inside``."""
    x = tl.load(row_ptr + token_ids, mask=inside, other=float("-inf")).to(tl.float32)
    return tl.minimum(tl.where(x > -LARGEST_LOGIT, x, float("-inf")), LARGEST_LOGIT)


@triton.jit
def keep_token(out_ptr, row, token_id, flags, history_ptr):
    """The row has drawn this token."""
    tl.store(out_ptr + row, token_id.to(tl.int64))
    if (flags & PENALIZED) != 0:
        word_ptr = history_ptr + token_id
        tl.store(word_ptr, tl.load(word_ptr) + 1)
