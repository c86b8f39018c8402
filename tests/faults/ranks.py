"""The program of the fault tests: every rank runs steps, and one of them meets a fault.

Arguments: the fault, and a folder for each rank's errors (a launcher may drop what survivors say) and process number,
and for the time of a signal.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from pathlib import Path

import torch

import pipemoe
from pipemoe.plan.cost.model import AttendCost, CostModel, HostCost
from pipemoe.plan.schedule import Facts, OpKind
from tests.faults.detach import detach
from tests.faults.stacks import tell_stacks_of_timeouts
from tests.hosts import pretend_hosts_if_told
from tests.moe_cases import make_layers
from tests.runtime.hold import Hold
from tests.runtime.sources import RowsSource, make_runtime

WATCHDOG_SECONDS = 8.0  # a busy machine may hold a rank up for some seconds
NUM_LAYERS = 6
CULPRIT = 1
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
# Where else a rank is killed: inside a call of the experts, behind its part of a collective that it has posted, or
# between steps.
KILLED_IN = ("experts", "dispatch", "combine", "exchange", "idle")
# Of rows that do not come: they are never sent, are more than the others expect, or their communicators are aborted.
OF_ROWS = ("missing rows", "other count", "abort")


class DyingExperts:
    """Experts whose calls for one layer do not return."""

    def __init__(self, inner, layer: int, die) -> None:
        self._inner, self._layer, self._die = inner, layer, die

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def __call__(self, layer: int, *arguments) -> None:
        if layer == self._layer:
            self._die()
        self._inner(layer, *arguments)


def main(fault: str, folder: str) -> None:
    if fault.startswith("kill"):
        detach()
    torch.set_num_threads(1)
    pretend_hosts_if_told()
    world = pipemoe.init(watchdog_seconds=WATCHDOG_SECONDS, grace_seconds=1.0)
    tell_stacks_of_timeouts(world)
    log = os.open(f"{folder}/rank{world.rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, sys.stderr.fileno())
    (Path(folder) / f"pid{world.rank}").write_text(str(os.getpid()))
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    mode = "broadcast" if fault in ("barrier", *OF_ROWS) else "per_rank"
    runtime = make_runtime(world, make_layers(NUM_LAYERS, world.device, dtype), mode=mode)
    culprit = world.rank == (0 if fault == "barrier" else CULPRIT)
    hold = Hold(world.device)

    def run(before_attend=lambda cohort, layer: None, on_done=lambda op: None) -> None:
        source = RowsSource(5 + world.rank, runtime, before_attend)
        runtime.submit_step([5 + world.rank], source, on_done=on_done).result()
        world.all_gather(b"")

    def meet_signal() -> None:
        (Path(folder) / "fault").write_text(str(time.time()))
        os.kill(os.getpid(), SIGNALS[fault.split()[0]])

    def then_die(call):
        def dying(*arguments):
            call(*arguments)
            meet_signal()

        return dying

    def before_attend(cohort: int, layer: int) -> None:
        if not culprit or layer != (0 if fault == "barrier" else 2):
            return
        if fault in SIGNALS:
            meet_signal()
        elif fault == "barrier":
            hold.wait()

    def on_done(op) -> None:
        if fault == "barrier" and op.kind is OpKind.FINISH:
            hold.release()  # never reached: in lockstep nothing finishes before rank 0 attends

    def broken(*args) -> None:
        raise OSError(f"planted in the {fault}")

    def in_layer_2(planted):
        """The transport's dispatch; `planted` in place of the third one."""
        calls, dispatch = itertools.count(), runtime.transport.dispatch
        return lambda *arguments: (planted if next(calls) == 2 else dispatch)(*arguments)

    def never(*arguments):
        return None if world.device.type == "cuda" else lambda: False

    def abort(*arguments):
        runtime.transport.abort()

    def broken_note(doing, seconds=None) -> None:
        if getattr(doing, "layer", 0) == 2:
            raise ValueError("planted in the conductor")

    posts = {"dispatch": "tell_sent", "combine": "tell_summed"} if world.shared is not None else {}
    run()
    if fault == "transport" and culprit:
        setattr(runtime.transport, posts.get("dispatch", "dispatch"), broken)
    elif fault == "conductor" and culprit:
        world.conductor.note = broken_note
    elif fault == "plan" and culprit:
        # After the comparison of configurations, so only the digest can tell. By the row: cohorts of few tokens run
        # ahead.
        cost = CostModel(attend=AttendCost(row_ps=10**11), host=HostCost(graph_rows=0), sms=runtime.cost.sms)
        runtime.plans.cost = cost
        runtime.plans._of_steps.clear()
    elif fault in ("missing rows", "abort") and culprit:
        runtime.transport.dispatch = in_layer_2(never if fault == "missing rows" else abort)
    elif fault == "other count" and culprit:
        of_step = runtime.plans.of_step
        runtime.plans.of_step = lambda facts: of_step(Facts(tuple((*of_rank, 1) for of_rank in facts.lengths)))
    elif fault == "planning" and culprit:
        runtime.plans.of_step = broken
    elif fault == "absent" and culprit:
        signal.pause()
    elif fault == "kill experts" and culprit:
        runtime.experts_with_free_sms = {
            n: DyingExperts(e, 2, meet_signal) for n, e in runtime.experts_with_free_sms.items()
        }
    elif fault in ("kill dispatch", "kill combine") and culprit:
        post = posts.get(fault.split()[1], fault.split()[1])
        setattr(runtime.transport, post, then_die(getattr(runtime.transport, post)))
    elif fault == "kill exchange" and culprit:
        world.start_gathering = then_die(world.start_gathering)
    elif fault == "kill idle" and culprit:
        meet_signal()
    elif fault == "exit" and culprit:
        sys.exit(0)
    run(before_attend, on_done)
    print(f"rank {world.rank} survived", flush=True)
    world.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
