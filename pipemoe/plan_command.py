"""`pipemoe plan`: what a step would take, on any machine: no GPU, no MPI, no model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipemoe.comm.nccl import default_max_ctas
from pipemoe.config import DTYPES, Config
from pipemoe.errors import ConfigError, InputError
from pipemoe.model_facts.dimensions import dimensions_of, dimensions_of_facts
from pipemoe.model_facts.known_models import MODEL_CONFIGS, model_config
from pipemoe.model_facts.limits import supported_facts
from pipemoe.output_path import check_output_file, write_whole
from pipemoe.plan.auto.choice import Candidate, auto_candidates
from pipemoe.plan.clock.prediction import Prediction, simulate
from pipemoe.plan.config import COMBINES, MODES, OBJECTIVES, PlanConfig
from pipemoe.plan.cost.default import default_cost
from pipemoe.plan.cost.devices import GPUS, cpu
from pipemoe.plan.cost.dimensions import Dimensions
from pipemoe.plan.cost.file import read_cost_bytes, subject_and_cost
from pipemoe.plan.cost.model import CostModel
from pipemoe.plan.cost.tuned import COHORT_MARGIN
from pipemoe.plan.planner import plan
from pipemoe.plan.row import row_bytes
from pipemoe.plan.schedule import Facts
from pipemoe.plan_report import (
    as_json,
    candidates_table,
    cohorts_lines,
    front_table,
    milliseconds,
    ranks_table,
    timeline_ranks,
    timeline_text,
)
from pipemoe.plan_traffic import add_traffic_options, run_traffic
from pipemoe.runtime.costs import model_key
from pipemoe.world.arguments import MOST_SLOTS

_DEFAULT_MODEL = "deepseek-v3"
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_OF_ONE_STEP = ("mode", "objective", "makespan_budget", "combine", "num_sms", "pareto", "trace", "width")  # options
_OF_GPUS = ("gpu", "ranks_per_gpu")
_MOST_TOKENS = 10_000_000  # of a rank: planning more would take minutes, or for ever


def add_plan_parser(subcommands: argparse._SubParsersAction, positive: Callable[[str], int]) -> None:
    parser = subcommands.add_parser(
        "plan",
        help="predict what a step would take, on any machine",
        description="Prints the candidates of mode auto, the plan, and the predicted times to first token of one step.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--model",
        help=f"{', '.join(MODEL_CONFIGS)}, or the path of a config.json or its directory (default {_DEFAULT_MODEL})",
    )
    parser.add_argument("--gpu", type=str.lower, choices=tuple(GPUS), default="h200", help="default %(default)s")
    parser.add_argument(
        "--cores",
        type=positive,
        metavar="N",
        help="ranks without GPUs, on N cores of one host, in place of --gpu (dtype: float32)",
    )
    parser.add_argument(
        "--cost", metavar="FILE", help="measured costs (pipemoe tune) of --model, in place of those derived from --gpu"
    )
    parser.add_argument("--ranks", type=positive, help="number of ranks (default: as many as --rank-tokens names)")
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument(
        "--rank-tokens",
        metavar="T,T,...",
        help="tokens per rank; one number is every rank's; 512+16 are two sequences",
    )
    inputs.add_argument(
        "--trace-arrivals",
        type=Path,
        metavar="FILE",
        help="instead of one step: requests over time, as in this trace, served by pipemoe.Engine; needs --ranks",
    )
    parser.add_argument("--layers", type=positive, help="MoE layers (default: the model's)")
    parser.add_argument("--mode", choices=MODES, default="auto", help="default %(default)s")
    parser.add_argument("--objective", choices=OBJECTIVES, default="mean", help="default %(default)s")
    parser.add_argument(
        "--makespan-budget",
        type=float,
        default=PlanConfig().makespan_budget,
        help="how much later the slowest may be (default %(default)s)",
    )
    parser.add_argument("--moe-max-num-tokens", type=positive, default=8192, help="default %(default)s")
    parser.add_argument("--max-tokens-per-rank", type=positive, help="default: 16384, or what --rank-tokens needs")
    parser.add_argument(
        "--slots",
        type=positive,
        help="cohorts under way at once (default 4); with --trace-arrivals also how many roll (default: by costs)",
    )
    parser.add_argument("--combine", choices=COMBINES, default="reduce", help="default %(default)s")
    parser.add_argument(
        "--num-sms", type=positive, metavar="N", help="that the experts' kernels fill in every plan (default: chosen)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16, with --cores float32")
    parser.add_argument(
        "--ranks-per-gpu", type=positive, default=1, help="ranks that share a GPU (default %(default)s)"
    )
    parser.add_argument(
        "--pareto", action="store_true", help="also the best mean for slowest times of up to 20 %% above the best"
    )
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="write the predicted timeline as a Chrome trace (https://ui.perfetto.dev)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    parser.add_argument("--width", type=positive, default=100, help="columns of the timeline (default %(default)s)")
    of_traffic = add_traffic_options(parser, positive)
    defaults = {name: parser.get_default(name) for name in (*_OF_ONE_STEP, *_OF_GPUS, *of_traffic)}
    parser.set_defaults(of_traffic=of_traffic, defaults=defaults)


def run(options: argparse.Namespace) -> int:
    """Print the report. Raises InputError and ConfigError for what cannot be."""
    options.rolling_slots, options.slots = options.slots, options.slots or PlanConfig().num_slots
    if options.slots > MOST_SLOTS:
        raise InputError(f"--slots {options.slots}: a world has at most {MOST_SLOTS}")
    if options.trace:
        check_output_file("--trace", options.trace)
        _check_replaces_no_requests(options.trace)
    if options.cost and not options.model:
        raise InputError(f"--cost {options.cost} is of one model: say which with --model")
    if options.cost and options.cores:
        raise InputError(f"--cost {options.cost} says what was measured, --cores {options.cores} is another machine")
    if options.cores:
        _check_unused(options, _OF_GPUS, f"with --cores {options.cores}")
    if options.cost:
        _check_unused(options, _OF_GPUS, f"with --cost {options.cost}, which says what was measured")
    if options.trace_arrivals:
        _check_unused(options, _OF_ONE_STEP, "with --trace-arrivals")
    else:
        _check_unused(options, options.of_traffic, "without --trace-arrivals")
    model = options.model or _DEFAULT_MODEL
    model_facts = supported_facts(model_config(model))
    dimensions = dimensions_of_facts(model_facts)
    if options.layers:
        dimensions = replace(dimensions, shape=replace(dimensions.shape, num_layers=options.layers))
    device = f"costs of {options.cost}" if options.cost else f"{options.cores} cores" if options.cores else options.gpu
    if options.trace_arrivals:
        if not options.ranks:
            raise InputError("--trace-arrivals needs --ranks")
        cost = _cost(options, dimensions, options.ranks)
        return run_traffic(options, model, device, dimensions.shape, cost, model_facts.positions)
    facts = parse_facts(options.rank_tokens, options.ranks)
    _check_positions(facts, model_facts.positions, model)
    shape, value_bytes = dimensions.shape, _BYTES[_dtype(options)]
    config = Config(
        mode=options.mode,
        moe_max_num_tokens=options.moe_max_num_tokens,
        max_tokens_per_rank=options.max_tokens_per_rank or max(16384, *facts.tokens),
        num_slots=options.slots,
        combine=options.combine,
        num_sms=options.num_sms,
        objective=options.objective,
        makespan_budget=options.makespan_budget,
    )
    cost = _cost(options, dimensions, facts.num_ranks)
    shares = cost.cores.permille > 0 and facts.num_ranks > 1
    if not any(facts.tokens):
        print(json.dumps({}) if options.json else "nothing to plan: no rank has a token")
        return 0
    chosen = plan(facts, shape, config, cost)  # first: it finds what is wrong with the step
    candidates = auto_candidates(facts, shape, config, cost) if options.mode == "auto" else []
    spans = True if options.trace else () if options.json else timeline_ranks(chosen)
    prediction = simulate(chosen, cost, spans=spans)
    front = _pareto(facts, dimensions, config, cost) if options.pareto else []
    num_bytes = exchange_bytes(config, dimensions, facts.num_ranks, value_bytes)
    shared_bytes = host_shared_bytes(config, dimensions, facts.num_ranks, value_bytes) if shares else 0
    if options.json:
        about = {"model": model, "device": device, "exchange_bytes": shared_bytes or num_bytes}
        about["shared_bytes"] = shared_bytes
        print(json.dumps(about | as_json(chosen, prediction, candidates, front)))
    else:
        tokens = sum(facts.tokens)
        print(f"{model} on {facts.num_ranks} ranks of {device}, {shape.num_layers} MoE layers, {tokens} tokens\n")
        if candidates:
            print(candidates_table(candidates))
            print(_rule(config, f"{100 * config.makespan_budget:g} %") + _differing(candidates, prediction) + "\n")
        print(cohorts_lines(chosen))
        print("\n" + ranks_table(chosen, prediction) + "\n")
        print(
            f"mean TTFT {milliseconds(prediction.mean)} ms, slowest {milliseconds(prediction.makespan)} ms, over "
            f"{sum(map(len, facts.lengths))} sequences"
        )
        print(_memory(num_bytes, shared_bytes, facts.num_ranks) + "\n")
        if front:
            print(front_table(front))
            print(_rule(config, "the line's budget") + _differing(candidates, prediction) + "\n")
        print(timeline_text(chosen, prediction, num_layers=3, width=options.width))
    if options.trace:
        write_whole(options.trace, json.dumps(_trace(prediction)))
        if not options.json:
            print(f"timeline: {options.trace}")
    return 0


def _check_replaces_no_requests(path: Path) -> None:
    """Elsewhere --trace names requests to read. Raises InputError if this could be such a file."""
    if path.exists() and path.read_bytes()[:1] not in (b"", b"{"):
        raise InputError(f"--trace {path} is to be written, and holds no timeline now; --trace-arrivals reads requests")


def _check_unused(options: argparse.Namespace, names: Sequence[str], where: str) -> None:
    """Raises InputError if one of these was given, since nothing would read it."""
    for name in names:
        if getattr(options, name) != options.defaults[name]:
            raise InputError(f"--{name.replace('_', '-')} means nothing {where}")


def parse_facts(text: str, num_ranks: int | None = None) -> Facts:
    """ "4096,16,0" as three ranks' sequences, "16+3" as two of one rank; a single number is every rank's. Raises
    InputError.
    """
    try:
        lengths = [tuple(int(n) for n in rank.split("+") if int(n)) for rank in text.split(",")]
    except ValueError:
        raise InputError(
            f"--rank-tokens {text!r}: whole numbers are wanted, one per rank, as in 4096,16,0 or 512+16,64"
        ) from None
    if num_ranks is not None and len(lengths) == 1:
        lengths *= num_ranks
    if num_ranks is not None and len(lengths) != num_ranks:
        raise InputError(f"--rank-tokens {text!r} is for {len(lengths)} ranks, but --ranks is {num_ranks}")
    facts = Facts(tuple(lengths))
    for rank, tokens in enumerate(facts.tokens):
        if tokens > _MOST_TOKENS:
            raise InputError(
                f"--rank-tokens: rank {rank} has {tokens} tokens; at most {_MOST_TOKENS} can be planned for"
            )
    return facts


def _check_positions(facts: Facts, positions: int, model: str) -> None:
    """Raises InputError if a sequence is longer than the model takes."""
    for rank, lengths in enumerate(facts.lengths):
        if max(lengths, default=0) > positions:
            longest = f"rank {rank} has a sequence of {max(lengths)} tokens, but {model} has positions for {positions}"
            raise InputError(
                f"--rank-tokens: {longest} (max_position_embeddings); sequences of one rank are added up as in 512+16"
            )


def exchange_bytes(config: PlanConfig, dimensions: Dimensions, num_ranks: int, value_bytes: int) -> int:
    """Receive and partial-sum buffers of all slots, and staging for combine="gather": as pipemoe.runtime.workspace
    allocates.
    """
    hidden, rows = dimensions.shape.hidden, config.max_wave_rows(num_ranks)
    of_row = row_bytes(hidden, value_bytes, dimensions.shape.top_k)
    staging = (
        (num_ranks - 1) * min(rows, config.max_tokens_per_rank) * hidden * value_bytes
        if config.combine == "gather"
        else 0
    )
    return config.max_slots * config.num_buffers * (rows * (of_row + hidden * value_bytes) + staging)


def host_shared_bytes(config: PlanConfig, dimensions: Dimensions, num_ranks: int, value_bytes: int) -> int:
    """What each rank of a host shares with the others, in place of exchange_bytes: see pipemoe.comm.shared."""
    from pipemoe.comm.shared.waves import WaveMemory

    hidden, rows = dimensions.shape.hidden, config.max_wave_rows(num_ranks)
    own_rows, of_row = min(rows, config.max_tokens_per_rank), row_bytes(hidden, value_bytes, dimensions.shape.top_k)
    sums = np.dtype(np.float32)  # on the host, whatever the model's dtype
    return WaveMemory(config.max_slots, config.num_buffers, own_rows, of_row, rows, hidden, sums).num_bytes


def _memory(num_bytes: int, shared_bytes: int, num_ranks: int) -> str:
    """What exchange and experts take, in a line."""
    if shared_bytes:
        whole = f"{num_ranks * shared_bytes / 2**20:.1f} MiB in all"
        return f"shared memory {shared_bytes / 2**20:.1f} MiB per rank, {whole} (plus the experts' scratch)"
    return f"exchange buffers {num_bytes / 2**20:.1f} MiB per rank (plus the experts' scratch)"


def _dtype(options: argparse.Namespace) -> str:
    return options.dtype or ("float32" if options.cores else "bfloat16")


def _cost(options: argparse.Namespace, dimensions: Dimensions, num_ranks: int) -> CostModel:
    """The file's costs, or those derived from the GPU. Raises ConfigError if the file is of something else."""
    if options.cost:
        subject, cost = subject_and_cost(read_cost_bytes(options.cost), options.cost)
        _check_subject(options, subject, dimensions, num_ranks)
    elif options.cores:
        value_bytes = _BYTES[_dtype(options)]
        cost = default_cost(cpu(options.cores), dimensions, num_ranks, value_bytes=value_bytes, sum_bytes=4)
    else:
        gpu, sharing, value_bytes = GPUS[options.gpu], options.ranks_per_gpu, _BYTES[_dtype(options)]
        ctas = default_max_ctas(gpu.num_sms // sharing, options.slots, sharing) if num_ranks > 1 else 0
        cost = default_cost(
            gpu,
            dimensions,
            num_ranks,
            value_bytes=value_bytes,
            sum_bytes=value_bytes,
            ranks_per_device=sharing,
            ctas=ctas,
        )
    return cost


def _check_subject(
    options: argparse.Namespace, subject: dict[str, Any], dimensions: Dimensions, num_ranks: int
) -> None:
    """Raises ConfigError if a cost file's subject is another model, or another number of ranks."""
    key, found = model_key(dimensions), subject.get("model")
    if found != key:
        names = [name for name, config in MODEL_CONFIGS.items() if model_key(dimensions_of(config)) == found]
        measured = f"measured with model {names[0]}, {found}" if names else f"measured with model {found}"
        raise ConfigError(
            f"{options.cost}: {measured}, but --model {options.model} is {key}; name that model, or run pipemoe "
            "tune for this one"
        )
    if subject.get("num_ranks") != num_ranks:
        wanted = f"measured with num_ranks {subject.get('num_ranks')}, but --ranks and --rank-tokens say {num_ranks}"
        raise ConfigError(f"{options.cost}: {wanted}; name as many, or run pipemoe tune with that many")


def _rule(config: PlanConfig, budget: str) -> str:
    """How one candidate is chosen, in a line."""
    margin = f"predictions are inexact, so each extra cohort must buy {COHORT_MARGIN / 10:g} %"
    choice = f"the lowest {config.objective} TTFT of those whose slowest is at most {budget} above the least"
    return f"chosen: {choice}; {margin}"


def _differing(candidates: Sequence[Candidate], prediction: Prediction) -> str:
    """Why the chosen candidate's figures come again a little differently, where they do."""
    of_table = [(milliseconds(c.mean), milliseconds(c.slowest)) for c in candidates if c.chosen]
    if not candidates or of_table == [(milliseconds(prediction.mean), milliseconds(prediction.makespan))]:
        return ""
    return (
        "\nfigures in this table: few layers, carried on in a straight line; "
        "by rank, and over all sequences: all layers, so they differ a little"
    )


def _pareto(facts: Facts, dimensions: Dimensions, config: PlanConfig, cost: CostModel) -> list[tuple[int, Candidate]]:
    """What is chosen with each makespan budget, in percent."""
    found = []
    for percent in (0, 2, 5, 10, 15, 20):
        candidates = auto_candidates(facts, dimensions.shape, replace(config, makespan_budget=percent / 100), cost)
        found += [(percent, candidate) for candidate in candidates if candidate.chosen]
    return found


def _trace(prediction: Prediction) -> dict:
    from pipemoe.trace import Span, Timeline, chrome_trace

    return chrome_trace(
        [
            Timeline(Span(op, begin / 1e9, end / 1e9) for op, (begin, end) in spans if begin < end)
            for spans in prediction.spans
        ]
    )
