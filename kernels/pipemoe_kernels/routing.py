"""Routing: from a router's logits to the K experts of every token and their weights, in one launch; a warp has one token.

    softmax   choice = logit              weight = exp(logit) / sum over all experts
    sigmoid   choice = score + bias       weight = score = 1 / (1 + exp(-logit))        bias [E] may be left out
              of the experts in the top_groups groups whose two largest choices have the largest sums

The K largest choices are taken, largest first; then weights are divided by their sum (renormalise) and multiplied by `scale`.
Of equal choices the lower expert is taken, of equal groups the lower group. NaN loses to every number, and where only NaN is
left the lowest expert is taken: ids are always valid and all different. A NaN logit makes all softmax weights of its token
NaN; a sigmoid weight is NaN if its own logit is, and renormalised all of them are if one is.

    shared memory of a warp:  | keys [MAX_EXPERTS] | keys of groups [MAX_EXPERTS / 2] |
    key of a choice           uint32 in the same order: 0 not to be taken, 1 NaN, then the numbers from -inf on

DeepSeek-V3 (arXiv:2412.19437, section 2.1.2) has the bias and the groups; Qwen3-MoE and Mixtral are softmax.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from pipemoe_kernels.element import ELEMENTS
from pipemoe_kernels.launch import FLOAT32_POINTER, INT32, INT32_POINTER, UINT32, Kernel, Stream
from pipemoe_kernels.numba_cuda import SIMULATOR, cuda, types

if SIMULATOR:
    from pipemoe_kernels import simulated_warp as warp_operations
else:
    from pipemoe_kernels import ptx_warp as warp_operations

max_over_lanes, min_over_lanes = warp_operations.max_over_lanes, warp_operations.min_over_lanes
sum_over_lanes, from_lane, sync_lanes = warp_operations.sum_over_lanes, warp_operations.from_lane, warp_operations.sync_lanes
bits_of, from_bits = warp_operations.bits_of, warp_operations.from_bits

MAX_EXPERTS = 512
MAX_TOP_K = 16
CAPABILITY = (8, 0)  # the oldest that has the instructions
KEYS_OF_WARP = MAX_EXPERTS + MAX_EXPERTS // 2
NOT_TAKEN, NAN_KEY, NO_PLACE, SIGN = UINT32(0), UINT32(1), UINT32(0xFFFFFFFF), UINT32(0x80000000)
ZERO, ONE, LEAST_SUM = np.float32(0.0), np.float32(1.0), np.float32(1e-20)


@dataclass(frozen=True, slots=True)
class Scoring:
    """What a routing kernel is compiled for. rounded: weights are rounded to the logits' format."""

    sigmoid: bool
    renormalise: bool
    rounded: bool = False
    scale: float = 1.0


@cuda.jit(device=True, inline="always")
def key_of(choice):
    bits = bits_of(choice + ZERO)  # -0 becomes 0
    key = UINT32(bits ^ SIGN)
    if bits >= SIGN:
        key = UINT32(~bits)
    if choice != choice:
        key = NAN_KEY
    return key


@cuda.jit(device=True, inline="always")
def choice_of(key):
    """key_of backwards."""
    bits = UINT32(~key)
    if key >= SIGN:
        bits = UINT32(key ^ SIGN)
    return from_bits(bits)


@cuda.jit(device=True, inline="always")
def best_of_lane(keys, first, count, lane):
    """Largest key in a lane's places, 32 apart, and the lowest place that has it."""
    best, place = NOT_TAKEN, NO_PLACE
    for i in range(lane, count, 32):
        key = UINT32(keys[first + i])
        if key > best:
            best, place = key, UINT32(i)
    return best, place


@cuda.jit(device=True, inline="always")
def take_largest(keys, first, count, num_taken, lane):
    """Take `num_taken` of keys[first : first + count], largest first, lower places before higher; lane k gets the k-th place."""
    mine = UINT32(0)
    best, place = best_of_lane(keys, first, count, lane)
    for k in range(num_taken):
        largest = max_over_lanes(best)
        taken = min_over_lanes(place if best == largest else NO_PLACE)
        if lane == k:
            mine = taken
        if place == taken:
            keys[first + types.int64(taken)] = NOT_TAKEN
            best, place = best_of_lane(keys, first, count, lane)
    sync_lanes()
    return mine


@cuda.jit(device=True, inline="always")
def keep_largest_groups(keys, first, groups_at, num_experts, num_groups, top_groups, lane):
    """Makes the keys of all but the `top_groups` best groups NOT_TAKEN."""
    size = num_experts // num_groups
    for group in range(lane, num_groups, 32):
        largest = NOT_TAKEN
        second = NOT_TAKEN
        for i in range(first + group * size, first + (group + 1) * size):
            key = UINT32(keys[i])
            if key > largest:
                largest, second = key, largest
            elif key > second:
                second = key
        keys[groups_at + group] = key_of(choice_of(largest) + choice_of(second))
    sync_lanes()
    take_largest(keys, groups_at, num_groups, top_groups, lane)
    for i in range(lane, num_experts, 32):
        if keys[groups_at + i // size] != NOT_TAKEN:
            keys[first + i] = NOT_TAKEN
    sync_lanes()


@cache
def routing_kernel(dtype: torch.dtype, scoring: Scoring, has_bias: bool = False, warps: int = 4) -> Kernel:
    element = ELEMENTS[dtype]
    load = element.load
    sigmoid, renormalise, rounded, scale = scoring.sigmoid, scoring.renormalise, scoring.rounded, np.float32(scoring.scale)
    rounded = rounded and dtype != torch.float32
    round_to = warp_operations.round_to_half if dtype == torch.float16 else warp_operations.round_to_bf16
    num_keys = warps * KEYS_OF_WARP

    def route_tokens(
        logits, row_stride, bias, num_tokens, num_experts, top_k, num_groups, top_groups, ids, ids_stride, weights, weights_stride
    ):
        keys = cuda.shared.array(num_keys, types.uint32)
        lane = cuda.threadIdx.x % 32
        warp = cuda.threadIdx.x // 32
        token = types.int64(cuda.blockIdx.x) * warps + warp
        if token < num_tokens:
            row = token * row_stride
            first = warp * KEYS_OF_WARP
            for i in range(lane, num_experts, 32):
                choice = load(logits, row + i)
                if sigmoid:
                    choice = ONE / (ONE + math.exp(-choice))
                if has_bias:
                    choice += bias[i]
                keys[first + i] = key_of(choice)
            sync_lanes()
            if sigmoid and top_groups < num_groups:
                keep_largest_groups(keys, first, first + MAX_EXPERTS, num_experts, num_groups, top_groups, lane)
            expert = types.int64(take_largest(keys, first, num_experts, top_k, lane))
            value = load(logits, row + expert)
            weight = ZERO
            if sigmoid:
                if lane < top_k:
                    weight = ONE / (ONE + math.exp(-value))
            else:
                largest = from_lane(value, 0)
                total = ZERO
                for i in range(lane, num_experts, 32):
                    total += math.exp(load(logits, row + i) - largest)
                total = sum_over_lanes(total)
                if lane < top_k:
                    weight = math.exp(value - largest) / total
            if renormalise:
                chosen = sum_over_lanes(weight)
                weight /= chosen + LEAST_SUM if sigmoid else chosen
            weight *= scale
            if rounded:
                weight = round_to(weight)
            if lane < top_k:
                ids[token * ids_stride + lane] = expert
                weights[token * weights_stride + lane] = weight

    return Kernel(
        route_tokens,
        (
            *(element.pointer, INT32, FLOAT32_POINTER, INT32, INT32, INT32, INT32, INT32),
            *(INT32_POINTER, INT32, FLOAT32_POINTER, INT32),
        ),
        32 * warps,
        key=(dtype, scoring, has_bias, warps),
    )


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
    """logits [T, E] float32 or 16-bit, rows strided -> ids [T, K] int32 in [0, E), weights [T, K] float32, rows strided.

    bias [E] float32 or None, and groups, E / num_groups >= 2 neighbouring experts each, for sigmoid scoring only. T may be 0.
    """
    num_tokens, num_experts = logits.shape
    top_k = ids.shape[1]
    assert ids.shape == weights.shape == (num_tokens, top_k), (ids.shape, weights.shape)
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32, (ids.dtype, weights.dtype)
    assert fits(num_experts, top_k), (num_experts, top_k)
    assert num_experts == 1 or logits.stride(1) == 1, logits.stride()
    assert top_k == 1 or ids.stride(1) == weights.stride(1) == 1, (ids.stride(), weights.stride())
    assert scoring.sigmoid or (bias is None and num_groups == top_groups == 1)
    assert bias is None or (bias.dtype == torch.float32 and bias.is_contiguous() and bias.shape == (num_experts,))
    assert num_experts % num_groups == 0 and (num_groups == 1 or num_experts // num_groups >= 2), (num_experts, num_groups)
    assert 1 <= top_groups <= num_groups and 1 <= top_k <= top_groups * (num_experts // num_groups), (top_k, top_groups)
    if num_tokens == 0:
        return
    kernel = kernel or routing_kernel(logits.dtype, scoring, bias is not None)
    warps = kernel.threads // 32
    kernel.launch(
        stream,
        (-(-num_tokens // warps), 1),
        logits,
        logits.stride(0),
        weights if bias is None else bias,
        num_tokens,
        num_experts,
        top_k,
        num_groups,
        top_groups,
        ids,
        ids.stride(0),
        weights,
        weights.stride(0),
    )
