"""The engine section for vLLM: what is refused where the run is composed, and the command line it becomes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import attrs
import pytest
from packaging.version import Version
from prl.compose import describe
from prl.compose.compose import Composition, compose
from prl.compose.plan import plan
from prl.errors import ConfigError
from prl.run_dir import RunDir
from prl_vllm import release, rules, spanning
from prl_vllm.api import KEPT_SECONDS
from prl_vllm.arguments import arguments, command_line, environment
from prl_vllm.config import Parallel, VllmConfig
from prl_vllm.spanning import Meeting

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "spell_backward.toml"


@attrs.frozen(kw_only=True)
class Served:
    dtype: str = "float32"
    latent: bool = False
    recurrent: bool = False


DENSE = Served()
needs_names = pytest.mark.skipif(release.installed() is None, reason="names are those of the installed vLLM")


def composed(*edits: str) -> Composition:
    return compose(CONFIG, plugins="vllm", overrides=['engine.type="vllm"', *edits], probe=False)


def refusal(*edits: str) -> str:
    with pytest.raises(ConfigError) as error:
        composed(*edits)
    (problem,) = error.value.problems
    return problem.message


def test_without_vllm_the_rest_goes_on_and_this_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prl.compose.checks.find_spec", lambda name: None if name == "vllm" else True)
    assert compose(CONFIG, plugins="vllm").run.engine.count == 1
    with pytest.raises(ConfigError, match=r"needs vllm; pip install 'prl\[vllm\]'"):
        compose(CONFIG, plugins="vllm", overrides=['engine.type="vllm"'])


def test_what_the_run_decides_is_no_option() -> None:
    assert refusal("engine.options.max_model_len=8") == (
        "engine.options.max_model_len is decided by engine.length (plugin 'vllm')"
    )
    assert "is decided by prl: the trainer needs them" in refusal('engine.options.logprobs_mode="raw_logprobs"')


@needs_names
def test_names_are_those_of_the_installed_release() -> None:
    assert "max_num_batched_tokens" in release.arguments()
    assert "VLLM_CPU_KVCACHE_SPACE" in release.variables()
    sentence = refusal("engine.options.max_num_batched_token=8")
    assert f"is not an argument of vLLM {release.installed()} (did you mean 'max_num_batched_tokens'?)" in sentence
    assert "is not a variable of vLLM" in refusal('engine.environment.VLLM_CPU_KVCACHE_SPACES="1"')
    assert composed('engine.environment.OMP_PROC_BIND="true"').run.engine.count == 1


def test_a_sequence_must_fit_and_every_engine_needs_its_server() -> None:
    assert "engine.length = 64 is shorter than rollouts.sequence_length = 96" in refusal("engine.length=64")
    assert "names 1 servers for engine.count = 2 engines" in refusal(
        'engine.servers=["http://127.0.0.1:8000"]', "engine.count=2"
    )


def test_options_become_the_command_line() -> None:
    run = composed("engine.sequences=8", "engine.prefix_caching=false").run
    config = attrs.evolve(run.engine, options={"max_num_batched_tokens": 512, "compilation_config": {"mode": 0}})
    assert isinstance(config, VllmConfig)
    words = list(command_line(arguments(run, config, DENSE, model=Path("m"), cpu=True)))
    pairs = dict(zip(words, [*words[1:], ""], strict=True))
    assert pairs["--max-num-seqs"] == "8"
    assert pairs["--max-model-len"] == "96"
    assert pairs["--dtype"] == "float32"
    assert pairs["--max-num-batched-tokens"] == "512"
    assert pairs["--compilation-config"] == '{"mode": 0}'
    assert pairs["--kv-cache-memory-bytes"] == str(256 << 20)
    assert {"--no-enable-prefix-caching", "--enforce-eager", "--skip-tokenizer-init"} <= set(words)


def test_on_gpus_vllm_chooses_its_cache_and_compiles() -> None:
    run = composed().run
    assert isinstance(run.engine, VllmConfig)
    words = set(command_line(arguments(run, run.engine, DENSE, model=Path("m"), cpu=False)))
    assert not words & {"--kv-cache-memory-bytes", "--enforce-eager"}
    assert "VLLM_CPU_OMP_THREADS_BIND" not in environment(run.engine, cpu=False)


def test_what_the_cpu_backend_lacks_is_not_asked_of_it() -> None:
    run = composed().run
    assert isinstance(run.engine, VllmConfig)

    def chosen(served: Served, *, cpu: bool) -> tuple[object, object]:
        values = arguments(run, run.engine, served, model=Path("m"), cpu=cpu)  # type: ignore[arg-type]
        return values.get("attention_backend"), values["enable_prefix_caching"]

    assert chosen(Served(latent=True), cpu=True) == ("CPU_MLA", True)
    assert chosen(Served(latent=True, dtype="bfloat16"), cpu=True) == (None, True)
    assert chosen(Served(recurrent=True), cpu=True) == (None, False)
    assert chosen(Served(latent=True, recurrent=True), cpu=False) == (None, True)


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        (Parallel(experts=True, data=2, all_to_all="deepep_high_throughput"), {}),
        (
            Parallel(experts=True, data=2, all_to_all="deepep_v2"),
            {"EP_REUSE_NCCL_COMM": "0", "EP_DISABLE_GIN": "1"},
        ),
        (Parallel(experts=True, data=2, nodes=2, all_to_all="deepep_v2"), {"EP_REUSE_NCCL_COMM": "0"}),
    ],
)
def test_deepep_needs_no_network_on_one_node_and_a_communicator_of_its_own(
    parallel: Parallel, expected: dict[str, str]
) -> None:
    set_for_it = environment(VllmConfig(parallel=parallel), cpu=False)
    assert {key: value for key, value in set_for_it.items() if key.startswith("EP_")} == expected


def test_the_environment_of_the_config_comes_last() -> None:
    run = composed('engine.environment.OMP_NUM_THREADS="3"').run
    assert isinstance(run.engine, VllmConfig)
    assert environment(run.engine, cpu=True)["OMP_NUM_THREADS"] == "3"


GPUS = ('trainer.device="cuda"',)


@pytest.mark.parametrize(
    ("edits", "sentence"),
    [
        (("engine.parallel.experts=true",), "divides experts over one device"),
        (("engine.parallel.redundant_experts=8",), "redundant_experts needs engine.parallel.experts = true"),
        (
            ('engine.parallel.all_to_all="flashinfer_nvlink_two_sided"', "engine.parallel.tensor=8"),
            "needs engine.parallel.experts = true",
        ),
        (
            (
                'engine.parallel.all_to_all="deepep_low_latency"',
                "engine.parallel.experts=true",
                "engine.parallel.data=8",
            ),
            "needs DeepEP (module deep_ep)",
        ),
        (('engine.kv_tiers.disk="kv"',), "set engine.kv_tiers.host_bytes too"),
        (("engine.kv_tiers.host_bytes=1024", "engine.prefix_caching=false"), "needs engine.prefix_caching = true"),
        (("engine.prefill.count=2", "engine.count=2"), "leaves none to decode; raise engine.count"),
        (
            ("engine.prefill.count=1", "engine.count=2", "engine.prefix_caching=false"),
            "engine.prefill needs engine.prefix_caching = true",
        ),
        (
            ("engine.prefill.count=1", "engine.count=2", 'engine.servers=["http://a:1", "http://b:1"]'),
            "engine.prefill needs servers that the run starts",
        ),
    ],
)
def test_rules_between_parallelism_and_tiers(
    monkeypatch: pytest.MonkeyPatch, edits: tuple[str, ...], sentence: str
) -> None:
    monkeypatch.setattr(release, "cpu_build", lambda: False)
    monkeypatch.setattr(rules, "find_spec", lambda name: None if name == "deep_ep" else True)
    assert sentence in refusal(*GPUS, *edits)


def test_engines_for_prompts_need_nixl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "find_spec", lambda name: None)
    sentence = refusal("engine.count=2", "engine.prefill.count=1")
    assert sentence.startswith("engine.prefill needs NIXL (module nixl), which is not installed here; pip install")


def test_engines_for_prompts_are_a_kind_in_the_launch_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rules, "find_spec", lambda name: True)
    composition = composed("engine.count=3", "engine.prefill.count=1")
    engines = [p for p in plan(composition, RunDir(tmp_path)).processes if p.role == "engine"]
    assert [(engine.index, engine.kind) for engine in engines] == [(0, "prefill"), (1, "decode"), (2, "decode")]
    assert [composed("engine.count=2").run.engine.kind_of(index) for index in (0, 1)] == ["", ""]


def test_engines_that_hand_over_and_have_tiers_have_both_connectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "find_spec", lambda name: True)
    tiers = ("engine.kv_tiers.host_bytes=4096", 'engine.kv_tiers.disk="kv"')
    run = composed("engine.count=2", "engine.prefill.count=1", "engine.prefill.patience=20", *tiers).run
    assert isinstance(run.engine, VllmConfig)
    values = arguments(run, run.engine, DENSE, model=Path("m"), cpu=True, route_bytes=8, identity="name")
    assert values["kv_transfer_config"] == {
        "kv_connector": "MultiConnector",
        "kv_connector_extra_config": {
            "connectors": [
                {
                    "kv_connector": "NixlConnector",
                    "kv_role": "kv_both",
                    "kv_buffer_device": "cpu",
                    "kv_connector_extra_config": {"kv_lease_duration": 41},
                },
                {
                    "kv_connector": "OffloadingConnector",
                    "kv_role": "kv_both",
                    "kv_connector_extra_config": {
                        "cpu_bytes_to_use": 4096,
                        "spec_name": "TieringOffloadingSpec",
                        "secondary_tiers": [{"type": "fs", "root_dir": "kv"}],
                        "prl_route_bytes": 8,
                    },
                },
            ]
        },
        "kv_role": "kv_both",
        "engine_id": "name",
        "kv_load_failure_policy": "recompute",
    }
    variables = environment(run.engine, cpu=True, exchange=("10.0.0.1", 5600))
    assert variables["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "10.0.0.1"
    assert variables["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "5600"


@pytest.mark.parametrize("edit", ["engine.fp8.weights=true", "engine.fp8.kv_cache=true"])
def test_what_needs_a_gpu_is_refused_on_a_cpu(edit: str) -> None:
    assert "needs a GPU" in refusal('trainer.device="cpu"', edit)


@pytest.mark.parametrize(("engines", "gpus"), [(4, 32), (8, 64)])
def test_an_engine_of_eight_gpus_becomes_one_command_line(
    monkeypatch: pytest.MonkeyPatch, engines: int, gpus: int
) -> None:
    monkeypatch.setattr(release, "cpu_build", lambda: False)
    run = composed(
        *GPUS,
        f"engine.count={engines}",
        "engine.parallel.data=8",
        "engine.parallel.experts=true",
        "engine.parallel.redundant_experts=16",
        "engine.fp8.weights=true",
        "engine.kv_tiers.host_bytes=1024",
        'engine.kv_tiers.disk="kv"',
    ).run
    assert isinstance(run.engine, VllmConfig)
    assert run.engine.count * run.engine.gpus == gpus
    words = list(command_line(arguments(run, run.engine, DENSE, model=Path("m"), cpu=False, route_bytes=8)))
    pairs = dict(zip(words, [*words[1:], ""], strict=True))
    assert (pairs["--tensor-parallel-size"], pairs["--data-parallel-size"]) == ("1", "8")
    assert pairs["--all2all-backend"] == "allgather_reducescatter"
    assert json.loads(pairs["--eplb-config"]) == {"num_redundant_experts": 16}
    assert pairs["--quantization"] == "fp8"
    connector = json.loads(pairs["--kv-transfer-config"])
    assert connector["kv_connector"] == "OffloadingConnector"
    assert connector["kv_connector_extra_config"]["secondary_tiers"] == [{"type": "fs", "root_dir": "kv"}]
    assert connector["kv_connector_extra_config"]["prl_route_bytes"] == 8
    assert {"--enable-expert-parallel", "--enable-eplb", "--enable-return-routed-experts"} <= set(words)
    assert environment(run.engine, cpu=False)["VLLM_USE_DEEP_GEMM"] == "1"


# --- engines that span nodes ------------------------------------------------------------------------------------------
def wide(nodes: int) -> Composition:
    """An engine of `nodes` nodes of 8 devices, a copy of the attention on each device, experts over all."""
    parallel = f"{{nodes={nodes}, data={8 * nodes}, experts=true}}"
    return composed(*GPUS, f"engine.nodes={nodes}", f"engine.parallel={parallel}")


@pytest.mark.parametrize("nodes", [4, 8])
def test_one_engine_on_32_and_64_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nodes: int) -> None:
    monkeypatch.setattr(release, "cpu_build", lambda: False)
    run, whole = wide(nodes).run, plan(wide(nodes), RunDir(tmp_path))
    parts = [p for p in whole.processes if p.role in ("engine", "engine-part")]
    ranks = [f"data ranks {8 * i}-{8 * i + 7} of {8 * nodes}" for i in range(nodes)]
    assert [(p.name, p.node, p.gpus, p.share) for p in parts] == [
        (("engine-0" if i == 0 else f"engine-part-{i - 1}"), i, 8, ranks[i]) for i in range(nodes)
    ]
    assert parts[1].argv[-4:] == ("--role", "engine-part", "--index", "0")
    meeting = Meeting(address="10.0.0.1", port=5555, life="a")
    assert isinstance(run.engine, VllmConfig)
    common = arguments(run, run.engine, DENSE, model=Path("m"), cpu=False)
    assert (common["data_parallel_size"], common["tensor_parallel_size"]) == (8 * nodes, 1)
    assert common["enable_expert_parallel"] is True
    own = [spanning.arguments(run.engine.parallel, node, meeting) for node in range(nodes)]
    where = {"data_parallel_address": "10.0.0.1", "data_parallel_rpc_port": 5555, "data_parallel_size_local": 8}
    assert own[0] == where
    assert own[1:] == [{**where, "data_parallel_start_rank": 8 * node} for node in range(1, nodes)]


def test_the_plan_shows_what_each_node_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(release, "cpu_build", lambda: False)
    rows = describe.processes(plan(wide(4), RunDir(tmp_path)))
    assert rows[2:6] == [
        ["engine-0 (data ranks 0-7 of 32)", "inference 0", "1", "0-7", "hello"],
        ["engine-part-0 (data ranks 8-15 of 32)", "inference 1", "1", "0-7", "-"],
        ["engine-part-1 (data ranks 16-23 of 32)", "inference 2", "1", "0-7", "-"],
        ["engine-part-2 (data ranks 24-31 of 32)", "inference 3", "1", "0-7", "-"],
    ]


@pytest.mark.parametrize(
    ("edits", "sentence"),
    [
        (("engine.nodes=2", "engine.parallel={nodes=2, data=3}"), "data = 3 copies cannot be spread over"),
        (("engine.nodes=3", "engine.parallel={nodes=2, data=2}"), "must be 2, engine.count = 1 engines of 2 nodes"),
        (
            ("engine.nodes=2", "engine.parallel={nodes=2, data=2}", 'engine.servers=["http://127.0.0.1:1"]'),
            "whoever starts them spreads them over nodes",
        ),
        (
            ("engine.nodes=2", "engine.parallel={nodes=2, data=2}", "engine.kv_tiers.host_bytes=1024"),
            "engine.kv_tiers and engine.parallel.nodes = 2 exclude each other",
        ),
        (
            ("engine.count=2", "engine.nodes=4", "engine.parallel={nodes=2, data=2}", "engine.prefill.count=1"),
            "engine.prefill and engine.parallel.nodes = 2 exclude each other",
        ),
        (("engine.options.data_parallel_rpc_port=9",), "is decided by engine.parallel.nodes"),
        (("engine.options.data_parallel_hybrid_lb=true",), "one server spreads requests over all copies"),
    ],
)
def test_rules_of_engines_that_span_nodes(
    monkeypatch: pytest.MonkeyPatch, edits: tuple[str, ...], sentence: str
) -> None:
    monkeypatch.setattr(release, "cpu_build", lambda: False)
    monkeypatch.setattr(rules, "find_spec", lambda name: True)
    assert sentence in refusal(*GPUS, *edits)


@pytest.mark.parametrize(("edit", "devices", "more"), [("model.experts=12", 8, 4), ("model.size=toy", 3, 1)])
def test_experts_must_be_spread_evenly(monkeypatch: pytest.MonkeyPatch, edit: str, devices: int, more: int) -> None:
    """Those that the config names, and those that the model has without being told (8)."""
    monkeypatch.setattr(release, "cpu_build", lambda: False)
    plugins = ("model.type=glm-5.1", edit, "engine.nodes=1")
    with pytest.raises(ConfigError) as error:
        compose(
            CONFIG,
            plugins="vllm,glm5",
            overrides=['engine.type="vllm"', *GPUS, *plugins, f"engine.parallel={{data={devices}, experts=true}}"],
            probe=False,
        )
    assert f"over {devices} devices; {more} redundant experts can" in error.value.problems[0].message


@pytest.mark.parametrize(("version", "refused"), [("0.31.9", True), ("0.32.0", False)])
def test_experts_on_a_cpu_need_a_release_that_can_be_mended(
    monkeypatch: pytest.MonkeyPatch, version: str, refused: bool
) -> None:
    monkeypatch.setattr(release, "installed", lambda: Version(version))
    monkeypatch.setattr(release, "cpu_build", lambda: True)
    assert composed().run.engine.count == 1  # dense
    if refused:
        assert f"vLLM {version} is installed, which computes experts wrongly" in refusal("model.experts=4")
    else:
        assert composed("model.experts=4").run.engine.count == 1


@needs_names
def test_connections_are_given_up_before_the_server_does() -> None:
    """A request into one that the server is closing is lost."""
    (envs,) = release._sources("envs.py")
    declared = re.search(r"VLLM_HTTP_TIMEOUT_KEEP_ALIVE: int = (\d+)", envs.read_text())
    assert declared is not None
    assert int(declared[1]) > KEPT_SECONDS
