"""Routing: from a router's logits to every token's K experts and their weights, in one launch; one warp per token.

    softmax   choice = logit              weight = exp(logit) / sum over all experts
    sigmoid   choice = score + bias       weight = score = 1 / (1 + exp(-logit))        bias [E] may be left out
              only experts of the top_groups groups whose two largest choices have the largest sums

The K largest choices are taken, largest first. Their weights are then divided by their sum (renormalise) and multiplied
by `scale`. Of equal choices the lower expert is taken, of equal groups the lower group. NaN loses to every number;
where only NaN is left the lowest expert is taken, so ids are always valid and all different. A NaN logit makes all
softmax weights of its token NaN. A sigmoid weight is NaN if its own logit is; renormalised, all are NaN if one is.

A lane has the experts lane, lane + 32, ...: it loads their logits all at once, and keeps them in registers with their
keys (largest_keys.py).

DeepSeek-V3 (arXiv:2412.19437, section 2.1.2) has the bias and the groups; Qwen3-MoE and Mixtral are softmax.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from pipemoe_kernels.element import ELEMENTS
from pipemoe_kernels.largest_keys import NOT_TAKEN, key_of, largest_keys, words_of_groups
from pipemoe_kernels.launch.kernel import (
    FLOAT32_POINTER,
    INT32,
    INT32_POINTER,
    WORD_POINTER,
    Kernel,
    Stream,
    is_hopper,
    kernel_factory,
)
from pipemoe_kernels.numba_cuda import SIMULATOR, cuda, types
from pipemoe_kernels.placed_rows import PlacedRows

if SIMULATOR:
    from pipemoe_kernels import simulated_eights as eights
    from pipemoe_kernels import simulated_warp as warp_operations
else:
    from pipemoe_kernels.ptx import eights
    from pipemoe_kernels.ptx import warp as warp_operations

if SIMULATOR:
    from pipemoe_kernels.simulated_warp import launch_dependents, wait_for_earlier
else:
    from pipemoe_kernels.ptx.hopper import launch_dependents, wait_for_earlier

sum_over_lanes, from_lane = warp_operations.sum_over_lanes, warp_operations.from_lane
bits_of, store_word_at = warp_operations.bits_of, eights.store_word_at

MAX_EXPERTS = 512
MAX_TOP_K = 16
CAPABILITY = (8, 0)  # the oldest that has the instructions
ZERO, ONE, LEAST_SUM = np.float32(0.0), np.float32(1.0), np.float32(1e-20)


@dataclass(frozen=True, slots=True)
class Scoring:
    """What a routing kernel is compiled for. rounded: weights are rounded to the logits' format."""

    sigmoid: bool
    renormalise: bool
    rounded: bool = False
    scale: float = 1.0


@kernel_factory
def routing_kernel(
    dtype: torch.dtype,
    scoring: Scoring,
    has_bias: bool = False,
    warps: int = 1 if SIMULATOR else 4,
    max_experts: int = MAX_EXPERTS,
    placed: bool = False,
    on_hopper: bool = False,
) -> Kernel:
    """For up to max_experts experts, a multiple of 32. placed: `ids` is the place of PlacedRows; then ids_stride is
    the bytes of a row, and weights_stride the weights' place in it. on_hopper: it starts early, as only Hopper's can.
    """
    element = ELEMENTS[dtype]
    load = element.load
    sigmoid, renormalise, rounded, scale = (
        scoring.sigmoid,
        scoring.renormalise,
        scoring.rounded,
        np.float32(scoring.scale),
    )
    rounded = rounded and dtype != torch.float32
    round_to = warp_operations.round_to_half if dtype == torch.float16 else warp_operations.round_to_bf16
    each = max_experts // 32
    largest = largest_keys(each)
    take_largest, keep_largest_groups = largest.take, largest.keep_groups
    words = words_of_groups(each) if sigmoid else 1
    num_words = warps * words

    def route_tokens(
        logits,
        row_stride,
        bias,
        num_tokens,
        num_experts,
        top_k,
        num_groups,
        top_groups,
        ids,
        ids_stride,
        weights,
        weights_stride,
    ):
        if on_hopper:
            launch_dependents()
            wait_for_earlier()
        shared = cuda.shared.array(num_words, types.uint32)
        lane = cuda.threadIdx.x % 32
        warp = cuda.threadIdx.x // 32
        token = types.int64(cuda.blockIdx.x) * warps + warp
        if token < num_tokens:
            row = token * row_stride
            values = cuda.local.array(each, types.float32)
            keys = cuda.local.array(each, types.uint32)
            biases = cuda.local.array(each, types.float32)
            for i in range(each):
                values[i] = ZERO
                biases[i] = ZERO
                if 32 * i + lane < num_experts:
                    values[i] = load(logits, row + (32 * i + lane))
                    if has_bias:
                        biases[i] = bias[32 * i + lane]
            for i in range(each):
                keys[i] = NOT_TAKEN
                if 32 * i + lane < num_experts:
                    choice = values[i]
                    if sigmoid:
                        choice = ONE / (ONE + math.exp(-choice))
                    if has_bias:
                        choice += biases[i]
                    keys[i] = key_of(choice)
            if sigmoid and top_groups < num_groups:
                keep_largest_groups(keys, shared, warp * words, num_experts, num_groups, top_groups, lane)
            expert = types.int64(take_largest(keys, top_k, lane))
            value = load(logits, row + expert)
            weight = ZERO
            if sigmoid:
                if lane < top_k:
                    weight = ONE / (ONE + math.exp(-value))
            else:
                peak = from_lane(value, 0)
                total = ZERO
                for i in range(each):
                    if 32 * i + lane < num_experts:
                        total += math.exp(values[i] - peak)
                total = sum_over_lanes(total)
                if lane < top_k:
                    weight = math.exp(value - peak) / total
            if renormalise:
                chosen = sum_over_lanes(weight)
                weight /= chosen + LEAST_SUM if sigmoid else chosen
            weight *= scale
            if rounded:
                weight = round_to(weight)
            if lane < top_k:
                if placed:
                    if token < types.int64(ids[1]):
                        address = ids[0] + types.uint64(token * ids_stride + weights_stride + 4 * lane)
                        store_word_at(address, bits_of(weight))
                        store_word_at(address + types.uint64(4 * top_k), types.uint32(expert))
                else:
                    ids[token * ids_stride + lane] = expert
                    weights[token * weights_stride + lane] = weight

    return Kernel(
        route_tokens,
        (
            *(element.pointer, INT32, FLOAT32_POINTER, INT32, INT32, INT32, INT32, INT32),
            *(WORD_POINTER if placed else INT32_POINTER, INT32, FLOAT32_POINTER, INT32),
        ),
        32 * warps,
        hopper_only=on_hopper,
        starts_early=on_hopper,
        key=(dtype, scoring, has_bias, warps, max_experts, placed, on_hopper),
    )


def _least_size(num_experts: int) -> int:
    """The least of the few sizes that kernels are compiled for."""
    return max(32, 1 << (num_experts - 1).bit_length())


def fits(num_experts: int, top_k: int) -> bool:
    """Whether route_tokens takes this many."""
    return num_experts <= MAX_EXPERTS and top_k <= MAX_TOP_K


def route_tokens(
    stream: Stream,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    weights: torch.Tensor,
    scoring: Scoring,
    num_groups: int = 1,
    top_groups: int = 1,
    kernel: Kernel | None = None,
) -> None:
    """logits [T, E] float32 or 16-bit -> ids [T, K] int32 in [0, E), weights [T, K] float32; rows may be strided.

    bias [E] float32 (or None) and groups are for sigmoid scoring only; a group has E / num_groups >= 2 neighbouring
    experts. T may be 0.
    """
    num_tokens, top_k = len(logits), ids.shape[1]
    assert ids.shape == weights.shape == (num_tokens, top_k), (ids.shape, weights.shape)
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32, (ids.dtype, weights.dtype)
    assert top_k == 1 or ids.stride(1) == weights.stride(1) == 1, (ids.stride(), weights.stride())
    places = ids, ids.stride(0), weights, weights.stride(0)
    _launch(stream, logits, bias, top_k, places, scoring, num_groups, top_groups, kernel)


def route_placed_tokens(
    stream: Stream,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    rows: PlacedRows,
    weights_offset: int,
    scoring: Scoring,
    num_groups: int = 1,
    top_groups: int = 1,
    kernel: Kernel | None = None,
) -> None:
    """route_tokens into wire rows: weights from byte `weights_offset` of a row on, ids right behind them."""
    rows.check()
    assert weights_offset % 4 == 0 and weights_offset + 8 * top_k <= rows.row_bytes, (weights_offset, rows.row_bytes)
    places = rows.place, rows.row_bytes, logits, weights_offset
    _launch(stream, logits, bias, top_k, places, scoring, num_groups, top_groups, kernel, placed=True)


def _launch(stream, logits, bias, top_k, places, scoring, num_groups, top_groups, kernel, *, placed=False) -> None:
    num_tokens, num_experts = logits.shape
    assert fits(num_experts, top_k), (num_experts, top_k)
    assert num_experts == 1 or logits.stride(1) == 1, logits.stride()
    assert scoring.sigmoid or (bias is None and num_groups == top_groups == 1)
    assert bias is None or (bias.dtype == torch.float32 and bias.is_contiguous() and bias.shape == (num_experts,))
    assert num_experts % num_groups == 0 and (num_groups == 1 or num_experts // num_groups >= 2), (
        num_experts,
        num_groups,
    )
    assert 1 <= top_groups <= num_groups and 1 <= top_k <= top_groups * (num_experts // num_groups), (top_k, top_groups)
    if num_tokens == 0:
        return
    kernel = kernel or routing_kernel(
        *(logits.dtype, scoring, bias is not None),
        max_experts=_least_size(num_experts),
        placed=placed,
        on_hopper=is_hopper(stream.device_index),
    )
    warps = kernel.threads // 32
    kernel.launch(
        stream,
        (-(-num_tokens // warps), 1),
        logits,
        logits.stride(0),
        logits if bias is None else bias,
        num_tokens,
        num_experts,
        top_k,
        num_groups,
        top_groups,
        *places,
    )
