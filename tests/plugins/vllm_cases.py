"""Each mend of vLLM's CPU backend, and what is done for unfinished requests, with it and without it: a program, because
a mend that is missing may end a process.

    python -m tests.plugins.vllm_cases FOLDER       one line of JSON for each case: [mend, applied, outcome]

vLLM is imported once; every case runs in a process forked from there, in which vLLM has one process only. An outcome is
the largest deviation from what is right, or the sentence with which the process ended.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

import torch
from prl.blocks.context import Context
from prl.blocks.decoder import Decoder
from prl.blocks.linear import linear
from prl.compose.compose import Composition, compose
from prl_vllm import model_files
from prl_vllm.handover import TO_BE_FETCHED
from prl_vllm.inside import mends, unfinished
from prl_vllm.inside.loading import Loader

from tests.plugins.parity import randomise

CONFIG = Path(__file__).parents[2] / "configs" / "spell_backward.toml"
EXPERTS = ("model.layers=2", "model.experts=8", "model.experts_per_token=2", "model.expert_intermediate_size=64")
PROMPT = [5, 9, 14, 33, 27, 8, 51, 3]


class Model:
    """A family's model twice: in vLLM, in this process, and the trainer's."""

    def __init__(self, folder: Path, *edits: str, plugins: str = "", **options: Any) -> None:
        from vllm import LLM

        self.composition: Composition = compose(CONFIG, plugins=plugins, overrides=edits)
        described = model_files.describe(self.composition)
        self.vocab_size = described.speech.tokenizer.vocab_size
        self.llm = LLM(
            str(model_files.write(described, folder / str(os.getpid()), length=64, cpu=True)),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=64,
            max_num_seqs=4,
            enforce_eager=True,
            kv_cache_memory_bytes=64 << 20,
            distributed_executor_backend="uni",
            **({"attention_backend": "CPU_MLA"} if described.latent else {}),
            **options,
        )
        self.worker = self.llm.llm_engine.model_executor.driver_worker.worker
        self.trainer: Decoder = self.composition.build(self.composition.run.model, self.vocab_size)

    def load(self, seed: int) -> None:
        """The trainer's weights of `seed`, as a live update."""
        randomise(self.trainer, seed)
        provider = self.composition.provider(self.composition.run.model)
        weight_map = self.composition.load(provider.weights)(self.composition.run.model, self.vocab_size)  # type: ignore[attr-defined]
        tensors = self.trainer.state_dict().items()
        Loader(self.worker).load(dict(part for name, tensor in tensors for part in weight_map.to_hf(name, tensor)))

    def sampled(self, seed: int | None = None) -> list[int]:
        return self._generate(seed).token_ids  # type: ignore[no-any-return]

    def deviation(self) -> float:
        """Largest difference of the log-probabilities of greedy tokens from the trainer's."""
        return self.gap(PROMPT, self._generate(None))

    @torch.no_grad()
    def gap(self, prompt: list[int], output: Any, *, since: int = 0) -> float:
        """The same of an output, from one of its tokens on."""
        tokens = torch.tensor([*prompt, *output.token_ids])
        hidden = self.trainer.hidden(tokens, Context.packed(torch.tensor([0, len(tokens)])))
        rows = linear(hidden, self.trainer.head()).log_softmax(1)[len(prompt) - 1 : -1]
        own = rows.gather(1, tokens[len(prompt) :, None])[:, 0]
        theirs = torch.tensor(
            [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]
        )
        return float((own - theirs).abs()[since:].max())

    def ask(self, name: str, count: int, **extra: Any) -> None:
        """A request of 40 tokens, computed as the engine is stepped."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=count, logprobs=0, ignore_eos=True, detokenize=False, extra_args=extra
        )
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": PROMPT * 5}, params)

    def _generate(self, seed: int | None) -> Any:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0 if seed is None else 1.0,
            seed=seed,
            max_tokens=12,
            logprobs=0,
            ignore_eos=True,
            detokenize=False,
        )
        (answer,) = self.llm.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)
        return answer.outputs[0]


# --- the cases --------------------------------------------------------------------------------------------------------
def rope(folder: Path) -> float:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    with set_current_vllm_config(VllmConfig()):
        parameters = {"rope_type": "default", "rope_theta": 10_000.0}
        positions = get_rope(64, max_position=128, is_neox_style=False, rope_parameters=parameters, dtype=torch.float32)
        torch.manual_seed(0)
        query, key = torch.randn(7, 4, 192)[..., 128:], torch.randn(7, 1, 576)[..., 512:]
        where = torch.arange(7)
        expected = positions.forward_native(where, query.clone(), key.clone())
        seen = positions.forward_cpu(where, query, key)
    return max(float((a - b).abs().max()) for a, b in zip(expected, seen, strict=True))


def seeded_prefill(folder: Path) -> float:
    whole = Model(folder, "model.layers=1", max_num_batched_tokens=64).sampled(seed=3)
    parts = Model(folder, "model.layers=1", max_num_batched_tokens=5, enable_chunked_prefill=True).sampled(seed=3)
    return float(whole != parts)


def experts_after_update(folder: Path) -> float:
    model = Model(folder, *EXPERTS)
    model.load(seed=1)
    model.load(seed=2)
    return model.deviation()


def experts_without_gate(folder: Path) -> float:
    model = Model(folder, 'model.type="nemotron-3-nano"', plugins="nemotron3")
    model.load(seed=1)
    return model.deviation()


def expert_map(folder: Path) -> float:
    """The second of two ranks, with experts 4 to 7."""
    from vllm._custom_ops import cpu_prepack_moe_weight
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    model = Model(folder, *EXPERTS)
    (experts, *_) = [
        module.quant_method.moe_kernel.fused_experts
        for module in model.worker.model_runner.get_model().modules()
        if getattr(getattr(module, "quant_method", None), "moe_kernel", None)
    ]
    torch.manual_seed(0)
    x, gate_up, down = torch.randn(6, 128), torch.randn(4, 128, 128) * 0.1, torch.randn(4, 128, 64) * 0.1
    ids = torch.tensor([[0, 5], [4, 7], [1, 2], [6, 3], [7, 0], [5, 4]], dtype=torch.int32)
    weights = torch.rand(6, 2)
    expected = torch.zeros_like(x)
    for row in range(6):
        for expert, weight in zip(ids[row].tolist(), weights[row], strict=True):
            if expert >= 4:
                gate, up = (gate_up[expert - 4] @ x[row]).chunk(2)
                expected[row] += weight * (down[expert - 4] @ (torch.nn.functional.silu(gate) * up))
    output = torch.empty_like(x)
    experts.apply(
        output=output,
        hidden_states=x,
        w1=cpu_prepack_moe_weight(gate_up, experts.isa),
        w2=cpu_prepack_moe_weight(down, experts.isa),
        topk_weights=weights,
        topk_ids=ids,
        activation=MoEActivation.SILU,
        global_num_experts=8,
        expert_map=torch.tensor([-1, -1, -1, -1, 0, 1, 2, 3], dtype=torch.int32),
        a1q_scale=None,
        a2_scale=None,
        workspace13=torch.empty(0),
        workspace2=torch.empty(0),
        expert_tokens_meta=None,
        apply_router_weight_on_input=False,
    )
    return float((output - expected).abs().max())


def tiers(folder: Path) -> float:
    from vllm.config import KVTransferConfig

    kept = {"cpu_bytes_to_use": 8 << 20}
    offloading = KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both", kv_connector_extra_config=kept)
    model = Model(folder, "model.layers=1", kv_transfer_config=offloading)
    model.load(seed=1)
    return model.deviation()


def processors(folder: Path) -> float:
    """Processors that are lost to this thread."""
    before = os.sched_getaffinity(0)
    _beside_nixl(folder)
    return float(len(before - os.sched_getaffinity(0)))


def progress(folder: Path) -> float:
    """Threads that never sleep while there is nothing to do."""
    kept = _beside_nixl(folder)
    others = set(os.listdir("/proc/self/task")) - {str(threading.get_native_id())}
    for _ in range(50):
        others = {task for task in others if _runs(task)}
        time.sleep(0.01)
    del kept
    return float(len(others))


def _runs(task: str) -> bool:
    return Path(f"/proc/self/task/{task}/stat").read_text().rpartition(")")[2].split()[0] == "R"


def _beside_nixl(folder: Path, **options: Any) -> Model:
    from vllm.config import KVTransferConfig

    with socket.socket() as found:
        found.bind(("", 0))
        os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(found.getsockname()[1])
    nixl = KVTransferConfig(kv_connector="NixlConnector", kv_role="kv_both", kv_buffer_device="cpu")
    return Model(folder, "model.layers=1", kv_transfer_config=nixl, **options)


# --- unfinished requests when weights change --------------------------------------------------------------------------
def half_computed_prompt(folder: Path) -> float:
    """As a prompt in whose middle weights change is to be: computed by the new ones."""
    model = Model(folder, "model.layers=1", block_size=32, max_num_batched_tokens=16)
    model.load(seed=1)
    model.ask("half", 6)
    model.llm.llm_engine.step()  # 16 of its 40 tokens
    return _after_update(model, "half", clear_cache=False)


def recomputed_beside_a_kept_prompt(folder: Path) -> float:
    """What is under way is computed again, while another server may read a prompt."""
    model = _beside_nixl(folder, block_size=32)
    model.load(seed=1)
    model.ask("kept", 1, kv_transfer_params=dict(TO_BE_FETCHED))
    model.ask("running", 12)
    for _ in range(4):
        model.llm.llm_engine.step()
    return _after_update(model, "running", clear_cache=True)


def _after_update(model: Model, name: str, *, clear_cache: bool) -> float:
    """Largest deviation of what is sampled after an update from the trainer's."""
    engine = model.llm.llm_engine
    core = engine.engine_core.engine_core
    before = len(
        core.scheduler.requests[next(r for r in core.scheduler.requests if r.startswith(name))].output_token_ids
    )
    core.pause_scheduler("keep", clear_cache=clear_cache)
    model.load(seed=2)
    core.set_weight_version("2")
    core.resume_scheduler()
    answer = None
    while answer is None or not answer.finished:
        answer = next((output for output in engine.step() if output.request_id == name), answer)
    return model.gap(PROMPT * 5, answer.outputs[0], since=before)


CASES: dict[str, Callable[[Path], float]] = {
    case.__name__: case
    for case in (
        rope,
        seeded_prefill,
        experts_after_update,
        experts_without_gate,
        expert_map,
        tiers,
        processors,
        progress,
        half_computed_prompt,
        recomputed_beside_a_kept_prompt,
    )
}


def forked(case: Callable[[Path], float], folder: Path, *, applied: bool) -> float | str:
    """What a process of its own finds, or how it ended."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            mends.apply(without=frozenset() if applied else frozenset({case.__name__}))
            if applied:
                unfinished.install()
            outcome: float | str = case(folder)
        except BaseException as error:
            traceback.print_exc()
            outcome = f"{type(error).__name__}: {error}"
        os.write(write, json.dumps(outcome).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        content = answer.read()
    _, status = os.waitpid(child, 0)
    return json.loads(content) if content else f"ended by signal {os.WTERMSIG(status)}"  # type: ignore[no-any-return]


if __name__ == "__main__":
    import vllm.entrypoints.llm  # noqa: F401 - once, for all cases

    chosen = sys.argv[2:] or list(CASES)
    for name in chosen:
        for applied in (True, False):
            print(json.dumps([name, applied, forked(CASES[name], Path(sys.argv[1]), applied=applied)]), flush=True)
