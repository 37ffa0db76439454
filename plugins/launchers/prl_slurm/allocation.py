"""Which nodes a job asks for, and which of those it is given runs what.

    one             inference nodes, then trainer nodes, then spares, of one allocation
    shared          the groups on the same nodes, each with devices of its own, then spares
    heterogeneous   component 0 is inference, component 1 the trainer

Pure: the plan and the config go in, requests and places come out. Knows no command of Slurm's.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from prl.compose.plan import LaunchPlan, NodeGroup, Process
from prl.errors import InfrastructureError

from prl_slurm import NodesSection, SlurmConfig


@attrs.frozen(kw_only=True)
class Request:
    """One component of the job: nodes that are alike."""

    nodes: int
    cpus: int
    gpus: int
    section: NodesSection
    """What these nodes have of their own."""


@attrs.frozen(kw_only=True)
class Place:
    """Where a process runs."""

    host: str
    component: int
    first_gpu: int
    """Among the devices that the job has on that node."""


def requests(plan: LaunchPlan, config: SlurmConfig) -> tuple[Request, ...]:
    """The components to ask for; the processes of the run fit on them."""
    if config.allocation == "heterogeneous":
        return tuple(
            Request(nodes=group.nodes, cpus=group.cpus, gpus=group.gpus, section=getattr(config, group.name))
            for group in plan.groups
        )
    together = sum if config.allocation == "shared" else max
    nodes = max(g.nodes for g in plan.groups) if config.allocation == "shared" else sum(g.nodes for g in plan.groups)
    return (
        Request(
            nodes=nodes + config.spare_nodes,
            cpus=together(group.cpus for group in plan.groups),
            gpus=together(group.gpus for group in plan.groups),
            section=NodesSection(),
        ),
    )


@attrs.define(kw_only=True)
class Nodes:
    """The nodes a job was given: which of them holds which part of the plan, and which wait to take one over."""

    groups: tuple[NodeGroup, ...]
    shared: bool
    assigned: dict[tuple[str, int], tuple[str, int]]
    """(group, node) -> host, component"""
    spares: list[str]
    lost: dict[str, str] = attrs.field(factory=dict)
    """Host -> why nothing runs there any more."""

    @classmethod
    def given(cls, plan: LaunchPlan, config: SlurmConfig, hosts: Sequence[Sequence[str]]) -> Nodes:
        """`hosts` are those of every component, in Slurm's order."""
        shared = config.allocation == "shared"
        left = [list(component) for component in hosts]
        assigned: dict[tuple[str, int], tuple[str, int]] = {}
        for index, group in enumerate(plan.groups):
            component = index if config.allocation == "heterogeneous" else 0
            for node in range(group.nodes):
                host = left[component][node] if shared else left[component].pop(0)
                assigned[group.name, node] = (host, component)
        used = {host for host, _ in assigned.values()}
        spares = [host for component in left for host in component if host not in used]
        return cls(groups=plan.groups, shared=shared, assigned=assigned, spares=spares)

    @property
    def hosts(self) -> list[str]:
        """Those that have a part, in the order of the plan."""
        return list(dict.fromkeys(host for host, _ in self.assigned.values()))

    def of(self, group: str) -> list[str]:
        """The group's nodes."""
        parts = sorted(part for part in self.assigned if part[0] == group)
        return [self.assigned[part][0] for part in parts]

    def beside(self, group: str) -> list[str]:
        """Nodes that are there and have no part in the group; the spares are among them."""
        mine = self.of(group)
        return [host for host in [*self.hosts, *self.spares] if host not in mine and host not in self.lost]

    def place(self, process: Process) -> Place:
        """InfrastructureError when its node is lost and nothing took its place."""
        host, component = self.assigned[process.group, process.node]
        if host in self.lost:
            raise InfrastructureError(f"no node is left for {process.name}: {host} {self.lost[host]}")
        return Place(host=host, component=component, first_gpu=self._before(process.group) + process.first_gpu)

    def _before(self, name: str) -> int:
        """Devices that the groups before this one have on a node that groups share."""
        if not self.shared:
            return 0
        names = [group.name for group in self.groups]
        return sum(group.gpus for group in self.groups[: names.index(name)])

    def close_up(self, group: str) -> int:
        """The group's nodes that are left become its first; how many they are."""
        parts = sorted(part for part in self.assigned if part[0] == group)
        holders = sorted((self.assigned[part] for part in parts), key=lambda holder: holder[0] in self.lost)
        self.assigned |= dict(zip(parts, holders, strict=True))
        return sum(host not in self.lost for host, _ in holders)

    def lose(self, host: str, reason: str) -> str | None:
        """Nothing runs on that node from now on; the spare that takes its part, if there is one."""
        if host in self.spares:
            self.spares.remove(host)
        self.lost[host] = reason
        parts = [part for part, (holder, _) in self.assigned.items() if holder == host]
        if not parts or not self.spares:
            return None
        spare = self.spares.pop(0)
        self.assigned |= dict.fromkeys(parts, (spare, 0))
        return spare
