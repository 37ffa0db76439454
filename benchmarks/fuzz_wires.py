"""The fuzz tests of tests/fuzz with tens of thousands of inputs each.

    python -m benchmarks.fuzz_wires              from the root of a checkout; ten minutes

Each test runs in a process of its own, with the property it has in the normal test run: the target refuses or ignores
what makes no sense, goes on serving others, and keeps nothing of it. Results go to benchmarks/results/fuzz_wires.json;
the exit code is 1 when a test failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "fuzz_wires.json"
TESTS = {
    "hub: frames of a hostile worker": "test_hub.py::test_whatever_a_peer_sends_the_hub_serves_the_others",
    "hub: answers to another's request": "test_hub.py::test_only_who_was_asked_can_answer",
    "hub: groups that make no sense": "test_groups.py::test_a_group_that_is_believed_can_be_used",
    "hub: demonstrations that make no sense": (
        "test_groups.py::test_a_demonstration_that_is_believed_can_be_trained_on"
    ),
    "engine: request bodies": "test_engine.py::test_every_request_is_answered_and_changes_nothing",
    "engine: tokens": "test_engine.py::test_nothing_is_done_without_the_token",
    "engine: manifests": ("test_engine.py::test_a_manifest_that_lies_is_refused_and_the_served_weights_stay"),
    "client: an engine's answers": "test_engine.py::test_a_client_survives_what_an_engine_answers",
}


def run(test: str, examples: int) -> dict[str, Any]:
    """One fuzz test in a process of its own; its output goes where this one's goes when it fails."""
    environment = {**os.environ, "PRL_FUZZ_EXAMPLES": str(examples), "OMP_NUM_THREADS": "1"}
    without = ("-p", "no:cacheprovider", "-p", "no:logging")  # refusals are logged, which pytest would collect
    command = [sys.executable, "-m", "pytest", "-q", "-x", *without, f"tests/fuzz/{test}"]
    started = time.monotonic()
    finished = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if finished.returncode:
        print(finished.stdout, file=sys.stderr)
    return {
        "inputs": examples,
        "passed": finished.returncode == 0,
        "seconds": round(time.monotonic() - started),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--examples", type=int, default=10_000, help="inputs of each test")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for name, test in TESTS.items():
        results[name] = run(test, options.examples)
        print(name, json.dumps(results[name]), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    machine = {"cores": os.cpu_count(), "python": platform.python_version()}
    RESULTS.write_text(json.dumps({"machine": machine, "tests": results}, indent=1) + "\n")
    return 0 if all(result["passed"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
