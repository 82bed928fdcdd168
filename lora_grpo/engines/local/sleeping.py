"""Sleep mode: an engine gives its GPU memory back for a while, and shows on waking that it is what it was.

vLLM frees weights and KV cache. At level 1 it keeps a copy of the weights in host memory, adapter slots included; at
level 2 it keeps none, and the base is read from its files again (from vLLM 0.28). Its allocator is one for the whole
process.
"""

from collections.abc import Sequence
from typing import Any

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines import compat
from lora_grpo.engines.base import Engine
from lora_grpo.engines.delivery.probe import probe_sequences
from lora_grpo.errors import ConfigError, DeliveryError
from lora_grpo.scoring import mean_abs_difference
from lora_grpo.types import LogProbs

SAME_BASE_NATS = 0.02
"""What two scorings of the same tokens on the same weights may differ by, mean a token."""


def check_may_sleep(llm: Any, level: int, loaded: Sequence[AdapterVersion], *, shared: bool, alive: int) -> None:
    """Raises `ConfigError` with what stands against it. `shared`: a trainer's base is a view of its weights; `alive`
    engines are in this process."""
    if level not in (1, 2):
        raise ConfigError(f"there is no sleep level {level}: use 1 (weights go to host memory) or 2 (read again)")
    if shared:
        raise ConfigError("sleep would free the weights that the trainer shares; start with share_base_weights=False")
    if not compat.sleep_mode(llm):
        raise ConfigError("the engine was not started with enable_sleep_mode=True (GPUs only), so it cannot sleep")
    if llm.llm_engine.has_unfinished_requests():
        raise ConfigError("the engine is answering requests, and sleep would abort them; sleep when they are done")
    if alive > 1:
        raise ConfigError(
            f"{alive} engines are alive in this process, and vLLM would unmap all; close the others first"
        )
    release = ".".join(map(str, compat.vllm_release()))
    if level == 2 and not compat.reads_base_again():
        raise ConfigError(
            f"sleep level 2 on vLLM {release} has no way back: it cannot read the base of an engine with LoRA again; "
            "use level 1, or vLLM 0.28 or newer"
        )
    if level == 2 and loaded and not compat.slots_outlive_level_2():
        raise ConfigError(
            f"sleep level 2 on vLLM {release} discards the adapter slots ({', '.join(map(str, loaded))} loaded); use "
            "level 1, or unload every version first"
        )


def check_base_is_back(engine: Engine, level: int, before: LogProbs) -> None:
    """Raises `DeliveryError` unless the base scores as it did `before`."""
    gap = mean_abs_difference(score_base(engine), before)
    if not gap <= SAME_BASE_NATS:
        raise DeliveryError(
            f"after sleep level {level} the base is not the same: its log-probs differ by {gap:.3f} nats per "
            f"token (at most {SAME_BASE_NATS}); the engine is closed, start another"
        )


def score_base(engine: Engine) -> LogProbs:
    return engine.logprobs(probe_sequences(engine.describe_base()), adapter=None)
