"""The trainer process of a node: torch's elastic agent, which starts the ranks, watches them and stops them together.

Each rank is a process of its own (`prl worker --role trainer-rank`) that finds its peers through the rendezvous the
first agent holds on a free port of the run's network, to which what ranks say to each other keeps too. Ranks are not
restarted by themselves: the run goes on from a checkpoint instead (`prl.supervise`). They write to the agent's own
stdout and stderr, hence into its log. Started by `prl.worker`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from prl import network
from prl.compose.compose import Composition
from prl.errors import InfrastructureError
from prl.run_dir import RunDir
from prl.supervise.policy import is_accident
from prl.train import rendezvous
from prl.train.rendezvous import Meeting


def main(composition: Composition, run_dir: RunDir, index: int) -> int:
    """Run the ranks of one of the trainer's nodes to their end; 0 when all of them ended well."""
    command = [sys.executable, "-m", "prl", "worker", "--run", str(run_dir.path), "--role", "trainer-rank"]
    run = composition.run
    nodes = run.trainer.nodes
    meeting = rendezvous.Meeting(
        node=index, nodes=nodes, address=network.address(run), run_dir=run_dir if nodes > 1 else None
    )
    return launch([*command, "--index", str(index)], ranks=run.trainer.ranks // nodes, meeting=meeting)


def launch(command: Sequence[str], *, ranks: int, meeting: Meeting | None = None) -> int:
    """Run `command` once per rank of this node under the elastic agent; the exit code says whether a restart may help.

    Alone, unless other agents are to be met.
    """
    meeting = meeting or Meeting()
    rendezvous.register()
    rendezvous.keep_to(meeting.address, os.environ)
    config = LaunchConfig(
        min_nodes=meeting.nodes,
        max_nodes=meeting.nodes,
        nproc_per_node=ranks,
        run_id="prl-trainer",
        role="trainer",
        rdzv_backend=rendezvous.BACKEND,
        rdzv_configs={"meeting": meeting},
        local_addr=meeting.address,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        max_restarts=0,
    )
    executable, *arguments = command
    try:
        elastic_launch(config, executable)(*arguments)
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            print(f"trainer rank {rank} (pid {failure.pid}) ended with exit code {failure.exitcode}", file=sys.stderr)
        codes = [failure.exitcode for failure in error.failures.values()]
        final = [code for code in codes if not is_accident(code, under_way=True)]
        return final[0] if final else InfrastructureError.exit_code
    except SignalException as signal:
        return 128 + int(signal.sigval)
    return 0
