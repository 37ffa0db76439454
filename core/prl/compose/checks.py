"""What must hold between sections, and on the machine that launches: checked once, where the run is composed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import attrs
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from prl.compose.config import Run
from prl.compose.discover import InstalledPlugin
from prl.compose.registry import Registry
from prl.errors import Problem
from prl.providers import Kernel, Provider
from prl.train import layout


def across_sections(run: Run) -> list[Problem]:
    """Core's own rules; plugins add theirs with `prl_validate`."""
    return [
        *_tokenizer(run),
        *_environments(run),
        *_lengths(run),
        *_warmup(run),
        *_nodes(run),
        *layout.problems(run.trainer),
    ]


def kernels(run: Run, registry: Registry) -> Iterable[Problem]:
    """A kernel computes one operation and can be chosen for no other."""
    for seam, section in attrs.asdict(run.kernels, recurse=False).items():
        provider = None if section is None else registry.of_config(type(section)).provider
        if isinstance(provider, Kernel) and provider.seam != seam:
            yield Problem(f"kernels.{seam}", f"kernel {provider.name!r} computes {provider.seam}, not {seam}")


def _tokenizer(run: Run) -> Iterable[Problem]:
    if bool(run.tokenizer.file) == bool(run.tokenizer.characters):
        given = "both" if run.tokenizer.file else "neither"
        yield Problem("tokenizer", f"needs exactly one of file and characters, got {given}")


def _environments(run: Run) -> Iterable[Problem]:
    for name, count in Counter(environment.name for environment in run.environments).items():
        if count > 1:
            yield Problem("environments", f"{count} of them are named {name!r}; give each a `name` of its own")
    if run.run.steps and not any(environment.weight for environment in run.environments):
        yield Problem("environments", "every weight is 0, so there is nothing to train on")


def _lengths(run: Run) -> Iterable[Problem]:
    fewest, most = run.rollouts.min_tokens, run.rollouts.max_tokens
    if fewest > most:
        yield Problem("rollouts.min_tokens", f"must be <= max_tokens ({most}), got {fewest}")


def _warmup(run: Run) -> Iterable[Problem]:
    if run.warmup.steps and run.losses.ce is None:
        yield Problem("losses.ce", f"missing section: warmup.steps is {run.warmup.steps}, and it trains this stream")


def _nodes(run: Run) -> Iterable[Problem]:
    if run.trainer.ranks % run.trainer.nodes:
        ranks, nodes = run.trainer.ranks, run.trainer.nodes
        yield Problem("trainer.ranks", f"must be a multiple of trainer.nodes ({nodes}), got {ranks}")
    if run.engine.spans > 1 and run.engine.nodes != run.engine.count * run.engine.spans:
        yield Problem(
            "engine.nodes",
            f"must be {run.engine.count * run.engine.spans}, engine.count = {run.engine.count} engines of "
            f"{run.engine.spans} nodes each, got {run.engine.nodes}",
        )
    elif run.engine.spans == 1 and run.engine.count < run.engine.nodes:
        yield Problem("engine.nodes", f"must be <= engine.count ({run.engine.count}), got {run.engine.nodes}")


def files(run: Run) -> list[Problem]:
    """Paths of the config that lead nowhere from here."""
    named = {
        "tokenizer.file": run.tokenizer.file,
        "trainer.initial_weights": run.trainer.initial_weights,
        "checkpoints.resume": run.checkpoints.resume,
    }
    return [
        Problem(where, f"there is no {path!r} (from {Path.cwd()})")
        for where, path in named.items()
        if path and not Path(path).exists()
    ]


def missing_modules(provider: Provider) -> list[str]:
    """Import names the provider requires and this Python does not have; probed, not imported."""
    return [name for name in provider.requires if find_spec(name.partition(".")[0]) is None]


def unavailable(provider: Provider, plugin: InstalledPlugin | None) -> str | None:
    """Why a provider cannot be used on this machine and what would help, or None."""
    missing = missing_modules(provider)
    if not missing:
        return None
    return f"unavailable here: needs {' and '.join(missing)}; " + "; ".join(_remedy(name, plugin) for name in missing)


def _remedy(module: str, plugin: InstalledPlugin | None) -> str:
    """The extra that brings a module; without one no project is named: an index may hold another by that name."""
    for line in plugin.requires if plugin else ():
        requirement = Requirement(line)
        if plugin and requirement.marker and canonicalize_name(requirement.name) == canonicalize_name(module):
            extra = str(requirement.marker).rpartition("extra == ")[2].strip("\"')")
            return f"pip install '{plugin.dist}[{extra}]'"
    return f"install {module} as its project describes"
