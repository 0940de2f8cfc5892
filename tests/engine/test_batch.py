"""A step's inputs: what of them is there, what pads them, and what is copied again only when it has changed."""

from __future__ import annotations

from typing import Any, cast

import torch

from pdray.engine.kv.block_pool import BlockPool
from pdray.engine.request import EngineRequest
from pdray.engine.schedule.bookkeeping import Bookkeeper
from pdray.engine.schedule.limits import EngineLimits
from pdray.engine.schedule.plan import Chunk, SampledRow, StepPlan
from pdray.engine.schedule.scheduler import Scheduler
from pdray.engine.schedule.token_budget import STEP_SIZES
from pdray.engine.step.graphs import StepGraphs, decode_sizes, launched_sizes, prefill_shapes
from pdray.engine.step.histories import Histories
from pdray.engine.step.inputs import InputBuffers, StepShape
from pdray.engine.step.mask_buffer import MaskBuffer
from pdray.engine.step.scores import score_piece
from pdray.sampling_params import SamplingParams

LIMITS = EngineLimits(
    block_size=4,
    num_blocks=39,
    max_model_len=64,
    max_num_seqs=4,
    max_num_batched_tokens=16,
    headroom_tokens=4,
    vocab_size=97,
    eos_token_ids=(),
)
CPU = torch.device("cpu")


class Steps:
    """A scheduler whose steps are planned ahead, and answered with tokens 50, 51, …"""

    def __init__(self) -> None:
        self.scheduler = Scheduler(LIMITS, BlockPool(40, enable_prefix_caching=False))
        self.bookkeeper = Bookkeeper(self.scheduler)

    def add(self, key: str, prompt: list[int], **params: Any) -> None:
        request = EngineRequest(key, prompt, SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, **params))
        self.scheduler.add(self.scheduler.prepare(request, reserved=False), 0.0)

    def plan(self) -> StepPlan:
        return self.scheduler.schedule(0.0)

    def book(self, plan: StepPlan) -> None:
        self.bookkeeper.update(plan, [SampledRow(50 + i) for i in range(plan.num_draws)], 0.0)


def make_buffers(num_tokens: int) -> InputBuffers:
    draws = LIMITS.max_num_seqs, LIMITS.vocab_size, CPU
    return InputBuffers(LIMITS, num_tokens, CPU, Histories(*draws), MaskBuffer(*draws))


def test_a_token_that_only_the_device_knows_is_named_by_its_draw() -> None:
    steps, buffers = Steps(), make_buffers(16)
    for key in ("a", "b"):
        steps.add(key, [7, 8, 9])
    prompts = steps.plan()
    assert buffers.fill(prompts).input_ids.tolist() == [7, 8, 9, 7, 8, 9]
    ahead = steps.plan()
    assert ahead.is_decode and buffers.fill(ahead).input_ids.tolist() == [-1, -2]
    steps.book(prompts)
    steps.book(ahead)
    assert buffers.fill(steps.plan()).input_ids.tolist() == [50, 51]


def test_records_that_are_not_made_again_are_those_of_the_draws() -> None:
    steps, buffers = Steps(), make_buffers(16)
    for key, params in (("a", {}), ("b", {"bad_words_token_ids": ((4,),)}), ("c", {"logprobs": 2})):
        steps.add(key, [7, 8, 9], **params)
    seen = []
    for _ in range(9):
        plan = steps.plan()
        inputs = buffers.fill(plan)
        fresh = InputBuffers(LIMITS, 16, CPU, buffers._histories, buffers._masks).fill(plan)
        assert torch.equal(inputs.draws.records, fresh.draws.records)
        assert inputs.needs._replace(joins=None) == fresh.needs._replace(joins=None)
        seen.append((inputs.draws.view()["position"].tolist(), inputs.needs.num_masks, inputs.needs.has_reports))
        steps.book(plan)
        if len(seen) == 4:
            steps.scheduler.release("b")
    assert seen[:4] == [([i] * 3, 1, True) for i in range(4)]
    assert seen[4:] == [([i] * 2, 0, True) for i in range(4, 9)]


def test_padding_of_a_decode_step_holds_no_kv_and_writes_to_the_dummy_block() -> None:
    steps, buffers = Steps(), make_buffers(4)
    buffers.fill(StepPlan(), StepShape(4, 4, 4, True))
    steps.add("a", list(range(20, 26)))
    steps.book(steps.plan())
    plan = steps.plan()
    inputs = buffers.fill(plan, StepShape(4, 4, 4, True))
    assert inputs.shape.num_draws == 4
    block = plan.chunks[0].sequence.block_table[1]
    assert inputs.input_ids.tolist() == [50, 0, 0, 0]
    assert inputs.positions.tolist() == [6, 0, 0, 0]
    assert inputs.attention.slot_mapping.tolist() == [4 * block + 2, 0, 0, 0]
    assert inputs.attention.seq_lens.tolist() == [7, 0, 0, 0]
    assert inputs.attention.cu_seqlens_q.tolist() == [0, 1, 2, 3, 4]
    assert inputs.attention.num_decodes == 4 and len(inputs.num_logprobs) == 1


def test_padding_of_a_prompt_belongs_to_no_sequence() -> None:
    steps, buffers = Steps(), make_buffers(16)
    steps.add("a", list(range(20, 26)))
    steps.add("b", [30])
    inputs = buffers.fill(steps.plan(), StepShape(16, 3, 3, False))
    assert inputs.input_ids.tolist() == [20, 21, 22, 23, 24, 25, 30] + [0] * 9
    assert inputs.attention.slot_mapping.tolist()[7:] == [0] * 9
    assert inputs.attention.cu_seqlens_q.tolist() == [0, 6, 7, 7]
    assert inputs.attention.seq_lens.tolist() == [6, 1, 0]
    assert inputs.logit_rows.tolist() == [5, 6, 0]
    assert inputs.attention.num_decodes == 0


def test_block_tables_follow_growth_and_preemption() -> None:
    steps, buffers = Steps(), make_buffers(16)
    steps.add("a", [7, 8, 9])
    steps.book(steps.plan())
    sequence = steps.scheduler.requests["a"].lead
    for _ in range(3):
        plan = steps.plan()
        tables = buffers.fill(plan).attention.block_tables
        assert tables[0].tolist() == sequence.block_table[: tables.shape[1]]
        steps.book(plan)
    before = list(sequence.block_table)
    steps.scheduler._preempt(sequence)
    steps.scheduler.pool.allocate(2)  # so that the sequence comes back to other blocks
    plan = steps.plan()
    assert buffers.fill(plan).attention.block_tables[0].tolist() == sequence.block_table != before


def test_graph_sizes_reach_the_largest_batch() -> None:
    assert decode_sizes(1) == [1] and decode_sizes(5) == [1, 2, 4, 5]
    assert decode_sizes(300)[-4:] == [248, 256, 288, 300]
    assert [shape[:2] for shape in prefill_shapes(100, 256)] == [(16, 8), (32, 8), (64, 8)]
    assert [shape[:2] for shape in prefill_shapes(600, 40)][-4:] == [(384, 8), (384, 40), (512, 8), (512, 40)]
    shapes = [shape[:2] for shape in prefill_shapes(8192, 256)]
    many = [size for size, num_seqs in shapes if num_seqs == 256]
    assert many == [*STEP_SIZES, *range(4608, 8193, 512)], "what the token budget chooses, and what fills a step"
    assert max(shape.num_tokens for shape in prefill_shapes(8192, 256, is_shared=True)) == 4096
    assert prefill_shapes(20, 4) == [StepShape(16, 4, 4, False)]


def test_steps_are_padded_to_a_graphs_shape_or_to_one_whose_kernels_are_loaded() -> None:
    assert launched_sizes(300) == [300] and launched_sizes(512) == []
    assert launched_sizes(6000) == [4608, 5120, 5632, 6000]
    graphs = StepGraphs(torch.empty(4, 97), max_num_batched_tokens=16)
    steps = Steps()
    for key in ("a", "b", "c"):
        steps.add(key, list(range(5)))
    assert graphs.shape_for(steps.plan()) == StepShape(16, 4, 4, False)
    steps.book(steps.scheduler.plans_in_flight[0])
    assert graphs.shape_for(steps.plan()) == StepShape(4, 4, 4, True)
    none = StepGraphs(torch.empty(4, 97), max_num_batched_tokens=15)  # too few tokens for a graph with prompts
    steps = Steps()
    steps.add("a", list(range(9)))
    assert none.shape_for(steps.plan()) == StepShape(15, 1, 1, False)


def test_long_steps_with_prompts_are_split_where_flash_attention_can_have_a_part() -> None:
    split = [shape[:2] for shape in prefill_shapes(8192, 256, has_flash=True) if shape.is_split]
    assert split[0] == (1024, 8) and split[-1] == (8192, 256)
    assert split == [shape[:2] for shape in prefill_shapes(8192, 256) if shape.num_tokens >= 1024]
    assert not any(shape.is_split for shape in prefill_shapes(8192, 256))


def test_a_long_chunk_behind_a_long_prefix_is_launched_where_flash_attention_can_take_it() -> None:
    for chunk, is_launched in (((8000, 5000), True), ((0, 5000), False), ((8000, 400), False), ((8000, 4095), False)):
        for has_flash in (True, False):
            graphs = StepGraphs(torch.empty(4, 97), 8192, has_flash=has_flash)
            shape = graphs.shape_for(prompts((9, 1), chunk, decodes=1))
            fitting = next(each for each in prefill_shapes(8192, 4, has_flash=has_flash) if each[0] > chunk[1])
            assert shape == (StepShape(5120, 2, 0, False) if has_flash and is_launched else fitting)


def prompts(*chunks: tuple[int, int], decodes: int) -> StepPlan:
    """A step of chunks that begin at the first number and have as many tokens as the second says."""
    made = [Chunk(cast(Any, None), start, num_tokens, []) for start, num_tokens in chunks]
    return StepPlan(made, num_tokens=sum(num for _, num in chunks), is_decode=False, num_decodes=decodes)


def test_a_split_step_says_where_its_sequences_become_fresh() -> None:
    """Of either kind the other's sequences have no rows, nor has padding of either."""
    steps, buffers = Steps(), make_buffers(32)
    steps.add("a", list(range(20, 26)))
    steps.book(steps.plan())
    steps.add("b", list(range(30, 35)))
    steps.add("c", list(range(40, 43)))
    plan = steps.plan()
    split = buffers.fill(plan, StepShape(16, 4, 4, False, is_split=True)).attention.split
    assert split is not None and split.num_older.tolist() == [1]
    assert split.older_starts.tolist() == [0, 1, 1, 1, 1]
    assert split.fresh_starts.tolist() == [1, 1, 6, 9, 9]
    assert buffers.fill(plan, StepShape(16, 4, 4, False)).attention.split is None
    steps.book(plan)
    split = buffers.fill(steps.plan(), StepShape(16, 4, 4, False, is_split=True)).attention.split  # three that decode
    assert split is not None and split.num_older.tolist() == [3]
    assert split.older_starts.tolist() == [0, 1, 2, 3, 3] and split.fresh_starts.tolist() == [3] * 5


def test_chosen_graphs_pad_launched_steps_to_their_own_sizes() -> None:
    """A partition's graphs are few, and a step without one must not be padded to the largest of all steps."""
    graphs = StepGraphs(torch.empty(4, 97), 8192, decode=[2, 4], with_prompts=[StepShape(16, 1, 1, False)])
    steps = Steps()
    for key in ("a", "b"):
        steps.add(key, list(range(5)))
    assert graphs.shape_for(steps.plan()) == StepShape(16, 2, 2, False)
    assert StepGraphs(torch.empty(4, 97), 8192, decode=[2, 4], with_prompts=[]).launched_sizes == [2, 4]


def test_scores_are_computed_in_pieces_whose_kernels_are_loaded() -> None:
    assert [score_piece(decode_sizes(n)) for n in (1, 2, 3, 101, 256, 1024)] == [1, 2, 2, 96, 128, 128]


def test_a_sequence_that_is_released_keeps_its_slot_until_its_step_is_filled() -> None:
    """Else one that joins in the same step would be given it, and the step adds both draws to it."""
    steps, buffers = Steps(), make_buffers(16)
    steps.add("a", [7, 8, 9], repetition_penalty=1.2)
    plan = steps.plan()
    buffers.fill(plan)
    steps.book(plan)
    steps.add("b", [7, 8, 9], repetition_penalty=1.2)
    plan = steps.plan()
    assert len(plan.chunks) == 2
    steps.scheduler.release("a")
    slots = buffers.fill(plan).draws.view()["slot"]
    assert slots[0] != slots[1]
    steps.book(plan)
    plan = steps.plan()
    buffers.fill(plan)
    assert len(buffers._histories._free) == LIMITS.max_num_seqs - 1
