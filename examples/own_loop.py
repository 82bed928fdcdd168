"""A training loop of your own, in PyTorch and PEFT."""

# %% Divided into cells for an editor or a notebook
import random

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from lora_grpo import AdapterStore, NativeSync, Sampling, VLLMEngine, keep_archived, keep_best, keep_latest

NAME, STEPS, LEARNING_RATE = "Qwen/Qwen2.5-0.5B-Instruct", 30, 1e-4
KEEP = keep_latest(8) | keep_archived(keep_latest(50) | keep_best("reward"))  # in memory; on disk

engine = VLLMEngine(NAME, max_lora_rank=16, max_model_len=64)
base = AutoModelForCausalLM.from_pretrained(NAME, dtype="auto").to(engine.device)
model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)


# %% The loss
def loss(groups, advantages):
    """Policy gradient; -100 marks what cross_entropy leaves out: prompts and padding."""
    rows = [(group.prompt_token_ids, done.token_ids) for group in groups for done in group.completions]
    ids = pad_sequence([torch.tensor([*prompt, *done]) for prompt, done in rows], batch_first=True)
    targets = [torch.tensor([-100] * (len(prompt) - 1) + list(done)) for prompt, done in rows]
    targets = pad_sequence(targets, batch_first=True, padding_value=-100)
    logits = model(ids.to(engine.device)).logits[:, :-1].float()
    nats = cross_entropy(logits.transpose(1, 2), targets.to(engine.device), reduction="none")
    return (advantages.flatten()[:, None].to(engine.device) * nats).mean()


# %% The loop: publish and prove, sample, score, learn; then back to the best version
with AdapterStore(archive="runs/own-loop", retention=KEEP) as store:
    sync = NativeSync(model, engine, store, optimizer=optimizer)
    version = sync.push(step=0)  # publish, load, prove: now it can be sampled from
    for step in range(1, STEPS + 1):
        sums = [random.sample(range(10, 100), 2) for _ in range(16)]
        groups = engine.generate([f"{a}+{b}=" for a, b in sums], Sampling(n=8, max_tokens=4), adapter=version)
        answers = [[done.text for done in group.completions] for group in groups]
        rewards = torch.tensor([[float(str(a + b) in t) for t in ts] for (a, b), ts in zip(sums, answers, strict=True)])
        loss(groups, rewards - rewards.mean(1, keepdim=True)).backward()
        store.record(version, reward=rewards.mean().item())
        optimizer.step()
        optimizer.zero_grad()
        version = sync.push(step=step)
        print(f"step {step}: reward {rewards.mean():.3f}; {version} is served")
    print(sync.rollback(to="best:reward"))  # engine, weights, optimizer and random state
    sync.close()
engine.close()
