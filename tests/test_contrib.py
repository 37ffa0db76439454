"""contrib/prl-* the way a stranger meets them: installed with pip beside prl, listed, chosen; forgotten, misspelt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = sorted((ROOT / "contrib").glob("prl-*"))
CONFIG = "configs/spell_backward.toml"


def run(*words: str, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m WORDS` in the checkout, with or without the plugin on the path."""
    environment = {**os.environ, "PYTHONPATH": str(site or "")}
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip installed the plugins, as it would into site-packages."""
    target = tmp_path_factory.mktemp("site")
    alone = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    installed = run("pip", "install", *alone, "--target", str(target), *map(str, PACKAGES))
    assert installed.returncode == 0, installed.stderr
    return target


def check(*edits: str, site: Path | None = None) -> tuple[int, str]:
    """Exit code of `prl config check`, and everything it said."""
    finished = run("prl", "config", "check", CONFIG, *edits, site=site)
    assert "Traceback" not in finished.stderr
    return finished.returncode, finished.stdout + finished.stderr


def test_an_installed_plugin_is_listed_with_what_it_provides(site: Path) -> None:
    finished = run("prl", "plugins", "--json", site=site)
    (cispo,) = (plugin for plugin in json.loads(finished.stdout) if plugin["name"] == "cispo")
    assert (cispo["status"], cispo["distribution"], cispo["version"]) == ("ok", "prl-cispo", "0.1.0")
    assert [(p["kind"], p["name"]) for p in cispo["provides"]] == [("loss", "cispo")]
    assert [(f["name"], f["default"]) for f in cispo["provides"][0]["fields"]] == [("clip_high", "5.0")]


def test_an_installed_plugin_is_chosen_by_the_config(site: Path) -> None:
    code, _ = check("--plugins", "cispo", "--set", "losses.rl.type=cispo", site=site)
    assert code == 0


def test_its_config_is_checked_like_any_other(site: Path) -> None:
    code, said = check(
        "--plugins", "cispo", "--set", "losses.rl.type=cispo", "--set", "losses.rl.clip_high=-1.0", site=site
    )
    assert code == 2
    assert "losses.rl.clip_high" in said
    assert "must be > 0, got -1.0" in said


def test_not_installed_the_error_names_the_plugin() -> None:
    code, said = check("--plugins", "cispo", "--set", "losses.rl.type=cispo")
    assert code == 2
    assert "cispo: not installed" in " ".join(said.split()).replace("cispo not installed", "cispo: not installed")


def test_not_named_the_error_says_which_plugin_to_name(site: Path) -> None:
    code, said = check("--set", "losses.rl.type=cispo", site=site)
    assert code == 2
    assert "installed plugin 'cispo' provides it but this run does not name it" in said


@pytest.mark.parametrize(
    "edits",
    [("--plugins", "cispoo", "--set", "losses.rl.type=cispo"), ("--plugins", "cispo", "--set", "losses.rl.type=cipso")],
    ids=["plugin", "loss"],
)
def test_misspelt_the_error_says_what_was_meant(site: Path, edits: tuple[str, ...]) -> None:
    code, said = check(*edits, site=site)
    assert code == 2
    assert "did you mean 'cispo'?" in said


def test_a_launcher_of_somebody_else_is_chosen(site: Path) -> None:
    there = ("launcher.type=kubernetes", "launcher.image=prl:1", "launcher.claim=runs", "launcher.mount=/shared")
    sets = [word for edit in (*there, "weights.type=disk", "run.dir=/shared/tale") for word in ("--set", edit)]
    finished = run("prl", "launch", CONFIG, "--plugins", "kubernetes,disk", *sets, "--dry-run", site=site)
    assert finished.returncode == 0, finished.stderr
    assert "to be started by 'kubernetes'\napiVersion: jobset.x-k8s.io/v1alpha2\nkind: JobSet\n" in finished.stdout


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_its_own_tests_pass_where_it_is_installed(package: Path, site: Path) -> None:
    tests = ("--rootdir", str(package), str(package / "tests"))
    finished = run("pytest", "-q", "-p", "no:cacheprovider", *tests, site=site)
    assert finished.returncode == 0, finished.stdout
    assert " passed" in finished.stdout
    assert " skipped" not in finished.stdout
