"""The style that machines check: ruff everywhere, mypy strict on core, files of one idea, names that say something."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = [path for folder in ("core", "plugins", "contrib", "benchmarks") for path in (ROOT / folder).rglob("*.py")]


def check(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_finds_nothing() -> None:
    check("ruff", "check", "--no-cache", ".")


def test_mypy_is_strict_on_core() -> None:
    check("mypy", "--cache-dir=/dev/null")


def test_files_are_of_one_idea() -> None:
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: lines for name, lines in long.items() if lines > 500} == {}


def test_names_say_what_is_inside() -> None:
    empty_words = {"utils", "helpers", "common", "misc"}
    assert [path for path in SOURCES if empty_words & {*path.parts, path.stem}] == []
