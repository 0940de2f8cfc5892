"""Sizes at which one kernel, or one shape of it, overtakes another.

Measured on one H100 with Qwen3-0.6B and 8B in bfloat16. Elsewhere results are the same and may come later: to tune
another device or model, change these and run ``pdray bench kernels``.
"""

# Products up to these stream the weight by kernels of ours; beyond them cuBLAS reads as fast as the memory gives.
ONE_ROW_MAX_WEIGHT_ROWS = 65536
FEW_ROWS_MAX = 16  # rows of the input; also the largest that the kernel takes
FEW_ROWS_MAX_WEIGHT_ELEMENTS = 1 << 23
FEW_ROWS_SPLIT_MAX_COLUMNS = 2048  # of the result; a tile for each of 132 SMs needs more
# Up to TILED_ROWS_MAX rows a gated product, and from TILED_MIN_ROWS on a plain one whose weight is between the limits,
# is one tiled kernel of ours. A gated result of TILED_GATED_MANY_COLUMNS or more has wider tiles.
TILED_ROWS_MAX, TILED_GATED_MANY_COLUMNS = 64, 8192
TILED_MIN_ROWS, TILED_MIN_WEIGHT_ELEMENTS, TILED_MAX_WEIGHT_ELEMENTS = 33, 3 << 20, 1 << 23
# A prompt's gated product is one kernel, too, where its tiles keep the processors busy for this share of the time, and
# x has at most so many columns: of more, the gate is a small part, and the library's product is ahead by as much.
GATED_PROMPT_MIN_OCCUPANCY, GATED_PROMPT_MAX_COLUMNS = 0.8, 2048

# Attention of one query token: how finely a long sequence is split among programs.
DECODE_MAX_SPLITS = 32
DECODE_MIN_TOKENS_PER_SPLIT = 128
# The same where attention begins at the projection; from so many pairs of sequence and KV head on it does.
PROJECTED_MIN_TOKENS_PER_SPLIT, PROJECTED_MIN_PROGRAMS = 256, 16

# Prompts by FlashAttention-3: tokens of the sequence that an average token is in; below it Triton is as fast.
FLASH_MIN_MEAN_LENGTH = 256
# The same behind a prefix, whose keys must be copied together first: query tokens that an average key is read for, and
# the most keys that are copied (of 8 heads of 128 4 KiB each).
FLASH_MIN_QUERIES_PER_KEY, FLASH_MAX_GATHERED_KEYS = 512, 65536

# Rotary embedding: pairs of elements that a program rotates, enough for one token, or to keep the memory busy.
ROTARY_PAIRS, ROTARY_MANY_PAIRS, ROTARY_MANY_TOKENS = 256, 512, 1024

# The draw: token ids of a program of four warps, which take them at once (short latency), or of one warp, which needs
# no barrier to skip tiles; the latter from so many programs on.
DRAW_SHORT_SPAN, DRAW_LONG_SPAN, DRAW_MANY_PROGRAMS = 1024, 4096, 4096

# Rows whose sums over ranks have so many bytes are computed in two halves, each while the other's sum is made.
HALVES_MIN_BYTES = 32 << 20

# Sums for which a rank sends so much at most are made by one kernel, in one trip over the link; others by NCCL.
ONE_SHOT_MAX_BYTES = 1 << 20  # the largest that was measured: 9 us for 25 to 36 by NCCL
