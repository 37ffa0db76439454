"""TRL's GRPOTrainer on the workload of trl_comparison.toml, with a meter on it.

A randomly initialised Qwen3 of 312,064 parameters, 8 prompts of 24 digits x 8 completions of exactly 64 characters a
step, reward = share of the letter a. Prints a JSON line per step: seconds and CPU-seconds since training began. Run by
trl_comparison.py; alone: python benchmarks/trl_grpo.py --threads 1 --steps 10
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Sequence
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", CUDA_VISIBLE_DEVICES="")

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

PROMPTS, GROUP, PROMPT_LENGTH, COMPLETION_LENGTH = 8, 8, 24, 64
SPECIALS = ("<pad>", "<eos>", "<unk>")
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXY"


def character_tokenizer() -> PreTrainedTokenizerFast:
    """64 symbols: one token per character."""
    vocabulary = {symbol: index for index, symbol in enumerate((*SPECIALS, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def model(vocabulary: int) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=1024,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
            tie_word_embeddings=False,
        )
    )


def prompts(count: int) -> Dataset:
    digits = random.Random(0)
    return Dataset.from_dict({"prompt": ["".join(digits.choices("0123456789", k=PROMPT_LENGTH)) for _ in range(count)]})


def share_of_a(completions: Sequence[str], **_: Any) -> list[float]:
    return [completion.count("a") / max(1, len(completion)) for completion in completions]


class Meter(TrainerCallback):
    """Prints what has been used so far, at the end of every step."""

    def __init__(self) -> None:
        self.started = (time.perf_counter(), time.process_time())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "reward" not in logs:
            return
        wall, cpu = time.perf_counter() - self.started[0], time.process_time() - self.started[1]
        row = {"step": state.global_step, "wall": wall, "cpu": cpu, "reward": float(logs["reward"])}
        print(json.dumps(row), flush=True)


def configuration(steps: int, folder: str) -> GRPOConfig:
    return GRPOConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=PROMPTS * GROUP,
        num_generations=GROUP,
        gradient_accumulation_steps=1,
        max_completion_length=COMPLETION_LENGTH,
        generation_kwargs={"min_new_tokens": COMPLETION_LENGTH},
        temperature=1.0,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        beta=0.0,
        loss_type="dapo",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        seed=0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = character_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model(len(tokenizer)),
            processing_class=tokenizer,
            reward_funcs=share_of_a,
            args=configuration(arguments.steps, folder),
            train_dataset=prompts(PROMPTS * arguments.steps),
            callbacks=[Meter()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


if __name__ == "__main__":
    main()
