"""plugins.lock: what makes a worker refuse to start."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from prl.compose import lock
from prl.compose.compose import compose, create_run, open_run
from prl.compose.discover import installed
from prl.errors import LockError
from prl.run_dir import RunDir

Throwaway = Callable[..., Path]


@pytest.fixture
def run_dir(toy_config: Path, throwaway_plugin: Throwaway, tmp_path: Path) -> RunDir:
    throwaway_plugin("second", "")
    composition = compose(toy_config, plugins="second", overrides=[f"run.dir={tmp_path / 'run'}"])
    return create_run(composition, toy_config)


def refusal(run_dir: RunDir) -> str:
    with pytest.raises(LockError) as caught:
        open_run(run_dir)
    assert caught.value.exit_code == 3
    return str(caught.value)


def test_unchanged_code_is_accepted(run_dir: RunDir) -> None:
    assert [plugin.name for plugin in open_run(run_dir).plugins] == ["toy", "second"]


def test_edited_source_is_refused_by_name_with_both_digests(run_dir: RunDir, tmp_path: Path) -> None:
    before = lock.digest("prl_second")
    (tmp_path / "site-prl_second" / "prl_second" / "__init__.py").write_text("x = 1")
    after = lock.digest("prl_second")
    assert before
    assert after
    message = refusal(run_dir)
    assert socket.gethostname() in message
    assert f"second: launched with 0.0.1 ({before[:16]}), here 0.0.1 ({after[:16]})" in message
    assert "toy:" not in message


def test_source_is_verified_before_it_is_run(run_dir: RunDir, tmp_path: Path) -> None:
    (tmp_path / "site-prl_second" / "prl_second" / "__init__.py").write_text("raise SystemExit(77)")
    assert "second: launched with" in refusal(run_dir)


def test_a_file_beside_the_module_counts(run_dir: RunDir, tmp_path: Path) -> None:
    (tmp_path / "site-prl_second" / "prl_second" / "kernel.cu").write_text("")
    assert "second: launched with" in refusal(run_dir)


def test_a_plugin_that_is_gone_is_named(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    site = tmp_path / "site-prl_second"
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(site)])
    assert "second: launched with 0.0.1" in (message := refusal(run_dir))
    assert "not installed here" in message


@pytest.mark.parametrize(
    ("plugins", "sentence"),
    [
        ('["second", "toy"]', "reordered: plugins.lock has toy, second; run.toml has second, toy"),
        ('["toy"]', "second: in plugins.lock, not in run.toml"),
        ('["toy", "second", "third"]', "third: in run.toml, not in plugins.lock"),
    ],
)
def test_another_list_of_plugins_is_refused(run_dir: RunDir, plugins: str, sentence: str) -> None:
    config = run_dir.config.read_text()
    run_dir.config.write_text(config.replace('plugins = ["toy", "second"]', f"plugins = {plugins}"))
    assert sentence in refusal(run_dir)


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda content: content["libraries"].update(torch="0.0.1"), "torch: launched with 0.0.1, here "),
        (lambda content: content.update(python="2.7"), "python: launched with 2.7, here 3."),
        (lambda content: content["prl"].update(version="0.0.0"), "prl: launched with 0.0.0 ("),
        (lambda content: content.update(digest="0"), "the lock was edited"),
    ],
)
def test_other_versions_are_refused(run_dir: RunDir, edit: Callable[[dict[str, object]], None], sentence: str) -> None:
    content = json.loads(run_dir.lock.read_text())
    edit(content)
    run_dir.lock.write_text(json.dumps(content))
    assert sentence in refusal(run_dir)


def test_a_missing_lock_is_a_lock_error(run_dir: RunDir) -> None:
    run_dir.lock.unlink()
    assert "cannot be read" in refusal(run_dir)


def test_the_digest_is_of_content_and_names_not_of_the_place(throwaway_plugin: Throwaway, tmp_path: Path) -> None:
    folder = throwaway_plugin("here", "x = 1")
    first = lock.digest("prl_here")
    (folder / "prl_here" / "__pycache__").mkdir()
    (folder / "prl_here" / "__pycache__" / "x.pyc").write_text("")
    assert lock.digest("prl_here") == first
    shutil.copytree(folder / "prl_here", folder / "prl_copy")
    assert lock.digest("prl_copy") == first
    (folder / "prl_copy" / "__init__.py").rename(folder / "prl_copy" / "other.py")
    assert lock.digest("prl_copy") != first
    assert lock.digest("prl_nowhere") is None


def test_the_lock_keeps_the_order_of_plugins(throwaway_plugin: Throwaway) -> None:
    throwaway_plugin("one", "")
    throwaway_plugin("two", "")
    content = lock.derive(["two", "one"], installed())
    assert [entry["name"] for entry in content["plugins"]] == ["two", "one"]
    assert content["digest"] != lock.derive(["one", "two"], installed())["digest"]
