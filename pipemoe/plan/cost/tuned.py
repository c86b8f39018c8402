"""The planner's numbers that were tuned by hand. Each says what it was tuned on, and when, as far as that is known.

"permille" is a thousandth. What `pipemoe tune` measures on a machine replaces all but the search's numbers.
"""

from __future__ import annotations

# --- What whole steps reach of the peak rates (cost/default.py) ---
# GPUs: fitted on 2026-12-01 to steps of Qwen3-30B-A3B on one H200, 1 to 8192 tokens. Of those of
# benchmarks/results/h200/forward.json predictions are 10 % off at most.
# CPUs: fitted on 2026-12-02 to two runs of 16 sets of prompts in 6 modes, the small model on 4 ranks that share two
# cores and memory: 5 to 17 % off by mode. In a later run of 21 sets, not fitted, steps took 17 % longer than predicted
# in the mean, give or take 14 to 22 % by mode. Between the two fitted runs the machine's speed alone differed by 20 %.
# dense, grouped GEMMs, attention and memory in permille of the peak; passes: how often a model's own modules pass over
# each row in elementwise kernels.
REACHED_ON_GPU = {"dense": 750, "grouped": 900, "attention": 690, "memory": 940, "passes": 10}
REACHED_ON_CPU = {"dense": 417, "grouped": 256, "attention": 271, "memory": 914, "passes": 8}

# ns of the conductor's thread for each operation, see HostCost. Of several ranks, fitted on 2026-11-26 to steps on two
# H100s and on quarters of one; but attention without graphs, of which a sixth of the launches is left.
HOST_ON_GPU = {
    "attend_ns": 170_000,
    "graph_ns": 27_000,
    "pack_ns": 110_000,
    "dispatch_ns": 45_000,
    "experts_ns": 60_000,
    "combine_ns": 53_000,
    "finish_ns": 450_000,
    "idle_ns": 16_000,
}
# Of a rank without peers, whose steps are one graph or played from tapes. Nothing is packed.
HOST_ON_LONE_GPU = {
    "attend_ns": 150_000,
    "graph_ns": 4_000,
    "pack_ns": 0,
    "dispatch_ns": 6_000,
    "experts_ns": 4_000,
    "combine_ns": 6_000,
    "finish_ns": 300_000,
    "idle_ns": 6_000,
}
# CPUs: the fit above.
HOST_ON_CPU = {
    "attend_ns": 20_000,
    "graph_rows": 0,
    "pack_ns": 6_000,
    "dispatch_ns": 12_000,
    "experts_ns": 10_000,
    "combine_ns": 10_000,
    "finish_ns": 20_000,
    "idle_ns": 4_000,
}
# Latencies in ns (attention, experts, a group of collectives and each of its segments, before and after a step), the
# least that a layer's attention is busy, as its kernels take no less for few rows, rows that a tile of the experts'
# GEMMs is rounded up to, and the permille of CostModel. GPUs: groups and steps' ends of several ranks by the fit of
# HOST_ON_GPU, all else by the first.
FIXED_ON_GPU = {
    "attend_ns": 5_000,
    "attend_least_ns": 110_000,
    "experts_ns": 20_000,
    "group_ns": 15_000,
    "segment_ns": 4_000,
    "start_ns": 2_000_000,
    "finish_ns": 200_000,
    "tile_rows": 16,
    "gap_permille": 500,
}
# Without peers nothing travels, there is no exchange before a step, and small steps are one graph with kernels of their
# own. Fitted on 2026-12-01 to benchmarks/results/h200/forward_whole_step.json, 1 to 8192 tokens: 9 % off at most.
FIXED_ON_LONE_GPU = FIXED_ON_GPU | {
    "attend_least_ns": 26_000,
    "experts_ns": 11_000,
    "group_ns": 0,
    "segment_ns": 0,
    "start_ns": 900_000,
    "finish_ns": 300_000,
}
FIXED_ON_CPU = {
    "attend_ns": 100_000,
    "attend_least_ns": 0,
    "experts_ns": 8_700,
    "group_ns": 850,
    "segment_ns": 480,
    "start_ns": 86_000,
    "finish_ns": 1_040_000,
    "tile_rows": 2,
    "gap_permille": 1000,
}
# See CoresCost. Several cohorts of a rank are threads that take turns. The fit of CPUs.
CORES_SLOWDOWN_PERMILLE = 1284
# What later slots have of the cores at least, in permille.
LEAST_SHARE = 300

# NCCL's rings between GPUs: about 330 of 450 GB/s, as published for H200s. 2026-11-23.
LINK_PERMILLE = 700
# Bytes per second between 4 ranks on one GPU, NCCL 2.30, one thread block per collective; with four about 100 GB/s.
# 2026-11-24, one H200.
ONE_GPU_LINK = 20 * 10**9
# Ranks that share a GPU share its memory: attention takes this much longer if every other rank attends to as much.
# 2026-11-24, quarters of an H200.
CROWD_PERMILLE = 150

# --- What operations do to one another side by side (cost/default.py) ---
# permille of its speed alone that each of KINDS (line) has beside another (column); then of a computation on the
# lower-priority stream. GPUs: pairs measured by benchmarks/overlap.py with 2048 tokens per rank on two H100s, and on
# quarters of one; where a transfer takes part, half of the loss measured there, as whole steps show less. 2026-11-26.
BETWEEN_GPUS = (
    ((680, 325, 870, 900), (870, 670, 980, 980), (910, 815, 970, 970), (845, 780, 970, 970)),
    ((420, 280), (820, 520)),
)
ON_ONE_GPU = (
    ((775, 390, 835, 835), (910, 570, 950, 960), (890, 800, 980, 965), (825, 740, 965, 965)),
    ((245, 130), (630, 520)),
)
# CPUs: computations share cores (CoresCost); the threads that move transfers compete with one another. 2026-11-24.
ON_CORES = (((1000,) * 4,) * 2 + ((1000, 1000, 667, 667),) * 2, ((1000,) * 2,) * 2)
# SmsCost's crowded and roomy speeds, as `pipemoe tune` found them on the same machines. 2026-11-26.
SMS_BETWEEN_GPUS, SMS_ON_ONE_GPU = (750, 580, 1000, 1070), (690, 1000, 1000, 1110)
# At most this part of the multiprocessors is left to collectives. On quarters of an H200 with NCCL_MAX_CTAS=1, leaving
# 3 of 32 cost the kernels 1 to 7 % and saved them 25 % beside a transfer. 2026-11-24.
MOST_SMS_LEFT = 10  # one in so many

# --- Mode auto's search (auto/) ---
# Predictions are inexact, so each extra cohort must gain this many permille. 2026-11-24, before the fits above; no run
# is recorded.
COHORT_MARGIN = 30
# Events on the clock. A core runs some 4,000 in a millisecond, and planning should take no longer. 2026-11-25.
MOST_EVENTS = 3_600  # in all; a candidate that would take more is not run
DOUBTFUL_EVENTS = 2_600  # in all, for a candidate that wins only if its bound is tighter than the others' were
CANDIDATE_EVENTS = 550  # about as many as one candidate may take; fewer layers are simulated where one has more
CANDIDATE_LAYERS = 16  # that are simulated at most, and half of them
# Ranks whose attention differs by less than one part in ALIKE_PARTS are simulated as one. If more than MOST_RANKS
# remain, the difference no longer counts. 2026-11-23, to make planning faster; no run is recorded.
ALIKE_PARTS, MOST_RANKS = 16, 3

# What core_speed's rounds take on cores of the speed that the costs of CPUs are for: a product of 64 x 128 and
# 128 x 256, and 4000 turns of a loop in Python. The cores of the fitted runs took .82 and .69 of these.
REFERENCE_PRODUCT_NS, REFERENCE_LOOP_NS = 70_000, 205_000
