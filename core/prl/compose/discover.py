"""Which plugins are installed: entry points of the group `prl`, read once per `sys.path`, sorted by name.

Reads metadata only: no plugin is imported here. Loading is `plugins.py`; what a run may use is its config's choice.
"""

from __future__ import annotations

import difflib
import json
import sys
import tomllib
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError, distribution, entry_points
from pathlib import Path
from urllib.parse import unquote, urlparse

import attrs

GROUP = "prl"


@attrs.frozen(kw_only=True)
class InstalledPlugin:
    """One entry point and the distribution that declares it."""

    name: str
    dist: str
    version: str
    entry: EntryPoint
    requires: tuple[str, ...]
    """The distribution's Requires-Dist lines."""

    @property
    def module(self) -> str:
        return self.entry.module

    @property
    def package(self) -> str:
        """Top-level package: what the lock digests."""
        return self.module.partition(".")[0]


def installed() -> dict[str, tuple[InstalledPlugin, ...]]:
    """Plugin name -> everything that claims it, one entry unless two distributions are in conflict."""
    return _read(tuple(sys.path))


@lru_cache(maxsize=8)
def _read(_: tuple[str, ...]) -> dict[str, tuple[InstalledPlugin, ...]]:
    """`entry_points` re-reads files at every call, in an order that differs between machines."""
    claims: dict[str, list[InstalledPlugin]] = {}
    for entry in entry_points(group=GROUP):
        claims.setdefault(entry.name, []).append(_describe(entry))
    return {name: tuple(sorted(found, key=lambda p: p.dist)) for name, found in sorted(claims.items())}


def _describe(entry: EntryPoint) -> InstalledPlugin:
    dist = entry.dist
    assert dist is not None, "entry points read from metadata know their distribution"
    return InstalledPlugin(
        name=entry.name,
        dist=dist.metadata["Name"],
        version=dist.version,
        entry=entry,
        requires=tuple(dist.requires or ()),
    )


def version_of(dist: str) -> str | None:
    """Version of an installed distribution, without importing it; None when it is not installed."""
    try:
        return distribution(dist).version
    except PackageNotFoundError:
        return None


def undeclared() -> tuple[str, ...]:
    """Plugins that the checkout of an editable prl declares and its installation does not know yet."""
    try:
        root = _editable_root(distribution("prl"))
    except PackageNotFoundError:
        return ()
    if root is None or not (root / "pyproject.toml").is_file():
        return ()
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    return tuple(sorted(set(project["entry-points"][GROUP]) - set(installed())))


def _editable_root(dist: Distribution) -> Path | None:
    origin = json.loads(dist.read_text("direct_url.json") or "{}")
    if not origin.get("dir_info", {}).get("editable"):
        return None
    return Path(unquote(urlparse(origin["url"]).path))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"`, or nothing when no known word is close."""
    close = closest(word, known)
    return f" (did you mean {close!r}?)" if close else ""


def closest(word: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)
