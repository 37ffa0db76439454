"""Composing a run: what is said about mistakes, and what a composition can do."""

from __future__ import annotations

import textwrap
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs
import pytest
from prl.compose.compose import Composition, compose, create_run, open_run, planned_run_dir
from prl.errors import ConfigError, PluginError, UserError

Throwaway = Callable[..., Path]

OTHER_LOSS = """
    import attrs
    from prl import hookimpl
    from prl.compose.config import LossConfig
    from prl.providers import Loss

    @attrs.frozen(kw_only=True)
    class Config(LossConfig):
        pass

    @hookimpl
    def prl_losses():
        extra = dict(requires={requires!r}, replaces={replaces!r})
        return [Loss(name="{name}", config=Config, summary="", build="{ref}", **extra)]
"""


def other_loss(name: str, *, ref: str = "x:y", requires: Sequence[str] = (), replaces: str | None = None) -> str:
    return OTHER_LOSS.format(name=name, ref=ref, requires=tuple(requires), replaces=replaces)


def mistakes(config: Path, text: str) -> dict[str, str]:
    """Dotted path -> sentence, for a config that extends `config`."""
    extending = config.with_name("mistaken.toml")
    extending.write_text(f'extends = "{config.name}"\n' + textwrap.dedent(text))
    with pytest.raises(ConfigError) as caught:
        compose(extending)
    return {p.path: p.message for p in caught.value.problems}


def test_a_composition_knows_what_its_names_mean(toy_config: Path) -> None:
    composition = compose(toy_config, overrides=["losses.rl.clip_high=0.3"])
    loss = composition.run.losses.rl
    assert [plugin.name for plugin in composition.plugins] == ["toy"]
    assert composition.run.plugins == ("toy",)
    assert composition.provider(loss).name == "toy"
    assert composition.load("prl_toy:nothing")() is None
    assert composition.build(loss, 1, 2) == "clip 0.3, (1, 2)"
    assert [path for path, _ in composition.sections()] == [
        "model",
        "environments[0]",
        "scheduler",
        "advantage",
        "losses.rl",
        "optimizer",
        "quantization",
        "engine",
        "weights",
        "launcher",
    ]


def test_an_environment_is_named_after_its_type(toy_config: Path) -> None:
    assert compose(toy_config).run.environments[0].name == "toy"
    assert compose(toy_config, overrides=["environments.0.name=easy"]).run.environments[0].name == "easy"


def test_the_resolved_config_composes_to_the_same_run(toy_config: Path, tmp_path: Path) -> None:
    composition = compose(toy_config, overrides=["run.seed=3", f"run.dir={tmp_path / 'run'}"])
    run_dir = create_run(composition, toy_config)
    again = compose(run_dir.config)
    assert attrs.evolve(again.run, run=composition.run.run) == composition.run
    assert again.run.run == attrs.evolve(composition.run.run, dir="")
    assert tomllib.loads(run_dir.config.read_text())["plugins"] == ["toy"]


def test_five_mistakes_of_five_kinds_get_five_sentences(toy_config: Path) -> None:
    assert mistakes(
        toy_config,
        """
        [losses.rl]
        type = "toyy"
        [model]
        witdh = 3
        [trainer]
        ranks = "2"
        max_grad_norm = -1
        [losses.ce]
        """,
    ) == {
        "losses.rl.type": "unknown loss 'toyy' (did you mean 'toy'?)",
        "model.witdh": "unknown key 'witdh' (did you mean 'width'?)",
        "trainer.ranks": "expected int, got str '2'",
        "trainer.max_grad_norm": "must be > 0, got -1.0",
        "losses.ce.type": "missing: which loss? This run's plugins provide 'toy'",
    }


def test_rules_across_sections(toy_config: Path) -> None:
    assert mistakes(
        toy_config,
        """
        [tokenizer]
        file = "tokenizer.json"
        [warmup]
        steps = 2
        [rollouts]
        min_tokens = 9
        max_tokens = 8
        [trainer]
        initial_weights = "nowhere"
        [[environments]]
        type = "toy"
        [[environments]]
        type = "toy"
        """,
    ) == {
        "tokenizer": "needs exactly one of file and characters, got both",
        "environments": "2 of them are named 'toy'; give each a `name` of its own",
        "rollouts.min_tokens": "must be <= max_tokens (8), got 9",
        "losses.ce": "missing section: warmup.steps is 2, and it trains this stream",
        "tokenizer.file": f"there is no 'tokenizer.json' (from {Path.cwd()})",
        "trainer.initial_weights": f"there is no 'nowhere' (from {Path.cwd()})",
    }


def test_environments_that_are_never_drawn_from(toy_config: Path) -> None:
    with pytest.raises(ConfigError, match="every weight is 0"):
        compose(toy_config, overrides=["environments.0.weight=0"])


def test_plugins_check_across_sections_too(toy_config: Path, throwaway_plugin: Throwaway) -> None:
    throwaway_plugin(
        "strict",
        """
        from prl import hookimpl
        @hookimpl
        def prl_validate(run):
            yield f"model.width {run.model.width} is odd"
        """,
    )
    throwaway_plugin("clumsy", "from prl import hookimpl\n@hookimpl\ndef prl_validate(run): return run.nothing")
    with pytest.raises(ConfigError) as caught:
        compose(toy_config, plugins="strict,clumsy", overrides=["model.width=3"])
    assert [p.message for p in caught.value.problems] == [
        "model.width 3 is odd (plugin 'strict')",
        "prl_validate failed: AttributeError: 'Run' object has no attribute 'nothing' (plugin 'clumsy')",
    ]


def test_all_plugin_failures_are_reported_together(toy_config: Path, throwaway_plugin: Throwaway) -> None:
    throwaway_plugin("boom", "import deep_ep_not_here")
    throwaway_plugin("copy", other_loss("toy"))
    with pytest.raises(PluginError) as caught:
        compose(toy_config, plugins="boom,nowhere,copy")
    assert str(caught.value).splitlines()[1:] == [
        "  boom      ModuleNotFoundError: No module named 'deep_ep_not_here'",
        "  nowhere   not installed",
        "  copy      loss 'toy' is provided by plugins toy and copy; drop one (--plugins no:toy) "
        'or have one declare replaces="toy:toy"',
    ]
    assert caught.value.exit_code == 2


def test_a_misspelt_plugin_is_not_reported_again_for_its_sections(
    toy_config: Path, throwaway_plugin: Throwaway
) -> None:
    throwaway_plugin("contributed", other_loss("thirty_lines"))
    with pytest.raises(PluginError) as caught:
        compose(toy_config, plugins="contributd", overrides=["losses.rl.type=thirty_lines"])
    assert "contributd   not installed (did you mean 'contributed'?)" in str(caught.value)


def test_a_missing_plugin_is_reported_once_and_other_mistakes_with_it(toy_config: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(toy_config, plugins="absent_one", overrides=["losses.rl.type=thirty_lines", "run.steps=-1"])
    assert [(p.path, p.message) for p in caught.value.problems] == [
        ("plugins", "absent_one: not installed"),
        ("run.steps", "must be >= 0, got -1"),
    ]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "thirty_lines",
            "unknown loss 'thirty_lines'; installed plugin 'contributed' provides it but this run does not name it; "
            "add it to plugins",
        ),
        ("tyo", "unknown loss 'tyo' (did you mean 'toy'?)"),
        ("zzz", "unknown loss 'zzz'; no installed plugin provides it; this run has 'toy'"),
    ],
)
def test_an_unknown_type_is_looked_for(toy_config: Path, throwaway_plugin: Throwaway, name: str, sentence: str) -> None:
    throwaway_plugin("contributed", other_loss("thirty_lines"))
    with pytest.raises(ConfigError) as caught:
        compose(toy_config, overrides=[f"losses.rl.type={name}"])
    assert [(p.path, p.message) for p in caught.value.problems] == [("losses.rl.type", sentence)]


def test_what_a_provider_requires_is_probed_where_the_run_is(toy_config: Path, throwaway_plugin: Throwaway) -> None:
    source = other_loss("heavy", requires=["deep_ep_not_here"])
    throwaway_plugin("heavy", source, requires=["deep-ep-not-here>=1; extra == 'kernels'"])
    overrides = ["losses.rl.type=heavy"]
    with pytest.raises(ConfigError) as caught:
        compose(toy_config, plugins="heavy", overrides=overrides)
    assert [(p.path, p.message) for p in caught.value.problems] == [
        (
            "losses.rl",
            "loss 'heavy' is unavailable here: needs deep_ep_not_here; pip install 'prl-heavy[kernels]'",
        )
    ]
    assert compose(toy_config, plugins="heavy", overrides=overrides, probe=False).run.plugins == ("toy", "heavy")


def test_replaces_takes_a_name_over(toy_config: Path, throwaway_plugin: Throwaway) -> None:
    throwaway_plugin("better", other_loss("toy", replaces="toy:toy"))
    composition = compose(toy_config, plugins="better")
    assert composition.registry.of_config(type(composition.run.losses.rl)).plugin == "better"


def test_a_part_that_cannot_be_imported_names_its_plugin(toy_config: Path, throwaway_plugin: Throwaway) -> None:
    folder = throwaway_plugin("late", other_loss("late", ref="prl_late.part:build"))
    part = folder / "prl_late" / "part.py"
    part.write_text("\nimport deep_ep_not_here\n")
    composition = compose(toy_config, plugins="late", overrides=["losses.rl.type=late"])
    with pytest.raises(PluginError) as caught:
        composition.build(composition.run.losses.rl)
    assert str(caught.value) == (
        "plugin 'late' (loss 'late') cannot load prl_late.part:build: "
        f"ModuleNotFoundError: No module named 'deep_ep_not_here' ({part}:2)"
    )


# --- the run directory ------------------------------------------------------------------------------------------------
def created(toy_config: Path, tmp_path: Path) -> tuple[Composition, Path]:
    composition = compose(toy_config, overrides=[f"run.dir={tmp_path / 'run'}"])
    return composition, create_run(composition, toy_config).path


@pytest.mark.parametrize("place", ["/proc/run", "file/run"])
def test_a_run_directory_that_cannot_be_made_is_refused(toy_config: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    composition = compose(toy_config, overrides=[f"run.dir={tmp_path / place}"])
    with pytest.raises(UserError, match=f"{place} cannot be made: (No such|Not a)"):
        create_run(composition, toy_config)


def test_a_run_directory_holds_what_a_worker_needs(toy_config: Path, tmp_path: Path) -> None:
    composition, path = created(toy_config, tmp_path)
    assert {p.name for p in path.iterdir()} == {"run.toml", "plugins.lock", "token", "logs"}
    assert (path / "token").stat().st_mode & 0o077 == 0
    assert (path / "logs" / "attempt-1").is_dir()
    with pytest.raises(UserError, match="already holds a run"):
        create_run(composition, toy_config)


def test_by_default_a_run_is_named_after_its_config(
    toy_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = create_run(compose(toy_config), toy_config)
    assert first.path.parent == tmp_path / "runs"
    assert first.path.name.startswith("toy-")
    repeated = planned_run_dir(compose(first.config), first.config)
    assert repeated.path.name.startswith("toy-")
    assert not repeated.path.name.startswith("toy-2-")


def test_a_worker_sees_the_composition_that_was_launched(toy_config: Path, tmp_path: Path) -> None:
    composition, path = created(toy_config, tmp_path)
    from prl.run_dir import RunDir

    opened = open_run(RunDir(path))
    assert attrs.evolve(opened.run, run=composition.run.run) == composition.run
    assert opened.build(opened.run.losses.rl) == "clip 0.2, ()"
