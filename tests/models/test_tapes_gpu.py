"""Steps played from tapes give what steps issued by Python give, bit by bit."""

import importlib.util
from dataclasses import replace

import pytest
import torch

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

from pipemoe import Config, load_model
from pipemoe.model_facts.facts import cut_config
from pipemoe.model_facts.known_models import MODEL_CONFIGS
from pipemoe.plan.config import MODES
from pipemoe.runtime.taped_run import TapedRun

pytestmark = pytest.mark.gpu

LENGTHS = (30, 1, 8), (300,), (1,), (700, 40)


@pytest.fixture(scope="module", params=["transformers", "fused"])
def model(world, request):
    config = Config(mode="broadcast", max_tokens_per_rank=1024, graph_tokens=256, debug=True, attention=request.param)
    source = cut_config(MODEL_CONFIGS["small"], 4)
    return load_model(source, world, random_weights=True, dtype=torch.bfloat16, seed=3, config=config)


@pytest.mark.parametrize(
    ("mode", "cap"),
    [*((mode, 4096) for mode in MODES), ("chunked", 64), ("pipelined", 64)],
)
def test_the_same_logits(model, mode, cap, monkeypatch):
    config = replace(model.config, mode=mode, moe_max_num_tokens=cap)
    changed = model.with_config(config)
    vocab = changed.decoder.vocab_size
    by_python = []
    issue = TapedRun._issue_by_python
    monkeypatch.setattr(TapedRun, "_issue_by_python", lambda run, op: by_python.append(op) or issue(run, op))
    for number, lengths in enumerate(LENGTHS):
        g = torch.Generator().manual_seed(number)
        prompts = [torch.randint(0, vocab, (n,), generator=g).tolist() for n in lengths]
        found = {}
        for plays in (False, True, True):
            changed.runtime.plays_tapes = plays
            by_python.clear()
            logits = changed.prefill(prompts, keep_logits=True).logits
            assert bool(by_python) == plays
            found.setdefault(plays, []).append(logits)
        for logits in found[True]:
            assert torch.equal(logits, found[False][0])
