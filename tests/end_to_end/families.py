"""The main job with each of the three model families, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.end_to_end.live import ROOT, Launched, launched

FAMILIES = {"glm-5.1": "glm5", "kimi-k2.7": "kimi_k2", "nemotron-3-ultra": "nemotron3"}
SPELL = ROOT / "configs" / "spell_backward.toml"
SHORT = (
    "environments.0.parameters.max_word_len=3",
    "warmup.steps=130",
    "warmup.samples_per_step=48",
    "run.steps=3",
    "rollouts.groups_per_step=4",
    "evaluation.tasks=128",
    "evaluation.every=1000",
    "checkpoints.huggingface=false",
    "trackers=[]",
)
"""Words of three letters, so that a short supervised start teaches something."""


@contextmanager
def begun(folder: Path) -> Iterator[Mapping[str, Launched]]:
    """By the model's type: one config, two words of it changed."""
    with ExitStack() as stack:
        yield {
            model: stack.enter_context(
                launched(
                    SPELL, folder / model, f'model.type="{model}"', *SHORT, words=("--plugins", f"{plugin},no:console")
                )
            )
            for model, plugin in FAMILIES.items()
        }
