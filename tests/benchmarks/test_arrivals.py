"""benchmarks/arrivals.py as far as it goes without a GPU."""

import pytest
import torch

from benchmarks import arrivals
from pipemoe.errors import ConfigError


def test_segments_are_all_rows():
    assert arrivals.split(4096, 4) == [1024] * 4
    assert arrivals.split(10, 4) == [2, 3, 2, 3] and arrivals.split(2, 3) == [0, 1, 1]


def test_options():
    options = arrivals.parse(["--cases", "deepseek-v3:100,qwen3-30b-a3b:7"])
    assert options.cases == [("deepseek-v3", 100), ("qwen3-30b-a3b", 7)] and options.parts == 4
    assert arrivals.parse([]).cases == list(arrivals.CASES)
    for wrong in ("deepseek-v3", "deepseek-v3:0", "nobody:5"):
        with pytest.raises(SystemExit):
            arrivals.parse(["--cases", wrong])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_needs_a_gpu():
    with pytest.raises(ConfigError, match="Hopper"):
        arrivals.run(arrivals.parse([]))
