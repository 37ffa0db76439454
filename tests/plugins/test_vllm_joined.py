"""Runs that join a vLLM server which somebody else started, as docs/vllm.md says."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from prl import network
from prl.compose.compose import compose
from prl.errors import InfrastructureError
from prl_vllm import model_files
from prl_vllm.api import VllmApi
from prl_vllm.inside import KEY_VARIABLE

from tests.plugins.served_vllm import CONFIG, ROOT, STARTUP, k3, needs_vllm, serving

pytestmark = needs_vllm
SMALL = ("model.layers=2", "engine.sequences=16")
ON_A_CPU = ("--enforce-eager", "--dtype", "float32", "--max-model-len", "128", "--kv-cache-memory-bytes", str(1 << 26))
KEY = "of-the-one-who-started-it"


@pytest.fixture(scope="module")
def port() -> int:
    return network.free_port("127.0.0.1")


@pytest.fixture(scope="module")
def server(port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[bytes]]:
    """Started with the command of the documentation."""
    folder = tmp_path_factory.mktemp("model")
    described = model_files.describe(compose(CONFIG, plugins="vllm", overrides=['engine.type="vllm"', *SMALL]))
    model_files.write(described, folder, length=128, cpu=True)
    (documented,) = re.findall(r"^PRL_VLLM=1 .*?(?=^```)", (ROOT / "docs" / "vllm.md").read_text(), re.M | re.S)
    words = shlex.split(documented.replace("\\\n", " ").replace("FOLDER", str(folder)))
    variables = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    command = [sys.executable, *words[len(variables) + 1 :], "--port", str(port), "--api-key", KEY, *ON_A_CPU]
    environment = {**os.environ, **variables, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        yield process
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def joined(server: subprocess.Popen[bytes], port: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """The config's line for the server, once it is healthy."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    url = f"http://127.0.0.1:{port}"

    async def healthy() -> None:
        api = VllmApi(url, key=KEY)
        while server.poll() is None and not await api.healthy():
            await asyncio.sleep(0.2)
        await api.aclose()

    asyncio.run(asyncio.wait_for(healthy(), STARTUP))
    return f'engine.servers=["{url}"]'


@pytest.mark.parametrize("seed", [1, 2])
def test_one_run_after_the_other_serves_its_weights(joined: str, tmp_path: Path, seed: int) -> None:
    with serving(tmp_path / "run", joined, *SMALL) as served:
        for version in (0, 1):
            manifest = served.publish(version, seed=10 * seed + version)
            assert served.get("/weights/checksums") == {t.name: t.checksum for t in manifest.tensors}
            assert k3(served.gaps(served.prompts(3, 40, 17))) < 1e-10
        assert served.stopped() == 0


def test_what_answers_there_must_be_a_server_with_the_extension(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        sentence = "is not one a run can use .*answered 501.* start it as docs/vllm.md says"
        with (
            pytest.raises(InfrastructureError, match=sentence),
            serving(tmp_path / "run", f'engine.servers=["http://127.0.0.1:{other.server_port}"]', *SMALL),
        ):
            pass
        other.shutdown()


def test_an_engine_ends_when_its_server_does(joined: str, server: subprocess.Popen[bytes], tmp_path: Path) -> None:
    with serving(tmp_path / "run", joined, *SMALL) as served:
        os.killpg(server.pid, signal.SIGKILL)
        with pytest.raises(InfrastructureError, match=r"http://127.0.0.1:\d+ is not healthy any more"):
            served.ended()
