"""What a plugin provides: one inert record per thing with a name in a config, and the Protocol of what it builds.

A registration hook returns `Provider` records. A config's `type = "..."` chooses one; its `config` class structures the
section; its `Ref` strings are imported only in the process that needs that part. From then on it is plain calls. See
docs/plugins.md for a walk through and docs/hooks.md for every hook.
"""

from __future__ import annotations

from prl.providers.learning import (
    Advantage,
    AdvantageFunction,
    Kernel,
    Loss,
    LossFunction,
    LossInputs,
    LossOutput,
    NumberFormat,
    Optimizer,
    Quantization,
    StatefulAdvantage,
)
from prl.providers.models import (
    Degree,
    LanguageModel,
    Limit,
    Model,
    Renderer,
    Tokenizer,
    WeightMap,
)
from prl.providers.provider import (
    Provider,
    Ref,
    option,
)
from prl.providers.rollouts import (
    Drop,
    EngineLoad,
    Env,
    Environment,
    InFlight,
    LoadAwareScheduler,
    Pipeline,
    RolloutScheduler,
    Scheduler,
    Score,
)
from prl.providers.running import (
    HandingLauncher,
    Launcher,
    MetricTracker,
    ProcessLauncher,
    RemoteRun,
    RunInfo,
    SweepingLauncher,
    Tracker,
)
from prl.providers.serving import (
    Engine,
    EngineClient,
    ResumableClient,
    WeightReceiver,
    WeightSender,
    WeightTransport,
)

KINDS: dict[str, type[Provider]] = {
    "model": Model,
    "environment": Environment,
    "scheduler": Scheduler,
    "advantage": Advantage,
    "loss": Loss,
    "optimizer": Optimizer,
    "quantization": Quantization,
    "engine": Engine,
    "weight_transport": WeightTransport,
    "kernel": Kernel,
    "tracker": Tracker,
    "launcher": Launcher,
}
"""Kind -> its record. The registration hook of a kind is `prl_<kind>s` (see hookspecs.py)."""

__all__ = [
    "KINDS",
    "Advantage",
    "AdvantageFunction",
    "Degree",
    "Drop",
    "Engine",
    "EngineClient",
    "EngineLoad",
    "Env",
    "Environment",
    "HandingLauncher",
    "InFlight",
    "Kernel",
    "LanguageModel",
    "Launcher",
    "Limit",
    "LoadAwareScheduler",
    "Loss",
    "LossFunction",
    "LossInputs",
    "LossOutput",
    "MetricTracker",
    "Model",
    "NumberFormat",
    "Optimizer",
    "Pipeline",
    "ProcessLauncher",
    "Provider",
    "Quantization",
    "Ref",
    "RemoteRun",
    "Renderer",
    "ResumableClient",
    "RolloutScheduler",
    "RunInfo",
    "Scheduler",
    "Score",
    "StatefulAdvantage",
    "SweepingLauncher",
    "Tokenizer",
    "Tracker",
    "WeightMap",
    "WeightReceiver",
    "WeightSender",
    "WeightTransport",
    "option",
]
