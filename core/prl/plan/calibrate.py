"""How long operations of attention take beside those of matrix products, from steps that differ in the lengths of their
documents: what `prl bench train --calibrate` writes as `[trainer.costs]`.

    seconds of a step = a x products + b x attention + c x index scores                  (a, b, c >= 0)

Every step trains as many tokens, so what is done per token stays and only attention and index scores change; what is no
operation at all, as reading and writing, is counted with the products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import numpy as np

from prl.compose.compose import Composition
from prl.compose.config import CostsSection, Run
from prl.errors import RunError
from prl.rollout.tokenizer import vocab_size_of
from prl.train.flops import Flops
from prl.train.layout import layout_of
from prl.train.survey import Survey, as_trained

REPEATS = 3
"""Steps of every length; the fastest counts."""
_LENGTHS = 6
_SHORTEST = 16


def steps(run: Run) -> list[tuple[int, ...]]:
    """The lengths of every step: one full micro-batch for each group of ranks, of documents that are alike."""
    layout = layout_of(run.trainer)
    room = run.trainer.micro_batch_tokens * layout.context
    longest = min(room, run.rollouts.sequence_length)
    lengths = [length for halvings in range(_LENGTHS) if (length := longest >> halvings) >= min(_SHORTEST, longest)]
    return [(length,) * (layout.data * (room // length)) for length in lengths for _ in range(REPEATS)]


def measured(composition: Composition, sampled: float, seconds: Sequence[float]) -> CostsSection:
    """From the `seconds` of every one of `steps`; `sampled`, the share of tokens with logits."""
    model = as_trained(composition, vocab_size_of(composition))
    every = steps(composition.run)
    rows = [
        (operations(model, every[first], sampled), min(seconds[first : first + REPEATS]))
        for first in range(0, len(every), REPEATS)
    ]
    return fit([work for work, _ in rows], [least for _, least in rows])


def operations(model: Survey, lengths: tuple[int, ...], sampled: float) -> Mapping[str, float]:
    """By kind: products, attention, index."""
    kinds = zip(model.kinds, model.layer_flops(lengths), strict=True)
    head = model.head_flops(round(sampled * sum(lengths)))
    flops = sum((each.scaled(len(kind.layers)) for kind, each in kinds), head)
    found = {"products": 0.0, "attention": 0.0, "index": 0.0}
    for side in attrs.fields(Flops):
        for work, n in getattr(flops, side.name).items():
            found[work if work in found else "products"] += n
    return found


def fit(work: Sequence[Mapping[str, float]], seconds: Sequence[float]) -> CostsSection:
    """Least squares of relative errors; what was not measured stays 1. RunError when nothing can be told apart."""
    names = ("products", "attention", "index")
    table = np.array([[row[name] for name in names] for row in work]) / np.array(seconds)[:, None]
    used = [column for column in range(len(names)) if table[:, column].any()]
    rate = np.zeros(len(names))
    while used:
        scale = table[:, used].max(0)
        solved = np.linalg.lstsq(table[:, used] / scale, np.ones(len(table)), rcond=None)[0] / scale
        if (solved >= 0).all():
            rate[used] = solved
            break
        used.pop(int((solved * scale).argmin()))
    products = rate[0]
    if not products or not (rate[1] or rate[2]):
        raise RunError(
            "operations of attention took no time that could be told from the rest; measure with longer sequences: "
            "rollouts.sequence_length, trainer.micro_batch_tokens"
        )
    attention, index = (float(rate[i] / products) or 1.0 for i in (1, 2))
    return CostsSection(attention=round(attention, 3), index=round(index, 3))
