"""Fixtures every test may use: plugins that exist for one test, and a run made of nothing but toys."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

TOY_PLUGIN = """
    import attrs
    from prl import hookimpl, option
    from prl.compose import config
    from prl.providers import (
        Advantage, Engine, Environment, Launcher, Loss, Model, Optimizer, Quantization, Scheduler, Tracker,
        WeightTransport,
    )

    @attrs.frozen(kw_only=True)
    class ToyModel(config.ModelConfig):
        width: int = option(8, help="hidden size", validator=config.positive)

    @attrs.frozen(kw_only=True)
    class ToyEnvironment(config.EnvironmentConfig):
        words: tuple[str, ...] = option(("a",), help="what it asks for")

    @attrs.frozen(kw_only=True)
    class ToyScheduler(config.SchedulerConfig):
        pass

    @attrs.frozen(kw_only=True)
    class ToyAdvantage(config.AdvantageConfig):
        pass

    @attrs.frozen(kw_only=True)
    class ToyLoss(config.LossConfig):
        clip_high: float = option(0.2, help="upper bound", validator=config.positive)

    @attrs.frozen(kw_only=True)
    class ToyOptimizer(config.OptimizerConfig):
        pass

    @attrs.frozen(kw_only=True)
    class ToyFormat(config.QuantizationConfig):
        pass

    @attrs.frozen(kw_only=True)
    class ToyEngine(config.EngineConfig):
        pass

    @attrs.frozen(kw_only=True)
    class ToyTransport(config.WeightTransportConfig):
        pass

    @attrs.frozen(kw_only=True)
    class ToyTracker(config.TrackerConfig):
        pass

    @attrs.frozen(kw_only=True)
    class ToyLauncher(config.LauncherConfig):
        pass

    @hookimpl
    def prl_models():
        ref = "prl_toy:nothing"
        return [Model(name="toy", config=ToyModel, summary="", build=ref, weights=ref, render=ref, special_tokens=())]

    @hookimpl
    def prl_environments():
        return [Environment(name="toy", config=ToyEnvironment, summary="", build="prl_toy:nothing")]

    @hookimpl
    def prl_schedulers():
        return [Scheduler(name="toy", config=ToyScheduler, summary="", build="prl_toy:nothing")]

    @hookimpl
    def prl_advantages():
        return [Advantage(name="toy", config=ToyAdvantage, summary="", build="prl_toy:nothing")]

    @hookimpl
    def prl_losses():
        return [Loss(name="toy", config=ToyLoss, summary="", build="prl_toy:describe")]

    @hookimpl
    def prl_optimizers():
        return [Optimizer(name="toy", config=ToyOptimizer, summary="", build="prl_toy:nothing")]

    @hookimpl
    def prl_quantizations():
        return [Quantization(name="toy", config=ToyFormat, summary="", build="prl_toy:nothing")]

    @hookimpl
    def prl_engines():
        return [Engine(name="toy", config=ToyEngine, summary="", serve="prl_toy:nothing", connect="prl_toy:nothing")]

    @hookimpl
    def prl_weight_transports():
        ref = "prl_toy:nothing"
        return [WeightTransport(name="toy", config=ToyTransport, summary="", send=ref, receive=ref)]

    @hookimpl
    def prl_trackers():
        return [Tracker(name="toy", config=ToyTracker, summary="", build="prl_toy:nothing")]

    @hookimpl
    def prl_launchers():
        return [Launcher(name="toy", config=ToyLauncher, summary="", build="prl_toy:nothing")]

    def nothing(*args):
        return None

    def describe(config, *rest):
        return f"clip {config.clip_high}, {rest}"
"""

TOY_CONFIG = """
plugins = ["toy"]
[run]
steps = 3
[model]
type = "toy"
[tokenizer]
characters = "abc"
[[environments]]
type = "toy"
[scheduler]
type = "toy"
[advantage]
type = "toy"
[losses.rl]
type = "toy"
[optimizer]
type = "toy"
[quantization]
type = "toy"
[engine]
type = "toy"
[weights]
type = "toy"
[launcher]
type = "toy"
"""

ThrowawayPlugin = Callable[..., Path]


@pytest.fixture
def throwaway_plugin(tmp_path: Path) -> Iterator[ThrowawayPlugin]:
    """`throwaway_plugin(name, source, requires=..., version=...)`: a distribution that is installed for one test.

    Writes the package `prl_<name>` and its metadata into a folder of its own, puts that on `sys.path` and returns it
    (a subprocess needs it on PYTHONPATH). `distribution` renames the distribution, so that two can claim one name.
    """
    folders: list[Path] = []
    modules = set(sys.modules)

    def install(
        name: str,
        source: str,
        *,
        requires: Sequence[str] = (),
        version: str = "0.0.1",
        distribution: str = "",
    ) -> Path:
        distribution = distribution or f"prl_{name}"
        folder = tmp_path / f"site-{distribution}"
        package = folder / distribution
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(textwrap.dedent(source))
        # importlib reads the distribution's name up to the first hyphen, so it is spelt with underscores here.
        metadata = folder / f"{distribution}-{version}.dist-info"
        metadata.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {distribution.replace('_', '-')}", f"Version: {version}"]
        lines += [f"Requires-Dist: {requirement}" for requirement in requires]
        (metadata / "METADATA").write_text("\n".join(lines) + "\n")
        (metadata / "entry_points.txt").write_text(f"[prl]\n{name} = {distribution}\n")
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()
        folders.append(folder)
        return folder

    yield install
    for folder in folders:
        sys.path.remove(str(folder))
    for module in set(sys.modules) - modules:
        if module.startswith("prl_") and any(str(f) in str(sys.modules[module].__file__) for f in folders):
            del sys.modules[module]


@pytest.fixture
def toy_plugin(throwaway_plugin: ThrowawayPlugin) -> Path:
    """The folder of plugin `toy`, which provides one `toy` of every kind."""
    return throwaway_plugin("toy", TOY_PLUGIN)


@pytest.fixture
def toy_config(toy_plugin: Path, tmp_path: Path) -> Path:
    """A config that composes with plugin `toy` alone."""
    config = tmp_path / "toy.toml"
    config.write_text(TOY_CONFIG)
    return config
