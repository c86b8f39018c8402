"""transformers' models with pipemoe's experts: the same logits and tokens as by themselves, on any number of ranks."""

import pytest
import torch

import pipemoe
from tests.models.tiny_families import FAMILIES, VOCAB, tiny_family_config

pytestmark = pytest.mark.mpi
# What transformers itself does otherwise in a step of decoding than in a whole prompt, or not at all, for a tiny model.
NO_GENERATE = ()


def make_model(family, world, dtype=torch.float32, **changes):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_family_config(family, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some begin with zeros, which would hide what is wrong
            if not parameter.any():
                parameter.normal_(0, 0.1)
    return model.to(world.device, dtype)


def prompts(world, count=2, length=9):
    generator = torch.Generator().manual_seed(world.rank)
    return torch.randint(3, VOCAB, (count, length + world.rank), generator=generator).to(world.device)


def config(mode):
    return pipemoe.Config(mode=mode, moe_max_num_tokens=16, max_tokens_per_rank=64)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_tokens(world, family):
    for mode in ("broadcast", "auto"):
        model, tokens = make_model(family, world), prompts(world)
        with torch.inference_mode():
            wanted = model(tokens).logits
            generated = model.generate(tokens, max_new_tokens=3 + world.rank, do_sample=False)
        experts = pipemoe.from_transformers(model, world, config(mode))
        with experts, torch.inference_mode():
            assert torch.allclose(model(tokens).logits, wanted, atol=1e-4, rtol=1e-4)
            found = model.generate(tokens, max_new_tokens=3 + world.rank, do_sample=False)
            assert torch.equal(found, generated)
