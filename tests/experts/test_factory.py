"""Which implementation is built, from which arguments. Stand-ins take the place of those that need a GPU."""

import importlib.util

import pytest
import torch

from pipemoe.errors import ConfigError
from pipemoe.experts import make_experts, quantise_experts
from pipemoe.experts.dequantising import DequantisingExperts
from pipemoe.experts.factory import IMPLEMENTATIONS
from pipemoe.experts.host import HostExperts
from tests.experts.oracle import random_weights

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
CLASSES = {
    "torch": "torch_cuda.TorchExperts",
    "hopper": "hopper.HopperExperts",
    "hopper_fp8": "hopper_fp8.HopperFp8Experts",
    "ampere": "ampere.AmpereExperts",
}
SETTINGS = {"top_k": 2, "hidden": 128, "dtype": BF16}


@pytest.fixture
def built(monkeypatch):
    """Takes the place of all that need a GPU (a Hopper one); a list of (implementation, weights, settings)."""
    if importlib.util.find_spec("numba_cuda") is None:
        pytest.skip("numba-cuda is not installed")
    made = []

    class StandIn:
        deterministic, num_sms = False, 0

        def __init__(self, weights, **settings):
            made.append((self.implementation, weights, settings))

    for name, place in CLASSES.items():
        wire_dtype = E4M3 if name == "hopper_fp8" else BF16
        monkeypatch.setattr(
            f"pipemoe.experts.{place}", type(name, (StandIn,), {"implementation": name, "wire_dtype": wire_dtype})
        )
    set_capability(monkeypatch, (9, 0))
    return made


def set_capability(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


def weights_of(**options):
    return random_weights(4, 128, 128, **{"dtype": BF16, **options})


@pytest.mark.parametrize(("capability", "dtype", "hidden", "chosen"), [
    ((9, 0), BF16, 128, "hopper"),
    ((9, 0), torch.float32, 128, "torch"),  # no tensor-core kernels for it
    ((9, 0), BF16, 100, "torch"),  # nor for such sizes
    ((8, 0), BF16, 128, "ampere"),
    ((8, 9), BF16, 128, "ampere"),
    ((12, 0), BF16, 128, "ampere"),
    ((10, 0), BF16, 128, "torch"),  # torch has a grouped_mm for it
    ((8, 0), torch.float32, 128, "torch"),
    ((7, 5), BF16, 128, "torch"),
])  # fmt: skip
def test_auto_goes_by_the_device_the_dtype_and_the_sizes(built, monkeypatch, capability, dtype, hidden, chosen):
    set_capability(monkeypatch, capability)
    weights = [random_weights(4, hidden, 128, dtype=dtype)]
    experts = make_experts(weights, top_k=2, hidden=hidden, device="cuda:1", dtype=dtype)
    assert experts.implementation == chosen and built[-1][:2] == (chosen, weights)
    settings = built[-1][2]
    assert settings["device"] == torch.device("cuda:1") and (
        settings["dtype"],
        settings["hidden"],
        settings["top_k"],
    ) == (dtype, hidden, 2)


def test_auto_takes_quantised_weights_to_the_one_that_has_them(built):
    make_experts([quantise_experts(weights_of())], **SETTINGS, device="cuda")
    assert built[-1][0] == "hopper_fp8"


def test_auto_on_the_host():
    experts = make_experts([weights_of()], **SETTINGS, device="cpu", deterministic=True)
    assert isinstance(experts, HostExperts) and experts.implementation == "host" and experts.deterministic
    assert not make_experts([weights_of()], **SETTINGS, device=torch.device("cpu")).deterministic


@pytest.mark.parametrize("name", CLASSES)
def test_each_gets_what_it_takes(built, name):
    make_experts(
        [weights_of()], **SETTINGS, device="cuda", implementation=name, deterministic=True, num_sms=100, num_experts=64
    )
    implementation, _, settings = built[-1]
    wanted = {"top_k": 2, "hidden": 128, "device": torch.device("cuda"), "dtype": BF16, "deterministic": True}
    wanted |= {} if name == "torch" else {"num_sms": 100}
    wanted |= {"num_experts": 64} if name == "hopper" else {}
    assert implementation == name and settings == wanted


@pytest.mark.parametrize("name", CLASSES)
def test_e4m3_rows_are_dequantised_for_all_that_do_not_multiply_them(built, name):
    experts = make_experts([weights_of()], **SETTINGS, device="cuda", implementation=name, dispatch_dtype=E4M3)
    assert isinstance(experts, DequantisingExperts) == (name != "hopper_fp8") and experts.wire_dtype == E4M3
    assert experts.implementation == name
    assert make_experts([weights_of()], **SETTINGS, device="cuda", implementation=name).wire_dtype == (
        E4M3 if name == "hopper_fp8" else BF16
    )


def test_e4m3_rows_on_the_host():
    experts = make_experts([weights_of()], **SETTINGS, device="cpu", dispatch_dtype=E4M3)
    assert isinstance(experts, DequantisingExperts) and experts.implementation == "host"


def test_e4m3_rows_need_a_gpu_that_can_make_them(built, monkeypatch):
    set_capability(monkeypatch, (8, 9))
    make_experts([weights_of()], **SETTINGS, device="cuda", dispatch_dtype=E4M3)
    set_capability(monkeypatch, (8, 6))
    with pytest.raises(ConfigError, match="cuda is of compute capability under 8.9"):
        make_experts([weights_of()], **SETTINGS, device="cuda", dispatch_dtype=E4M3)


@pytest.mark.parametrize(("options", "message"), [
    ({"device": "meta"}, r"device is meta; experts run on one of \['cpu', 'cuda'\]"),
    ({"device": "cpu", "implementation": "fast"}, r"is 'fast'; it must be one of \['auto', 'host', .*'ampere'\]"),
    ({"device": "cpu", "dispatch_dtype": torch.float16}, "is torch.float16; it must be torch.float8_e4m3fn or None"),
    ({"device": "cpu", "dispatch_dtype": BF16}, "dispatch_dtype is torch.bfloat16"),
])  # fmt: skip
def test_what_there_is_not_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make_experts([weights_of()], **SETTINGS, **options)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_an_implementation_on_the_wrong_device_is_refused(name):
    other = "cuda" if IMPLEMENTATIONS[name] == "cpu" else "cpu"
    with pytest.raises(
        ConfigError, match=f"implementation '{name}' runs on {IMPLEMENTATIONS[name]}, but device is {other}"
    ):
        make_experts([weights_of()], **SETTINGS, device=other, implementation=name)


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "hopper_fp8"])
def test_quantised_weights_are_refused_by_those_that_do_not_take_them(built, name):
    with pytest.raises(ConfigError, match=f"quantised, which experts implementation '{name}' does not take"):
        make_experts([quantise_experts(weights_of())], **SETTINGS, device="cuda", implementation=name)
    assert not built
