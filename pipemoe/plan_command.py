"""`pipemoe plan`: what a step would take, on any machine: no GPU, no MPI, no model."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from pipemoe.comm.nccl import default_max_ctas
from pipemoe.config import DTYPES, Config
from pipemoe.errors import InputError
from pipemoe.plan.auto import auto_candidates
from pipemoe.plan.cost_file import read_cost
from pipemoe.plan.default_cost import default_cost
from pipemoe.plan.devices import GPUS
from pipemoe.plan.dimensions import Dimensions, dimensions_of
from pipemoe.plan.model_configs import MODEL_CONFIGS
from pipemoe.plan.planner import plan
from pipemoe.plan.report import candidates_table, cohorts_lines, milliseconds, ranks_table, table, timeline_text
from pipemoe.plan.schedule import COMBINES, MODES, OBJECTIVES, Facts, PlanConfig
from pipemoe.plan.simulator import Prediction, simulate
from pipemoe.runtime.arriving import GATHERING_PERMILLE

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def add_plan_parser(subcommands: argparse._SubParsersAction, positive: type) -> None:
    parser = subcommands.add_parser(
        "plan",
        help="predict what a step would take, on any machine",
        description="Prints the candidates of mode auto, the plan, and the predicted times to first token of one step.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("--model", default="deepseek-v3", help=f"{', '.join(MODEL_CONFIGS)}, or the path of a config.json (default %(default)s)")
    parser.add_argument("--gpu", choices=tuple(GPUS), default="h200", help="default %(default)s")
    parser.add_argument("--cost", metavar="FILE", help="measured costs (pipemoe tune) in place of those derived from --model and --gpu")
    parser.add_argument("--ranks", type=positive, help="number of ranks (default: as many as --rank-tokens names)")
    parser.add_argument("--rank-tokens", required=True, metavar="T,T,...", help="tokens per rank; one number is every rank's; 512+16 are two sequences")
    parser.add_argument("--layers", type=positive, help="MoE layers (default: the model's)")
    parser.add_argument("--mode", choices=MODES, default="auto", help="default %(default)s")
    parser.add_argument("--objective", choices=OBJECTIVES, default="mean", help="default %(default)s")
    parser.add_argument("--makespan-budget", type=float, default=0.1, help="how much later the slowest may be (default %(default)s)")
    parser.add_argument("--moe-max-num-tokens", type=positive, default=8192, help="default %(default)s")
    parser.add_argument("--max-tokens-per-rank", type=positive, help="default: 16384, or what --rank-tokens needs")
    parser.add_argument("--slots", type=positive, default=4, help="cohorts under way at once (default %(default)s)")
    parser.add_argument("--combine", choices=COMBINES, default="reduce", help="default %(default)s")
    parser.add_argument("--combine-blocks", type=positive, metavar="N", help="blocks of columns of the sums (default: chosen in mode auto, else 1)")
    parser.add_argument("--arrivals", choices=("on", "off"), help="whether waves are computed as they arrive (default: off)")
    parser.add_argument("--num-sms", type=positive, metavar="N", help="that the experts' kernels fill in every plan (default: chosen)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default %(default)s")
    parser.add_argument("--ranks-per-gpu", type=positive, default=1, help="ranks that share a GPU (default %(default)s)")
    parser.add_argument("--pareto", action="store_true", help="also the best mean for slowest times of up to 20 %% above the best")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write the predicted timeline as a Chrome trace (https://ui.perfetto.dev)")
    parser.add_argument("--width", type=positive, default=100, help="columns of the timeline (default %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Print the report. Raises InputError and ConfigError for what cannot be."""
    facts = parse_facts(options.rank_tokens, options.ranks)
    dimensions = _dimensions(options.model)
    if options.layers:
        dimensions = replace(dimensions, shape=replace(dimensions.shape, num_layers=options.layers))
    shape, value_bytes = dimensions.shape, _BYTES[options.dtype]
    config = Config(
        mode=options.mode,
        moe_max_num_tokens=options.moe_max_num_tokens,
        max_tokens_per_rank=options.max_tokens_per_rank or max(16384, *facts.tokens),
        num_slots=options.slots,
        combine=options.combine,
        combine_blocks=options.combine_blocks,
        arrivals=None if options.arrivals is None else options.arrivals == "on",
        num_sms=options.num_sms,
        objective=options.objective,
        makespan_budget=options.makespan_budget,
    )
    if options.cost:
        cost = read_cost(options.cost)
    else:
        gpu, sharing = GPUS[options.gpu], options.ranks_per_gpu
        ctas = default_max_ctas(gpu.num_sms // sharing, options.slots, sharing) if facts.num_ranks > 1 else 0
        cost = default_cost(gpu, dimensions, facts.num_ranks, value_bytes=value_bytes, sum_bytes=value_bytes, ranks_per_device=sharing, ctas=ctas)
    if options.arrivals == "on" and not cost.experts.arrivals_permille:  # a file's, or default costs, are of experts that take whole waves
        cost = replace(cost, experts=replace(cost.experts, arrivals_permille=GATHERING_PERMILLE))
    device = f"costs of {options.cost}" if options.cost else options.gpu
    print(f"{options.model} on {facts.num_ranks} ranks of {device}, {shape.num_layers} MoE layers, {sum(facts.tokens)} tokens\n")
    candidates = auto_candidates(facts, shape, config, cost)
    if options.mode == "auto" and candidates:
        print(candidates_table(candidates) + "\n")
    chosen = plan(facts, shape, config, cost)
    prediction = simulate(chosen, cost, spans=True)
    print(cohorts_lines(chosen) + "\n")
    print(ranks_table(chosen, prediction) + "\n")
    print(f"mean TTFT {milliseconds(prediction.mean)} ms, slowest {milliseconds(prediction.makespan)} ms, over {sum(map(len, facts.lengths))} sequences")
    print(f"exchange buffers {exchange_bytes(config, dimensions, facts.num_ranks, value_bytes) / 2**20:.1f} MiB per rank (plus the experts' scratch)\n")
    if options.pareto:
        print(_pareto(facts, dimensions, config, cost) + "\n")
    if chosen.cohorts:
        print(timeline_text(chosen, prediction, num_layers=3, width=options.width))
    if options.trace:
        options.trace.write_text(json.dumps(_trace(prediction)))
        print(f"timeline: {options.trace}")
    return 0


def parse_facts(text: str, num_ranks: int | None = None) -> Facts:
    """ "4096,16,0" as three ranks' sequences, "16+3" as two of one rank; a single number is every rank's. Raises InputError."""
    try:
        lengths = [tuple(int(n) for n in rank.split("+") if int(n)) for rank in text.split(",")]
    except ValueError:
        raise InputError(f"--rank-tokens {text!r}: whole numbers are wanted, one per rank, as in 4096,16,0 or 512+16,64") from None
    if num_ranks is not None and len(lengths) == 1:
        lengths *= num_ranks
    if num_ranks is not None and len(lengths) != num_ranks:
        raise InputError(f"--rank-tokens {text!r} is for {len(lengths)} ranks, but --ranks is {num_ranks}")
    return Facts(tuple(lengths))


def exchange_bytes(config: PlanConfig, dimensions: Dimensions, num_ranks: int, value_bytes: int) -> int:
    """Receive and partial-sum buffers of all slots, and staging for combine="gather": as pipemoe.runtime.workspace allocates."""
    hidden, rows = dimensions.shape.hidden, config.max_wave_rows(num_ranks)
    row_bytes = -(-(-(-hidden * value_bytes // 4) * 4 + 8 * dimensions.shape.top_k) // 128) * 128
    staging = (num_ranks - 1) * min(rows, config.max_tokens_per_rank) * hidden * value_bytes if config.combine == "gather" else 0
    return config.max_slots * config.num_buffers * (rows * (row_bytes + hidden * value_bytes) + staging)


def _dimensions(model: str) -> Dimensions:
    if model in MODEL_CONFIGS:
        return dimensions_of(MODEL_CONFIGS[model])
    try:
        return dimensions_of(json.loads(Path(model).read_text()))
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"--model {model}: {error}; give one of {', '.join(MODEL_CONFIGS)}, or the path of a config.json") from None


def _pareto(facts: Facts, dimensions: Dimensions, config: PlanConfig, cost) -> str:
    lines = [["makespan budget", "mean ms", "slowest ms", "candidate"]]
    for percent in (0, 2, 5, 10, 15, 20):
        candidates = auto_candidates(facts, dimensions.shape, replace(config, makespan_budget=percent / 100), cost)
        lines += [[f"{percent} %", milliseconds(c.mean), milliseconds(c.slowest), c.name] for c in candidates if c.chosen]
    return table(lines)


def _trace(prediction: Prediction) -> dict:
    from pipemoe.trace import Span, Timeline, chrome_trace

    return chrome_trace([Timeline(Span(op, begin / 1e9, end / 1e9) for op, (begin, end) in spans if begin < end) for spans in prediction.spans])
