"""The main job on several meshes of the trainer: does it learn as with one process?

    python -m benchmarks.meshes_learn --out benchmarks/results/meshes_learn.json     from the root, some 40 minutes
    python -m benchmarks.meshes_learn --steps 2 --warmup 4                           a look at whether it runs

configs/spell_backward.toml with a mixture of four experts in place of the dense feed-forward, one run after the other.
Every run starts from the same weights and tasks; the same batches follow only until rounding has changed a sample.
Reports the share of held-out words that are spelled backwards after the supervised start and as training goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MESHES = {
    "one process": (),
    "shard 2": ("trainer.ranks=2",),
    "context 2": ("trainer.ranks=2", "trainer.context=2"),
    "shard 2, expert 2": ("trainer.ranks=2", "trainer.expert=2"),
    "shard 2, context 2, expert 4": ("trainer.ranks=4", "trainer.context=2", "trainer.expert=4"),
}
MIXTURE = ("model.experts=4", "model.expert_intermediate_size=128")


def learn(name: str, directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One run to its end."""
    edits = (
        f"run.dir={directory}",
        f"run.steps={options.steps}",
        f"warmup.steps={options.warmup}",
        f"evaluation.every={max(1, options.steps // 4)}",
        "checkpoints.huggingface=false",
        "trackers=[]",
        *MIXTURE,
        *MESHES[name],
    )
    words = [word for edit in edits for word in ("--set", edit)]
    config = str(ROOT / "configs" / "spell_backward.toml")
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "prl", "launch", config, "--plugins", "no:console", *words], check=True, cwd=ROOT
    )
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["phase"] == "rl"]
    return {
        "mesh": name,
        "accuracy": {
            line["eval/version"]: line["eval/spell_backward/accuracy"] for line in lines if line["phase"] == "eval"
        },
        "reward_last_10_steps": sum(line["reward/mean"] for line in steps[-10:]) / len(steps[-10:]),
        "mismatch_k3_fresh": max(line["mismatch/k3_fresh"] for line in steps if "mismatch/k3_fresh" in line),
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="rl steps")
    parser.add_argument("--warmup", type=int, default=116, help="supervised steps before them")
    parser.add_argument("--out", type=Path, help="where results are written, after every run")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(MESHES):
            results.append(learn(name, Path(folder) / str(number), options))
            print(json.dumps(results[-1]), flush=True)
            if options.out:
                command = f"python -m benchmarks.meshes_learn --steps {options.steps} --warmup {options.warmup}"
                options.out.write_text(json.dumps({"command": command, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
