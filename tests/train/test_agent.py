"""The elastic agent around programs that end well, badly, or not by themselves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
from prl.run_dir import RunDir
from prl.train.agent import launch

from tests.listening import needs_proc


def rank_program(source: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(source)]


def test_every_rank_is_told_who_it_is(tmp_path):
    program = rank_program(
        f"""
        import os, pathlib
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
        pathlib.Path({str(tmp_path)!r}, os.environ["RANK"]).write_text(" ".join(os.environ[n] for n in names))
        """
    )
    assert launch(program, ranks=2) == 0
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["0 0 2 127.0.0.1", "1 1 2 127.0.0.1"]


def test_a_rank_that_fails_ends_the_others_and_is_named(capfd):
    program = rank_program(
        """
        import os, signal, sys
        sys.exit(7) if os.environ["RANK"] == "1" else signal.pause()
        """
    )
    assert launch(program, ranks=2) == 75
    assert "trainer rank 1 (pid " in capfd.readouterr().err.splitlines()[-1]


def test_an_agent_that_is_told_to_stop_stops_its_ranks():
    rank = rank_program("import os, signal; print(os.getpid(), flush=True); signal.pause()")
    agent = rank_program(f"from prl.train.agent import launch; raise SystemExit(launch({rank!r}, ranks=1))")
    with subprocess.Popen(agent, stdout=subprocess.PIPE) as process:
        try:
            started = int(process.stdout.readline())  # ranks write where the agent writes
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 128 + signal.SIGTERM
        finally:
            process.kill()
    with pytest.raises(ProcessLookupError):
        os.kill(started, 0)


@needs_proc
def test_ranks_and_their_agent_listen_on_loopback_alone(tmp_path):
    program = rank_program(
        f"""
        import os, pathlib, torch.distributed as dist
        from tests.listening import addresses
        dist.init_process_group("gloo")
        dist.barrier()
        seen = addresses(os.getpid()) | addresses(os.getppid())
        pathlib.Path({str(tmp_path)!r}, os.environ["RANK"]).write_text(" ".join(sorted(seen)))
        dist.barrier()
        dist.destroy_process_group()
        """
    )
    assert launch(program, ranks=2) == 0
    assert [set((tmp_path / rank).read_text().split()) for rank in "01"] == [{"127.0.0.1"}] * 2


def test_agents_meet_at_an_address_that_the_first_one_writes_down(tmp_path):
    run_dir = RunDir(tmp_path / "run")
    run_dir.path.mkdir()
    run_dir.create_token()
    run_dir.write_json(run_dir.rendezvous, {"host": "127.0.0.1", "port": 1, "attempt": "an earlier one"})
    ranks = rank_program(
        f"""
        import os, pathlib, torch, torch.distributed as dist
        dist.init_process_group("gloo")
        total = torch.tensor([int(os.environ["RANK"]) + 1])
        dist.all_reduce(total)
        names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR")
        words = [*(os.environ[n] for n in names), str(int(total))]
        pathlib.Path({str(tmp_path)!r}, os.environ["RANK"]).write_text(" ".join(words))
        dist.destroy_process_group()
        """
    )
    agent = """
        import sys
        from prl.run_dir import RunDir
        from prl.train.agent import launch
        from prl.train.rendezvous import Meeting
        meeting = Meeting(node=int(sys.argv[1]), nodes=2, address="127.0.0.2", run_dir=RunDir(sys.argv[2]))
        raise SystemExit(launch(sys.argv[3:], ranks=1, meeting=meeting))
    """
    agents = [subprocess.Popen([*rank_program(agent), node, str(run_dir.path), *ranks]) for node in ("1", "0")]
    assert [process.wait(120) for process in agents] == [0, 0]
    assert json.loads(run_dir.rendezvous.read_text())["host"] == "127.0.0.2"
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["0 0 0 2 127.0.0.2 3", "1 0 1 2 127.0.0.2 3"]
