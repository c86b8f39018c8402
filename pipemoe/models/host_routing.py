"""The router of the host as a prepared call, for compiled code that makes it again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numba import types

from pipemoe.addresses import Arguments, Call, int_matrix, longs_at, matrix, places, real, vector
from pipemoe.compiled import Compiled
from pipemoe.models.routing import SOFTMAX, RoutingSpec, sigmoid_top_k, softmax_top_k

if TYPE_CHECKING:
    import torch


_AT = places(logits=2, bias=1, ids=2, weights=2, renormalises=0, scale=0, num_groups=0, top_groups=0)


def prepared_route(
    logits: np.ndarray, spec: RoutingSpec, bias: torch.Tensor | None, ids: np.ndarray, weights: np.ndarray
) -> Call:
    """A call that does what `route` does with logits [T, E] float32, into ids [T, K] int32 and weights [T, K]
    float32. bias: [E] float32.
    """
    of_bias = np.zeros(spec.num_experts, np.float32) if bias is None else bias.numpy()
    words = Arguments(
        _AT,
        logits=logits,
        bias=of_bias,
        ids=ids,
        weights=weights,
        renormalises=spec.renormalise,
        scale=float(spec.scale),
        num_groups=spec.num_groups,
        top_groups=spec.top_groups,
    )
    return words.of(softmax_call if spec.scoring == SOFTMAX else sigmoid_call)


def compile_route(spec: RoutingSpec) -> None:
    """So that no later `prepared_route` does."""
    (softmax_call if spec.scoring == SOFTMAX else sigmoid_call).compile()


def _prepared(function: Callable) -> Compiled:
    return Compiled(function, signatures=lambda: [types.void(types.int64)], what="the router of the host", nogil=True)


@_prepared
def softmax_call(at):  # pragma: no cover (compiled)
    renormalises, scale = longs_at(at)[_AT.renormalises] != 0, real(at, _AT.scale)
    softmax_top_k(matrix(at, _AT.logits), renormalises, scale, int_matrix(at, _AT.ids), matrix(at, _AT.weights))


@_prepared
def sigmoid_call(at):  # pragma: no cover (compiled)
    renormalises, scale = longs_at(at)[_AT.renormalises] != 0, real(at, _AT.scale)
    num_groups, top_groups = longs_at(at)[_AT.num_groups], longs_at(at)[_AT.top_groups]
    ids, weights = int_matrix(at, _AT.ids), matrix(at, _AT.weights)
    logits, bias = matrix(at, _AT.logits), vector(at, _AT.bias)
    sigmoid_top_k(logits, bias, num_groups, top_groups, renormalises, scale, ids, weights)
