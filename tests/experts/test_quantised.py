"""Quantised experts, and e4m3 rows for experts that are not: shapes, errors, and the oracle."""

from dataclasses import replace

import pytest
import torch

from pipemoe.errors import ConfigError, InputError
from pipemoe.experts import check_finite, dequantise_experts, make_experts, quantise_experts
from tests.experts.oracle import expected, make_rows, random_rows, random_weights, relative_error
from tests.experts.oracle_fp8 import expected_e4m3, make_e4m3_rows

E4M3 = torch.float8_e4m3fn


def run(rows, weights, deterministic=False, dispatch_dtype=E4M3):
    experts = make_experts(
        [weights],
        top_k=rows.ids.shape[1],
        hidden=weights.hidden,
        device="cpu",
        dtype=weights.row_dtype,
        deterministic=deterministic,
        dispatch_dtype=dispatch_dtype,
    )
    scratch = experts.new_scratch(len(rows) + 2)
    experts.warm_up(scratch)
    assert experts.wire_dtype == rows.hidden.dtype and scratch.num_bytes > 0
    out = torch.full(rows.hidden.shape, torch.nan, dtype=torch.float64 if deterministic else torch.float32)
    experts(0, rows, out, scratch)
    return out


def test_quantising_and_back():
    weights = random_weights(3, 256, 128, dtype=torch.bfloat16, first_expert=4)
    quantised = quantise_experts(weights)
    quantised.validate(0)
    assert quantised.is_quantised and quantised.row_dtype == torch.bfloat16 and quantised.first_expert == 4
    assert quantised.num_bytes < 0.51 * weights.num_bytes
    wide = dequantise_experts(quantised, torch.bfloat16)
    wide.validate(0)
    for name, tensor in weights.tensors():
        assert relative_error(getattr(wide, name), tensor.double()) < 3e-2
    assert wide.first_expert == 4 and not wide.is_quantised


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("num_rows", [0, 1, 70])
def test_host_experts_on_e4m3_rows(dtype, tolerance, num_rows):
    weights = random_weights(5, 256, 96, dtype=dtype)
    rows = random_rows(num_rows, 256, 5, 3, dtype=dtype)
    narrow = make_e4m3_rows(rows)
    wide = make_rows(narrow.hidden.float() * narrow.scales.repeat_interleave(128, 1), rows.ids, rows.weights)
    assert relative_error(run(narrow, weights), expected(wide, weights)) < tolerance
    assert relative_error(run(narrow, weights), expected(rows, weights)) < 4e-2


def test_a_rows_bits_are_its_own():
    weights = random_weights(5, 128, 96)
    rows = make_e4m3_rows(random_rows(60, 128, 5, 3))
    whole = run(rows, weights, deterministic=True)
    for part in (slice(0, 1), slice(17, 40)):
        assert torch.equal(run(rows[part], weights, deterministic=True), whole[part])


def test_oracle_agrees_with_dequantised_experts():
    weights = quantise_experts(random_weights(3, 128, 128))
    rows = random_rows(20, 128, 3, 2)
    narrow = make_e4m3_rows(rows)
    wide = make_rows(narrow.hidden.double() * narrow.scales.repeat_interleave(128, 1), rows.ids, rows.weights)
    found = expected_e4m3(narrow, weights, quantise_activations=False)
    assert relative_error(found, expected(wide, dequantise_experts(weights, torch.float64))) < 1e-6


def test_rows_of_another_format_are_refused():
    weights, rows = random_weights(3, 128, 96), random_rows(4, 128, 3, 2)
    experts = make_experts([weights], top_k=2, hidden=128, device="cpu", dtype=torch.float32, dispatch_dtype=E4M3)
    scratch, out = experts.new_scratch(4), torch.empty(4, 128)
    with pytest.raises(InputError, match="layer 0: 4 rows of torch.float32; at most 4 of torch.float8_e4m3fn"):
        experts(0, rows, out, scratch)
    with pytest.raises(InputError, match="5 rows .* at most 4"):
        experts(0, make_e4m3_rows(random_rows(5, 128, 3, 2)), torch.empty(5, 128), scratch)


def test_weights_that_do_not_fit_the_format():
    good = quantise_experts(random_weights(2, 256, 128))
    wrong = {
        "come with float32 gate_up_scales": replace(good, gate_up_scales=None),
        "weights are torch.bfloat16": replace(good, gate_up=good.gate_up.bfloat16(), down=good.down.bfloat16()),
        "gate_up_scales has shape": replace(good, gate_up_scales=good.gate_up_scales[:, :1]),
        "down is torch.bfloat16": replace(good, down=good.down.bfloat16()),
        "cannot have biases": replace(good, down_bias=torch.zeros(2, 256, dtype=E4M3)),
    }
    for message, weights in wrong.items():
        with pytest.raises(InputError, match=f"layer 3.*{message}"):
            weights.validate(3)
    with pytest.raises(InputError, match="hidden is 192 .* multiples of 128"):
        quantise_experts(random_weights(2, 192, 128)).validate(0)
    with pytest.raises(InputError, match="biases"):
        quantise_experts(random_weights(2, 128, 128, bias=True))
    good.gate_up_scales[1, 0, 1] = torch.nan
    with pytest.raises(InputError, match="layer 0, expert 1: gate_up_scales"):
        check_finite([good])


def test_settings_that_cannot_work():
    settings = {"top_k": 2, "hidden": 128, "device": "cpu", "dtype": torch.bfloat16}
    weights = random_weights(2, 128, 128, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="quantised, which experts implementation 'host'"):
        make_experts([quantise_experts(weights)], **settings)
    with pytest.raises(ConfigError, match="runs on cuda"):
        make_experts([weights], **settings, implementation="hopper_fp8")
    with pytest.raises(ConfigError, match="dispatch_dtype is torch.float16"):
        make_experts([weights], **settings, dispatch_dtype=torch.float16)
    with pytest.raises(ConfigError, match="hidden is 96; .* multiple of 128"):
        make_experts(
            [random_weights(2, 96, 64)], **{**settings, "hidden": 96, "dtype": torch.float32}, dispatch_dtype=E4M3
        )


def test_what_are_no_weights_is_refused():
    good = random_weights(2, 128, 128, dtype=torch.float32)
    narrow = quantise_experts(good)
    odd = [None, 7, {}, [good], good.gate_up, (w for w in [good])]
    odd += [
        replace(good, gate_up=None),
        replace(good, down=good.down[0]),
        replace(good, down=good.down.int()),
        replace(good, gate_up=good.gate_up.int(), down=good.down.int()),
        replace(good, gate_up=good.gate_up.to_sparse()),
        replace(good, activation=[]),
        replace(good, gated=good.down),
        replace(good, first_expert="0"),
        replace(good, gate_up_bias=7),
    ]
    for weights in [*odd, narrow]:
        with pytest.raises(InputError):
            quantise_experts(weights)
    for weights in [*odd, good]:
        with pytest.raises(InputError):
            dequantise_experts(weights, torch.float32)
    for dtype in (None, "float32", torch.int8, E4M3):
        with pytest.raises(InputError, match="^dtype is "):
            dequantise_experts(narrow, dtype)
    uneven = quantise_experts(random_weights(2, 100, 30, dtype=torch.float32))
    assert dequantise_experts(uneven, torch.float32).gate_up.shape == (2, 60, 100)
