"""What TRL's users write that is called something else here, or is not there: what to do instead."""

_EVERY_VERSION = (
    "every version is published and archived; [keep] (KeepConfig) says how many stay, trainer_state_every how often "
    "with the exact trainer state"
)

_INSTEAD = {
    "max_steps": "set total_steps: it counts generations, where TRL's max_steps counts optimizer steps",
    "num_train_epochs": "set total_steps, which counts generations",
    "output_dir": "the run's directory is run_dir= of GRPOTrainer, and output_dir at the top of a config file",
    "save_steps save_strategy save_total_limit save_only_model": _EVERY_VERSION,
    "resume_from_checkpoint": "call trainer.resume(), or `lora-grpo train --resume`",
    "logging_steps logging_strategy logging_first_step": "every step is logged; leave it out",
    "log_completions num_completions_to_print": "set log_completions_every, the steps between shown samples",
    "eval_steps eval_strategy": "set eval_every, the steps between held-out evaluations",
    "eval_on_start": "held-out prompts are answered at the start and at the end anyway; leave it out",
    "optim optim_args": "the optimizer is AdamW (learning_rate, weight_decay, adam_beta1 ...); leave it out",
    "shuffle_dataset": "prompts are shuffled again in every epoch, by seed; leave it out",
    "data_seed": "prompts are shuffled by seed; leave it out",
    "steps_per_generation": "set generation_batch_size, the completions of one generation",
    "warmup_ratio": "set warmup_steps, in optimizer updates",
    "use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode": (
        "completions always come from vLLM; leave it out, and see [engine] (EngineConfig)"
    ),
    "vllm_gpu_memory_utilization": "set engine.gpu_memory_utilization (EngineConfig)",
    "vllm_max_model_length": "set engine.max_model_len (EngineConfig)",
    "vllm_server_base_url vllm_server_host vllm_server_port": "name the servers in engine.urls (EngineConfig)",
    "bf16 fp16": "dtypes are model.dtype (ModelConfig) and engine.dtype (EngineConfig); leave it out",
    "model_init_kwargs": "pass the model as ModelConfig(name, dtype=, revision=, trust_remote_code=)",
    "generation_kwargs repetition_penalty": (
        "completions are sampled only with temperature and max_completion_length, so that the loss fits them"
    ),
    "sync_ref_model top_entropy_quantile off_policy_mask_threshold multi_objective_aggregation": (
        "it is TRL's own; train with NativeGRPOTrainer (lora_grpo.integrations.trl), which has it"
    ),
    "deepspeed fsdp fsdp_config": "launch with accelerate (DDP or FSDP2); leave it out",
}
TRL_SETTINGS = {name: instead for names, instead in _INSTEAD.items() for name in names.split()}
"""By TRL's setting."""

CONFIG = (
    "pass config=lora_grpo.GRPOConfig(...), whose fields have TRL's names where they mean the same; a trl.GRPOConfig "
    "goes to NativeGRPOTrainer (lora_grpo.integrations.trl)"
)
REWARD_MODEL = (
    "reward functions have the signature f(prompts, completions, **columns) -> list[float]: call the model in one, or "
    "train with NativeGRPOTrainer (lora_grpo.integrations.trl), which takes reward models"
)
TRL_ARGUMENTS = {
    "args": CONFIG,
    "callbacks": "use guard= for rollbacks, report_to for trackers, or NativeGRPOTrainer (lora_grpo.integrations.trl)",
    "optimizers": "the optimizer is AdamW, set by GRPOConfig",
    "reward_processing_classes": REWARD_MODEL,
    "tools": "write a rollout_func, which may take turns and mark tool output in Completion.token_mask",
    "environment_factory": "write a rollout_func, which may take turns and mark tool output in Completion.token_mask",
    "quantization_config": "set ModelConfig(name=..., quantization='nf4'), which quantizes trainer and engine",
}
"""By an argument of TRL's trainer."""
