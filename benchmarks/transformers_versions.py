"""The comparison with transformers, under the release the constraints pin and under the newest one.

    python -m benchmarks.transformers_versions                  from the root of a checkout; a few minutes
    python -m benchmarks.transformers_versions 5.17.0 5.23.0    these releases

Each release is installed beside the environment, not into it (pip --target, without its dependencies, which the test
extra has brought already), and the tests of the model families run with it in front of the path: the same tests that
run with every change. This module is their pytest plugin too: it notes how far apart the tensors were that a test
compared. Results go to benchmarks/results/transformers_versions.json; the exit code is 1 when a test failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "transformers_versions.json"
NOTES = "PRL_PARITY_NOTES"
FAMILIES = ("glm5", "kimi_k2", "nemotron3", "qwen3", "hf")
PARITY = "test_logits_and_gradients_are_those_of_transformers"
KINDS = {5e-6: "logits", 2e-6: "gradients"}
"""Tolerance of a comparison -> what it compares."""
_largest: dict[str, dict[str, float]] = defaultdict(dict)
_current: list[str] = []


# --- as a pytest plugin -----------------------------------------------------------------------------------------------
def pytest_configure() -> None:
    if NOTES not in os.environ:
        return
    testing = importlib.import_module("torch").testing
    compare = testing.assert_close

    def noting(actual: Any, expected: Any, *args: Any, **options: Any) -> None:
        if _current and options.get("atol") in KINDS:
            family, kind = _current[-1], KINDS[options["atol"]]
            difference = float((actual.detach() - expected.detach()).abs().max())
            _largest[family][kind] = max(_largest[family].get(kind, 0.0), difference)
        compare(actual, expected, *args, **options)

    testing.assert_close = noting


def pytest_runtest_setup(item: Any) -> None:
    _current[:] = [item.path.stem.removeprefix("test_")] if item.name.startswith(PARITY) else []


def pytest_sessionfinish() -> None:
    if NOTES in os.environ:
        version = importlib.import_module("transformers").__version__
        Path(os.environ[NOTES]).write_text(json.dumps({"transformers": version, "largest difference": _largest}))


# --- as a program -----------------------------------------------------------------------------------------------------
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="by default the pinned one and the newest")
    versions = parser.parse_args().versions or [pinned(), "newest"]
    results = [measure(version) for version in versions]
    RESULTS.write_text(json.dumps({"python": platform.python_version(), "releases": results}, indent=1) + "\n")
    return int(any(result["failed"] for result in results))


def pinned() -> str:
    """What constraints.txt says."""
    found = re.search(r"^transformers==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None, "constraints.txt pins transformers"
    return found[1]


def measure(version: str) -> dict[str, Any]:
    """Install one release and run the families' tests with it."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = "transformers" if version == "newest" else f"transformers=={version}"
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, wanted]
        subprocess.run(pip, check=True, stderr=subprocess.DEVNULL)
        notes = Path(folder) / "notes.json"
        path = os.pathsep.join([folder, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.transformers_versions", *tests()],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, NOTES: str(notes), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        summary = done.stdout.strip().splitlines()[-1]
        counted = {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", summary)}
        if not notes.exists():
            raise SystemExit(done.stdout + done.stderr)
        noted = json.loads(notes.read_text())
    result = {
        **noted,
        "passed": counted.get("passed", 0),
        "failed": counted.get("failed", 0) + counted.get("error", 0),
        "seconds": round(time.perf_counter() - started),
    }
    print(json.dumps(result, indent=1))
    if result["failed"]:
        print(done.stdout)
    return result


def tests() -> list[str]:
    return [f"tests/plugins/test_{family}.py" for family in FAMILIES]


if __name__ == "__main__":
    sys.exit(main())
