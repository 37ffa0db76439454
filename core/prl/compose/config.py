"""The shape of a run: one attrs class per section of the TOML.

Sections that a plugin provides (`model`, `losses.rl`, ...) are typed here by an empty base class; the provider's own
`config` class, a subclass, structures them once a `type` has chosen it. Every field has a default unless a run without
it makes no sense. Nothing here imports torch.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import attrs
from attrs import validators

from prl.providers import option

positive = validators.gt(0)
not_negative = validators.ge(0)


# --- bases of the sections that plugins provide -----------------------------------------------------------------------
@attrs.frozen(kw_only=True)
class ModelConfig:
    """Base of `[model]` sections."""


@attrs.frozen(kw_only=True)
class EnvironmentConfig:
    """Base of `[[environments]]` sections."""

    name: str = option("", help="name in metrics and records; by default the type")
    weight: float = option(1.0, help="share of training tasks drawn from this environment", validator=not_negative)
    runs_in: Literal["auto", "controller", "workers"] = option(
        "auto",
        help="processes that hold its conversations; the controller saves their way there and back, and must never be "
        "held up for more than a millisecond; auto: what the plugin says of itself",
    )


@attrs.frozen(kw_only=True)
class SchedulerConfig:
    """Base of `[scheduler]` sections."""


@attrs.frozen(kw_only=True)
class AdvantageConfig:
    """Base of `[advantage]` sections."""


@attrs.frozen(kw_only=True)
class LossConfig:
    """Base of `[losses.rl]`, `[losses.ce]` and `[losses.ref_kl]` sections."""


@attrs.frozen(kw_only=True)
class OptimizerConfig:
    """Base of `[optimizer]` sections."""

    keeps_float32: ClassVar[bool] = False
    """Whether it moves float32 copies of parameters that are held in fewer bits."""
    learning_rate: float = option(1e-6, help="peak learning rate of the rl phase", validator=positive)


@attrs.frozen(kw_only=True)
class QuantizationConfig:
    """Base of `[quantization]` sections."""


@attrs.frozen(kw_only=True)
class EngineConfig:
    """Base of `[engine]` sections."""

    count: int = option(1, help="number of engines", validator=positive)
    nodes: int = option(1, help="nodes the engines are spread over", validator=positive)
    host: str = option("", help="address engines bind to; empty: where the run's network is (run.network)")

    @property
    def gpus(self) -> int:
        """Devices of one engine."""
        return 1

    @property
    def spans(self) -> int:
        """Nodes of one engine: a process of its own on each, the first of which is the engine to the others."""
        return 1

    def share_of(self, node: int) -> str:
        """For people: what of an engine that spans nodes is on which of them."""
        return f"node {node} of {self.spans}"

    def kind_of(self, index: int) -> str:
        """Which part of the work that engine does, where engines divide it: `prefill` or `decode`."""
        del index
        return ""


BYTES_PER_SECOND = 100e6
"""What a deadline allows for weights, on top of `weights.deadline`."""


@attrs.frozen(kw_only=True)
class WeightTransportConfig:
    """Base of `[weights]` sections."""

    deadline: float = option(
        60.0, help="seconds an engine has for prepare or commit, on top of 1 s per 100 MB", validator=positive
    )

    def patience(self, nbytes: int) -> float:
        """Seconds that so many bytes may take."""
        return self.deadline + nbytes / BYTES_PER_SECOND


@attrs.frozen(kw_only=True)
class KernelConfig:
    """Base of `[kernels.<seam>]` sections."""


@attrs.frozen(kw_only=True)
class TrackerConfig:
    """Base of `[[trackers]]` sections."""


@attrs.frozen(kw_only=True)
class LauncherConfig:
    """Base of `[launcher]` sections."""

    spans_hosts: ClassVar[bool] = False
    """Whether processes may be on several machines: they listen on a network then, and share files but no memory."""


# --- core's own sections ----------------------------------------------------------------------------------------------
@attrs.frozen(kw_only=True)
class RunSection:
    """`[run]`: what this run is called and how long it goes."""

    steps: int = option(help="optimizer steps of the rl phase", validator=not_negative)
    dir: str = option("", help="run directory; by default runs/<config name>-<date>-<time>")
    seed: int = option(0, help="seeds task order, sampling and initial weights", validator=not_negative)
    event_log: Literal["off", "tokens", "all"] = option(
        "tokens", help="what `prl replay` needs: some 8 bytes per token; all: large columns (routed experts) too"
    )
    network: str = option(
        "auto",
        help="where processes listen: loopback, hostname (the address of the host's name), an interface (ib0) or a "
        "network (10.1.0.0/16); auto: loopback, and hostname where the launcher spans machines",
    )


@attrs.frozen(kw_only=True)
class TokenizerSection:
    """`[tokenizer]`: exactly one of `file` and `characters`."""

    file: str = option("", help="path of a Hugging Face tokenizer.json")
    characters: str = option("", help="alphabet of a character tokenizer; specials come from the model's chat format")


@attrs.frozen(kw_only=True)
class RolloutSection:
    """`[rollouts]`: how much is generated for a step."""

    groups_per_step: int = option(8, help="groups (tasks) per optimizer step", validator=positive)
    group_size: int = option(8, help="rollouts per group", validator=positive)
    temperature: float = option(1.0, help="sampling temperature of training rollouts", validator=positive)
    max_tokens: int = option(256, help="most tokens of one assistant turn", validator=positive)
    min_tokens: int = option(0, help="fewest tokens of one assistant turn", validator=not_negative)
    sequence_length: int = option(2048, help="most tokens of a whole rollout, prompt included", validator=positive)
    workers: int = option(1, help="environment worker processes", validator=positive)
    timeout: float = option(
        600.0, help="seconds a group may take before it fails and is tried again", validator=positive
    )
    retries: int = option(3, help="times a task is issued again after a cut or a failure", validator=not_negative)
    keep: bool = option(True, help="write every trained rollout to rollouts.jsonl")


@attrs.frozen(kw_only=True)
class WarmupSection:
    """`[warmup]`: supervised steps on the environments' demonstrations, through the ce stream, before rl."""

    steps: int = option(0, help="supervised steps before the first rollout", validator=not_negative)
    samples_per_step: int = option(64, help="demonstrations per step", validator=positive)
    learning_rate: float = option(1e-3, help="peak learning rate of the warm-up", validator=positive)


@attrs.frozen(kw_only=True)
class LossesSection:
    """`[losses]`: one loss per stream; a stream without one must stay empty."""

    rl: LossConfig = option(help="loss of the rl stream")
    ce: LossConfig | None = option(None, help="loss of the ce stream (warm-up)")
    ref_kl: LossConfig | None = option(None, help="loss of the ref_kl stream")


@attrs.frozen(kw_only=True)
class ScheduleSection:
    """`[schedule]`: the learning rate over a phase's steps."""

    type: Literal["constant", "cosine"] = option("constant", help="shape after the warm-up")
    warmup_steps: int = option(0, help="steps of linear rise from 0", validator=not_negative)
    final: float = option(0.0, help="last learning rate of cosine, as a share of the peak", validator=not_negative)


@attrs.frozen(kw_only=True)
class CostsSection:
    """`[trainer.costs]`: what micro-batches are balanced by, the model's operations; `prl bench train --calibrate`
    measures and writes it."""

    attention: float = option(
        1.0, help="time of an operation of attention, over that of one of a matrix product", validator=positive
    )
    index: float = option(1.0, help="the same of an indexer's scores", validator=positive)


@attrs.frozen(kw_only=True)
class TrainerSection:
    """`[trainer]`: the processes that train."""

    ranks: int = option(1, help="trainer processes: replicate x shard x context", validator=positive)
    nodes: int = option(1, help="nodes the ranks are spread over, evenly", validator=positive)
    replicate: int = option(1, help="copies of the model (HSDP)", validator=positive)
    shard: int = option(
        0,
        help="ranks that a copy's parameters are divided over (FSDP2); 0: all that are left",
        validator=not_negative,
    )
    context: int = option(1, help="ranks that share every sequence (context parallelism)", validator=positive)
    context_attention: Literal["auto", "ulysses", "gather"] = option(
        "auto",
        help="how grouped-query attention works over the ranks of context: ulysses, each some heads on all tokens; "
        "gather, each all heads on its own tokens; auto: ulysses where context divides the heads",
    )
    expert: int = option(
        1, help="ranks that the experts of a layer are divided over, out of shard x context", validator=positive
    )
    threads: int = option(1, help="CPU threads of each rank", validator=positive)
    micro_batch_tokens: int = option(8192, help="most tokens packed into one forward and backward", validator=positive)
    costs: CostsSection = option(attrs.Factory(CostsSection), help="by which micro-batches are balanced")
    logprob_chunk: int = option(1024, help="tokens whose logits exist at one time", validator=positive)
    max_grad_norm: float = option(1.0, help="gradients are clipped to this global norm", validator=positive)
    device: Literal["auto", "cpu", "cuda"] = option("auto", help="auto: cuda where there is one")
    activation_checkpointing: Literal["none", "full", "selective"] = option(
        "none", help="compute activations again in the backward pass: of no layer, of all, of some of their parts"
    )
    recompute: tuple[Literal["attention", "mlp", "experts", "mamba"], ...] = option(
        (), help="which parts of layers, under selective"
    )
    activation_offload: bool = option(
        False, help="keep what the recomputed parts are computed from in host memory until the backward pass"
    )
    compile: bool = option(False, help="compile every layer (torch.compile)")
    optimizer_offload: bool = option(False, help="keep the optimizer's state in host memory between steps")
    initial_weights: str = option("", help="folder with Hugging Face safetensors to start from; empty: random")
    router_replay: Literal["auto", "on", "off"] = option(
        "auto",
        help="send every token to the experts the engine sent it to; auto: where the model has experts and the engine "
        "reports them",
    )


@attrs.frozen(kw_only=True)
class KernelsSection:
    """`[kernels]`: who computes an operation of the model, in trainer and embedded engine, if not plain torch."""

    attend: KernelConfig | None = option(None, help="attention")
    sparse_attend: KernelConfig | None = option(None, help="attention over selected tokens")
    index_scores: KernelConfig | None = option(None, help="an indexer's score of every earlier token")
    select_topk: KernelConfig | None = option(None, help="the tokens an indexer selects")
    grouped_mm: KernelConfig | None = option(None, help="every expert's product with its own tokens")
    dispatch: KernelConfig | None = option(None, help="tokens to their experts, and back")
    ssd_scan: KernelConfig | None = option(None, help="Mamba-2's recurrence")
    causal_conv: KernelConfig | None = option(None, help="Mamba-2's short convolution")


@attrs.frozen(kw_only=True)
class EvaluationSection:
    """`[evaluation]`: held-out tasks, interleaved with training on the same engines."""

    every: int = option(
        0,
        help="steps between evaluations; 0: never (also runs before the first and after the last)",
        validator=not_negative,
    )
    tasks: int = option(128, help="held-out tasks per environment", validator=positive)
    temperature: float = option(0.0, help="0 is greedy", validator=not_negative)


@attrs.frozen(kw_only=True)
class CheckpointSection:
    """`[checkpoints]`: what a run can continue from."""

    every: int = option(0, help="steps between checkpoints; 0: by the clock alone", validator=not_negative)
    minutes: float = option(
        30.0, help="a checkpoint also after the first step so long after the last one; 0: never", validator=not_negative
    )
    keep_last: int = option(2, help="older checkpoints are removed; 0 keeps all", validator=not_negative)
    keep_every: int = option(
        0, help="checkpoints of every so many steps are never removed; 0: none is spared", validator=not_negative
    )
    huggingface: bool = option(True, help="also write the policy as Hugging Face safetensors into the checkpoint")
    resume: str = option("", help="checkpoint folder to start from")


@attrs.frozen(kw_only=True)
class FailureSection:
    """`[failures]`: what becomes of the run when processes die or hang, or rollouts fail for no fault of the policy."""

    restarts: int = option(
        5, help="times one process may be restarted within `window` steps before it is given up", validator=not_negative
    )
    window: int = option(50, help="steps of the run over which restarts are counted", validator=positive)
    backoff: float = option(
        1.0,
        help="seconds before the second restart within the window; doubles with each further one",
        validator=not_negative,
    )
    silence: float = option(
        60.0, help="seconds without a sign of life after which a process is killed; 0: never", validator=not_negative
    )
    minimum_engines: int = option(
        1, help="the run goes on without engines that were given up as long as so many are left", validator=positive
    )
    minimum_trainer_nodes: int = option(
        0,
        help="the run goes on without trainer nodes that were lost as long as so many are left; 0: half of them",
        validator=not_negative,
    )
    share: float = option(
        0.5,
        help="the run ends when more than this share of the last 16 steps' groups was lost to failures",
        validator=[positive, validators.le(1)],
    )


@attrs.frozen(kw_only=True)
class Run:
    """A whole run, composed and checked."""

    plugins: tuple[str, ...] = option(help="what may be used, in the order in which hooks are called")
    run: RunSection = option(help="name, length, seed")
    model: ModelConfig = option(help="what is trained")
    tokenizer: TokenizerSection = option(help="text to tokens")
    environments: tuple[EnvironmentConfig, ...] = option(help="what it is trained on", validator=validators.min_len(1))
    rollouts: RolloutSection = option(attrs.Factory(RolloutSection), help="generation")
    scheduler: SchedulerConfig = option(help="what runs next, what is fresh enough")
    advantage: AdvantageConfig = option(help="rewards to credit")
    losses: LossesSection = option(help="one loss per stream")
    optimizer: OptimizerConfig = option(help="how parameters move")
    schedule: ScheduleSection = option(attrs.Factory(ScheduleSection), help="learning rate over time")
    warmup: WarmupSection = option(attrs.Factory(WarmupSection), help="supervised start")
    trainer: TrainerSection = option(attrs.Factory(TrainerSection), help="trainer processes")
    quantization: QuantizationConfig = option(help="number formats")
    kernels: KernelsSection = option(attrs.Factory(KernelsSection), help="other ways to compute")
    engine: EngineConfig = option(help="inference")
    weights: WeightTransportConfig = option(help="how weights reach the engines")
    evaluation: EvaluationSection = option(attrs.Factory(EvaluationSection), help="held-out tasks")
    checkpoints: CheckpointSection = option(attrs.Factory(CheckpointSection), help="what to continue from")
    failures: FailureSection = option(attrs.Factory(FailureSection), help="what dies, hangs or fails")
    trackers: tuple[TrackerConfig, ...] = option((), help="where metrics are shown")
    launcher: LauncherConfig = option(help="where processes run")


SECTION_KINDS: dict[type, str] = {
    ModelConfig: "model",
    EnvironmentConfig: "environment",
    SchedulerConfig: "scheduler",
    AdvantageConfig: "advantage",
    LossConfig: "loss",
    OptimizerConfig: "optimizer",
    QuantizationConfig: "quantization",
    EngineConfig: "engine",
    WeightTransportConfig: "weight_transport",
    KernelConfig: "kernel",
    TrackerConfig: "tracker",
    LauncherConfig: "launcher",
}
"""Base class of a section -> the kind of provider that structures it."""
