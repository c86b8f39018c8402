"""transformers' models with pipemoe's experts: the same logits and tokens as by themselves, on any number of ranks."""

import pytest
import torch

import pipemoe
from pipemoe.errors import InputError, ModelError
from tests.models.tiny_families import FAMILIES, VOCAB, is_left_out, make_model

pytestmark = pytest.mark.mpi


def prompts(world, count=2, length=9):
    generator = torch.Generator().manual_seed(world.rank)
    return torch.randint(3, VOCAB, (count, length + world.rank), generator=generator).to(world.device)


def config(mode="auto"):
    return pipemoe.Config(mode=mode, moe_max_num_tokens=16, max_tokens_per_rank=64)


def check_family(world, family, modes):
    """Ranks generate different numbers of tokens: who is done earlier serves the others."""
    model, tokens, count = make_model(family, world.device), prompts(world), 2 + 2 * world.rank
    with torch.inference_mode():
        wanted = model(tokens).logits
        generated = model.generate(tokens, max_new_tokens=count, do_sample=False)
    for mode in modes:
        model = make_model(family, world.device)
        with pipemoe.from_transformers(model, world, config(mode)), torch.inference_mode():
            assert torch.allclose(model(tokens).logits, wanted, atol=1e-4, rtol=1e-4), mode
            if mode == modes[-1]:
                assert torch.equal(model.generate(tokens, max_new_tokens=count, do_sample=False), generated)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(world, family):
    if is_left_out(world, family):
        pytest.skip("takes a minute; the slow test below runs anywhere")
    check_family(world, family, ("broadcast", "auto"))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_every_mode(world, family):
    check_family(world, family, ("padded", "chunked", "two_batch", "per_rank", "pipelined", "broadcast", "auto"))


def test_other_ranks_experts_are_freed(world):
    model = make_model("qwen3_moe", world.device)
    before = sum(p.numel() for p in model.parameters())
    experts = pipemoe.from_transformers(model, world, config())
    own = len(pipemoe.local_range(8, world.size, world.rank))
    held = sum(t.numel() for w in experts.moe.runtime.experts_with_free_sms[0].weights for _, t in w.tensors())
    assert held * 8 == own * 3 * 8 * 3 * 64 * 32  # 3 layers, 8 experts, 3 matrices
    assert before - sum(p.numel() for p in model.parameters()) == 3 * 8 * 3 * 64 * 32
    with experts:
        pass


def test_bfloat16(world):
    """As near to float32 as transformers' own bfloat16. Either may choose other experts for a token near a tie."""
    tokens, logits = prompts(world), []
    for dtype in (torch.float32, torch.bfloat16):
        with torch.inference_mode():
            logits.append(make_model("gpt_oss", world.device, dtype)(tokens).logits.float())
    model = make_model("gpt_oss", world.device, torch.bfloat16)
    with pipemoe.from_transformers(model, world, config()), torch.inference_mode():
        found = model(tokens).logits
    assert found.dtype == torch.bfloat16
    ours, theirs = ((other - logits[0]).norm(dim=-1).flatten() for other in (found.float(), logits[1]))
    assert ours.median() < 1.5 * theirs.median() < 0.05 * logits[0].norm(dim=-1).mean()
    assert (ours > 4 * theirs.median()).sum() <= 2


def test_ranks_without_prompts_and_several_rounds(world):
    model = make_model("mixtral", world.device)
    tokens = prompts(world)
    with torch.inference_mode():
        wanted = model(tokens).logits
    experts = pipemoe.from_transformers(model, world, config())
    for turn in range(3):  # in each only some have work; in the last nobody
        with experts, torch.inference_mode():
            if turn < 2 and world.rank % 2 == turn:
                for _ in range(turn + 1):
                    assert torch.allclose(model(tokens).logits, wanted, atol=1e-4)


def test_a_call_without_tokens_is_a_call(world):
    """Rows of no token go through the experts as well: all ranks take part, and nobody takes it for the end."""
    model = make_model("mixtral", world.device)
    tokens = prompts(world)
    with torch.inference_mode():
        wanted = model(tokens).logits
    experts = pipemoe.from_transformers(model, world, config())
    with experts, torch.inference_mode():
        if world.rank % 2 == 0:
            site = (
                model.model.layers[0].mlp.experts,
                model.model.layers[1].mlp.experts,
                model.model.layers[2].mlp.experts,
            )
            nothing = torch.empty(0, 64), torch.empty(0, 2, dtype=torch.long), torch.empty(0, 2)
            for module in site:
                assert module(*(t.to(world.device) for t in nothing)).shape == (0, 64)
            assert torch.allclose(model(tokens).logits, wanted, atol=1e-4)


def test_an_error_of_one_rank_ends_the_step_of_all(world):
    model, tokens = make_model("olmoe", world.device), prompts(world)
    experts = pipemoe.from_transformers(model, world, config())
    culprit = world.size - 1

    def fail(*_):
        if world.rank == culprit:
            raise ValueError("odd")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    wanted = ValueError if world.rank == culprit else ModelError
    with pytest.raises(wanted, match="odd"), experts, torch.inference_mode():
        model(tokens)
        model(tokens)
    handle.remove()
    with experts, torch.inference_mode():  # and all goes on
        assert torch.isfinite(model(tokens).logits).all()


def test_what_is_refused_says_why(world):
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(InputError, match="no routed experts were found in a LlamaForCausalLM: looked for gate_up_proj"):
        pipemoe.from_transformers(LlamaForCausalLM(LlamaConfig(vocab_size=99, **small)), world, config())
    with pytest.raises(InputError, match="model is a str"):
        pipemoe.from_transformers("a path", world, config())
    model = make_model("mixtral", world.device)
    model.model.layers[1].mlp.experts.act_fn = torch.nn.Tanh()
    with pytest.raises(InputError, match=r"model.layers.1.mlp.experts: the gating of MixtralExperts is none"):
        pipemoe.from_transformers(model, world, config())


def test_gradients_are_refused(world):
    model = make_model("mixtral", world.device)
    experts = pipemoe.from_transformers(model, world, config())
    with pytest.raises(InputError, match="experts here have no gradients"), experts:
        model(prompts(world))
    with experts:
        pass
