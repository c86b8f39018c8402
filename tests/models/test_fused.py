"""The fused decoder where there is no GPU: its arithmetic in the simulator, and when it is chosen."""

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipemoe import Config
from pipemoe.errors import ConfigError
from pipemoe.models import attention_choice, fused_decoder, products
from pipemoe.models.attention_choice import AttentionChoice
from pipemoe.models.families import find_family
from pipemoe.models.fused_decoder import FusedDecoder, lack
from pipemoe.models.host_decoder import HostDecoder
from pipemoe.models.loading import load_decoder
from pipemoe.models.products import FINE_ROWS, MOST_ROWS, add_product, product, row_counts, row_parts
from tests.models.tiny import FAMILIES, tiny_config

HERE = Path(__file__).parent


def test_fused_attention_in_the_simulator():
    paths = [str(HERE.parents[1] / "kernels"), str(HERE.parents[1]), *filter(None, sys.path)]
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "tests.simulated_threads"]
    command += [str(HERE / "simulated_fused.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def decoder_of(family, **changes):
    return load_decoder(tiny_config(family, **changes), rank=0, num_ranks=1, device="cpu", dtype=torch.bfloat16)[0]


def test_where_the_fused_one_lacks_something_attention_is_transformers_and_that_is_said_once(caplog):
    plain = decoder_of("qwen3_moe")
    choice = AttentionChoice(plain)
    with caplog.at_level(logging.INFO, "pipemoe"):
        assert choice.of(Config(), "rank 3: ")[0] is plain
        assert choice.of(Config(mode="chunked"), "rank 3: ")[0] is plain
    assert caplog.messages == [
        "rank 3: attention runs by transformers' modules, not fused: on the host it computes in float32, not in "
        "torch.bfloat16"
    ]


def test_on_the_host_in_float32_it_is_compiled_code():
    plain = load_decoder(tiny_config("mixtral"), rank=0, num_ranks=1, device="cpu", dtype=torch.float32)[0]
    choice = AttentionChoice(plain)
    assert choice.of(Config(attention="transformers"), "")[0] is plain
    for word in ("auto", "fused"):
        decoder, graphs = choice.of(Config(attention=word), "")
        assert isinstance(decoder, HostDecoder) and not graphs.has_places(Config())


def test_what_is_asked_for_by_name_is_refused_with_the_reason():
    choice = AttentionChoice(decoder_of("mixtral"))
    with pytest.raises(
        ConfigError, match="rank 3: attention='fused' is not to be had: on the host it .*; use attention="
    ):
        choice.of(Config(attention="fused"), "rank 3: ")
    decoder, graphs = choice.of(Config(attention="transformers"), "")
    assert choice.of(Config(attention="transformers", mode="chunked"), "") == (decoder, graphs)


def test_weights_are_in_their_last_place_before_the_first_graph(monkeypatch):
    """Graphs know weights by their addresses, whichever form they are of."""
    plain = decoder_of("mixtral")
    for module, name in ((attention_choice, "lack"), (fused_decoder, "lack"), (attention_choice, "lack_on_host")):
        monkeypatch.setattr(module, name, lambda decoder: None)
    monkeypatch.setattr(attention_choice, "HostDecoder", FusedDecoder)
    choice = AttentionChoice(plain)
    assert choice.of(Config(attention="transformers"), "")[0] is plain
    places = {name: parameter.data_ptr() for name, parameter in plain._model.named_parameters()}
    fused, graphs = choice.of(Config(attention="fused"), "")
    assert isinstance(fused, FusedDecoder) and choice.of(Config(), "") == (fused, graphs)
    assert places == {name: parameter.data_ptr() for name, parameter in plain._model.named_parameters()}
    attention = plain._blocks[0].self_attn
    together = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    assert torch.equal(fused._layers[0].attention._weight, together)
    assert fused._layers[0].attention._weight.data_ptr() == attention.q_proj.weight.data_ptr()


@pytest.mark.parametrize("bad", ["", "Fused", None, 3])
def test_attention_is_one_of_three_words(bad):
    with pytest.raises(ConfigError, match="attention is .*; it must be one of auto, fused, transformers"):
        Config(attention=bad)


@pytest.fixture
def gpu(monkeypatch):
    """lack(decoder, ...), as if its tensors were on a GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(fused_decoder, "serves", lambda device, dtype, head_dim: head_dim <= 256)

    def lack_of(decoder, **changes):
        decoder.device = torch.device("cuda")
        for name, value in changes.items():
            setattr(decoder, name, value)
        return lack(decoder)

    return lack_of


@pytest.mark.parametrize("family", FAMILIES)
def test_all_families_are_served(family, gpu):
    assert gpu(decoder_of(family)) is None


def test_every_lack_has_its_words(gpu):
    decoder = decoder_of("qwen3_moe")
    form, shape, routing = decoder.attention_form, decoder.shape, decoder.routing
    for words, changes in (
        ("does not state what its attention is made of", dict(attention_form=None)),
        ("in bfloat16 and float16, not in torch.float32", dict(dtype=torch.float32)),
        ("norms that are not plain RMSNorm", dict(plain_rms_norm=False)),
        ("rows of 68 values are not whole vectors", dict(shape=replace(shape, hidden=68))),
        ("no kernel routes to 17 of 64 experts", dict(routing=replace(routing, num_experts=64, top_k=17))),
        ("heads of 512 values do not fit the attention", dict(attention_form=replace(form, head_dim=512))),
        ("heads of 24 values, 24 of them rotated", dict(attention_form=replace(form, head_dim=24, rotary=24))),
    ):
        before = {name: getattr(decoder, name) for name in changes}
        assert words in (gpu(decoder, **changes) or ""), words
        gpu(decoder, **before)


def test_a_latent_of_a_width_without_kernels(gpu):
    assert "widths of latents and heads" in gpu(decoder_of("deepseek_v3", kv_lora_rank=20))
    assert "widths of latents and heads" in gpu(decoder_of("deepseek_v3", rope_interleave=False))


def test_families_state_what_their_configs_say():
    def form(family, **changes):
        return find_family(family).attention(tiny_config(family, **changes))

    assert form("qwen3_moe").head_norms and not form("mixtral").head_norms
    assert form("qwen3_moe", attention_bias=True).biased and not form("qwen3_moe").biased
    assert form("mixtral", sliding_window=9).window == 9 and form("mixtral").window is None
    windowed = form("qwen3_moe", sliding_window=9, use_sliding_window=True)
    assert windowed.window == 9 and form("qwen3_moe", sliding_window=9).window is None
    latent = form("deepseek_v3").latent
    assert (latent.query_rank, latent.rank, latent.nope, latent.rope, latent.value) == (24, 16, 16, 8, 16)
    assert form("deepseek_v3").interleaved and not form("deepseek_v3", rope_interleave=False).interleaved
    assert form("deepseek_v3", q_lora_rank=None).latent.query_rank is None
    assert (form("qwen3_moe").num_query, form("qwen3_moe").num_key, form("qwen3_moe").head_dim) == (4, 2, 16)


@pytest.mark.parametrize("most", [1, 2, 16, 17, 40, 64, 65, 80, 8192, 10_001])
def test_row_counts_to_warm_up_for(most):
    counts = row_counts(most)
    assert counts == sorted(set(counts)) and counts[0] == 1 and counts[-1] == most
    assert counts[:20] == list(range(1, 21))[:most]
    assert all(b - a <= max(8, a / 4) for a, b in zip(counts, counts[1:]))


@given(num_rows=st.integers(0, 40_000), more=st.integers(0, 10_000))
def test_large_products_are_made_in_parts_that_a_warm_up_has_run(num_rows, more):
    parts = row_parts(num_rows)
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(num_rows))
    sizes = [part.stop - part.start for part in parts]
    assert {size for size in sizes if size > FINE_ROWS} <= set(row_counts(num_rows + more))  # the others: counts_filled
    assert len(parts) <= num_rows // MOST_ROWS + 2 and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("num_rows", [0, 1, 17, 1023, 1024, 1025, 2048, 9000, 17_000])
@pytest.mark.parametrize("has_bias", [True, False])
def test_products_in_parts(monkeypatch, num_rows, has_bias):
    monkeypatch.setattr(products, "takes_few_rows", lambda x, weight: False)  # there is no GPU
    draw = torch.Generator().manual_seed(num_rows)
    x = torch.randint(-3, 4, (num_rows, 2, 3), generator=draw).float()
    weight = torch.randint(-3, 4, (4, 6), generator=draw).float()
    rows = [[sum(a * b for a, b in zip(row, w)) for w in weight.tolist()] for row in x.flatten(1).tolist()]
    wanted = torch.tensor(rows).reshape(num_rows, 4)
    bias = torch.arange(4.0) if has_bias else None
    if bias is not None:
        wanted += bias
    assert torch.equal(product(x.flatten(1), weight, bias), wanted)
    hidden = torch.ones(num_rows, 4)
    add_product(hidden, x, weight, bias)
    assert torch.equal(hidden, 1 + wanted)
