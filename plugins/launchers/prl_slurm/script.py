"""The two files a job is made of: what it asks for, and the environment of its processes.

    slurm/job.sh     #SBATCH lines, then the job's own process: `python -m prl_slurm RUN`
    slurm/node.sh    modules, setup commands, virtual environment, container; then whatever it is given to run

Everything else is Python that reads run.toml, so the script is as good as the same for every run. A template of the
user's own replaces job.sh: `$options` and `$command` must be in it, `$run`, `$name` and `$environment` may.
"""

from __future__ import annotations

import shlex
import string
import sys
from collections.abc import Sequence
from pathlib import Path

from prl.compose.plan import LaunchPlan
from prl.errors import UserError
from prl.run_dir import RunDir, read_json

from prl_slurm import SlurmConfig
from prl_slurm.allocation import Request, requests

TEMPLATE = """\
#!/bin/bash
$options

$environment
exec $command
"""
COMMAND = "-m prl_slurm"
NEEDED = ("options", "command")


def job(plan: LaunchPlan, config: SlurmConfig) -> str:
    """The batch script; UserError when the user's template is not one."""
    run = plan.run_dir.path
    return _script(plan, config, run, f"{run}/slurm/job.log", shlex.quote(str(run)))


def array(plans: Sequence[LaunchPlan], config: SlurmConfig, folder: Path) -> str:
    """The batch script of a sweep: element I of the array is the run in line I + 1 of slurm/runs."""
    if config.allocation == "heterogeneous":
        raise UserError("--sweep: a heterogeneous job cannot be an array; use launcher.allocation = 'one' or 'shared'")
    if len({requests(plan, config) for plan in plans}) > 1:
        raise UserError("--sweep: its runs need different nodes, which one job array cannot ask for; launch them apart")
    run = f'"$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {shlex.quote(f"{folder}/slurm/runs")})"'
    return _script(plans[0], config, folder, f"{folder}/slurm/%a.log", run, f"--array=0-{len(plans) - 1}")


def _script(plan: LaunchPlan, config: SlurmConfig, folder: Path, log: str, run: str, *more: str) -> str:
    name = config.job_name or folder.name
    asked = requests(plan, config)
    lone = sum(request.nodes for request in asked) == 1
    common = [*more, *_job_options(config, name, log, lone=lone), *_dependency(config, plan.after)]
    parts = ["\n".join(_lines([*_options(request, config), *common])) for request in asked]
    values = {
        "options": "\n#SBATCH hetjob\n".join(parts),
        "environment": environment(config),
        "command": f"{shlex.quote(python(config))} {COMMAND} {run}",
        "run": str(folder),
        "name": name,
    }
    return _fill(_template(config), values)


def node(config: SlurmConfig, run: Path) -> str:
    """What stands between srun and a process."""
    runs = f'{shlex.join(_apptainer(config, run))} "$@"' if config.container.backend == "apptainer" else '"$@"'
    return f"#!/bin/bash\n{environment(config)}\nexec {runs}\n"


def environment(config: SlurmConfig) -> str:
    """The shell lines before any Python."""
    lines = [f"module load {shlex.join(config.modules)}"] if config.modules else []
    lines += [f". {shlex.quote(f'{config.venv}/bin/activate')}"] if config.venv else []
    return "\n".join([*lines, *config.setup])


def python(config: SlurmConfig) -> str:
    """The interpreter on the nodes."""
    return f"{config.venv}/bin/python" if config.venv else sys.executable


def pyxis(config: SlurmConfig, run: Path) -> list[str]:
    """Options of srun that start a step inside the image; none without Pyxis."""
    container = config.container
    if container.backend != "pyxis":
        return []
    mounts = ",".join([f"{run}:{run}", f"{Path.cwd()}:{Path.cwd()}", *container.mounts])
    return [f"--container-image={container.image}", f"--container-mounts={mounts}", *container.options]


def _apptainer(config: SlurmConfig, run: Path) -> list[str]:
    binds = [f"--bind={mount}" for mount in (f"{run}:{run}", f"{Path.cwd()}:{Path.cwd()}", *config.container.mounts)]
    return ["apptainer", "exec", "--nv", *binds, *config.container.options, config.container.image]


# --- #SBATCH lines ----------------------------------------------------------------------------------------------------
def _lines(options: Sequence[str]) -> list[str]:
    return [f"#SBATCH {option}" for option in options]


def _options(request: Request, config: SlurmConfig) -> list[str]:
    """Of one component."""
    section = request.section
    gres = section.gres or config.gres or (f"gpu:{request.gpus}" if request.gpus else "")
    given = {
        "nodes": str(request.nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(request.cpus),
        "gres": gres,
        "mem": section.memory or config.memory,
        "partition": section.partition or config.partition,
        "constraint": section.constraint or config.constraint,
    }
    options = [f"--{name}={value}" for name, value in given.items() if value]
    return [*options, *(["--exclusive"] if config.exclusive else [])]


def _job_options(config: SlurmConfig, name: str, log: str, *, lone: bool) -> list[str]:
    """Of every component: sbatch wants the queue's questions answered for each."""
    given = {
        "job-name": name,
        "account": config.account,
        "qos": config.qos,
        "exclude": config.exclude,
        "reservation": config.reservation,
        "time": config.time,
    }
    options = [f"--{key}={value}" for key, value in given.items() if value]
    # A lost node of several ends its own processes and no others; the log of a job that queues again goes on.
    lives = [] if lone else ["--no-kill"]
    lives += ["--requeue", "--open-mode=append", f"--signal=B:USR1@{config.cut_seconds}"]
    return [*options, f"--output={log}", f"--chdir={Path.cwd()}", *lives, *config.options]


def _dependency(config: SlurmConfig, after: RunDir | None) -> list[str]:
    """One that can never be met takes the job out of the queue, where the wait is for another run."""
    if after is None:
        return [f"--dependency={config.dependency}"] if config.dependency else []
    finished = f"afterok:{(read_json(after.launch) or {})['job']}"
    return [f"--dependency={','.join(filter(None, [config.dependency, finished]))}", "--kill-on-invalid-dep=yes"]


# --- the user's own ---------------------------------------------------------------------------------------------------
def _template(config: SlurmConfig) -> string.Template:
    if not config.template:
        return string.Template(TEMPLATE)
    try:
        return string.Template(Path(config.template).read_text())
    except OSError as error:
        raise UserError(f"launcher.template: {config.template} cannot be read: {error.strerror}") from error


def _fill(template: string.Template, values: dict[str, str]) -> str:
    """`$$` is a dollar, and so is a name in braces or out of them that is none of ours: the shell's own."""
    filled = template.safe_substitute(values)
    text = template.template
    if missing := [name for name in NEEDED if f"${name}" not in text and f"${{{name}}}" not in text]:
        raise UserError(f"launcher.template: it has no {' and no '.join(f'${name}' for name in missing)}")
    return "\n".join(line for line in filled.splitlines()).strip() + "\n"
