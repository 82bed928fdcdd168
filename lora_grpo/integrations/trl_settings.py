"""From TRL's arguments to ours: what is passed on, and what is refused with the reason and the way out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from torch import nn
from transformers import TrainingArguments

from lora_grpo.adapters.peft_form.checks import scheme_of
from lora_grpo.config import KeepConfig
from lora_grpo.errors import ConfigError, UnsupportedAdapter
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.types import Sampling

# What `generation_kwargs` may override: the fields of `Sampling`, which mean what vLLM's mean.
_SAMPLED_WITH = tuple(field.name for field in fields(Sampling) if field.name not in ("n", "first_prompt"))
# Parts of the names of those that keep objects or packed tensors, or what they keep outside of their state.
_OPTIMIZERS_NOT_KEPT = ("galore", "apollo", "adalomo", "grokadamw", "adamw_torch_4bit", "adamw_torch_8bit")
_ANOTHER = "the sampled distribution would not be the trained one"
_REFUSED: dict[str, tuple[Callable[[Any], object], str]] = {  # by setting: what of it is refused, and why
    "vllm_tensor_parallel_size": (lambda size: size != 1, "the proofs read the slots of one worker; set it to 1"),
    "vllm_enable_sleep_mode": (bool, "level 2 discards base and adapters; lower vllm_gpu_memory_utilization instead"),
    "vllm_model_impl": (lambda name: name not in ("vllm", "auto"), "only vLLM's classes are proven; set it to 'vllm'"),
    "vllm_structured_outputs_regex": (lambda regex: regex is not None, f"{_ANOTHER}; check it in a reward function"),
    "use_transformers_continuous_batching": (bool, "completions come from vLLM here; leave it out"),
    "use_transformers_paged": (bool, "completions come from vLLM here; leave it out"),
    "temperature": (lambda value: value <= 0, "the completions of a group would all be the same; set it above 0"),
    "repetition_penalty": (lambda value: value != 1.0, f"{_ANOTHER}; set it to 1.0"),
    "world_size": (lambda count: count > 1, "one process trains and serves its own engine; launch it without torchrun"),
    "model_init_kwargs": (lambda given: not isinstance(given or {}, Mapping), "pass a dict: {'dtype': 'float32'}"),
    "fp16": (bool, "float16 needs a loss scale, which no rollback restores; set bf16=True, or fp16=False"),
    "deepspeed": (bool, "its optimizer cannot be rolled back; leave it out"),
    "fsdp": (bool, "one process trains and serves its own engine; leave it out"),
    "use_liger_kernel": (bool, "its kernels replace layers when training begins, after all was compared; leave it out"),
    "neftune_noise_alpha": (bool, "its noise is in the trainer's log-probs alone, off by whole nats; leave it out"),
    "sync_ref_model": (bool, "with an adapter, the KL's reference is the base or the start's adapter; set it to False"),
}


def check_arguments(args: Any, peft_config: Any) -> None:
    """Raises `ConfigError` or `UnsupportedAdapter` for a `trl.GRPOConfig` that cannot work without merging."""
    if isinstance(args, GRPOConfig):
        raise ConfigError("args is lora_grpo's GRPOConfig, of lora_grpo.GRPOTrainer; pass a trl.GRPOConfig here")
    if not isinstance(args, TrainingArguments | None):
        raise ConfigError(f"args={args!r} must be a trl.GRPOConfig")
    if args is None or not args.use_vllm or args.vllm_mode != "colocate":
        found = "args=None" if args is None else f"use_vllm={args.use_vllm}, vllm_mode={args.vllm_mode!r}"
        raise ConfigError(f"{found}: set use_vllm=True, vllm_mode='colocate' (server: lora_grpo.integrations.callback)")
    given = args.generation_kwargs or {}
    if not isinstance(given, Mapping) or not set(given) <= set(_SAMPLED_WITH):
        raise ConfigError(f"generation_kwargs={given!r}: only {', '.join(_SAMPLED_WITH)} can be given here")
    sampling_of({**vars(args), "generation_kwargs": None}, args.seed, ())
    try:
        sampling_of(vars(args), args.seed, ())
    except ConfigError as error:
        raise ConfigError(f"generation_kwargs={given!r}: {error}") from None
    for name, (is_refused, reason) in _REFUSED.items():
        said = getattr(args, name)
        if is_refused(said):
            raise ConfigError(f"{name}={getattr(said, 'value', said)!r}: {reason}")
    check_optimizer(args)
    if peft_config is not None and not isinstance(peft_config, LoraConfig):
        kind = type(peft_config).__name__
        raise UnsupportedAdapter(f"peft_config is a {kind}; vLLM swaps only LoRA: use peft.LoraConfig")


def check_optimizer(args: TrainingArguments) -> None:
    """Raises `ConfigError` for an optimizer that a rollback cannot restore."""
    if any(word in args.optim for word in _OPTIMIZERS_NOT_KEPT):
        raise ConfigError(f"optim={args.optim.value!r}: its state cannot be kept; use 'adamw_torch' or 'adamw_8bit'")


def check_reference(model: Any, args: Any) -> None:
    """Raises `ConfigError` for a PeftModel of which TRL cannot take the reference of its KL: a copy named "ref"."""
    names = list(getattr(model, "peft_config", {}))
    if not (names and args.beta):
        return
    copied = f"with beta={args.beta} TRL copies the adapter 'default' to 'ref', the reference of its KL"
    if "default" not in names:
        fix = "load it with PeftModel.from_pretrained(base, path, is_trainable=True), which names it so"
        raise ConfigError(f"{copied}, and the adapters are {names}; {fix}")
    if "ref" in names:
        raise ConfigError(f"{copied}, which the model has already: call model.delete_adapter('ref'), or set beta=0.0")


def check_types(given: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for an argument of the wrong type, where TRL ends in a traceback, or late."""
    place = (str | Path | None, "a directory")
    rows = Dataset | IterableDataset | torch.utils.data.Dataset | None
    rules: dict[str, tuple[Any, str]] = {
        "model": (str | Path | nn.Module, "a name, a directory or a model"),
        "reward_funcs": (list | str | Callable | None, "a function, a reward model, its name, or a list of these"),
        "train_dataset": (rows, "a datasets.Dataset, such as Dataset.from_list(rows)"),
        "keep": (KeepConfig | None, "a KeepConfig, such as KeepConfig(on_tmpfs=8)"),
        "engine_args": (Mapping | None, "a dict of VLLMEngine's keywords, such as {'max_loras': 2}"),
        "run_dir": place,
        "store_root": place,
    }
    inside = {"reward_funcs": str | Callable, "engine_args": str}
    for name, (kind, needed) in rules.items():
        value = given[name]
        items = value if isinstance(value, list | Mapping) else ()
        if not (isinstance(value, kind) and all(isinstance(item, inside[name]) for item in items)):
            raise ConfigError(f"{name}={value!r:.200} must be {needed}")


def sampling_of(given: Mapping[str, Any], seed: int, end_tokens: Sequence[int]) -> Sampling:
    """But for the call's seed. `given` is what TRL gives its own vLLM; at `end_tokens` it takes a completion to end."""
    fields = {"max_tokens": given["max_completion_length"], "min_p": given["min_p"] or 0.0, "seed": seed}
    fields |= {name: given[name] for name in ("temperature", "top_p", "top_k")}
    fields |= given["generation_kwargs"] or {}
    # Of stops vLLM takes one string alone, a list, or None.
    for name in fields.keys() & {"stop", "stop_token_ids"}:
        value = fields[name]
        fields[name] = (value,) if isinstance(value, str) else () if value is None else value
    sampling = Sampling(**fields)
    ends = sampling.stop_token_ids if sampling.ignore_eos else (*sampling.stop_token_ids, *end_tokens)
    return replace(sampling, stop_token_ids=ends)


def vllm_args(given: Mapping[str, Any], rank: int, others: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of `VLLMEngine`; `others` are the user's own and may not repeat what TRL's arguments say."""
    model = given["model"]
    checkpoint = getattr(model, "name_or_path", "")
    if not checkpoint:
        raise ConfigError("the model knows no checkpoint, which vLLM loads too; pass the trainer its name or directory")
    its, config = "the trainer's model", "trl.GRPOConfig's"
    said = {  # each with what it follows from
        "model": (checkpoint, its),
        "quantization": ("nf4" if scheme_of(model.config) == "nf4" else None, its),
        "max_model_len": (given["max_model_length"], f"{config} vllm_max_model_length"),
        "gpu_memory_utilization": (given["gpu_memory_utilization"], f"{config} vllm_gpu_memory_utilization"),
        "max_num_seqs": (given["max_num_seqs"], f"{config} per_device_train_batch_size * steps_per_generation"),
        "model_impl": (given["model_impl"], f"{config} vllm_model_impl"),
        "revision": (given["revision"], f"{config} model_init_kwargs"),
        "trust_remote_code": (given["trust_remote_code"], f"{config} trust_remote_code"),
    }
    if twice := sorted(said.keys() & others.keys()):
        raise ConfigError(f"engine_args: {twice[0]} follows from {said[twice[0]][1]} here; set that, and leave it out")
    settled = {name: value for name, (value, _) in said.items()}
    # vLLM's CPU backend compiles for a minute when not eager, and gains little by it.
    on_cpu = next(model.parameters()).device.type == "cpu"
    return {"max_lora_rank": rank, "max_num_batched_tokens": 4096, "enforce_eager": on_cpu, **settled, **others}
