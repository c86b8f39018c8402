"""Your own attention and router around pipemoe's experts: two layers, checked against a naive loop.

pipemoe run -n 4 examples/own_attention.py
"""

import torch
import torch.nn.functional as F

import pipemoe

NUM_LAYERS, NUM_EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 2, 8, 2, 64, 48
PROMPTS = [[300, 4], [7], [], [5, 1, 1]]  # tokens of each rank's prompts; with more ranks they begin again


class Layer:
    """One layer's weights, drawn from its number: the same on every rank."""

    def __init__(self, number: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(number)

        def draw(*shape: int) -> torch.Tensor:
            return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(device)

        self.queries, self.keys, self.values = draw(3, HIDDEN, HIDDEN)
        self.router = draw(NUM_EXPERTS, HIDDEN)
        self.gate_up = draw(NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN)
        self.down = draw(NUM_EXPERTS, HIDDEN, INTERMEDIATE)

    def attend_and_route(self, x, lengths):
        """x [T, H], this rank's prompts one after the other -> x [T, H], expert ids and weights [T, K]."""
        attended = [x[:0]]
        for prompt in x.split(lengths) if lengths else ():
            q, k, v = (prompt @ w.T for w in (self.queries, self.keys, self.values))
            attended.append(F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0])
        x = x + torch.cat(attended)
        weights, ids = (x @ self.router.T).softmax(-1).topk(TOP_K)
        return x, ids, weights

    def naive_experts(self, x, ids, weights):
        """What the experts compute, token by token."""
        y = torch.zeros_like(x)
        for token in range(len(x)):
            for expert, weight in zip(ids[token], weights[token]):
                gate, up = (self.gate_up[expert] @ x[token]).chunk(2)
                y[token] += weight * (self.down[expert] @ (F.silu(gate) * up))
        return y


def main() -> None:
    world = pipemoe.init()
    layers = [Layer(number, world.device) for number in range(NUM_LAYERS)]
    own = pipemoe.local_range(NUM_EXPERTS, world.size, world.rank)  # the experts of this rank
    weights = [
        pipemoe.ExpertWeights(w.gate_up[own.start : own.stop], w.down[own.start : own.stop], first_expert=own.start)
        for w in layers
    ]
    moe = pipemoe.PipelinedMoE(world, weights, num_experts=NUM_EXPERTS, top_k=TOP_K)

    lengths = PROMPTS[world.rank % len(PROMPTS)]
    begin = torch.randn(sum(lengths), HIDDEN).to(world.device)
    x = begin
    with moe.step(sum(lengths), lengths) as step:  # every rank opens one, also without tokens
        for number, layer in enumerate(layers):
            x, ids, topk_weights = layer.attend_and_route(x, lengths)
            x = x + step(number, x, ids, topk_weights)

    wanted = begin
    for layer in layers:
        wanted, ids, topk_weights = layer.attend_and_route(wanted, lengths)
        wanted = wanted + layer.naive_experts(wanted, ids, topk_weights)
    torch.testing.assert_close(x, wanted, rtol=1e-3, atol=1e-3)
    print(f"rank {world.rank}: {len(x)} tokens through {NUM_LAYERS} layers, as in the naive loop")


if __name__ == "__main__":
    main()
