"""Providers by kind and name. Two claims to one name are a conflict that names both, unless one says `replaces`."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from prl.compose.config import SECTION_KINDS
from prl.compose.plugins import Failure, Provided

BASES = {kind: base for base, kind in SECTION_KINDS.items()}
"""Kind -> base class of its config sections."""


@attrs.frozen
class Registry:
    """What a config's `type` can choose from."""

    entries: dict[tuple[str, str], Provided] = attrs.field(factory=dict)

    def find(self, kind: str, name: str) -> Provided | None:
        return self.entries.get((kind, name))

    def names(self, kind: str) -> list[str]:
        """Names of a kind, sorted."""
        return sorted(name for of_kind, name in self.entries if of_kind == kind)

    def of_config(self, config: type) -> Provided:
        """The provider whose sections are of this class; LookupError for a class no plugin provides."""
        for entry in self.entries.values():
            if entry.provider.config is config:
                return entry
        raise LookupError(f"no provider of this run has sections of class {config.__name__}")

    def of_ref(self, ref: str) -> Provided | None:
        """The provider one of whose lazily imported parts is `ref`."""
        for entry in self.entries.values():
            if ref in entry.provider.parts().values():
                return entry
        return None


def build(records: Iterable[Provided]) -> tuple[Registry, list[Failure]]:
    """The registry, and every conflict as a failure of the plugin that came later."""
    entries: dict[tuple[str, str], Provided] = {}
    failures: list[Failure] = []
    for new in records:
        key = (new.kind, new.provider.name)
        old = entries.get(key)
        if old is None or _replaces(new, old):
            entries[key] = new
        elif not _replaces(old, new):
            failures.append(Failure(new.plugin, _conflict(new, old)))
    registry = Registry(entries)
    return registry, failures + _bad_configs(registry)


def _replaces(new: Provided, old: Provided) -> bool:
    return new.provider.replaces == f"{old.plugin}:{old.provider.name}"


def _conflict(new: Provided, old: Provided) -> str:
    name = new.provider.name
    return (
        f"{new.kind} {name!r} is provided by plugins {old.plugin} and {new.plugin}; "
        f'drop one (--plugins no:{old.plugin}) or have one declare replaces="{old.plugin}:{name}"'
    )


def _bad_configs(registry: Registry) -> list[Failure]:
    """Config classes tell a section's provider, so each must be of its kind's base and belong to one provider."""
    failures: list[Failure] = []
    owners: dict[type, Provided] = {}
    for entry in registry.entries.values():
        config, base = entry.provider.config, BASES[entry.kind]
        other = owners.setdefault(config, entry)
        label = f"{entry.kind} {entry.provider.name!r}"
        if not issubclass(config, base):
            failures.append(Failure(entry.plugin, f"config of {label} must derive from {base.__name__}"))
        elif other is not entry:
            failures.append(
                Failure(entry.plugin, f"{label} and {other.provider.name!r} share the config class {config.__name__}")
            )
    return failures
