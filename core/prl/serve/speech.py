"""How text becomes the tokens of a run's policy and back, for the OpenAI endpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import attrs

from prl.providers import Model, Renderer, Tokenizer
from prl.rollout.tokenizer import load

if TYPE_CHECKING:
    from prl.compose.compose import Composition


@attrs.frozen(kw_only=True)
class Speech:
    """The name under which the policy is served, and its language."""

    model: str
    tokenizer: Tokenizer
    renderer: Renderer

    @classmethod
    def of(cls, composition: Composition) -> Speech:
        """Of the run's model: its name is the model's `type`."""
        run = composition.run
        provider = cast(Model, composition.provider(run.model))
        tokenizer = load(run.tokenizer, provider.special_tokens)
        renderer = composition.load(provider.render)(run.model, tokenizer)
        return cls(model=provider.name, tokenizer=tokenizer, renderer=renderer)
