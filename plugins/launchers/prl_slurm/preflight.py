"""Before training: every node says what it can do for the run, and what a node is to be blamed for.

    start `probe.py` on every node ─► first line of each ─► tell all where all listen ─► second line of each ─► judge
        ─► those that will train add up a number together ─► where that fails, neighbours do so in pairs ─► judge

A node that does not answer in time is bad as well. What becomes of a bad node, the job's own process decides.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

import attrs
from prl.run_dir import RunDir

from prl_slurm import SlurmConfig, steps
from prl_slurm.allocation import Place
from prl_slurm.steps import Job, Step

_ROUNDS = 2
_GRACE_SECONDS = 15.0
"""After torch's own deadline, for it to say so."""
Problems = dict[str, list[str]]
"""Host -> what is wrong with it."""


@attrs.define(kw_only=True)
class Probe:
    """One node under examination; two threads read what it says."""

    step: Step
    started: float
    """Seconds since the epoch here, before anything ran there."""
    heard: list[tuple[float, dict[str, Any]]] = attrs.field(factory=list)
    """(when, what) it said, of drills aside."""
    ready: dict[str, float] = attrs.field(factory=dict)
    """Group of a drill -> when it was ready for it, by this process's monotonic clock."""
    drills: list[dict[str, str]] = attrs.field(factory=list)
    """Of each drill, the groups in which it failed, and why."""
    noise: list[str] = attrs.field(factory=list)
    ended: bool = False

    def listen(self) -> None:
        for line in self.step.popen.stdout or ():
            try:
                self._hear(json.loads(line))
            except ValueError:
                self.noise.append(line.strip())
        self.ended = True

    def _hear(self, said: dict[str, Any]) -> None:
        if "ready" in said:
            self.ready[said["ready"]] = time.monotonic()
        elif "failed" in said:
            self.drills.append(said["failed"])
        else:
            self.heard.append((time.time(), said))

    def listen_to_errors(self) -> None:
        self.noise.extend(line.strip() for line in self.step.popen.stderr or () if line.strip())

    @property
    def report(self) -> dict[str, Any]:
        """All it said of itself."""
        return {key: value for _, said in self.heard for key, value in said.items()}

    def problems(self, skew: float, slowest: float = 0.0) -> list[str]:
        """What is wrong with the node as far as it said itself; `slowest`: MB/s that its files may have."""
        if not self.heard:
            return [f"did not answer: {self._last_noise('it said nothing')}"]
        problems = [problem for _, said in self.heard for problem in said.get("problems", ())]
        problems += [*self._clock(skew), *self._speed(slowest)]
        if not problems and len(self.heard) < _ROUNDS:
            problems.append(f"answered only once; then: {self._last_noise('nothing')}")
        return problems

    def _last_noise(self, otherwise: str) -> str:
        return self.noise[-1] if self.noise else otherwise

    def _clock(self, skew: float) -> list[str]:
        """What it said was said after it was started and before it was heard."""
        when, said = self.heard[0]
        ahead, behind = said["time"] - when, self.started - said["time"]
        if max(ahead, behind) <= skew:
            return []
        how = f"{ahead:.0f} s ahead of" if ahead > behind else f"{behind:.0f} s behind"
        return [f"its clock is at least {how} this node's (launcher.clock_skew = {skew:g})"]

    def _speed(self, slowest: float) -> list[str]:
        return [
            f"{does}s the run's folder at {self.report[does]:.1f} MB/s (launcher.slowest_files = {slowest:g})"
            for does in ("write", "read")
            if self.report.get(does, slowest) < slowest
        ]


# --- who is to blame --------------------------------------------------------------------------------------------------
Failed = Mapping[tuple[str, str], str]
"""(host, other) -> why what they tried together failed."""


def blame(failed: Failed, hosts: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Host -> a pair in which it failed: the hosts in most failures, until none is left to explain.

    Example:
        >>> blame({("a", "c"): "timed out", ("b", "c"): "timed out"}, ["a", "b", "c", "d"])
        {'c': ('a', 'c')}
    """
    blamed: dict[str, tuple[str, str]] = {}
    left = list(failed)
    while left:
        worst = max(hosts, key=lambda host: sum(host in pair for pair in left))
        blamed[worst] = next(pair for pair in left if worst in pair)
        left = [pair for pair in left if worst not in pair]
    return blamed


def unreachable(probes: Mapping[str, Probe], good: Sequence[str]) -> Problems:
    """A node that most others cannot reach is bad; one that cannot reach most others is bad as well."""
    failed = {
        (host, peer): why for host in good for peer, why in probes[host].report["unreachable"].items() if peer in good
    }
    blamed = blame(failed, good)
    return {
        worst: [f"{host} cannot reach {peer} ({failed[host, peer]}); see run.network"]
        for worst, (host, peer) in blamed.items()
    }


def pairs_of(hosts: Sequence[str]) -> dict[str, list[str]]:
    """Neighbours in a ring, each pair by a name: a bad node is in two that fail, a good one beside it in one."""
    ring = zip(hosts, [*hosts[1:], hosts[0]], strict=True)
    return {f"pair-{index}": list(pair) for index, pair in enumerate(ring) if len(hosts) > 2 or index == 0}


# --- the examination --------------------------------------------------------------------------------------------------
class Examination(AbstractContextManager["Examination"]):
    """Probes on every host of the job, until the block is left; `gpus`: devices that each must have."""

    def __init__(self, job: Job, config: SlurmConfig, run_dir: RunDir, gpus: Mapping[str, int]) -> None:
        self._job = job
        self._config = config
        self._run_dir = run_dir
        self._gpus = gpus
        self._nonce = secrets.token_hex(8)
        self._file = run_dir.path / "slurm" / f"preflight-{self._nonce}.json"
        self._told: dict[str, Any] = {}
        self._drills = 0
        self.probes: dict[str, Probe] = {}

    def __enter__(self) -> Self:
        self._tell()
        self.probes = {host: self._start(host) for host in self._gpus}
        return self

    def __exit__(self, *_: object) -> None:
        for probe in self.probes.values():
            probe.step.kill()
            probe.step.popen.wait()
        for file in self._file.parent.glob(f"{self._file.stem}*"):
            file.unlink(missing_ok=True)

    def _tell(self, **orders: Any) -> None:
        self._told |= orders
        self._run_dir.write_json(self._file, self._told)

    def _start(self, host: str) -> Probe:
        words = (self._nonce, host, str(self._gpus[host]), str(self._config.free_gb))
        started = time.time()
        step = steps.start(
            *(self._job, self._config, self._run_dir.path, f"preflight-{host}"),
            Place(host=host, component=self._job.where(host), first_gpu=0),
            ["python", "-m", "prl_slurm.probe", str(self._run_dir.path), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        probe = Probe(step=step, started=started)
        for listen in (probe.listen, probe.listen_to_errors):
            threading.Thread(target=listen, name=step.name, daemon=True).start()
        return probe

    # --- alone --------------------------------------------------------------------------------------------------------
    def look(self) -> Problems:
        """What is wrong with each host, found out without torch."""
        deadline = time.monotonic() + self._config.preflight_seconds
        probes = self.probes
        _until(lambda: all(probe.heard or probe.ended for probe in probes.values()), deadline)
        well = [probe for probe in probes.values() if probe.heard and not probe.report["problems"]]
        peers = {host: [p.report["address"], p.report["port"]] for host, p in probes.items() if p in well}
        self._tell(peers=peers)
        _until(lambda: all(len(probe.heard) > 1 or probe.ended for probe in well), deadline)
        slowest = self._config.slowest_files
        found = {host: probe.problems(self._config.clock_skew, slowest) for host, probe in probes.items()}
        for host, sentences in unreachable(probes, [host for host in found if not found[host]]).items():
            found[host] += sentences
        return found

    def speeds(self) -> dict[str, dict[str, float]]:
        """Host -> MB/s at which it writes and reads files of the run's folder."""
        return {
            host: {does: round(probe.report[does], 1) for does in ("write", "read") if does in probe.report}
            for host, probe in self.probes.items()
        }

    # --- together -----------------------------------------------------------------------------------------------------
    def together(self, trainer: Sequence[str], others: Sequence[str]) -> Problems:
        """What is wrong with the hosts that will train, and with the devices of the others, found out with torch."""
        groups = {"trainer": list(trainer)} if len(trainer) > 1 else {}
        alone = [host for host in (*trainer, *others) if self.probes[host].report["devices"]]
        groups |= {f"devices-{host}": [host] for host in alone if not (groups and host in trainer)}
        if not groups:
            return {}
        failures, absent = self._drill(groups)
        if absent or not failures:
            return absent
        found = {members[0]: [why] for name, why in failures if len(members := groups[name]) == 1}
        if not found:
            sentence = next(why for name, why in failures if name == "trainer")
            found = self._in_pairs(trainer, others) or {
                trainer[0]: [f"the sum over all trainer nodes fails: {sentence}"]
            }
        return found

    def _in_pairs(self, trainer: Sequence[str], others: Sequence[str]) -> Problems:
        """A pair says little of which of its two it is: a third host, that will not train, may tell."""
        kin = [host for host in others if self._job.where(host) == self._job.where(trainer[0])]
        hosts = [*trainer, *(kin[:1] if len(trainer) == 2 else [])]
        groups = pairs_of(hosts)
        failures, absent = self._drill(groups)
        failed = {(groups[name][0], groups[name][1]): why for name, why in failures}
        blamed = blame(failed, [host for host in hosts if host not in absent])
        sentences = {
            worst: [f"{pair[0]} and {pair[1]} cannot add up a number together: {failed[pair]}"]
            for worst, pair in blamed.items()
        }
        return absent | sentences

    def _drill(self, named: Mapping[str, Sequence[str]]) -> tuple[list[tuple[str, str]], Problems]:
        """(group, why it failed), and the hosts that were not even ready some time after the others."""
        index, self._drills = self._drills, self._drills + 1
        seconds = self._config.collective_seconds
        groups = {f"{index}-{name}": members for name, members in named.items()}  # nothing is left of an earlier drill
        self._tell(**{f"drill-{index}": {"groups": groups, "seconds": seconds}})
        hosts = list(dict.fromkeys(host for members in groups.values() for host in members))
        parts = [(name, host) for name, members in groups.items() for host in members]
        started = time.monotonic()

        def done(some: Iterable[str]) -> bool:
            return all(len(self.probes[host].drills) > index or self.probes[host].ended for host in some)

        def late() -> list[tuple[str, str]]:
            return [(name, host) for name, host in parts if name not in self.probes[host].ready]

        def patience() -> float:
            """Loading torch takes what it takes: only the others say that it takes too long."""
            ready = sorted(self.probes[host].ready.get(name, float("inf")) for name, host in parts)
            return min(started + self._config.preflight_seconds, ready[(len(parts) - 1) // 2] + seconds)

        _until(lambda: not late() or done({host for _, host in late()}), patience)
        missing = {host for _, host in late() if len(self.probes[host].drills) <= index}
        limit = time.monotonic() + seconds + _GRACE_SECONDS
        _until(lambda: done(set(hosts) - missing), limit)
        silent = {host for host in hosts if len(self.probes[host].drills) <= index} - missing
        problems: Problems = {host: [f"was not ready to add up a number {seconds} s after others"] for host in missing}
        problems |= {host: ["said no more when it was to add up a number"] for host in silent}
        spoke = [self.probes[host].drills[index] for host in hosts if host not in problems]
        failures = [(name.partition("-")[2], why) for failed in spoke for name, why in failed.items()]
        return failures, problems


def _until(condition: Callable[[], bool], deadline: float | Callable[[], float]) -> None:
    while not condition() and time.monotonic() < (deadline() if callable(deadline) else deadline):
        time.sleep(0.05)
