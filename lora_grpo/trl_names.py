"""What TRL's users write that is called something else here, or is not there: what to do instead."""

_INSTEAD = {
    "max_steps num_train_epochs": "set total_steps: it counts generations, where max_steps counts optimizer steps",
    "output_dir": "the run's directory is run_dir= of GRPOTrainer, and output_dir at the top of a config file",
    "save_steps save_strategy save_total_limit save_only_model": (
        "every version is published and archived; [keep] (KeepConfig) says how many stay, and their trainer states"
    ),
    "resume_from_checkpoint": "call trainer.resume(), or `lora-grpo train --resume`",
    "logging_steps logging_strategy logging_first_step": "every step is logged; leave it out",
    "log_completions num_completions_to_print log_unique_prompts log_multimodal": "set log_completions_every, in steps",
    "eval_steps eval_strategy": "set eval_every, the steps between held-out evaluations",
    "eval_on_start": "held-out prompts are answered at the start and at the end anyway; leave it out",
    "optim optim_args": "the optimizer is AdamW (learning_rate, weight_decay, adam_beta1 ...); leave it out",
    "shuffle_dataset data_seed": "prompts are shuffled again in every epoch, by seed; leave it out",
    "steps_per_generation": "set generation_batch_size, the completions of one generation",
    "warmup_ratio": "set warmup_steps, in optimizer updates",
    "lr_scheduler_kwargs": "schedules are those of lr_scheduler_type alone; leave it out",
    "gradient_checkpointing_kwargs": "set gradient_checkpointing alone, or leave both out",
    "use_liger_loss use_liger_kernel liger_kernel_config": "log-probs take the vocabulary in parts; leave it out",
    "remove_unused_columns": "reward functions get every column; leave it out",
    "ds3_gather_for_generation": "nothing is gathered: vLLM has a base of its own; leave it out",
    "per_device_eval_batch_size eval_accumulation_steps": "vLLM answers all held-out prompts at once; leave it out",
    "num_generations_eval": "held-out prompts get one greedy completion each; leave it out",
    "load_best_model_at_end metric_for_best_model greater_is_better": "save_model(DIR, which='best:METRIC') does it",
    "push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision": (
        "`lora-grpo export RUN VERSION --push-to-hub REPO` uploads a version; leave it out"
    ),
    "run_name project": "trackers are named after the run's directory; leave it out",
    "max_tool_calling_iterations": "write a rollout_func, which takes its turns itself (GRPOTrainer)",
    "disable_tqdm": "pass view=False to GRPOTrainer",
    "ignore_data_skip": "a resumed run goes on with its next prompts; leave it out",
    "trust_remote_code": "set model.trust_remote_code (ModelConfig)",
    "vllm_tensor_parallel_size": "each process has a vLLM of its own on its GPU; leave it out",
    "vllm_importance_sampling_cap": "set vllm_importance_sampling_clip_max, its new name",
    "use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode "
    "use_transformers_continuous_batching transformers_continuous_batching_config use_transformers_paged": (
        "completions always come from vLLM; leave it out, and see [engine] (EngineConfig)"
    ),
    "vllm_gpu_memory_utilization": "set engine.gpu_memory_utilization (EngineConfig)",
    "vllm_max_model_length": "set engine.max_model_len (EngineConfig)",
    "vllm_server_base_url vllm_server_host vllm_server_port vllm_group_port": "list them in engine.urls (EngineConfig)",
    "vllm_server_timeout": "set engine.timeout_s and engine.patience_s (EngineConfig)",
    "bf16 fp16 bf16_full_eval fp16_full_eval": "set model.dtype (ModelConfig) and engine.dtype (EngineConfig)",
    "model_init_kwargs": "pass the model as ModelConfig(name, dtype=, revision=, trust_remote_code=)",
    "generation_kwargs repetition_penalty vllm_structured_outputs_regex": (
        "completions are sampled only with temperature and max_completion_length, so that the loss fits them"
    ),
    "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps": (
        "the KL's reference stays the adapter at the start, and TRL does not move it with adapters either; leave it out"
    ),
    "top_entropy_quantile off_policy_mask_threshold multi_objective_aggregation sapo_temperature_neg "
    "sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg entropy_coef use_adaptive_entropy "
    "entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target router_aux_loss_coef": (
        "it is TRL's own; train with NativeGRPOTrainer (lora_grpo.integrations.trl), which has it"
    ),
    "deepspeed fsdp fsdp_config": "launch with accelerate (DDP or FSDP2); leave it out",
}
_NOTHING_LIKE_IT = """
optim_target_modules average_tokens_across_devices label_smoothing_factor tf32 torch_compile torch_compile_backend
torch_compile_mode use_cache neftune_noise_alpha torch_empty_cache_steps auto_find_batch_size log_on_each_node
logging_nan_inf_filter include_num_input_tokens_seen log_level log_level_replica trackio_space_id trackio_bucket_id
trackio_static_space_id eval_delay prediction_loss_only eval_do_concat_batches eval_use_gather_object
include_for_metrics batch_eval_metrics save_on_each_node enable_jit_checkpoint restore_callback_states_from_checkpoint
full_determinism use_cpu accelerator_config parallelism_config dataloader_drop_last dataloader_num_workers
dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
dataloader_in_order label_names train_sampling_strategy length_column_name ddp_find_unused_parameters ddp_bucket_cap_mb
ddp_broadcast_buffers ddp_static_graph ddp_backend debug skip_memory_metrics do_train do_eval do_predict local_rank
disable_dropout cast_lm_head_to_fp32 pad_to_multiple_of cache_implementation log_completions_hub_repo
"""
TRL_SETTINGS = {
    **{name: f"TRL's setting {name} has no counterpart here: leave it out" for name in _NOTHING_LIKE_IT.split()},
    **{name: instead for names, instead in _INSTEAD.items() for name in names.split()},
}

CONFIG = "pass config=lora_grpo.GRPOConfig(...), or a trl.GRPOConfig to NativeGRPOTrainer (lora_grpo.integrations.trl)"
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
