"""Small steps as one graph give what the same steps give operation by operation."""

import importlib.util
from dataclasses import replace

import pytest
import torch

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

from pipemoe import Config, load_model
from pipemoe.errors import ModelError
from pipemoe.model_facts.facts import cut_config
from pipemoe.model_facts.known_models import MODEL_CONFIGS
from pipemoe.models.random_weights import reference_model
from pipemoe.models.whole_graphs import ROWS, WholeGraphs
from tests.models.test_decoder import reference_logits
from tests.models.tiny import FAMILIES, tiny_config

pytestmark = pytest.mark.gpu
LENGTHS = [1], [2], [3], [4], [5], [1, 1], [2, 1, 1], [9], [16], [7, 1, 30], [33], [1] * 16, [64], [150, 20], [199]
BF16 = torch.bfloat16


def prompts_of(lengths, vocab, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (n,), generator=g) for n in lengths]


def load(source, world, **options):
    config = Config(mode="broadcast", max_tokens_per_rank=200, moe_max_num_tokens=200, **options)
    return load_model(source, world, random_weights=True, dtype=BF16, seed=3, config=config)


def ratio(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "small"])
def test_the_same_logits(world, name, monkeypatch):
    model = load(cut_config(MODEL_CONFIGS[name], 3), world)
    whole = model._whole
    assert whole is not None and whole.most_rows == 200
    runs = []
    run = WholeGraphs.run
    monkeypatch.setattr(WholeGraphs, "run", lambda graphs, tokens: runs.append(len(tokens)) or run(graphs, tokens))
    for number, lengths in enumerate(LENGTHS):
        prompts = prompts_of(lengths, model.decoder.vocab_size, number)
        found = [model.prefill(prompts, keep_logits=True) for _ in range(3)]
        assert len(runs) == 3, lengths
        model._whole = None
        wanted = model.prefill(prompts, keep_logits=True)
        model._whole = whole
        runs.clear()
        for each in found:
            assert torch.equal(each.logits, found[0].logits), lengths
            assert all(each.finite) and each.first_tokens == each.logits.argmax(-1).tolist()
        for i in range(len(lengths)):
            assert ratio(found[0].logits[i], wanted.logits[i]) < 3e-2, (lengths, i)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(world, family):
    """Against transformers, where the family's attention is fused."""
    config = tiny_config(family)
    model = load(config, world)
    if model._whole is None:
        pytest.skip(f"{family} has none")
    reference = reference_model(config, "cuda", BF16, seed=3)
    for lengths in ([1], [40, 1, 12], [3] * 16):
        prompts = prompts_of(lengths, model.decoder.vocab_size)
        found = model.prefill(prompts, keep_logits=True).logits
        for ids, logits in zip(prompts, found):
            assert ratio(logits.float(), reference_logits(reference, ids.cuda()).to(logits)) < 5e-2


def test_which_steps_are_one_piece(world):
    model = load(cut_config(MODEL_CONFIGS["small"], 2), world)
    assert model._whole.serves([torch.zeros(200)]) and model._whole.serves([torch.zeros(1)] * 16)
    assert not model._whole.serves([torch.zeros(201)]) and not model._whole.serves([torch.zeros(1)] * 17)
    assert not model._whole.serves([])
    assert {graph.num_rows for graph in model._whole._graphs} == {r for r in ROWS if r < 200} | {200}
    for options in ({"graph_tokens": 0}, {"attention": "transformers"}, {"deterministic": True}):
        assert model.with_config(replace(model.config, **options))._whole is None


def test_no_length_stalls(world):
    """Graphs of all numbers of rows are there from the beginning: nothing is captured in a step."""
    model = load(cut_config(MODEL_CONFIGS["small"], 2), world)
    graphs = list(model._whole._graphs)
    for length in range(1, 201, 7):
        model.prefill(prompts_of([length], model.decoder.vocab_size))
    assert model._whole._graphs == graphs


def test_model_code_that_fails(world, monkeypatch):
    model = load(cut_config(MODEL_CONFIGS["small"], 2), world)
    prompts = prompts_of([5], model.decoder.vocab_size)
    wanted = model.prefill(prompts).first_tokens

    def fails(graphs, tokens):
        raise ValueError("planted")

    with monkeypatch.context() as planted:
        planted.setattr(WholeGraphs, "run", fails)
        with pytest.raises(ModelError, match="planted"):
            model.prefill(prompts)
    with pytest.raises(ModelError, match="planted"):  # every rank hears of it at the next step
        model.prefill(prompts)
    assert model.prefill(prompts).first_tokens == wanted
