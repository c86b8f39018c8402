"""Plans and predictions of recorded cases are what they were; see golden.py."""

import json

from tests.plan.golden import RECORDED, digest, enumerate_cases


def test_plans_and_predictions_are_those_recorded():
    recorded = json.loads(RECORDED.read_text())
    found = {name: digest(made, cost) for name, made, cost in enumerate_cases()}
    assert found.keys() == recorded.keys()
    assert {name for name in found if found[name] != recorded[name]} == set()
