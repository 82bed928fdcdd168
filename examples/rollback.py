"""Go back to an earlier version and train on: a script, divided into cells (# %%) for an editor or a notebook."""

# %% A short run on the demo's base
from peft import LoraConfig

from lora_grpo import EngineConfig, GRPOConfig, GRPOTrainer, ModelConfig
from lora_grpo.demo import MAX_TOKENS, ensure_base, training_rows
from lora_grpo.rewards import exact

trainer = GRPOTrainer(
    ModelConfig(name=str(ensure_base()), dtype="float32"),
    exact("answer"),
    GRPOConfig(
        total_steps=4,
        num_generations=8,
        per_device_train_batch_size=32,
        max_completion_length=MAX_TOKENS,
        learning_rate=4e-3,
    ),
    training_rows(),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    engine_config=EngineConfig(max_model_len=64, enforce_eager=True),
    run_dir="runs/rollback",
)
trainer.train()

# %% Every version that you can go back to, and its reward
for version in trainer.store.list():
    print(version, trainer.store.metrics(version).get("reward"))

# %% One call takes back engine, weights, optimizer, schedule and random state; "best" or "parent" works, too
print(trainer.rollback(to=3))

# %% Train on: v3 is the parent of the next version; v4 and v5 are still there
trainer.train()
print({version.number: version.parent for version in trainer.store.list()})

# %% Done
trainer.close()
