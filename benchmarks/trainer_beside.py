"""What the trainer's part of a step stands beside: TRL's loss and backward, and the model without its output layer."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig


def trl(model: Any, ids_BL: Any, options: argparse.Namespace) -> Callable[[], Any]:
    import trl
    from datasets import Dataset

    from lora_grpo.bench.shapes import byte_tokenizer

    args = trl.GRPOConfig(
        tempfile.mkdtemp(),
        per_device_train_batch_size=options.rows,
        num_generations=options.rows,
        max_completion_length=options.tokens,
        gradient_checkpointing=options.checkpointing == "on",
        bf16=options.dtype == "bfloat16",
        use_cpu=options.device == "cpu",
        report_to="none",
    )
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["1"] * options.rows}),
        processing_class=byte_tokenizer(),
        peft_config=LoraConfig(r=16, target_modules="all-linear"),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    if args.gradient_checkpointing:  # as its `train` does
        trainer.model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    ids_BL = ids_BL.to(options.device)
    prompt_BP, completion_BT = ids_BL[:, : options.prompt], ids_BL[:, options.prompt :]
    inputs = {
        "prompt_ids": prompt_BP,
        "prompt_mask": torch.ones_like(prompt_BP),
        "completion_ids": completion_BT,
        "completion_mask": torch.ones_like(completion_BT),
        "advantages": torch.linspace(-1, 1, options.rows, device=options.device),
        "num_items_in_batch": torch.tensor(completion_BT.numel(), device=options.device),
    }

    def step() -> None:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()

    return step


def backbone(model: Any, ids_BL: Any, options: argparse.Namespace) -> Callable[[], Any]:
    def step() -> None:
        output = model.get_base_model().model(input_ids=ids_BL.to(options.device), use_cache=False)
        output.last_hidden_state.float().mean().backward()

    return step


def packed_backbone(model: Any, ids_BL: Any, options: argparse.Namespace) -> Callable[[], Any]:
    from lora_grpo.grpo.packing import in_spans, pack

    row = pack(ids_BL.tolist(), [options.prompt] * options.rows)
    ids_1N, positions_1N = torch.tensor([[row.ids], [row.positions]], device=options.device)

    def step() -> None:
        with in_spans(model, row.spans):
            output = model.get_base_model().model(
                input_ids=ids_1N, attention_mask=torch.ones_like(ids_1N), position_ids=positions_1N, use_cache=False
            )
            output.last_hidden_state.float().mean().backward()

    return step
