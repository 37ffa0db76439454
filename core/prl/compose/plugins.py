"""Load plugins one by one, isolated, checked and in the order asked for; a typed facade over pluggy.

A plugin that cannot be used becomes a `Failure` with its reason and harms no other. What is done about it belongs to
the caller: a run refuses, a listing shows it. pluggy's own loading is not used: it has no isolation and no order.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, Literal

import attrs
import pluggy
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

import prl
from prl import hookspecs
from prl.compose.config import Run
from prl.compose.discover import InstalledPlugin, did_you_mean
from prl.providers import KINDS, Limit, Provider

HOOKS = frozenset(name for name in vars(hookspecs) if name.startswith("prl_"))
REGISTRATION = {f"prl_{kind}{'es' if kind.endswith('s') else 's'}": kind for kind in KINDS}
"""Registration hook -> kind."""
LIFECYCLE = HOOKS - REGISTRATION.keys() - {"prl_validate"}


@attrs.frozen(kw_only=True, eq=False)
class Plugin:
    """A plugin that is loaded and passed every check."""

    name: str
    dist: str
    version: str
    module: str
    package: str


@attrs.frozen
class Failure:
    """Why a plugin cannot be used."""

    plugin: str
    reason: str
    status: Literal["broken", "incompatible"] = "broken"


@attrs.frozen
class Provided:
    """A provider, and the plugin it came from."""

    plugin: str
    kind: str
    provider: Provider


class UnusableError(Exception):
    """Raised while one plugin is checked; never leaves this module."""


class IncompatibleError(UnusableError):
    """The plugin asks for another version of prl."""


class Hooks:
    """The plugins of a run, in order, and typed calls to their hooks.

    Example:
        >>> hooks = Hooks()
        >>> hooks.load(["adamw", "nope"], installed())
        [Failure(plugin='nope', reason='not installed')]
        >>> [plugin.name for plugin in hooks.plugins]
        ['adamw']
    """

    def __init__(self) -> None:
        self.plugins: tuple[Plugin, ...] = ()
        self._manager = pluggy.PluginManager("prl")
        self._manager.add_hookspecs(hookspecs)

    def load(self, names: Iterable[str], installed: Mapping[str, Sequence[InstalledPlugin]]) -> list[Failure]:
        """Load `names` after what is loaded already; what could not be loaded comes back with its reason."""
        failures = []
        for name in names:
            try:
                self._load(name, installed)
            except UnusableError as error:
                status: Literal["broken", "incompatible"] = "broken"
                if isinstance(error, IncompatibleError):
                    status = "incompatible"
                failures.append(Failure(name, str(error), status))
        return failures

    def _load(self, name: str, installed: Mapping[str, Sequence[InstalledPlugin]]) -> None:
        found = _only_claim(name, installed)
        _check_version(found)
        module = _import(found)
        _check_hooks(module)
        try:
            self._manager.register(module, name=name)
        except (pluggy.PluginValidationError, ValueError) as error:
            raise UnusableError(" ".join(str(error).split())) from error
        self.plugins += (
            Plugin(name=name, dist=found.dist, version=found.version, module=found.module, package=found.package),
        )

    def provided(self) -> tuple[list[Provided], list[Failure]]:
        """Every provider of every loaded plugin, and the plugins whose registration hooks failed."""
        records: list[Provided] = []
        failures: list[Failure] = []
        for hook, kind in REGISTRATION.items():
            for plugin, function in self._implementations(hook):
                try:
                    records += [Provided(plugin, kind, record) for record in _checked(kind, function())]
                except Exception as error:  # a plugin may fail in any way, and must not hide the others
                    failures.append(Failure(plugin, f"{hook}: {_describe(error)}"))
        return records, failures

    def validate(self, run: Run, limits: Sequence[Limit]) -> list[tuple[str, str]]:
        """(plugin, sentence) for every problem that plugins see across sections."""
        problems: list[tuple[str, str]] = []
        for plugin, function in self._implementations("prl_validate"):
            try:
                problems += [(plugin, sentence) for sentence in function(run=run, limits=limits)]
            except Exception as error:  # as above: reported, never hiding what others found
                problems.append((plugin, f"prl_validate failed: {_describe(error)}"))
        return problems

    def implementations(self, hook: str) -> list[tuple[str, Callable[..., None]]]:
        """(plugin, function) of a lifecycle hook, in the order of the config's `plugins`.

        Each function takes all of the hook's arguments by keyword and passes on those the implementation declares.
        """
        if hook not in LIFECYCLE:
            raise ValueError(f"{hook} is not a lifecycle hook; they are {', '.join(sorted(LIFECYCLE))}")
        return self._implementations(hook)

    def _implementations(self, hook: str) -> list[tuple[str, Callable[..., Any]]]:
        position = {plugin.name: index for index, plugin in enumerate(self.plugins)}
        found = getattr(self._manager.hook, hook).get_hookimpls()
        return [
            (impl.plugin_name, _by_keyword(impl)) for impl in sorted(found, key=lambda impl: position[impl.plugin_name])
        ]


def _by_keyword(impl: pluggy.HookImpl) -> Callable[..., Any]:
    return lambda **arguments: impl.function(*[arguments[name] for name in impl.argnames])


def _only_claim(name: str, installed: Mapping[str, Sequence[InstalledPlugin]]) -> InstalledPlugin:
    claims = installed.get(name, ())
    if not claims:
        raise UnusableError(f"not installed{did_you_mean(name, installed)}")
    if len(claims) > 1:
        raise UnusableError(f"claimed by distributions {' and '.join(c.dist for c in claims)}; uninstall one of them")
    return claims[0]


def _check_version(plugin: InstalledPlugin) -> None:
    """A plugin's only declaration of compatibility is its distribution's requirement on prl."""
    for line in plugin.requires:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        concerns_prl = canonicalize_name(requirement.name) == "prl"
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if concerns_prl and applies and not requirement.specifier.contains(prl.__version__, prereleases=True):
            raise IncompatibleError(f"needs prl{requirement.specifier}, this is prl {prl.__version__}")


def _import(plugin: InstalledPlugin) -> ModuleType:
    try:
        module = plugin.entry.load()
    except Exception as error:  # a plugin's module can raise anything; the reason is kept
        raise UnusableError(_describe(error)) from error
    if not isinstance(module, ModuleType):
        raise UnusableError(f"its entry point names {plugin.entry.value}, which is not a module")
    return module


def _check_hooks(module: ModuleType) -> None:
    """Refuse misspelt hooks, wrappers, and hook functions without their marker, before pluggy sees the module."""
    for name, function in inspect.getmembers(module, inspect.isroutine):
        options = getattr(function, "prl_impl", None)
        if options is None:
            if name in HOOKS and function.__module__ == module.__name__:
                raise UnusableError(f"{name} is not marked with @prl.hookimpl, so it would never be called")
            continue
        hook = options.get("specname") or name
        if hook not in HOOKS:
            raise UnusableError(f"unknown hook {hook!r}{did_you_mean(hook, HOOKS)}")
        if options.get("wrapper") or options.get("hookwrapper"):
            raise UnusableError(
                f"{hook} is a wrapper; prl hooks take none, since one could rewrite another plugin's answer"
            )


def _checked(kind: str, records: Iterable[Provider] | None) -> list[Provider]:
    record_class = KINDS[kind]
    checked = []
    for record in records or ():
        if not isinstance(record, record_class):
            raise TypeError(f"expected {record_class.__name__} records, got {record!r}")
        if not attrs.has(record.config):
            raise TypeError(f"config of {record.name!r} must be an attrs class, got {record.config!r}")
        for part, reference in record.parts().items():
            if not re.fullmatch(r"[\w.]+:\w+", reference):
                raise TypeError(f'{part} of {record.name!r} must be "package.module:attribute", got {reference!r}')
        checked.append(record)
    return checked


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
