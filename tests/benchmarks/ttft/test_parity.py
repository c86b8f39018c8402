"""When a mode counts as at parity with the reference."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.ttft.parity import compare

REFERENCE = [np.array([0.0, 3.0, 1.0], np.float32), np.array([2.0, 1.99, 0.0], np.float32)]


def test_equal_logits_are_at_parity():
    for dtype in ("float32", "bfloat16"):
        found = compare([(1, REFERENCE[0]), (0, REFERENCE[1])], REFERENCE, dtype)
        assert found.ok and found.norm_ratio == 0 and found.wrong_tokens == 0 and found.prompts == 2


def test_a_near_tie_may_fall_either_way_in_bfloat16_only():
    swapped = REFERENCE[1] + np.array([-0.01, 0.01, 0.0], np.float32)
    found = [(1, REFERENCE[0]), (1, swapped)]
    assert compare(found, REFERENCE, "bfloat16").ok
    strict = compare(found, REFERENCE, "float32")
    assert not strict.ok and strict.wrong_tokens == 1


def test_a_decided_token_must_be_right():
    found = compare([(2, REFERENCE[0]), (0, REFERENCE[1])], REFERENCE, "bfloat16")
    assert not found.ok and found.wrong_tokens == 1


def test_logits_far_off_are_not_at_parity():
    found = compare([(1, REFERENCE[0] * 1.05), (0, REFERENCE[1])], REFERENCE, "bfloat16")
    assert not found.ok and found.norm_ratio == pytest.approx(0.05 * 10**0.5 / (10 + 4 + 1.99**2) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_is_never_at_parity(dtype):
    found = compare([(1, REFERENCE[0] * np.nan), (0, REFERENCE[1])], REFERENCE, dtype)
    assert not found.ok and found.norm_ratio is None
