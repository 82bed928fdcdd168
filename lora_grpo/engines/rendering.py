"""An engine asked in token ids: prompts are rendered with a trainer's own tokenizer, whose end token ends them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from lora_grpo.engines.base import Adapters, Engine, Samplings
from lora_grpo.engines.requests import sampling_by_prompt, token_prompts
from lora_grpo.types import Group, Prompt, Rendered, Sampling


class RenderingEngine:
    """`engine`, with text and chats encoded by `tokenizer` instead of its own.

    Completions end at `stop_token_ids` too, unless the call ignores end tokens. All else is the engine's own.
    """

    def __init__(self, engine: Engine, tokenizer: Any, stop_token_ids: Sequence[int]) -> None:
        self._engine, self.tokenizer, self._stop = engine, tokenizer, tuple(stop_token_ids)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, prompts: Sequence[Prompt], sampling: Samplings, *, adapter: Adapters) -> list[Group]:
        asked = self._ended(sampling) if isinstance(sampling, Sampling) else [self._ended(one) for one in sampling]
        groups = self._engine.generate(self._encoded(prompts), asked, adapter=adapter)
        return [replace(group, prompt=prompt) for group, prompt in zip(groups, prompts, strict=False)]

    def rendered(self, prompts: Sequence[Prompt], sampling: Samplings) -> tuple[list[Rendered], list[Sampling]]:
        """What the engine itself is asked: the prompts' token ids, and how each is sampled."""
        return self._encoded(prompts), [self._ended(one) for one in sampling_by_prompt(sampling, len(prompts))]

    def _encoded(self, prompts: Sequence[Prompt]) -> list[Rendered]:
        ids_P = token_prompts(self.tokenizer, prompts)
        return [Rendered.of(ids, prompt) for ids, prompt in zip(ids_P, prompts, strict=True)]

    def _ended(self, sampling: Sampling) -> Sampling:
        if sampling.ignore_eos:
            return sampling
        return replace(sampling, stop_token_ids=(*sampling.stop_token_ids, *self._stop))


def rendering(engine: Engine, tokenizer: Any, model: Any) -> Engine:
    """`engine` as a trainer of `model` asks it; itself where there is no `tokenizer`."""
    if tokenizer is None:
        return engine
    return cast(Engine, RenderingEngine(engine, tokenizer, end_tokens(tokenizer, model)))


def end_tokens(tokenizer: Any, model: Any) -> list[int]:
    """The ids that end a completion: the tokenizer's end token, and those of the model's generation config."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = getattr(tokenizer, "eos_token_id", None)
    found = [*(configured if isinstance(configured, list | tuple) else [configured]), own]
    return sorted({int(token) for token in found if token is not None})
