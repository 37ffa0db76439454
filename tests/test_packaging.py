"""The two lists of pyproject.toml agree with the tree, plugins are light, and the hooks are what they were."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import tomllib
from pathlib import Path

from prl import hookspecs

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MODULES = PROJECT["project"]["entry-points"]["prl"]
HEAVY = ("torch", "vllm", "transformers", "deep_ep", "deep_gemm", "wandb", "reasoning_gym", "rich")


def test_every_plugin_folder_is_packaged_and_declared() -> None:
    folders = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("plugins/*/prl_*") if any(path.glob("*.py"))}
    packages = set(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    assert packages == {"core/prl", *folders}
    assert sorted(MODULES.values()) == sorted(folder.rpartition("/")[2] for folder in folders)


def test_plugins_are_named_after_their_modules() -> None:
    assert {f"prl_{name}" for name in MODULES} == set(MODULES.values())


def test_no_folder_of_sources_is_itself_a_package() -> None:
    assert not [
        path
        for pattern in ("core", "plugins", "plugins/*", "tests", "contrib")
        for path in ROOT.glob(f"{pattern}/__init__.py")
    ]


def test_the_module_an_entry_point_names_is_light() -> None:
    script = (
        "import importlib, json, sys\n"
        f"heavy, modules, found = {HEAVY!r}, {sorted(MODULES.values())!r}, {{}}\n"
        "for module in modules:\n"
        "    before = set(sys.modules)\n"
        "    importlib.import_module(module)\n"
        "    found[module] = [name for name in heavy if name in sys.modules and name not in before]\n"
        "print(json.dumps({module: names for module, names in found.items() if names}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {}


def test_the_hooks_are_what_the_snapshot_says() -> None:
    """A plugin depends on names, arguments and annotations: changing one is a deliberate act that changes this file."""
    lines = [
        f"{name}{inspect.signature(function)}"
        for name, function in vars(hookspecs).items()
        if name.startswith("prl_") and inspect.isfunction(function)
    ]
    assert lines == (ROOT / "tests" / "hookspecs.snapshot").read_text().splitlines()
