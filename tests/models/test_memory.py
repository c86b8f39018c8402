"""Memory that does not suffice is an error with figures, on every rank, before any weight is there."""

from __future__ import annotations

import logging

import pytest
import torch

from pipemoe import Config, load_model
from pipemoe.errors import ConfigError
from pipemoe.experts.weights import ExpertWeights
from pipemoe.models import loading, memory
from pipemoe.models.loading import PreparedDecoder
from pipemoe.models.random_weights import reference_model
from tests.models.tiny import FAMILIES, tiny_config


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "quantised"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_the_bytes_foretold_are_those_taken(family, dtype, quantised):
    config = tiny_config(family, num_layers=2, hidden_size=128, tie_word_embeddings=family == "mixtral")
    prepared = PreparedDecoder(config, rank=1, num_ranks=3, device="cpu", dtype=dtype, quantised=quantised)
    foretold, spare = prepared.num_bytes, prepared.largest_bytes
    decoder, weights = prepared.load()
    buffers = sum(b.nbytes for name, b in decoder._model.named_buffers() if name.endswith("e_score_correction_bias"))
    tensors = [t for w in weights for t in (w.gate_up, w.down, w.gate_up_scales, w.down_scales) if t is not None]
    taken = decoder.num_bytes + buffers + sum(t.nbytes for t in tensors)
    assert abs(foretold - spare - taken) <= buffers  # those are counted in the dtype, and kept in float32


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Makes /proc and /sys/fs/cgroup: system(meminfo, cgroup, {file: text})."""

    def make(meminfo, groups="", limits=()):
        proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
        (proc / "self").mkdir(parents=True)
        (proc / "meminfo").write_text("".join(f"{name}:  {mib * 1024} kB\n" for name, mib in meminfo.items()))
        (proc / "self" / "cgroup").write_text(groups)
        for name, text in dict(limits).items():
            (cgroups / name).parent.mkdir(parents=True, exist_ok=True)
            (cgroups / name).write_text(f"{text}\n")
        monkeypatch.setattr(memory, "_PROC", proc)
        monkeypatch.setattr(memory, "_CGROUPS", cgroups)

    return make


MIB = 2**20
RAM = {"MemTotal": 1000, "MemAvailable": 10, "SwapTotal": 500}


@pytest.mark.parametrize(
    ("groups", "limits", "mib"),
    [
        ("", {}, 1500),
        ("0::/job/step\n", {"job/step/memory.max": "max", "job/memory.max": 300 * MIB, "memory.max": "max"}, 300),
        ("0::/job/step\n", {"job/step/memory.max": 200 * MIB, "job/memory.max": 300 * MIB}, 200),
        ("0::/\n", {"memory.max": 4000 * MIB}, 4000),  # a machine whose memory grows as it is used
        ("5:devices:/\n4:cpu,memory:/c1\n0::/\n", {"memory/c1/memory.limit_in_bytes": 250 * MIB}, 250),
        (
            "4:memory:/c1\n",
            {"memory/c1/memory.limit_in_bytes": 9223372036854771712, "memory/memory.limit_in_bytes": 700 * MIB},
            700,
        ),
        ("4:memory:/c1\n", {"memory/c1/memory.limit_in_bytes": 9223372036854771712}, 1500),
        ("rubbish\n", {"memory.max": "rubbish"}, 1500),
    ],
)
def test_the_hosts_limit(system, groups, limits, mib):
    system(RAM, groups, limits)
    limit, whose = memory.host_limit()
    assert limit == mib * MIB and ("control group" in whose) == (mib != 1500)


def test_a_host_that_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    assert memory.host_limit() == (None, "")


@pytest.mark.mpi
def test_too_little_memory_is_said_first_and_on_every_rank(world, monkeypatch, tmp_path_factory):
    """Ranks of one host share it: what each needs fits, what all need does not."""
    if world.device.type == "cuda":
        pytest.skip("of a host")
    config = tiny_config("mixtral", num_layers=2)
    folder = tmp_path_factory.mktemp(f"checkpoint{world.rank}")
    reference_model(config, "cpu", torch.float32, seed=5).save_pretrained(folder)
    places = {"rank": world.rank, "num_ranks": world.size, "device": world.device, "dtype": torch.float32}
    needed = [int(b) for b in world.all_gather(str(PreparedDecoder(config, **places).num_bytes).encode(), "bytes")]
    small = Config(max_tokens_per_rank=16, moe_max_num_tokens=16)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "host_limit", lambda: (sum(needed) - 1, "this host's memory and swap are"))
        for name in ("fill_random", "_fill_from"):  # no weight is made or read
            patch.setattr(loading, name, None)
        for source in (config, folder):
            beside = f", and with those of the {world.size - 1} other ranks on this host" if world.size > 1 else ""
            message = (
                rf"^rank 0: the weights need [\d.]+ MiB{beside}.*, "
                r"but this host's memory and swap are [\d.]+ MiB; use more hosts"
            )
            with pytest.raises(ConfigError, match=message):
                load_model(source, world, config=small, dtype=torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "host_limit", lambda: (sum(needed), "this host's memory and swap are"))
        assert load_model(config, world, config=small, dtype=torch.float32).prefill([[1, 2]]).first_tokens


@pytest.mark.mpi
def test_little_free_memory_is_a_warning(world, system, caplog):
    system({"MemTotal": 1 << 20, "MemAvailable": 0})
    with caplog.at_level(logging.WARNING, "pipemoe"):
        assert memory.shortage(world, MIB) is None
    said = [r for r in caplog.records if "only 0.0 MiB are free at present" in r.getMessage()]
    assert len(said) == (world.rank == 0 and world.device.type == "cpu")  # a GPU's own memory is another


@pytest.mark.mpi
def test_too_little_memory_of_a_gpu(world, monkeypatch):
    """With a stand-in for the GPU: ranks that share it must find room in what is free together."""
    place = torch.device("cuda", 0)
    monkeypatch.setattr(memory, "_place", lambda device: "host GPU-1")
    monkeypatch.setattr(memory, "_gpu_bytes", lambda device: (world.size * MIB, 100 * MIB))

    class OnGpu:
        rank, device, all_gather = world.rank, place, staticmethod(world.all_gather)

    assert memory.shortage(OnGpu, MIB) is None
    error = memory.shortage(OnGpu, MIB + 1)
    assert isinstance(error, ConfigError) and f"but {world.size}.0 MiB of the GPU's 100.0 MiB are free" in str(error)


def test_expert_weights_have_no_other_tensors():
    """Those that num_bytes counts."""
    assert [f for f in ExpertWeights.__slots__ if "bias" not in f] == [
        "gate_up",
        "down",
        "first_expert",
        "activation",
        "gated",
        "gate_up_scales",
        "down_scales",
        "limit",
        "alpha",
        "up_offset",
    ]
