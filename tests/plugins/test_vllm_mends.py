"""Every mend of vLLM's CPU backend is needed, and helps; so is `inside/unfinished.py`. `vllm_cases.py` runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prl_vllm.inside import mends

from tests.plugins.served_vllm import needs_vllm

pytestmark = needs_vllm
WITHOUT = {
    "rope": 0.1,
    "seeded_prefill": "RuntimeError: CPU Generator does not use offset",
    "experts_after_update": 0.1,
    "experts_without_gate": "NotImplementedError: is_act_and_mul=False",
    "expert_map": "ended by signal",
    "tiers": "Exception: CPU Offloading is currently only supported",
    "processors": 0.5,
    "progress": 0.5,
    "half_computed_prompt": 0.1,
    "recomputed_beside_a_kept_prompt": "RuntimeError: Failed to reset KV cache",
}
"""What happens without each: at least so large a deviation, or an end that begins with these words."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Any]:
    folder = tmp_path_factory.mktemp("models")
    done = subprocess.run(
        [sys.executable, "-m", "tests.plugins.vllm_cases", str(folder)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    return {(name, applied): outcome for name, applied, outcome in lines}


def test_every_mend_has_a_case() -> None:
    assert {mend.name for mend in mends.MENDS} < set(WITHOUT)


@pytest.mark.parametrize("name", WITHOUT)
def test_with_the_mend_the_result_is_right(outcomes: dict[tuple[str, bool], Any], name: str) -> None:
    assert isinstance(outcomes[name, True], float), outcomes[name, True]
    assert outcomes[name, True] < 1e-4


@pytest.mark.parametrize("name", WITHOUT)
def test_without_the_mend_it_is_not(outcomes: dict[tuple[str, bool], Any], name: str) -> None:
    seen, expected = outcomes[name, False], WITHOUT[name]
    if isinstance(expected, float):
        assert seen > expected
    else:
        assert seen.startswith(expected)
