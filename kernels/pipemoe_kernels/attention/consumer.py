"""A warpgroup with 64 of a tile's rows: scores, softmax and outputs, a tile of keys at a time, the last one first.

    scores of tile n - 1   ======                  products: one step's scores start together with the outputs of the
    outputs of tile n            ======            step before; exponentials of n - 1 run beside those outputs, and
    exponentials of n - 1        ----------        beside the other warpgroup's products

A row keeps its maximum and its sum; when the maximum grows, what was summed up before is rescaled.
"""

from __future__ import annotations

from pipemoe_kernels.attention.layout import (
    BEGIN,
    BOX_BYTES,
    END,
    FIRST_ROW,
    GROUP_BYTES,
    HAS_TILE,
    HEAD_SET,
    K_EMPTY,
    K_FULL,
    NUM_KEYS,
    Q_AT,
    Q_EMPTY,
    Q_FULL,
    ROWS_LEFT,
    SEEN,
    V_EMPTY,
    V_FULL,
    RingLayout,
)
from pipemoe_kernels.launch.kernel import ADDRESS, INT32, UINT32
from pipemoe_kernels.numba_cuda import cuda, types
from pipemoe_kernels.ptx import attention as ptx_attention
from pipemoe_kernels.ptx import hopper as ptx
from pipemoe_kernels.ptx.attention import KEYS, VALUES_DESCRIPTOR, AttentionProducts
from pipemoe_kernels.ptx.wgmma import TILE_DESCRIPTOR

F32 = types.float32
NOTHING, LATER_KEYS, BOTH_SIDES = range(3)  # what a step masks
TURN_BARRIER, GROUP_BARRIER = 1, 3  # named barriers, one of each for each consumer


def consumer(products: AttentionProducts, ring: RingLayout, group: int, windowed: bool):
    """group: query heads of a tile."""
    scores, scores_and_accumulate, accumulate = (
        products.scores,
        products.scores_and_accumulate,
        products.accumulate,
    )
    wait_scores, wait_scores_but_one, wait_out = products.wait_scores, products.wait_scores_but_one, products.wait_out
    mask, mask_both, row_maxima = products.mask, products.mask_both, products.row_maxima
    exponentials, rounded, zero, rescale, store = (
        products.exponentials,
        products.rounded,
        products.zero,
        products.rescale,
        products.store,
    )
    keys_at, values_at, key_bytes, value_bytes = ring.keys_at, ring.values_at, ring.key_bytes, ring.value_bytes
    value_boxes = ring.value_boxes
    no_maximum = float("-inf")
    tokens = 128 // group

    @cuda.jit(device=True, inline="always")
    def keys_of(barriers, stage):
        return TILE_DESCRIPTOR | ADDRESS((barriers + UINT32(keys_at) + stage * UINT32(key_bytes)) >> UINT32(4))

    @cuda.jit(device=True, inline="always")
    def values_of(barriers, stage):
        return VALUES_DESCRIPTOR | ADDRESS((barriers + UINT32(values_at) + stage * UINT32(value_bytes)) >> UINT32(4))

    @cuda.jit(device=True, inline="always")
    def parity_of(it):
        return UINT32((it >> UINT32(1)) & UINT32(1))

    @cuda.jit(device=True, inline="always")
    def release(barrier, lane):
        if lane == UINT32(0):
            ptx.barrier_arrive(barrier)

    @cuda.jit(device=True, inline="always")
    def new_shift(maximum, found, scale):
        """The row's maximum from now on, and what its scores are lessened by."""
        maximum = ptx_attention.maximum(maximum, found)
        return maximum, F32(0) if maximum == F32(no_maximum) else maximum * scale

    @cuda.jit(device=True, inline="always")
    def clear_values_behind(barriers, thread, group_of, stage, first):
        """What lies behind the piece's last key is another's, and may be no numbers; 0 x NaN is NaN."""
        at = UINT32(first * UINT32(128) + (thread & UINT32(127)) * UINT32(16))
        tile = UINT32(barriers + UINT32(values_at) + stage * UINT32(value_bytes))
        while at < UINT32(BOX_BYTES):
            for box in range(value_boxes):
                ptx_attention.clear_shared(tile + UINT32(box) * UINT32(BOX_BYTES) + at)
            at = UINT32(at + UINT32(2048))
        ptx_attention.fence_for_products()
        ptx_attention.group_sync(UINT32(GROUP_BARRIER) + group_of)

    def step_of(masked):
        @cuda.jit(device=True, inline="always")
        def step(
            barriers,
            lane,
            group_of,
            queries,
            it,
            column,
            seen,
            seen_below,
            window,
            scale,
            out,
            probabilities,
            maximum,
            maximum_below,
            row_sum,
            row_sum_below,
        ):
            stage = it & UINT32(1)
            earlier = UINT32(it - UINT32(1))
            earlier_stage = earlier & UINT32(1)
            ptx.barrier_wait(barriers + UINT32(K_FULL) + UINT32(8) * stage, parity_of(it))
            ptx.barrier_wait(barriers + UINT32(V_FULL) + UINT32(8) * earlier_stage, parity_of(earlier))
            ptx_attention.turn_sync(UINT32(TURN_BARRIER) + group_of)
            found_scores, out = scores_and_accumulate(
                queries, keys_of(barriers, stage), out, probabilities, values_of(barriers, earlier_stage)
            )
            ptx_attention.turn_arrive(UINT32(TURN_BARRIER + 1) - group_of)
            found_scores = wait_scores_but_one(found_scores)
            release(barriers + UINT32(K_EMPTY) + UINT32(8) * stage, lane)
            if masked == LATER_KEYS:
                found_scores = mask(found_scores, INT32(seen - column), INT32(seen_below - column))
            if masked == BOTH_SIDES:
                found_scores = mask_both(
                    found_scores,
                    INT32(seen - column - window),
                    INT32(seen - column),
                    INT32(seen_below - column - window),
                    INT32(seen_below - column),
                )
            found, found_below = row_maxima(found_scores)
            old, old_below = maximum, maximum_below
            maximum, shift = new_shift(maximum, found, scale)
            maximum_below, shift_below = new_shift(maximum_below, found_below, scale)
            factor = ptx_attention.exp2(old * scale - shift)
            factor_below = ptx_attention.exp2(old_below * scale - shift_below)
            found_scores, added, added_below = exponentials(found_scores, scale, shift, shift_below)
            row_sum = row_sum * factor + added
            row_sum_below = row_sum_below * factor_below + added_below
            out, found_scores = wait_out(out, probabilities, found_scores)
            out = rescale(out, factor, factor_below)
            probabilities = rounded(found_scores)
            release(barriers + UINT32(V_EMPTY) + UINT32(8) * earlier_stage, lane)
            return out, probabilities, maximum, maximum_below, row_sum, row_sum_below

        return step

    plain_step, masked_step = step_of(NOTHING), step_of(BOTH_SIDES if windowed else LATER_KEYS)

    @cuda.jit(device=True, inline="always")
    def consume(barriers, thread, group_of, lane, scale, window, out_address, out_row_bytes, out_head_bytes):
        line = UINT32(group_of * UINT32(64) + ((thread >> UINT32(5)) & UINT32(3)) * UINT32(16) + (lane >> UINT32(2)))
        line_below = UINT32(line + UINT32(8))
        token, token_below = UINT32(line // UINT32(group)), UINT32(line_below // UINT32(group))
        head, head_below = UINT32(line - token * UINT32(group)), UINT32(line_below - token_below * UINT32(group))
        first_column = INT32((lane & UINT32(3)) * UINT32(2))
        queries = TILE_DESCRIPTOR | ADDRESS((barriers + UINT32(Q_AT) + group_of * UINT32(GROUP_BYTES)) >> UINT32(4))
        if group_of == UINT32(1):
            ptx_attention.turn_arrive(UINT32(TURN_BARRIER))  # the first one begins
        q_parity = UINT32(0)
        it = UINT32(0)
        while True:
            ptx.barrier_wait(barriers + UINT32(Q_FULL), q_parity)
            q_parity ^= UINT32(1)
            if ptx.load_shared_u32(barriers + UINT32(HAS_TILE)) == UINT32(0):
                break
            first_row = ptx.load_shared_u32(barriers + UINT32(FIRST_ROW))
            rows_left = ptx.load_shared_u32(barriers + UINT32(ROWS_LEFT))
            head_set = ptx.load_shared_u32(barriers + UINT32(HEAD_SET))
            first_seen = INT32(ptx.load_shared_u32(barriers + UINT32(SEEN)))
            begin = ptx.load_shared_u32(barriers + UINT32(BEGIN))
            end = ptx.load_shared_u32(barriers + UINT32(END))
            num_keys = ptx.load_shared_u32(barriers + UINT32(NUM_KEYS))
            seen, seen_below = INT32(first_seen + INT32(token)), INT32(first_seen + INT32(token_below))
            out = zero()
            row_sum = F32(0)
            row_sum_below = F32(0)
            if begin < end:
                # Tiles of keys from `whole` on hold keys that a row does not see yet; those before `inside`, keys that
                # a row sees no more.
                whole = UINT32(begin)
                if first_seen > INT32(0):
                    whole = UINT32(max(begin, UINT32(UINT32(first_seen) // UINT32(KEYS))))
                inside = UINT32(begin)
                if windowed:
                    past = INT32(first_seen + INT32(tokens - 1) - window)
                    if past > INT32(0):
                        inside = UINT32(max(begin, UINT32(UINT32(UINT32(past) + UINT32(KEYS - 1)) // UINT32(KEYS))))
                n = UINT32(end - UINT32(1))
                stage = it & UINT32(1)
                ptx.barrier_wait(barriers + UINT32(K_FULL) + UINT32(8) * stage, parity_of(it))
                found_scores = wait_scores(scores(queries, keys_of(barriers, stage)))
                release(barriers + UINT32(K_EMPTY) + UINT32(8) * stage, lane)
                column = INT32(INT32(n * UINT32(KEYS)) + first_column)
                if windowed:
                    found_scores = mask_both(
                        found_scores,
                        INT32(seen - column - window),
                        INT32(seen - column),
                        INT32(seen_below - column - window),
                        INT32(seen_below - column),
                    )
                else:
                    found_scores = mask(found_scores, INT32(seen - column), INT32(seen_below - column))
                found, found_below = row_maxima(found_scores)
                maximum, shift = new_shift(F32(no_maximum), found, scale)
                maximum_below, shift_below = new_shift(F32(no_maximum), found_below, scale)
                found_scores, row_sum, row_sum_below = exponentials(found_scores, scale, shift, shift_below)
                probabilities = rounded(found_scores)
                if end * UINT32(KEYS) > num_keys:
                    ptx.barrier_wait(barriers + UINT32(V_FULL) + UINT32(8) * stage, parity_of(it))
                    clear_values_behind(barriers, thread, group_of, stage, UINT32(num_keys - n * UINT32(KEYS)))
                it = UINT32(it + UINT32(1))
                while n > whole:
                    n = UINT32(n - UINT32(1))
                    column = INT32(INT32(n * UINT32(KEYS)) + first_column)
                    out, probabilities, maximum, maximum_below, row_sum, row_sum_below = masked_step(
                        barriers,
                        lane,
                        group_of,
                        queries,
                        it,
                        column,
                        seen,
                        seen_below,
                        window,
                        scale,
                        out,
                        probabilities,
                        maximum,
                        maximum_below,
                        row_sum,
                        row_sum_below,
                    )
                    it = UINT32(it + UINT32(1))
                while n > inside:
                    n = UINT32(n - UINT32(1))
                    out, probabilities, maximum, maximum_below, row_sum, row_sum_below = plain_step(
                        barriers,
                        lane,
                        group_of,
                        queries,
                        it,
                        column,
                        seen,
                        seen_below,
                        window,
                        scale,
                        out,
                        probabilities,
                        maximum,
                        maximum_below,
                        row_sum,
                        row_sum_below,
                    )
                    it = UINT32(it + UINT32(1))
                if windowed:
                    while n > begin:
                        n = UINT32(n - UINT32(1))
                        column = INT32(INT32(n * UINT32(KEYS)) + first_column)
                        out, probabilities, maximum, maximum_below, row_sum, row_sum_below = masked_step(
                            barriers,
                            lane,
                            group_of,
                            queries,
                            it,
                            column,
                            seen,
                            seen_below,
                            window,
                            scale,
                            out,
                            probabilities,
                            maximum,
                            maximum_below,
                            row_sum,
                            row_sum_below,
                        )
                        it = UINT32(it + UINT32(1))
                release(barriers + UINT32(Q_EMPTY), lane)
                earlier = UINT32(it - UINT32(1))
                stage = earlier & UINT32(1)
                ptx.barrier_wait(barriers + UINT32(V_FULL) + UINT32(8) * stage, parity_of(earlier))
                out, found_scores = wait_out(
                    accumulate(out, probabilities, values_of(barriers, stage)), probabilities, found_scores
                )
                release(barriers + UINT32(V_EMPTY) + UINT32(8) * stage, lane)
            else:
                cuda.syncwarp()  # all lanes have read what the tile is
                release(barriers + UINT32(Q_EMPTY), lane)
            row_sum = ptx_attention.sum_of_row(row_sum)
            row_sum_below = ptx_attention.sum_of_row(row_sum_below)
            factor = ptx_attention.reciprocal(row_sum) if row_sum > F32(0) else F32(0)
            factor_below = ptx_attention.reciprocal(row_sum_below) if row_sum_below > F32(0) else F32(0)
            out = rescale(out, factor, factor_below)
            base = ADDRESS(out_address + ADDRESS(first_row) * ADDRESS(out_row_bytes))
            first_head = UINT32(head_set * UINT32(group))
            address = ADDRESS(
                base
                + ADDRESS(token) * ADDRESS(out_row_bytes)
                + ADDRESS(UINT32(first_head + head)) * ADDRESS(out_head_bytes)
            )
            address_below = ADDRESS(
                base
                + ADDRESS(token_below) * ADDRESS(out_row_bytes)
                + ADDRESS(UINT32(first_head + head_below)) * ADDRESS(out_head_bytes)
            )
            exists = UINT32(1) if token < rows_left else UINT32(0)
            exists_below = UINT32(1) if token_below < rows_left else UINT32(0)
            store(out, address, address_below, lane, exists, exists_below)

    return consume
