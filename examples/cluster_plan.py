"""How many GPUs does a first token within a limit take? Predicted on any machine: no GPU, no MPI, no weights.

    python examples/cluster_plan.py 100        # milliseconds for the short prompts

Each cluster gets the same step: one prompt of 4096 tokens, and 32 of 64 dealt to the ranks in turn.
"""

import json
import subprocess
import sys

MODEL, GPU, RANKS = "qwen3-235b-a22b", "h200", (4, 8, 16)
LONG, SHORT, NUM_SHORT = 4096, 64, 32


def step_ms(num_ranks: int, mode: str) -> tuple[float, float]:
    """Mean TTFT of ranks with short prompts alone, and of the rank with the long one, in ms."""
    prompts: list[list[int]] = [[] for _ in range(num_ranks)]
    for number in range(NUM_SHORT):
        prompts[number % num_ranks].append(SHORT)
    prompts[0].append(LONG)
    tokens = ",".join("+".join(map(str, of_rank)) for of_rank in prompts)
    command = ["plan", "--model", MODEL, "--gpu", GPU, "--rank-tokens", tokens, "--mode", mode, "--json"]
    found = subprocess.run([sys.executable, "-m", "pipemoe", *command], check=True, stdout=subprocess.PIPE).stdout
    long, *short = (rank["ttft_ms"] for rank in json.loads(found)["ranks"])
    return sum(short) / len(short), long


def main(limit_ms: float) -> None:
    print(f"{MODEL} on {GPU}s, ms until the first tokens: short prompts (beside the long one)")
    enough: dict[str, int] = {}
    for num_ranks in RANKS:
        cells = []
        for mode in ("broadcast", "auto"):
            short, long = step_ms(num_ranks, mode)
            cells.append(f"{mode} {short:6.1f} ({long:6.1f})")
            if short <= limit_ms:
                enough.setdefault(mode, num_ranks)
        print(f"{num_ranks:3} GPUs: " + ", ".join(cells))
    for mode in ("broadcast", "auto"):
        print(
            f"{mode}: {enough[mode]} GPUs do" if mode in enough else f"{mode}: more than {max(RANKS)} GPUs are needed"
        )


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 100.0)
