"""Costs: monotonous, derived for every preset, and read back as written; bad files refused."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipemoe.errors import ConfigError
from pipemoe.model_facts.dimensions import dimensions_of, dimensions_of_decoder
from pipemoe.model_facts.known_models import MODEL_CONFIGS
from pipemoe.plan.cost.default import default_cost
from pipemoe.plan.cost.devices import GPUS, UNKNOWN_GPU, cpu, gpu_named
from pipemoe.plan.cost.dimensions import dimensions_of_shape
from pipemoe.plan.cost.file import cost_of_bytes, read_cost_bytes, write_cost
from pipemoe.plan.cost.model import (
    CROWDED,
    KINDS,
    ROOMY,
    USUAL,
    AttendCost,
    ContentionCost,
    CostModel,
    SmsCost,
    attend_busy,
    cost_from_dict,
    experts_busy,
    graph_rows,
    rates_of,
    speeds_of,
)

RATES = rates_of(CostModel())
SUBJECT = {"device": "a GPU", "num_ranks": 4}


def read_cost(path, subject=None) -> CostModel:
    return cost_of_bytes(read_cost_bytes(path), path, subject)


@settings(deadline=None)
@given(st.integers(0, 10**5), st.integers(0, 10**5), st.sampled_from((1, 2, 7, 8)))
def test_experts_cost_more_for_more_rows(few, more, num_ranks):
    few, more = sorted((few, more))
    assert experts_busy(RATES, few, 128, 8, num_ranks) <= experts_busy(RATES, more, 128, 8, num_ranks)


def test_experts_read_few_weights_for_few_rows_and_all_for_many():
    only_weights = rates_of(
        replace(CostModel(), experts=replace(CostModel().experts, expert_ns=1000, pair_ps=0, row_ps=0))
    )
    assert experts_busy(only_weights, 1, 128, 8, 4) == pytest.approx(32 * 1000 * 8 / 128, rel=0.01)
    assert experts_busy(only_weights, 10**4, 128, 8, 4) == pytest.approx(32 * 1000, rel=0.01)


@settings(deadline=None)
@given(st.integers(0, 10**5), st.integers(0, 5 * 10**9), st.integers(0, 10**9))
def test_attention_costs_more_for_more(rows, pairs, more):
    assert attend_busy(RATES, rows, pairs) <= attend_busy(RATES, rows + more, pairs + more)


@pytest.mark.parametrize("model", MODEL_CONFIGS)
@pytest.mark.parametrize("device", [*GPUS.values(), cpu(2)])
def test_defaults_are_whole_and_positive(device, model):
    for num_ranks, sharing in ((1, 1), (4, 4), (8, 1)):
        cost = default_cost(
            device, dimensions_of(MODEL_CONFIGS[model]), num_ranks, value_bytes=2, sum_bytes=2, ranks_per_device=sharing
        )
        assert all(type(v) is int and v >= 0 for v in rates_of(cost))
        assert cost.attend.row_ps > 0 and cost.experts.expert_ns > 0


def test_devices_by_the_drivers_name():
    assert gpu_named("NVIDIA H200") is GPUS["h200"] and gpu_named("NVIDIA A100-SXM4-80GB") is GPUS["a100"]
    assert gpu_named("something else") is UNKNOWN_GPU


def test_dimensions():
    dimensions = dimensions_of(MODEL_CONFIGS["deepseek-v3"])
    assert dimensions.shape.num_layers == 58 and dimensions.expert_weights == 3 * 7168 * 2048
    assert dimensions_of_decoder({"model_type": "new"}, dimensions.shape) == dimensions_of_shape(dimensions.shape)
    with pytest.raises(ConfigError, match="'new'"):
        dimensions_of({"model_type": "new"})


@pytest.mark.parametrize("value", [-1, 1.5, True, 1 << 60, None])
def test_costs_are_whole_numbers(value):
    with pytest.raises(ConfigError, match="AttendCost.row_ps"):
        AttendCost(row_ps=value)


def test_contention_by_kinds():
    contention = ContentionCost()
    speeds = speeds_of(CostModel())[USUAL]
    at = KINDS.index
    assert speeds[0, at("attend"), at("experts")] == contention.attend_beside_experts
    assert speeds[1, at("attend"), at("experts")] == contention.attend_under_experts
    assert (
        speeds[0, at("combine"), at("attend")]
        == speeds[1, at("combine"), at("attend")]
        == contention.combine_beside_attend
    )
    with pytest.raises(ConfigError, match="attend_under_attend is 0"):
        ContentionCost(attend_under_attend=0)


def test_contention_where_other_multiprocessors_are_left():
    """Only what experts and transfers do to one another differs, and nothing is faster than alone."""
    cost, at = CostModel(sms=SmsCost(132, 8, 750, 500, 1100, 2000)), KINDS.index
    tables, experts, dispatch = speeds_of(cost), at("experts"), at("dispatch")
    usual = tables[USUAL]
    for table, of_experts, of_transfers in ((CROWDED, 750, 500), (ROOMY, 1100, 2000)):
        wanted = usual.copy()
        wanted[:, experts, dispatch:] = np.minimum(1000, usual[:, experts, dispatch:] * of_experts // 1000)
        wanted[:, dispatch:, experts] = np.minimum(1000, usual[:, dispatch:, experts] * of_transfers // 1000)
        assert (tables[table] == wanted).all()
    assert (speeds_of(replace(cost, sms=SmsCost(132, 8, 1000, 1000, 1000, 1000))) == usual).all()


@given(st.integers(1, 10**5), st.integers(0, 100))
def test_arithmetic_is_slower_on_fewer_multiprocessors_and_reading_is_not(rows, left):
    def busy(sms_left, **of_experts):
        cost = replace(CostModel(), experts=replace(CostModel().experts, row_ps=0, **of_experts))
        return experts_busy(rates_of(cost), rows, 128, 8, 4, sms_left)

    assert busy(left, expert_ns=0) == pytest.approx(busy(0, expert_ns=0) * 132 / (132 - left), abs=2)
    assert busy(left, pair_ps=0) == busy(0, pair_ps=0)
    assert busy(0) <= busy(left)


def test_graphs_compute_whole_buckets():
    assert [graph_rows(RATES, rows) for rows in (1, 16, 17, 500, 1024, 1025, 4096, 4097)] == [
        16,
        16,
        64,
        512,
        1024,
        1280,
        4096,
        0,
    ]
    assert graph_rows(rates_of(replace(CostModel(), host=replace(CostModel().host, graph_rows=0))), 1) == 0


def test_a_file_is_read_back(tmp_path):
    cost = replace(CostModel(), attend=AttendCost(1, 2, 3, 4, 5), finish_ns=5)
    write_cost(tmp_path / "cost.json", SUBJECT, cost)
    assert read_cost(tmp_path / "cost.json", SUBJECT) == read_cost(tmp_path / "cost.json") == cost
    assert cost_from_dict(asdict(cost)) == cost


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["subject"].update(device="another"), "device 'another'.*'a GPU'"),
        (lambda d: d["subject"].pop("num_ranks"), "num_ranks None"),
        (lambda d: d["subject"].update(more=1), "more 1"),
        (lambda d: d.update(schema="pipemoe.cost/1"), "schema"),
        (lambda d: d.update(schema="pipemoe.cost/4"), "schema is 'pipemoe.cost/4', not .* run pipemoe tune again"),
        (lambda d: d["cost"]["attend"].pop("first_pair_fs"), "attend lacks first_pair_fs"),
        (lambda d: d["cost"].pop("sms"), "sms"),
        (lambda d: d["cost"]["attend"].update(row_ps=-1), "row_ps"),
        (lambda d: d["cost"]["attend"].update(row_ps="1"), "row_ps"),
        (lambda d: d["cost"]["attend"].update(other=1), "other"),
        (lambda d: d["cost"].pop("host"), "host"),
        (lambda d: d["cost"].update(other=1), "other"),
        (lambda d: d.pop("cost"), "cost"),
        (lambda d: d.update(subject=[1]), "no cost file"),
    ],
)
def test_another_or_damaged_file_is_refused(tmp_path, change, message):
    path = tmp_path / "cost.json"
    write_cost(path, SUBJECT, CostModel())
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=message) as error:
        read_cost(path, SUBJECT)
    assert str(error.value).startswith(str(path))


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_cost(tmp_path / "missing.json")
    (tmp_path / "text").write_text("not JSON")
    with pytest.raises(ConfigError, match="no cost file"):
        read_cost(tmp_path / "text")
