"""Who launches or resumes a run is alone at it, until it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from prl.errors import UserError
from prl.run_dir import RunDir
from prl.supervise.claim import ClaimedError, claimed

HOLDER = """
import signal, sys
from prl.run_dir import RunDir
from prl.supervise.claim import claimed
with claimed(RunDir(sys.argv[1])):
    print("held", flush=True)
    signal.pause()
"""


def test_a_second_claim_is_refused_while_the_first_lasts(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    with claimed(run_dir), pytest.raises(ClaimedError, match="launched or resumed by another prl"), claimed(run_dir):
        pass
    with claimed(run_dir):
        pass


def test_a_claim_ends_with_the_process_that_held_it(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ClaimedError), claimed(RunDir(tmp_path)):
            pass
        holder.kill()
        with claimed(RunDir(tmp_path), patience=60.0):
            pass


def test_a_run_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written to: No such file"), claimed(RunDir(tmp_path / "nowhere")):
        pass
