"""The command line: exit codes, sentences, and what it does not import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from prl import __version__
from prl.cli import main
from prl.run_dir import RunDir

Throwaway = Callable[..., Path]

HEAVY = ("torch", "vllm", "transformers", "wandb", "reasoning_gym", "rich", "numpy", "zmq", "aiohttp")

LAUNCHER = """
    import attrs
    from pathlib import Path
    from prl import hookimpl
    from prl.compose.config import LauncherConfig
    from prl.providers import Launcher

    @attrs.frozen(kw_only=True)
    class Config(LauncherConfig):
        code: int = 0

    @hookimpl
    def prl_launchers():
        return [Launcher(name="recorder", config=Config, summary="", build="prl_recorder:Recorder")]

    class Recorder:
        def __init__(self, config, run_dir):
            self.config, self.run_dir = config, run_dir

        def render(self, plan):
            return "rendered " + ",".join(process.name for process in plan.processes)

        def check(self, plan):
            pass

        def launch(self, plan):
            (self.run_dir / "launched").write_text(str(plan.run_dir.path))
            return self.config.code
"""


@pytest.fixture
def config(toy_config: Path, throwaway_plugin: Throwaway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config whose launcher starts nothing, in an empty working directory."""
    throwaway_plugin("recorder", LAUNCHER)
    path = tmp_path / "work" / "recorded.toml"
    path.parent.mkdir()
    path.write_text('extends = "../toy.toml"\nplugins = ["recorder"]\n[launcher]\ntype = "recorder"\n')
    monkeypatch.chdir(path.parent)
    return path


def test_launch_hands_the_plan_to_the_launcher_and_returns_its_code(config: Path) -> None:
    assert main(["launch", str(config), "--set", "launcher.code=1", "--set", "run.dir=there"]) == 1
    run_dir = RunDir.existing("there")
    assert (run_dir.path / "launched").read_text() == str(run_dir.path)
    assert main(["launch", str(run_dir.config)]) == 1


def test_a_dry_run_shows_the_composition_and_makes_nothing(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", str(config), "--dry-run"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["losses.rl", "toy", "toy", "prl-toy", "0.0.1"] in lines
    assert ["launcher", "recorder", "recorder", "prl-recorder", "0.0.1"] in lines
    assert ["rendered", "controller-0,engine-0,environment-0,trainer-0"] in lines
    assert list(config.parent.iterdir()) == [config]


@pytest.mark.parametrize("command", [["launch"], ["launch", "--dry-run"], ["config", "check"], ["config", "show"]])
def test_what_the_user_wrote_wrong_is_exit_code_2(
    config: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    assert main([*command, str(config), "--set", "run.steps=many"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [f"{config}: 1 problem", "  run.steps   expected int, got str 'many'"]
    assert list(config.parent.iterdir()) == [config]


def test_a_launch_may_not_reuse_a_directory(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", str(config), "--set", "run.dir=there"]) == 0
    assert main(["launch", str(config), "--set", "run.dir=there"]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_config_check_and_show(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", str(config)]) == 0
    assert capsys.readouterr().out == f"{config}: ok, 2 plugins\n"
    assert main(["config", "show", str(config), "--set", "run.seed=5"]) == 0
    shown = capsys.readouterr().out
    again = config.with_name("again.toml")
    again.write_text(shown)
    assert main(["config", "show", str(again)]) == 0
    assert capsys.readouterr().out == shown


def test_config_diff_shows_dotted_paths(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = config.with_name("other.toml")
    other.write_text('extends = "recorded.toml"\n[run]\nseed = 0\n[model]\nwidth = 16\n[losses.ce]\ntype = "toy"\n')
    assert main(["config", "diff", str(config), str(other)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "losses.ce.clip_high: (absent) -> 0.2",
        "losses.ce.type: (absent) -> 'toy'",
        "model.width: 8 -> 16",
    ]


# --- plugins ----------------------------------------------------------------------------------------------------------
def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    assert main(["plugins", "--json"]) == 0
    return {plugin["name"]: plugin for plugin in json.loads(capsys.readouterr().out)}


def test_plugins_lists_the_broken_beside_the_sound(
    toy_plugin: Path, throwaway_plugin: Throwaway, capsys: pytest.CaptureFixture[str]
) -> None:
    throwaway_plugin("boom", "import deep_ep_not_here")
    throwaway_plugin("future", "", requires=["prl>=99"])
    throwaway_plugin("watcher", "from prl import hookimpl\n@hookimpl\ndef prl_step_end(step): pass")
    found = listed(capsys)
    assert found["boom"]["status"] == "broken: ModuleNotFoundError: No module named 'deep_ep_not_here'"
    assert found["future"]["status"] == f"incompatible: needs prl>=99, this is prl {__version__}"
    assert (found["watcher"]["status"], found["watcher"]["hooks"]) == ("ok", ["prl_step_end"])
    assert found["toy"]["distribution"] == "prl-toy"
    kinds = {provider["kind"] for provider in found["toy"]["provides"]}  # type: ignore[attr-defined]
    assert len(kinds) == 11
    assert main(["plugins"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("toy "))
    assert "loss toy" in row


def test_plugins_show_describes_fields_and_imports(toy_plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "show", "toy", "--json"]) == 0
    providers = json.loads(capsys.readouterr().out)["provides"]
    model = next(provider for provider in providers if provider["kind"] == "model")
    assert model["fields"] == [{"name": "width", "type": "int", "default": "8", "help": "hidden size"}]
    assert model["imports"]["render"] == {"by": "environment", "reference": "prl_toy:nothing"}
    assert main(["plugins", "show", "toy"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["width", "int", "=", "8", "hidden", "size"] in lines
    assert ["serve", "prl_toy:nothing", "in", "engine"] in lines


def test_plugins_show_of_a_misspelt_name(toy_plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "show", "toyy"]) == 2
    assert capsys.readouterr().err == "plugin 'toyy' is not installed (did you mean 'toy'?)\n"


def test_plugins_show_of_what_a_plugin_provides_names_the_plugin(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "show", "dppo"]) == 2
    assert "loss 'dppo' is provided by the plugin 'policy_gradient'" in capsys.readouterr().err


# --- processes --------------------------------------------------------------------------------------------------------
def python(*arguments: str, path: list[Path]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plugins"], ["plugins", "show", "toy"], ["launch", "CONFIG", "--dry-run"]]
)
def test_looking_around_imports_nothing_heavy(config: Path, tmp_path: Path, arguments: list[str]) -> None:
    arguments = [str(config) if argument == "CONFIG" else argument for argument in arguments]
    script = (
        "import sys\nfrom prl.cli import main\n"
        f"try: code = main({arguments!r})\n"
        "except SystemExit as stop: code = stop.code\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], code, file=sys.stderr)"
    )
    done = python("-c", script, path=[tmp_path / "site-prl_toy", tmp_path / "site-prl_recorder"])
    assert done.stderr.splitlines()[-1] == "[] 0"


def test_a_worker_whose_plugin_was_edited_exits_3_and_names_it(config: Path, tmp_path: Path) -> None:
    assert main(["launch", str(config), "--set", "run.dir=there"]) == 0
    (tmp_path / "site-prl_toy" / "prl_toy" / "part.py").write_text("")
    done = python(
        *("-m", "prl", "worker", "--run", "there", "--role", "controller"),
        path=[tmp_path / "site-prl_recorder", tmp_path / "site-prl_toy"],
    )
    assert done.returncode == 3
    assert "toy: launched with 0.0.1" in done.stderr
    assert "recorder:" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_worker_of_an_unknown_role_or_run(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["worker", "--run", "nowhere", "--role", "engine"]) == 2
    assert "not a run directory" in capsys.readouterr().err
    assert main(["worker", "--run", "nowhere", "--role", "engin"]) == 2
    assert "expected one of controller, environment, engine" in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error(config: Path, tmp_path: Path) -> None:
    script = f"from prl.cli import main; import sys; sys.exit(main(['config', 'show', {str(config)!r}]))"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'site-prl_toy'}:{tmp_path / 'site-prl_recorder'}"}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-u", "-c", script], env=environment, stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_sweep_is_one_run_per_combination(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    axes = ["--sweep", "run.seed=3,4", "--sweep", "launcher.code=0,1"]
    words = ["launch", str(config), "--set", "run.dir=swept", *axes]
    assert main([*words, "--dry-run"]) == 0
    assert "4 runs (not made)" in capsys.readouterr().out
    assert not Path("swept").exists()
    assert main(words) == 1  # of two of them
    made = sorted(path.name for path in Path("swept").iterdir())
    assert made == ["0-seed=3-code=0", "1-seed=3-code=1", "2-seed=4-code=0", "3-seed=4-code=1"]
    assert [tomllib.loads(Path("swept", name, "run.toml").read_text())["run"]["seed"] for name in made] == [3, 3, 4, 4]
    assert [Path("swept", name, "launched").exists() for name in made] == [True] * 4


def test_a_sweep_with_a_mistake_makes_nothing(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["launch", str(config), "--set", "run.dir=swept", "--sweep", "run.steps=1,-1"]
    assert main(words) == 2
    assert "run.steps" in capsys.readouterr().err
    assert not Path("swept").exists()
