"""What a plugin provides: one inert record per thing with a name in a config, and the Protocol of what it builds.

A registration hook returns `Provider` records. A config's `type = "..."` chooses one; its `config` class structures the
section; its `Ref` strings are imported only in the process that needs that part. From then on it is plain calls. See
docs/plugins.md for a walk through and docs/hooks.md for every hook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

import attrs

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from prl.blocks.context import Context
    from prl.compose.config import Run
    from prl.compose.plan import LaunchPlan
    from prl.rollout.conversation import Conversation
    from prl.run_dir import RunDir
    from prl.types import Completion, Group, Manifest, Message, Sampling, Split, Task, Tool

Ref: TypeAlias = str
"""`"package.module:attribute"`, imported lazily."""


def option(default: Any = attrs.NOTHING, *, help: str, **kwargs: Any) -> Any:
    """A field of a config section with the sentence `prl plugins show` prints for it.

    Example:
        >>> @attrs.frozen(kw_only=True)
        ... class CispoConfig(LossConfig):
        ...     clip_high: float = option(5.0, help="upper bound of the detached importance ratio")
    """
    return attrs.field(default=default, metadata={"help": help}, **kwargs)


@attrs.frozen(kw_only=True)
class Provider:
    """A named choice for a config section."""

    name: str
    """The `type` that chooses it."""
    config: type
    """attrs class of the section, a subclass of the kind's `...Config` base in `prl.compose.config`."""
    summary: str
    """One line for `prl plugins`."""
    requires: tuple[str, ...] = ()
    """Import names that must be installed where the run is; probed without importing."""
    replaces: str | None = None
    """`"plugin:name"` of a provider this one deliberately takes over."""


# --- model ------------------------------------------------------------------------------------------------------------
@attrs.frozen(kw_only=True)
class Model(Provider):
    """A family of language models; the same module serves the trainer and the embedded engine."""

    build: Ref
    """`(config, vocab_size) -> nn.Module` implementing `LanguageModel`, on the current default device, initialised."""
    weights: Ref
    """`(config, vocab_size) -> WeightMap` between the module's tensors and Hugging Face's names."""
    render: Ref
    """`(config, tokenizer) -> Renderer`; imports no torch."""
    special_tokens: tuple[str, ...]
    """Special tokens of the chat format; a character tokenizer is given these."""
    float32: tuple[str, ...] = ()
    """Endings of the names of tensors that are float32 in every number format, in the module and on every wire."""
    routing: Ref | None = None
    """`(config) -> prl.routes.Routing` of a model with experts; imports no torch. None: nothing is routed."""
    unquantized: tuple[str, ...] = ()
    """Regular expressions, found in the published names of matrices that no number format quantises (routers, ...)."""
    checkpoint_types: tuple[str, ...] = ()
    """`model_type` of the config.json of the family's checkpoints; `config` then has a field `checkpoint`."""
    limits: Ref | None = None
    """`(config, vocab_size) -> Sequence[Limit]`; imports no torch. UserError says why there is no such model."""


Degree: TypeAlias = Literal["expert", "tensor", "context"]
"""A kind of parallelism: over how many ranks experts, heads or a sequence are spread."""


@attrs.frozen(kw_only=True)
class Limit:
    """What a model's shape says about a degree of parallelism: it must divide `count`.

    Example:
        >>> Limit(degree="tensor", of="groups of Mamba-2", count=8)  # 1, 2, 4 or 8
    """

    degree: Degree
    of: str
    """What is spread."""
    count: int
    reason: str = ""
    """Why it cannot be spread further, where that is no matter of arithmetic."""


class LanguageModel(Protocol):
    """What trainer and embedded engine call; an nn.Module over `prl.blocks` (or anything that answers to this).

    One packed layout: `T` tokens of `S` documents one after the other, no batch dimension, no padding.
    """

    layers: nn.ModuleList
    """The units of activation checkpointing, compilation and FSDP."""

    def hidden(self, tokens: Tensor, context: Context) -> Tensor:
        """tokens [T] int64 -> final normed hidden states [T, D].

        A model with an attribute `shares_prefixes` that is True is trained on rows that several documents share
        (`Context.shared`).
        """

    def head(self) -> Tensor:
        """The output projection [vocab, D]: logits = hidden @ head().T"""

    def new_caches(self, rows: int, length: int) -> list[Any]:
        """One cache per layer with room for `rows` sequences of `length` tokens, in the parameters' dtype and device.

        Each cache has `copy_row(source, target, length)`: the first `length` tokens of one row into another; and
        `prefix_reusable`, False where the state after a row's last token is all there is, so that only a whole row can
        be copied.
        """


class WeightMap(Protocol):
    """Reversible, streaming, exact: `from_hf(to_hf(x)) == x`, bit for bit, for every tensor."""

    def to_hf(self, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        """A module tensor -> the Hugging Face tensors it is stored as (views where possible)."""

    def from_hf(self, tensors: Mapping[str, Any], name: str) -> Tensor:
        """The module tensor `name`, read from a mapping of Hugging Face names to tensors (lazily indexed)."""

    def hf_config(self) -> Mapping[str, Any]:
        """The `config.json` transformers and vLLM need to load the exported weights."""

    @property
    def carried(self) -> Sequence[str]:
        """Prefixes of checkpoint tensors the module has no part for and checkpoints keep (vision, token prediction)."""


class Tokenizer(Protocol):
    """Text to token ids and back. `prl.rollout.tokenizer.load` builds one from the `[tokenizer]` section."""

    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def special(self, token: str) -> int:
        """Id of a special token such as `<|im_end|>`; a UserError names the token when there is none."""


class Renderer(Protocol):
    """Messages to tokens and back, append-only: a later turn extends the ids of the one before it."""

    stop_tokens: tuple[int, ...]

    def start(self, messages: Sequence[Message], *, tools: Sequence[Tool] = ()) -> list[int]:
        """Tokens of a conversation's opening messages, ending where the assistant begins to speak.

        `tools` are declared to the policy where its chat format has a place for them.
        """

    def extend(self, messages: Sequence[Message], *, stopped: bool) -> list[int]:
        """Tokens to append after a sampled assistant turn so that it can speak again after `messages`.

        `stopped` says whether the turn ended in a stop token (else the renderer closes it).
        """

    def parse(self, completion: Sequence[int], *, tools: Sequence[Tool] = ()) -> Message:
        """A sampled turn (stop token included or not) as an assistant message; never raises.

        What is no well-formed tool call stays in `content`. `tools` tell text from numbers in formats that write both
        alike.
        """

    def demonstration(self, messages: Sequence[Message], *, tools: Sequence[Tool] = ()) -> tuple[list[int], list[bool]]:
        """A whole conversation as tokens, and which of them the assistant says (stop token included)."""


# --- loss, credit, optimizer ------------------------------------------------------------------------------------------
@attrs.frozen(kw_only=True)
class Loss(Provider):
    """A per-token loss over log-probabilities."""

    build: Ref
    """`(config) -> LossFunction`"""
    needs: frozenset[str] = frozenset()
    """Optional inputs the trainer must compute: `"entropy"`, `"ref_logprobs"`."""


class LossInputs(Protocol):
    """Columns of the packed tokens that are trained: `N` tokens (prompt tokens with no weight are left out)."""

    trainer_logprobs: Tensor  # [N] under the sampling temperature; carries the gradient
    engine_logprobs: Tensor  # [N]
    advantages: Tensor  # [N]
    weights: Tensor  # [N] this stream's weight; 0 = not in the stream
    sample_ids: Tensor  # [N] int64, which sample of the micro-batch each token belongs to
    sample_count: int
    staleness: Tensor  # [N] int64, version being trained - version that sampled the token
    entropy: Tensor | None  # [N], detached, when `needs` names it
    ref_logprobs: Tensor | None  # [N], when `needs` names it


@attrs.frozen(kw_only=True)
class LossOutput:
    """What a loss returns for one micro-batch."""

    loss: Tensor
    """[] the SUM over the stream's tokens of weight x per-token loss; core divides by the global token count."""
    metrics: Mapping[str, Tensor] = attrs.field(factory=dict)
    """[] detached SUMS; core divides by the same count."""


LossFunction: TypeAlias = "Callable[[LossInputs], LossOutput]"


@attrs.frozen(kw_only=True)
class Advantage(Provider):
    """Rewards of a group to per-token credit; runs in the controller, imports no torch."""

    build: Ref
    """`(config) -> AdvantageFunction`"""


AdvantageFunction: TypeAlias = "Callable[[Group], Sequence[float] | Sequence[Sequence[float]]]"
"""One number per rollout (spread over its sampled tokens), or one per token of each rollout.

One that learns from the groups it sees is a `StatefulAdvantage`.
"""


@runtime_checkable
class StatefulAdvantage(Protocol):
    """An `AdvantageFunction` with a memory, such as a running baseline: checkpoints carry it."""

    def __call__(self, group: Group) -> Sequence[float] | Sequence[Sequence[float]]: ...

    def state_dict(self) -> Mapping[str, Any]:
        """JSON-ready, and not changed by later calls."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@attrs.frozen(kw_only=True)
class Optimizer(Provider):
    """How parameters move. Learning-rate schedules are core's (`[schedule]`)."""

    build: Ref
    """`(config, named parameters, learning_rate) -> torch.optim.Optimizer`"""


# --- environment ------------------------------------------------------------------------------------------------------
@attrs.frozen(kw_only=True)
class Environment(Provider):
    """Tasks, how one task becomes a conversation with the policy, and what it was worth."""

    build: Ref
    """`(config, seed) -> Env`; seed is the run's."""
    cheap: bool = False
    """True: never blocks an event loop for more than a millisecond, so it runs inside the controller."""


@attrs.frozen(kw_only=True)
class Score:
    """What a conversation was worth."""

    reward: float
    metrics: Mapping[str, float] = attrs.field(factory=dict)


class Env(Protocol):
    """Built once in each environment process. Tasks are indexed so that a split can be resumed and never overlaps."""

    def size(self, split: Split) -> int:
        """Number of distinct tasks; no task of `eval` is in `train`."""

    def task(self, split: Split, index: int) -> Task:
        """The same task for the same arguments, in every process."""

    async def rollout(self, task: Task, conversation: Conversation) -> None:
        """Hold the conversation: `reply = await conversation.ask(messages)`, as often as the task wants."""

    async def score(self, task: Task, conversations: Sequence[Conversation]) -> Sequence[Score]:
        """Score the finished siblings together, in order."""

    def demonstration(self, task: Task) -> Sequence[Message] | None:
        """A solved conversation for the supervised warm-up, or None."""

    async def aclose(self) -> None: ...


# --- scheduler --------------------------------------------------------------------------------------------------------
@attrs.frozen(kw_only=True)
class Scheduler(Provider):
    """Rollout scheduler: what may start, what is fresh enough, what to cut. (Slurm is a launcher.)"""

    build: Ref
    """`(config, groups_per_step, clock) -> RolloutScheduler`; clock is `Callable[[], float]` in seconds."""


@attrs.frozen(kw_only=True)
class Pipeline:
    """What the scheduler is shown before it decides."""

    version: int  # newest version the engines serve
    next_version: int  # version at which the next batch to be formed will be trained (>= version)
    ready: int  # admitted groups waiting to be packed
    running: int  # groups in flight


@attrs.frozen(kw_only=True)
class InFlight:
    """A group that is being generated."""

    group_id: int
    started_version: int
    started_at: float  # on the scheduler's clock


@attrs.frozen(kw_only=True)
class Drop:
    """A decision against a group, with the reason the record will carry."""

    group_id: int
    reason: str
    retry: bool = True
    """Issue the task again; False gives it up."""


class RolloutScheduler(Protocol):
    """A pure state machine at group granularity; called by the controller only."""

    def capacity(self, pipeline: Pipeline) -> int:
        """How many groups may start now."""

    def admit(self, group: Group, version: int) -> Drop | None:
        """May this group be trained at `version`? Asked when it arrives and again when a batch is formed."""

    def select(self, ready: Sequence[int], outstanding: Sequence[int], count: int) -> Sequence[int]:
        """Which `count` of the ready groups form the next batch; empty: wait.

        `ready` (at least `count`) and `outstanding` (issued and not finished) are group ids, ascending.
        """

    def on_publish(self, version: int, in_flight: Sequence[InFlight]) -> Sequence[Drop]:
        """New weights are served: which groups in flight can no longer be used?"""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


# --- engine, weights, number formats ----------------------------------------------------------------------------------
@attrs.frozen(kw_only=True)
class Engine(Provider):
    """An inference engine: a server process and the client the others talk to it with."""

    serve: Ref
    """engine process: `async (EngineContext) -> None`; runs until cancelled. See `prl.weights.engines`."""
    connect: Ref
    """environment workers and controller: `(url, token) -> EngineClient`"""
    reports_routes: bool = False
    """It can say which experts tokens were sent to (`routes_from`)."""


class EngineClient(Protocol):
    """Async client of one engine. Every method raises InfrastructureError when the engine cannot answer."""

    async def generate(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        stop: Sequence[int],
        n: int = 1,
        session: str = "",
        routes_from: int | None = None,
    ) -> list[Completion]:
        """`n` continuations of prompt; `session` lets a later turn find its cache. Cancelling the task aborts it.

        With `routes_from` each says which experts its tokens were sent to, from that token of the prompt on. Rows may
        be missing: what is not known is not replayed.
        """

    async def prepare(self, manifest: Manifest) -> None:
        """Fetch and verify a version beside the one being served."""

    async def commit(self, version: int) -> None:
        """Pause between two tokens, swap to a prepared version, resume with every request kept. Idempotent."""

    async def pause(self) -> None: ...

    async def resume(self) -> None: ...

    async def statistics(self) -> Mapping[str, float]:
        """At least `version`, `running`, `waiting`, `generated_tokens` (total), `busy_seconds` (total)."""

    async def aclose(self) -> None: ...


@attrs.frozen(kw_only=True)
class WeightTransport(Provider):
    """How the bytes of a version travel from trainer to engine."""

    send: Ref
    """trainer: `(config, run_dir: Path, rank: int) -> WeightSender`; every rank has one and sends tensors of its own"""
    receive: Ref
    """engine: `(config, run_dir: Path) -> WeightReceiver`"""


class WeightSender(Protocol):
    def send(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> Manifest:
        """Write every tensor of this rank once; when it returns, any engine can fetch them. The part's manifest."""

    def retire(self, version: int) -> None:
        """No engine will ask for this version again: free it. Idempotent."""

    def close(self) -> None: ...


class WeightReceiver(Protocol):
    def fetch(self, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of every part, verified; InfrastructureError names the tensor whose checksum differs."""

    def close(self) -> None: ...


@attrs.frozen(kw_only=True)
class Quantization(Provider):
    """Number formats: what the trainer computes in, what travels, what the engine computes in."""

    build: Ref
    """`(config) -> NumberFormat`"""


class NumberFormat(Protocol):
    train_dtype: torch.dtype
    serve_dtype: torch.dtype
    """What engines compute in, and what tensors that are not quantised travel as."""
    tolerance: float
    """Mean |trainer - engine logprob| this format may cost."""
    fake_quantization: bool
    """Whether the trainer's forward pass sees its weights as an engine will, and its backward pass does not."""

    def quantizes(self, name: str, shape: Sequence[int]) -> bool:
        """Whether a Hugging Face tensor is among those that change their form; asked of what the model allows."""

    def export(self, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        """A Hugging Face tensor of the trainer -> what is sent to the engines, and stored. Takes meta tensors too."""

    def restore(self, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What `export` made, by Hugging Face name again: decoded when asked for, as exactly as float32 can.

        `export` of what was restored, unchanged, has the same bits. CheckpointError names a tensor that is malformed.
        """

    def rounded(self, tensor: Tensor) -> Tensor:
        """Matrices [..., O, I] that are quantised -> their values in float32 once exported and restored."""

    def declaration(self, kept: Sequence[str]) -> Mapping[str, Any] | None:
        """`quantization_config` of config.json, where the matrices `kept` are not quantised; None: there is none."""

    def reads(self, declared: Mapping[str, Any] | None) -> bool:
        """Whether `restore` understands a checkpoint whose config.json has this `quantization_config`, or none."""


@attrs.frozen(kw_only=True)
class Kernel(Provider):
    """Another way to compute one of the blocks' operations (`prl.blocks.kernels`)."""

    seam: str
    """The operation; a section of `[kernels]`."""
    build: Ref
    """`(config) -> function` that takes and returns what the seam's reference does."""
    device: str | None = None
    """torch's type of the only device it runs on, such as `cuda`."""


# --- launch and watch -------------------------------------------------------------------------------------------------
@attrs.frozen(kw_only=True)
class Launcher(Provider):
    """Where processes run."""

    build: Ref
    """`(config, run_dir: Path) -> ProcessLauncher`"""


class ProcessLauncher(Protocol):
    def render(self, plan: LaunchPlan) -> str:
        """What would be started, as text, with no side effect (`prl launch --dry-run`)."""

    def check(self, plan: LaunchPlan) -> None:
        """Refuse what cannot be started, with a PrlError, before anything is written."""

    def launch(self, plan: LaunchPlan) -> int:
        """Start every process, wait for the run, stop what is left; the exit code of the run.

        Or hand the run over to a system that does this, write `launch.json` and return 0; then there is `remote`.
        """


class HandingLauncher(ProcessLauncher, Protocol):
    def remote(self, run_dir: RunDir) -> RemoteRun:
        """The run that `launch.json` says was handed over."""


class SweepingLauncher(ProcessLauncher, Protocol):
    def launch_all(self, plans: Sequence[LaunchPlan], folder: Path) -> int:
        """The runs of a sweep at once, where the launcher has a way to; without it they go one after the other."""


class RemoteRun(Protocol):
    """A run that another system keeps, as the command line asks for it from anywhere.

    InfrastructureError when that system does not answer.
    """

    def rows(self) -> list[list[str]]:
        """(name, value) lines for `prl status`; never raises."""

    def over(self) -> bool:
        """Whether nothing of it runs or waits to run; may be asked often."""

    def stop(self) -> None:
        """The stop file is there: take back what does not run yet; what runs reads the file and ends by itself."""

    def cancel(self) -> None:
        """End what is left of it now."""


@attrs.frozen(kw_only=True)
class Tracker(Provider):
    """Where metrics are shown. Runs in the controller; a tracker that raises is reported and never stops a run."""

    build: Ref
    """`(config, run: Run, run_dir: Path) -> MetricTracker`"""


class MetricTracker(Protocol):
    def start(self) -> None: ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of one step (or of one evaluation, under `eval/`)."""

    def groups(self, step: int, groups: Sequence[Group]) -> None:
        """The groups a step was made of."""

    def finish(self, error: BaseException | None) -> None: ...


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


@attrs.frozen(kw_only=True)
class RunInfo:
    """What lifecycle hooks are told about the run."""

    run: Run
    run_dir: Path
