"""One engine on two nodes: vLLM's API server with a copy of the model on the first, another copy on the second.

The nodes are this machine twice: two processes of the run, two process groups of vLLM's, joined over the network.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from prl.compose.compose import open_run
from prl.errors import InfrastructureError
from prl.run_dir import RunDir
from prl.types import Sampling
from prl.weights import engine_parts

from tests.plugins.served_vllm import Served, k3, needs_vllm, serving

pytestmark = needs_vllm
BYTES_PER_TOKEN = 2 * 2 * 2 * 32 * 4  # layers, keys and values, heads, head_dim, float32
EDITS = ("model.layers=2", "engine.nodes=2", "engine.parallel.nodes=2", "engine.parallel.data=2")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("spanning") / "run"
    part = threading.Thread(target=_second_node, args=(RunDir(folder),), daemon=True)
    part.start()
    with serving(folder, *EDITS) as served:
        served.publish(0, seed=1)
        yield served
    part.join(60)


def _second_node(run_dir: RunDir) -> None:
    while not run_dir.controller.exists():
        threading.Event().wait(0.05)
    with suppress(InfrastructureError):  # a test ends it
        engine_parts.main(open_run(run_dir), run_dir, 0)


def _generated(engine: Served) -> dict[str, float]:
    """Copy -> tokens that it sampled, by the word of the server, whose socket is on its command line."""
    (server,) = [words for _, words in _children() if "--uds" in words]

    async def page() -> str:
        connector = aiohttp.UnixConnector(server[server.index("--uds") + 1])
        async with aiohttp.ClientSession(connector=connector) as session, session.get("http://vllm/metrics") as answer:
            return await answer.text()

    lines = [line for line in engine.run(page()).splitlines() if line.startswith("vllm:generation_tokens_total")]
    return {line.split('engine="')[1].split('"')[0]: float(line.rpartition(" ")[2]) for line in lines}


def _children() -> Iterator[tuple[int, list[str]]]:
    """(pid, command line) of what this process started."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                yield int(path.parent.name), path.with_name("cmdline").read_text().split("\0")


async def _gaps(engine: Served, prompts: list[list[int]]) -> np.ndarray:
    """[tokens] trainer's minus engine's logprob, of prompts sent together."""
    asked = [engine.client.generate(prompt, Sampling(max_tokens=16, seed=3), stop=(), n=2) for prompt in prompts]
    pairs = zip(prompts, await asyncio.gather(*asked), strict=True)
    return np.concatenate([engine.trainer.logprobs(p, c) - c.logprobs for p, cs in pairs for c in cs])


def test_both_copies_sample_under_the_weights_of_both_versions(engine: Served) -> None:
    before = _generated(engine)
    for version in (0, 1):
        if version:
            manifest = engine.publish(version, seed=2)
            assert engine.get("/weights/checksums") == {record.name: record.checksum for record in manifest.tensors}
        gaps = engine.run(_gaps(engine, engine.prompts(3, 40, 17, 8, 21, 5, 9, 12, seed=version)))
        assert len(gaps) == 8 * 2 * 16
        assert k3(gaps) < 1e-10
    sampled = {copy: tokens - before[copy] for copy, tokens in _generated(engine).items()}
    assert sampled.keys() == {"0", "1"}
    assert min(sampled.values()) > 100


def test_tokens_and_room_of_both_are_reported(engine: Served) -> None:
    (prompt,) = engine.prompts(9)
    for completion in engine.generate(prompt, n=8, max_tokens=4):
        assert completion.versions.tolist() == [1] * 4
    said = engine.statistics()
    assert said["sequences"] == 2 * 16
    assert (256 << 20) / BYTES_PER_TOKEN < said["kv_tokens"] <= 2 * (256 << 20) / BYTES_PER_TOKEN


def test_the_engine_ends_when_a_node_is_gone(engine: Served) -> None:
    (headless,) = [pid for pid, words in _children() if "prl_vllm.inside.headless" in words]
    os.kill(headless, signal.SIGKILL)
    with pytest.raises(InfrastructureError, match="a node of engine 0 is gone: engine-part on node 1: vLLM on"):
        engine.ended()
