"""A plan as text: what `prl launch --dry-run` shows of it, whoever launches it."""

from __future__ import annotations

from prl.compose.plan import LaunchPlan, Process


def groups(plan: LaunchPlan) -> list[list[str]]:
    """One row per group of nodes."""
    rows = [["GROUP", "NODES", "CPUS", "GPUS", "ON EACH NODE, AT MOST"]]
    for group in plan.groups:
        fullest = max((plan.on(group.name, node) for node in range(group.nodes)), key=len)
        rows.append([group.name, str(group.nodes), str(group.cpus), str(group.gpus), _counted(fullest)])
    return rows


def processes(plan: LaunchPlan) -> list[list[str]]:
    """One row per process."""
    rows = [["PROCESS", "NODE", "CPUS", "GPUS", "ANNOUNCED BY"]]
    for process in plan.processes:
        about = ", ".join(filter(None, (process.kind, process.share)))
        name = f"{process.name} ({about})" if about else process.name
        where = f"{process.group} {process.node}"
        rows.append([name, where, str(process.cpus), _devices(process), process.announced or "-"])
    return rows


def _counted(processes: list[Process]) -> str:
    names = [f"{process.kind} {process.role}".strip() for process in processes]
    return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))


def _devices(process: Process) -> str:
    if process.gpus < 2:
        return str(process.first_gpu) if process.gpus else "-"
    return f"{process.first_gpu}-{process.first_gpu + process.gpus - 1}"
