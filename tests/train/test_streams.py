"""Which tokens of a micro-batch are predicted, and what a loss is told about them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from prl.errors import RunError
from prl.train.logprobs import TokenScores
from prl.train.streams import no_tokens, predicted_tokens, stream_losses
from prl.types import MicroBatch

from tests.train.tiny import build_losses

CPU = torch.device("cpu")


def micro_batch(**changes) -> MicroBatch:
    """Samples of 4, 0 and 3 tokens; version 7 is trained; tokens 2, 3 and 6 were sampled."""
    columns = {
        "tokens": np.arange(10, 17, dtype=np.int32),
        "cu_seqlens": np.array([0, 4, 4, 7], dtype=np.int32),
        "temperatures": np.full(7, 0.5, dtype=np.float32),
        "advantages": np.arange(7, dtype=np.float32),
        "engine_logprobs": -np.arange(7, dtype=np.float32),
        "versions": np.array([-1, -1, 6, 7, -1, -1, 7], dtype=np.int32),
        "sampled": np.array([0, 0, 1, 1, 0, 0, 1], dtype=np.bool_),
        "weights": {"rl": np.array([0, 0, 1, 0, 0, 0, 2], dtype=np.float32)},
    }
    return MicroBatch(**{**columns, **changes})


def test_sampled_and_weighted_tokens_are_predicted_from_the_state_before():
    weights = {"rl": np.zeros(7, dtype=np.float32), "ce": np.array([0, 3, 0, 0, 0, 0, 0], dtype=np.float32)}
    tokens = predicted_tokens(micro_batch(weights=weights), 7, CPU)
    assert tokens.targets.tolist() == [11, 12, 13, 16]
    assert tokens.rows.tolist() == [0, 1, 2, 5]
    assert tokens.weights.keys() == {"ce"}
    assert tokens.weights["ce"].tolist() == [3, 0, 0, 0]
    assert tokens.sampled.tolist() == [False, True, True, True]


def test_the_first_token_of_a_sample_is_never_predicted():
    weights = {"ce": np.ones(7, dtype=np.float32)}
    tokens = predicted_tokens(micro_batch(weights=weights), 7, CPU)
    assert tokens.targets.tolist() == [11, 12, 13, 15, 16]


def test_columns_follow_their_tokens():
    tokens = predicted_tokens(micro_batch(), 7, CPU)
    assert tokens.targets.tolist() == [12, 13, 16]
    assert tokens.advantages.tolist() == [2, 3, 6]
    assert tokens.engine_logprobs.tolist() == [-2, -3, -6]
    assert tokens.temperatures.tolist() == [0.5, 0.5, 0.5]
    assert tokens.sample_ids.tolist() == [0, 0, 2]
    assert tokens.sample_count == 3


def test_staleness_and_freshness():
    tokens = predicted_tokens(micro_batch(), 7, CPU)
    assert tokens.staleness.tolist() == [1, 0, 0]
    assert tokens.fresh.tolist() == [False, False, True]  # one stale token makes its whole sample stale


def test_a_loss_that_needs_a_reference_is_refused_without_one():
    tokens = predicted_tokens(micro_batch(weights={"ref_kl": np.ones(7, dtype=np.float32)}), 7, CPU)
    scores = TokenScores(torch.zeros(len(tokens.rows), requires_grad=True), None)
    with pytest.raises(RunError, match="ref_kl stream needs ref_logprobs"):
        list(stream_losses(build_losses(), tokens, scores=scores, step=1))


def test_nothing_to_train_is_one_token_without_weight():
    tokens = predicted_tokens(no_tokens(), 7, CPU)
    assert len(tokens.rows) == 0
    assert tokens.weights == {}
    assert no_tokens().cu_seqlens.tolist() == [0, 1]
