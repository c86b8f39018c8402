"""First tokens of a checkpoint's model, with each rank's own prompts.

pipemoe run -n 2 examples/first_tokens.py path/to/checkpoint "A short prompt" "Another, on the next rank"
"""

import sys

from transformers import AutoTokenizer

import pipemoe


def main(path: str, *prompts: str) -> None:
    world = pipemoe.init()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = pipemoe.load_model(path, world, config=pipemoe.Config(max_tokens_per_rank=4096))
    own = prompts[world.rank :: world.size]  # dealt in turn; a rank may get none
    step = model.prefill([tokenizer(prompt)["input_ids"] for prompt in own])  # every rank calls
    for prompt, token, seconds in zip(own, step.first_tokens, step.ttft_seconds):
        print(f"rank {world.rank}: {prompt!r} -> {tokenizer.decode([token])!r} after {seconds * 1e3:.1f} ms")


if __name__ == "__main__":
    main(*sys.argv[1:])
