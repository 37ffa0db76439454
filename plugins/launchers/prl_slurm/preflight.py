"""Before training: every node says what it can do for the run, and a spare takes the place of one that cannot.

    start `probe.py` on every node ─► first line of each ─► tell all where all listen ─► second line of each ─► judge

A node that does not answer in time is bad as well. Called by the job's own process, before every attempt of the job.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
from prl.run_dir import RunDir

from prl_slurm import SlurmConfig, steps
from prl_slurm.allocation import Place
from prl_slurm.steps import Job, Step


@attrs.define(kw_only=True)
class Probe:
    """One node under examination; two threads read what it says."""

    step: Step
    started: float
    """Seconds since the epoch here, before anything ran there."""
    heard: list[tuple[float, dict[str, Any]]] = attrs.field(factory=list)
    """(when, what) it said."""
    noise: list[str] = attrs.field(factory=list)
    ended: bool = False

    def listen(self) -> None:
        for line in self.step.popen.stdout or ():
            try:
                self.heard.append((time.time(), json.loads(line)))
            except ValueError:
                self.noise.append(line.strip())
        self.ended = True

    def listen_to_errors(self) -> None:
        self.noise.extend(line.strip() for line in self.step.popen.stderr or () if line.strip())

    def problems(self, skew: float, rounds: int) -> list[str]:
        """What is wrong with the node as far as it said itself."""
        if not self.heard:
            said = self.noise[-1] if self.noise else "it said nothing"
            return [f"did not answer: {said}"]
        problems = [*self.heard[0][1]["problems"], *self._clock(skew)]
        if not problems and len(self.heard) < rounds:
            problems.append(f"answered only once; then: {self.noise[-1] if self.noise else 'nothing'}")
        return problems

    def _clock(self, skew: float) -> list[str]:
        """What it said was said after it was started and before it was heard."""
        when, said = self.heard[0]
        ahead, behind = said["time"] - when, self.started - said["time"]
        if max(ahead, behind) <= skew:
            return []
        how = f"{ahead:.0f} s ahead of" if ahead > behind else f"{behind:.0f} s behind"
        return [f"its clock is at least {how} this node's (launcher.clock_skew = {skew:g})"]


def examine(job: Job, config: SlurmConfig, run_dir: RunDir, gpus: Mapping[str, int]) -> dict[str, list[str]]:
    """Host -> what is wrong with it, for every host of the job; `gpus`: devices that each must have."""
    deadline = time.monotonic() + config.preflight_seconds
    nonce = secrets.token_hex(8)
    file = run_dir.path / "slurm" / f"preflight-{nonce}.json"
    run_dir.write_json(file, {"peers": {}})
    probes = {host: _start(job, config, run_dir.path, host, nonce, gpus.get(host, 0)) for host in gpus}
    try:
        _until(lambda: all(probe.heard or probe.ended for probe in probes.values()), deadline)
        peers = {host: _address(probe) for host, probe in probes.items() if _address(probe)}
        run_dir.write_json(file, {"peers": peers})
        _until(lambda: all(len(probes[host].heard) > 1 or probes[host].ended for host in peers), deadline)
    finally:
        for probe in probes.values():
            probe.step.kill()
            probe.step.popen.wait()
        file.unlink()
    problems = {host: probe.problems(config.clock_skew, 2) for host, probe in probes.items()}
    for host, sentences in unreachable(probes, problems).items():
        problems[host] += sentences
    return problems


def unreachable(probes: Mapping[str, Probe], problems: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """A node that most others cannot reach is bad; one that cannot reach most others is bad as well."""
    good = [host for host, sentences in problems.items() if not sentences]
    failed = {
        (host, peer): why
        for host in good
        for peer, why in probes[host].heard[1][1]["unreachable"].items()
        if peer in good
    }
    blamed: dict[str, list[str]] = {}
    while failed:
        counts = {host: sum(host in pair for pair in failed) for host in good}
        worst = max(good, key=lambda host: counts[host])
        host, peer = next(pair for pair in failed if worst in pair)
        blamed[worst] = [f"{host} cannot reach {peer} ({failed[host, peer]}); see run.network"]
        failed = {pair: why for pair, why in failed.items() if worst not in pair}
    return blamed


def _start(job: Job, config: SlurmConfig, run: Path, host: str, nonce: str, gpus: int) -> Probe:
    started = time.time()
    step = steps.start(
        *(job, config, run, f"preflight-{host}"),
        Place(host=host, component=job.where(host), first_gpu=0),
        ["python", "-m", "prl_slurm.probe", str(run), nonce, str(gpus)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    probe = Probe(step=step, started=started)
    for listen in (probe.listen, probe.listen_to_errors):
        threading.Thread(target=listen, name=step.name, daemon=True).start()
    return probe


def _address(probe: Probe) -> list[Any]:
    said = probe.heard[0][1] if probe.heard else {}
    return [said["address"], said["port"]] if said.get("port") else []


def _until(condition: Callable[[], bool], deadline: float) -> None:
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
