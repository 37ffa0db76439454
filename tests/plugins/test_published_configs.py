"""config.json of the three families, read back: every size of every variant, and files that ask for another model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from prl.errors import UserError
from prl_glm5 import Glm5Config, Glm51Config, Glm52Config
from prl_glm5 import published as glm_published
from prl_glm5 import sizes as glm_sizes
from prl_kimi_k2 import KimiK2Config, KimiK25Config, KimiK27Config
from prl_kimi_k2 import published as kimi_published
from prl_kimi_k2 import sizes as kimi_sizes
from prl_nemotron3 import NanoConfig, SuperConfig, UltraConfig
from prl_nemotron3 import published as nemotron_published
from prl_nemotron3 import sizes as nemotron_sizes

FAMILIES: dict[type, tuple[Any, Callable[[Any], Mapping[str, Any]]]] = {
    **dict.fromkeys((Glm5Config, Glm51Config, Glm52Config), (glm_sizes, glm_published.to_json)),
    KimiK2Config: (kimi_sizes, lambda sizes: kimi_published.to_json(sizes, vision=False)),
    **dict.fromkeys(
        (KimiK25Config, KimiK27Config), (kimi_sizes, lambda sizes: kimi_published.to_json(sizes, vision=True))
    ),
    **dict.fromkeys((NanoConfig, SuperConfig, UltraConfig), (nemotron_sizes, nemotron_published.to_json)),
}


def written(kind: type, folder: Path, size: str, **changes: Any) -> tuple[Any, Any]:
    """The sizes of a variant and those read from its config.json."""
    module, to_json = FAMILIES[kind]
    sizes = module.resolve(kind(size=size), 96)
    config = to_json(sizes)
    inner = dict(config.get("text_config") or config)
    inner |= changes
    inner = {key: value for key, value in inner.items() if value != "ABSENT"}
    config = {**config, "text_config": inner} if "text_config" in config else inner
    (folder / "config.json").write_text(json.dumps(config))
    return sizes, module.resolve(kind(checkpoint=str(folder)), 96)


@pytest.mark.parametrize("size", ["full", "toy"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_size_is_read_back(kind: type, size: str, tmp_path: Path) -> None:
    expected, read = written(kind, tmp_path, size)
    deviation = {"deviation": 0.02}  # of fresh weights: a checkpoint does not say
    module = FAMILIES[kind][0]
    assert read == module.attrs.evolve(expected, **deviation)


def test_published_spellings(tmp_path: Path) -> None:
    """Layers by name, positions as transformers before 5 wrote them, keys that a published file leaves out."""
    names = ["mamba", "moe", "mamba", "attention", "moe", "mamba", "moe"]
    _, read = written(UltraConfig, tmp_path, "toy", hybrid_override_pattern="ABSENT", layers_block_type=names)
    assert read.pattern == "MEM*EME"
    expected, read = written(KimiK27Config, tmp_path, "full", rope_parameters="ABSENT", moe_router_dtype="ABSENT")
    assert (read.yarn_factor, read.rope_theta) == (expected.yarn_factor, 50_000.0) == (64.0, 50_000.0)
    _, read = written(Glm51Config, tmp_path, "full", rope_theta="ABSENT", index_topk_freq="ABSENT", head_dim=64)
    assert (read.index_period, read.rope_theta) == (1, 1e6)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (Glm51Config, {"hidden_size": "ABSENT", "index_topk": None}, r"every size: no hidden_size, index_topk = None"),
        (Glm51Config, {"n_group": 8, "hidden_act": "gelu"}, r"hidden_act = 'gelu', .*'silu'.*; n_group = 8, .* 1 is"),
        (KimiK27Config, {"scoring_func": "softmax"}, r"scoring_func = 'softmax', where only 'sigmoid' is supported"),
        (KimiK27Config, {"rope_parameters": {"rope_type": "linear"}}, r"'linear'.* are not supported, only yarn with"),
        (UltraConfig, {"hybrid_override_pattern": "M-E"}, r"layers 'M-E' are not supported"),
        (UltraConfig, {"mlp_hidden_act": "silu"}, r"mlp_hidden_act = 'silu', where only 'relu2' is supported"),
    ],
)
def test_another_model_is_refused(kind: type, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        written(kind, tmp_path, "full", **changes)


def test_the_variant_must_fit_the_file(tmp_path: Path) -> None:
    written(KimiK2Config, tmp_path, "full")
    with pytest.raises(UserError, match=r"is of a model with no vision parts: choose model\.type kimi-k2$"):
        kimi_sizes.resolve(KimiK27Config(checkpoint=str(tmp_path)), 96)
    with pytest.raises(UserError, match=r"cannot read .*nowhere"):
        glm_sizes.resolve(Glm51Config(checkpoint=str(tmp_path / "nowhere")), 96)
