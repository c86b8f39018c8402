"""What arrival-driven calls ask of the kernels, with naive stand-ins for these: no GPU needed."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

from pipemoe.errors import ConfigError, InputError
from pipemoe.experts import arrivals as module
from pipemoe.experts import hopper
from pipemoe.experts.ampere import AmpereExperts
from pipemoe.experts.arrivals import ArrivingExperts
from pipemoe.experts.hopper_fp8 import HopperFp8Experts
from pipemoe_kernels.launch.kernel import Stream
from tests.experts.oracle import expected, random_rows, random_weights, relative_error, slice_experts
from tests.kernels.cases import expected_combine, expected_index

BF16 = torch.bfloat16
MAP = 128


class Lane:
    """A stream or an event of the stand-ins."""

    def wait_event(self, event):
        log.append(("wait", event))

    def record(self, lane=None):
        log.append(("record", self))


log = []


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    """Kernels and driver calls as plain torch; `log` gets what they were asked for in order."""
    log.clear()
    maps = []  # matrices by the number of their map

    def tensor_map(matrix, box):
        maps.append(matrix)
        return bytes(MAP)

    def device_maps(made, device):
        return SimpleNamespace(data_ptr=lambda base=MAP * (len(maps) - len(made)): base)

    def index(stream, ids, first_expert, num_local, counts, offsets, positions, tokens, first_place):
        ends, places = expected_index(ids, first_expert, num_local)
        named, ks = torch.nonzero(places >= 0, as_tuple=True)
        tokens[places[named, ks].long()] = named.int()
        offsets.copy_(ends)
        positions.copy_(torch.where(places >= 0, places + first_place, -1))
        log.append(("index", len(ids)))

    def write_word(stream, address, value):
        flags = [(made, (address - made.flags.data_ptr()) // 4) for made in all_arrivals]
        made, slot = next((made, slot) for made, slot in flags if 0 <= slot < len(made.flags))
        made.flags[slot] = value
        log.append(("flag", slot))

    def places(parts):
        """Place, local expert and token of each pair."""
        for s, first_row in enumerate(parts.first_rows):
            assert parts.flags[s] == parts.epoch and not bool((parts.batches >> 32 == parts.epoch).any())
            begin = 0
            for expert, end in enumerate(parts.ends[s].tolist()):
                for p in range(parts.top_k * first_row + begin, parts.top_k * first_row + end):
                    yield p, expert, first_row + int(parts.tokens[p])
                begin = end

    def gate_up(stream, kernel, hidden, parts, address, bias, a, num_sms):
        w = maps[address // MAP]
        log.append(("gate_up", num_sms))
        for place, expert, token in places(parts):
            gate, up = (hidden[token].float() @ w[expert].float().T + (0 if bias is None else bias[expert])).chunk(2)
            a[place] = torch.nn.functional.silu(gate) * up

    def down(stream, kernel, a, parts, address, y, num_sms, first_column):
        w = maps[address // MAP]
        for place, expert, _ in places(parts):
            y[place] = (a[place].float() @ w[expert, first_column : first_column + y.shape[1]].float().T).to(y.dtype)

    def combine(stream, y, positions, ids, first, weights, bias, out, **how):
        out.copy_(expected_combine(y, positions, ids, first, weights, bias))

    all_arrivals = []
    made_by = module.Arrivals.__init__

    def noted(self, *arguments):
        made_by(self, *arguments)
        all_arrivals.append(self)

    for target in (module, hopper):
        monkeypatch.setattr(target, "tensor_map", tensor_map)
        monkeypatch.setattr(target, "device_maps", device_maps)
    monkeypatch.setattr(module.Arrivals, "__init__", noted)
    monkeypatch.setattr(module, "index_local_pairs", index)
    monkeypatch.setattr(module.driver, "write_word", write_word)
    monkeypatch.setattr(module, "gate_up_arriving", gate_up)
    monkeypatch.setattr(module, "down_arrived", down)
    monkeypatch.setattr(module, "combine_lanes", combine)
    monkeypatch.setattr(module, "combine_rows", combine)
    monkeypatch.setattr(module.Stream, "current", lambda device: Stream(0, 0))
    monkeypatch.setattr(torch.cuda, "Event", Lane)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Lane())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def build(weights, top_k):
    experts = hopper.HopperExperts(
        weights, top_k=top_k, hidden=weights[0].hidden, device=torch.device("cpu"), dtype=BF16, num_sms=100
    )
    return experts, ArrivingExperts(experts.with_free_sms(8))


def deliver(arriving, arrivals, order):
    for part in order:
        arriving.arrived(arrivals, part)


@pytest.mark.parametrize("bias", [False, True])
def test_parts_in_any_order(bias):
    layers = [
        slice_experts(random_weights(6, 32, 24, dtype=BF16, bias=bias), range(1, 5)),
        slice_experts(random_weights(6, 32, 24, dtype=BF16), range(2, 2)),
        slice_experts(random_weights(6, 32, 40, dtype=BF16, bias=bias, seed=1), range(1, 3)),
    ]
    experts, arriving = build(layers, 3)
    arrivals, scratch = arriving.new_arrivals(50), experts.new_scratch(50)
    waves = [(0, [20, 0, 5, 25], [3, 0, 2, 1]), (2, [1, 49], [1, 0]), (1, [7, 8], [0, 1]), (0, [0, 0, 9], [2, 1, 0])]
    for layer, part_rows, order in waves:
        rows = random_rows(sum(part_rows), 32, 6, 3, dtype=BF16, seed=layer)
        out = torch.full((len(rows), 32), torch.nan)
        scratch.a.fill_(torch.nan)
        arriving.expect(arrivals, layer, rows, part_rows)
        deliver(arriving, arrivals, order)
        arriving(arrivals, out, scratch)
        wanted = expected(rows, layers[layer])
        assert bool(wanted.any()) == bool(layers[layer].num_local_experts)
        assert (out.double() - wanted).norm() <= 1e-2 * wanted.norm()


def test_order_of_the_work():
    experts, arriving = build([random_weights(3, 16, 16, dtype=BF16)], 2)
    arrivals, scratch = arriving.new_arrivals(10), experts.new_scratch(10)
    rows, out = random_rows(10, 16, 3, 2, dtype=BF16), torch.empty(10, 16)
    for _ in range(2):
        log.clear()
        arriving.expect(arrivals, 0, rows, [4, 6])
        deliver(arriving, arrivals, [1, 0])
        arriving(arrivals, out, scratch)
        free, turn = arrivals.free, arriving._turn
        assert log == [
            ("wait", free),
            ("index", 6),
            ("flag", 1),
            ("wait", free),
            ("index", 4),
            ("flag", 0),
            ("wait", turn),
            ("gate_up", 91),
            ("record", turn),
            ("record", free),
        ]


def test_columns_in_blocks():
    weights = random_weights(3, 24, 16, dtype=BF16, bias=True)
    experts, arriving = build([weights], 2)
    arrivals, scratch = arriving.new_arrivals(12), experts.new_scratch(12)
    rows, out, seen = random_rows(12, 24, 3, 2, dtype=BF16), torch.full((12, 24), torch.nan), []
    arriving.expect(arrivals, 0, rows, [6, 6])
    deliver(arriving, arrivals, [0, 1])
    event = SimpleNamespace(record=lambda: seen.append(int(out.isfinite().all(0).sum())))
    arriving(arrivals, out, scratch, [event] * 3)
    assert seen == [8, 16, 24]
    assert relative_error(out, expected(rows, weights)) < 1e-2


def test_mistakes():
    experts, arriving = build([random_weights(3, 16, 16, dtype=BF16)], 2)
    arrivals, scratch = arriving.new_arrivals(10), experts.new_scratch(10)
    rows, out = random_rows(10, 16, 3, 2, dtype=BF16), torch.empty(10, 16)
    with pytest.raises(InputError, match="not announced"):
        arriving(arrivals, out, scratch)
    for counts in ([4, 5], [11, -1], []):
        with pytest.raises(InputError, match="parts of"):
            arriving.expect(arrivals, 0, rows, counts)
    with pytest.raises(InputError, match="at most 8"):
        arriving.expect(arrivals, 0, rows, [1, 1, 1, 1, 1, 1, 1, 1, 2])
    arriving.expect(arrivals, 0, rows, [4, 6])
    with pytest.raises(InputError, match="part 2"):
        arriving.arrived(arrivals, 2)
    arriving.arrived(arrivals, 1)
    with pytest.raises(InputError, match="part 1"):
        arriving.arrived(arrivals, 1)
    with pytest.raises(InputError, match=r"\[0\] of the wave are not announced"):
        arriving(arrivals, out, scratch)
    with pytest.raises(InputError, match="has not been called"):
        arriving.expect(arrivals, 0, rows, [4, 6])
    arriving.arrived(arrivals, 0)
    with pytest.raises(InputError, match="has not been called"):
        arriving.expect(arrivals, 0, rows, [4, 6])
    assert not any(kind == "gate_up" for kind, _ in log)
    with pytest.raises(ConfigError, match="4 GiB"):
        arriving.new_arrivals(10**8)


def test_experts_that_take_whole_waves_only():
    experts = AmpereExperts(
        [random_weights(2, 16, 16, dtype=BF16)], top_k=2, hidden=16, device=torch.device("cpu"), dtype=BF16, num_sms=4
    )
    with pytest.raises(ConfigError, match="ampere experts"):
        ArrivingExperts(experts)
    assert not HopperFp8Experts.supports_arrivals
