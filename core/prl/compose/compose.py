"""A config and the installed plugins become a run.

    resolve layers -> load plugins -> registry -> structure -> check -> Composition -> run directory

`compose` is what the command line calls, once; `open_run` is the first act of every worker, from the files `create_run`
wrote. Neither imports torch. Everything wrong is reported together: a person fixes a config once.
"""

from __future__ import annotations

import importlib
import re
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from prl.compose import checks, layers, limits, lock, routing, toml
from prl.compose.config import SECTION_KINDS, Run
from prl.compose.convert import ExplainUnknown, StructureError, structure, unstructure
from prl.compose.discover import InstalledPlugin, closest, did_you_mean, installed
from prl.compose.plugins import Failure, Hooks, Plugin
from prl.compose.registry import Registry, build
from prl.errors import ConfigError, PluginError, Problem, UserError
from prl.providers import Provider, Ref
from prl.run_dir import RunDir, read_json


@attrs.frozen(kw_only=True, eq=False)
class Composition:
    """A run, and what its names mean."""

    run: Run
    registry: Registry
    hooks: Hooks
    resolved: dict[str, Any]
    """The config as one table: layers merged, defaults written out, the final `plugins` list."""

    @property
    def plugins(self) -> tuple[Plugin, ...]:
        """In the order of the config's list."""
        return self.hooks.plugins

    def provider(self, section: Any) -> Provider:
        """The provider that structured this config object; LookupError for an object that is no plugin's section."""
        return self.registry.of_config(type(section)).provider

    def load(self, ref: Ref) -> Any:
        """Import `"package.module:attribute"`; PluginError names the plugin whose part cannot be imported."""
        module, _, attribute = ref.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except Exception as error:  # a plugin's module can raise anything; the sentence keeps what and where
            entry = self.registry.of_ref(ref)
            owner = f"plugin {entry.plugin!r} ({entry.kind} {entry.provider.name!r})" if entry else "a plugin"
            raise PluginError(f"{owner} cannot load {ref}: {type(error).__name__}: {error}{_origin(error)}") from error

    def build(self, section: Any, *args: Any, **kwargs: Any) -> Any:
        """What the provider's `build` makes of a section.

        A section of the same kind inside it is built first, with the same arguments, and given under its field's name.
        """
        builder = self.load(getattr(self.provider(section), "build"))  # noqa: B009 - not every kind has one
        inner = {name: self.build(value, *args) for name, value in _within(section)}
        return builder(section, *args, **kwargs, **inner)

    def sections(self) -> list[tuple[str, Any]]:
        """(dotted path, config object) of every section that a plugin provides, in the order of `Run`."""
        return list(_sections(self.run))


def _sections(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, tuple(SECTION_KINDS)):
        yield path, value
        for name, inner in _within(value):
            yield from _sections(inner, f"{path}.{name}")
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _sections(item, f"{path}[{index}]")
    elif attrs.has(type(value)):
        for field in attrs.fields(type(value)):
            yield from _sections(getattr(value, field.name), f"{path}.{field.name}" if path else field.name)


def _within(section: Any) -> Iterator[tuple[str, Any]]:
    """(field, section) of the sections of its own kind that a section has."""
    base = next(base for base in SECTION_KINDS if isinstance(section, base))
    for field in attrs.fields(type(section)):
        value = getattr(section, field.name)
        if isinstance(value, base):
            yield field.name, value


def _origin(error: BaseException) -> str:
    """File and line that raised, so that a plugin's author need not search."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = frames[-1]
    return "" if frame.filename == __file__ or "importlib" in frame.filename else f" ({frame.filename}:{frame.lineno})"


# --- compose ----------------------------------------------------------------------------------------------------------
def compose(source: Path, *, plugins: str = "", overrides: Sequence[str] = (), probe: bool = True) -> Composition:
    """A config file and the command line's edits, composed and checked.

    `probe` also checks what only holds on the machine of the run: that files exist and required modules are installed.
    Raises ConfigError or PluginError with everything that is wrong.
    """
    table, problems = layers.resolve(source, plugins=plugins, overrides=overrides)
    known = installed()
    hooks, registry, failures = _assemble(table["plugins"], known)
    try:
        run = structure(table, registry, _explain_with(registry, known, failures))
    except StructureError as error:
        problems += error.problems
    else:
        problems += checks.across_sections(run)
        stated, unreadable = limits.of_model(run, registry)
        problems += [*unreadable, *limits.of_trainer(run, stated)]
        problems += [Problem("", f"{sentence} (plugin {plugin!r})") for plugin, sentence in hooks.validate(run, stated)]
        problems += _not_here(run, registry, known) if probe else []
        composition = Composition(run=run, registry=registry, hooks=hooks, resolved=unstructure(run, registry))
        problems += [*checks.kernels(run, registry), *routing.problems(composition)]
    _refuse(str(source), failures, problems)
    return composition


def _assemble(
    names: Sequence[str], known: Mapping[str, Sequence[InstalledPlugin]]
) -> tuple[Hooks, Registry, list[Failure]]:
    hooks = Hooks()
    failures = hooks.load(names, known)
    # What a misspelt name probably meant is loaded too, so that its sections are checked and not reported as unknown.
    meant = [closest(f.plugin, known) for f in failures if f.plugin not in known]
    hooks.load([name for name in meant if name and name not in names], known)
    records, broken = hooks.provided()
    registry, conflicts = build(records)
    return hooks, registry, failures + broken + conflicts


def _explain_with(
    registry: Registry, known: Mapping[str, Sequence[InstalledPlugin]], failures: Sequence[Failure]
) -> ExplainUnknown:
    def explain(kind: str, name: str) -> str | None:
        """May be slow: it loads plugins that the run does not name."""
        near = did_you_mean(name, registry.names(kind))
        owner = _unnamed_owner(kind, name, known)
        if owner:
            return (
                f"unknown {kind} {name!r}; installed plugin {owner!r} provides it but this run does not name it; "
                f"add it to plugins"
            )
        if failures and not near:
            return None
        provided = ", ".join(map(repr, registry.names(kind))) or "none"
        return f"unknown {kind} {name!r}{near or f'; no installed plugin provides it; this run has {provided}'}"

    return explain


def _unnamed_owner(kind: str, name: str, known: Mapping[str, Sequence[InstalledPlugin]]) -> str | None:
    hooks = Hooks()
    hooks.load(known, known)
    records, _ = hooks.provided()
    return next((r.plugin for r in records if (r.kind, r.provider.name) == (kind, name)), None)


def _not_here(run: Run, registry: Registry, known: Mapping[str, Sequence[InstalledPlugin]]) -> list[Problem]:
    problems = checks.files(run)
    for path, section in _sections(run):
        entry = registry.of_config(type(section))
        sentence = checks.unavailable(entry.provider, next(iter(known.get(entry.plugin, ())), None))
        if sentence:
            problems.append(Problem(path, f"{entry.kind} {entry.provider.name!r} is {sentence}"))
    return problems


def _refuse(source: str, failures: Sequence[Failure], problems: Sequence[Problem]) -> None:
    if problems:
        raise ConfigError(source, [*(Problem("plugins", f"{f.plugin}: {f.reason}") for f in failures), *problems])
    if failures:
        width = max(len(failure.plugin) for failure in failures)
        lines = "\n".join(f"  {failure.plugin:<{width}}   {failure.reason}" for failure in failures)
        raise PluginError(f"{source}: {len(failures)} plugin problem{'s' if len(failures) > 1 else ''}\n{lines}")


# --- the run directory ------------------------------------------------------------------------------------------------
def planned_run_dir(composition: Composition, source: Path) -> RunDir:
    """Where the run would live; makes nothing."""
    if composition.run.run.dir:
        return RunDir(composition.run.run.dir)
    return RunDir(Path("runs") / f"{_run_name(source)}-{time.strftime('%Y%m%d-%H%M%S')}")


def _run_name(source: Path) -> str:
    """The config's stem; for the run.toml of an earlier run, the name of that run without its date."""
    if source.name != "run.toml":
        return source.stem
    return re.sub(r"-\d{8}-\d{6}$", "", source.resolve().parent.name)


def config_table(composition: Composition) -> dict[str, Any]:
    """What run.toml holds: no `run.dir`, for the directory is where the file lies, and it repeats the run elsewhere."""
    section = {key: value for key, value in composition.resolved["run"].items() if key != "dir"}
    return {**composition.resolved, "run": section}


def create_run(composition: Composition, source: Path, run_dir: RunDir | None = None) -> RunDir:
    """Make the run directory with everything a worker needs; UserError where one is already, or none can be."""
    run_dir = run_dir or planned_run_dir(composition, source)
    another = "name another directory (--set run.dir=...)"
    try:
        run_dir.path.mkdir(parents=True, exist_ok=True)
        with run_dir.config.open("x") as file:
            file.write(toml.dumps(config_table(composition)))
    except FileExistsError:
        raise UserError(f"{run_dir.path} already holds a run; {another} or remove it") from None
    except OSError as error:
        raise UserError(f"the run directory {run_dir.path} cannot be made: {error.strerror}; {another}") from None
    run_dir.write_json(run_dir.lock, lock.derive([plugin.name for plugin in composition.plugins], installed()))
    run_dir.create_token()
    run_dir.logs(1).mkdir(parents=True, exist_ok=True)
    return run_dir


def open_run(run_dir: RunDir) -> Composition:
    """The composition of a launched run, as every process of it must see it.

    Verifies `plugins.lock` before any plugin is imported. Raises LockError with every difference.
    """
    table = attempt_table(run_dir)
    known = installed()
    lock.verify(lock.load(run_dir.lock), table["plugins"], known)
    hooks, registry, failures = _assemble(table["plugins"], known)
    _refuse(str(run_dir.config), failures, [])
    try:
        run = structure(table, registry, _explain_with(registry, known, failures))
    except StructureError as error:
        raise ConfigError(str(run_dir.config), error.problems) from error
    return Composition(run=_resumed(run, run_dir), registry=registry, hooks=hooks, resolved=table)


def attempt_table(run_dir: RunDir) -> dict[str, Any]:
    """run.toml, with the trainer on as many nodes as this attempt has."""
    table = layers.read(run_dir.config)
    return {**table, "trainer": {**table.get("trainer", {}), **(read_json(run_dir.resume) or {}).get("trainer", {})}}


def _resumed(run: Run, run_dir: RunDir) -> Run:
    """From the second attempt on, a run starts from a checkpoint of its own, if it has one."""
    checkpoint = (read_json(run_dir.resume) or {}).get("checkpoint")
    if not checkpoint:
        return run
    return attrs.evolve(run, checkpoints=attrs.evolve(run.checkpoints, resume=str(run_dir.path / checkpoint)))
