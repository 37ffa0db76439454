"""`plugins.lock`: which code a run was launched with. Every process derives it again before it imports torch.

Comparing each process with one file makes all of them pairwise equal without any talk between them. A digest is over
the source files of a package, not over its RECORD: an editable install's RECORD does not list them.
"""

from __future__ import annotations

import hashlib
import json
import platform
import socket
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import prl
from prl.compose.discover import InstalledPlugin, version_of
from prl.errors import LockError

SOURCE_SUFFIXES = frozenset({".py", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".jinja", ".json", ".toml"})
LIBRARIES = ("torch", "torchtitan", "vllm")


def derive(names: Iterable[str], installed: Mapping[str, Sequence[InstalledPlugin]]) -> dict[str, Any]:
    """The lock of these plugins, in this order, as this process sees them; imports none of them."""
    content = {
        "plugins": [_entry(name, installed.get(name, ())) for name in names],
        "prl": {"version": prl.__version__, "digest": digest("prl")},
        "python": platform.python_version(),
        "libraries": {name: version_of(name) for name in LIBRARIES},
    }
    return {**content, "digest": _digest_of(content)}


def _entry(name: str, claims: Sequence[InstalledPlugin]) -> dict[str, Any]:
    if not claims:
        return {"name": name, "dist": None, "version": None, "module": None, "digest": None}
    plugin = claims[0]
    return {
        "name": name,
        "dist": plugin.dist,
        "version": plugin.version,
        "module": plugin.module,
        "digest": digest(plugin.package),
    }


def digest(package: str) -> str | None:
    """sha256 over the source files of a top-level package or module, found without importing it; None if missing."""
    spec = find_spec(package)
    if spec is None:
        return None
    total = hashlib.sha256()
    for name, path in sorted(_sources(spec.submodule_search_locations, spec.origin)):
        content = path.read_bytes()
        total.update(f"{name}\0{len(content)}\0".encode())
        total.update(content)
    return total.hexdigest()


def _sources(folders: Iterable[str] | None, origin: str | None) -> list[tuple[str, Path]]:
    """(name relative to the package, file) of everything that can change what the package does."""
    if folders is None:
        return [(Path(origin).name, Path(origin))] if origin else []
    return [
        (path.relative_to(folder).as_posix(), path)
        for folder in folders
        for path in Path(folder).rglob("*")
        if path.suffix in SOURCE_SUFFIXES and path.is_file()
    ]


def _digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def verify(lock: Mapping[str, Any], named: Sequence[str], installed: Mapping[str, Sequence[InstalledPlugin]]) -> None:
    """Compare a lock with what this process would load for `named`; LockError names the host and every difference."""
    here = derive([entry["name"] for entry in lock["plugins"]], installed)
    differences = [
        f"{was['name']}: launched with {_shown(was)}, {_here(now)}"
        for was, now in zip(lock["plugins"], here["plugins"], strict=True)
        if was != now
    ]
    differences += _core_differences(lock, here) + _order_differences([e["name"] for e in lock["plugins"]], named)
    if differences or lock["digest"] != here["digest"]:
        reasons = "\n  ".join(differences or ["the lock was edited: its digest is not that of its content"])
        raise LockError(
            f"host {socket.gethostname()} does not see the code this run was launched with:\n  {reasons}\n"
            "Install the same code here, or launch a new run."
        )


def _core_differences(lock: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    differences = []
    if lock["prl"] != here["prl"]:
        differences.append(f"prl: launched with {_shown(lock['prl'])}, {_here(here['prl'])}")
    was, now = ({"python": side["python"], **side["libraries"]} for side in (lock, here))
    for name, version in was.items():
        if version != now.get(name):
            differences.append(f"{name}: launched with {version or 'none'}, here {now.get(name) or 'none'}")
    return differences


def _order_differences(locked: Sequence[str], named: Sequence[str]) -> list[str]:
    """The order of plugins is the order of their hooks, so it is part of what must be equal."""
    if list(locked) == list(named):
        return []
    differences = [f"{name}: in plugins.lock, not in run.toml" for name in locked if name not in named]
    differences += [f"{name}: in run.toml, not in plugins.lock" for name in named if name not in locked]
    return differences or [f"reordered: plugins.lock has {', '.join(locked)}; run.toml has {', '.join(named)}"]


def _shown(entry: Mapping[str, Any]) -> str:
    digest = entry["digest"]
    return f"{entry['version']} ({digest[:16] if digest else 'no source'})"


def _here(entry: Mapping[str, Any]) -> str:
    return f"here {_shown(entry)}" if entry["version"] else f"not installed here ({sys.prefix})"


def load(path: Path) -> dict[str, Any]:
    """The lock of a run; LockError when it is missing or not a lock."""
    try:
        lock: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LockError(f"{path} cannot be read ({error}); a run is started with `prl launch`") from error
    return lock
