"""The router of the host as a prepared call, for compiled code that makes it again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numba import types

from pipemoe.addresses import Arguments, Call, int_matrix, longs_at, matrix, real, vector
from pipemoe.compiled import Compiled
from pipemoe.models.routing import SOFTMAX, RoutingSpec, sigmoid_top_k, softmax_top_k

if TYPE_CHECKING:
    import torch


def prepared_route(
    logits: np.ndarray, spec: RoutingSpec, bias: torch.Tensor | None, ids: np.ndarray, weights: np.ndarray
) -> Call:
    """A call that does what `route` does with logits [T, E] float32, into ids [T, K] int32 and weights [T, K]
    float32. bias: [E] float32.
    """
    of_bias = np.zeros(spec.num_experts, np.float32) if bias is None else bias.numpy()
    words = Arguments(
        [logits, of_bias, ids, weights, spec.renormalise, float(spec.scale), spec.num_groups, spec.top_groups]
    )
    return words.of(softmax_call if spec.scoring == SOFTMAX else sigmoid_call)


def compile_route(spec: RoutingSpec) -> None:
    """So that no later `prepared_route` does."""
    (softmax_call if spec.scoring == SOFTMAX else sigmoid_call).compile()


def _prepared(function: Callable) -> Compiled:
    return Compiled(function, signatures=lambda: [types.void(types.int64)], what="the router of the host", nogil=True)


@_prepared
def softmax_call(at):  # pragma: no cover (compiled)
    words = longs_at(at)
    softmax_top_k(matrix(at, 0), words[11] != 0, real(at, 12), int_matrix(at, 5), matrix(at, 8))


@_prepared
def sigmoid_call(at):  # pragma: no cover (compiled)
    words = longs_at(at)
    renormalises, ids, weights = words[11] != 0, int_matrix(at, 5), matrix(at, 8)
    sigmoid_top_k(matrix(at, 0), vector(at, 3), words[13], words[14], renormalises, real(at, 12), ids, weights)
