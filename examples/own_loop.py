"""Your own training loop, with versions served by vLLM: a policy gradient in forty lines, no trainer class.

    python examples/own_loop.py                      # the demo's tiny model, on the CPU or a GPU
    python examples/own_loop.py --model Qwen/Qwen2.5-0.5B-Instruct

The loop is plain PyTorch and PEFT. `sync.push` publishes the adapter and returns when vLLM provably serves it;
`engine.generate(..., adapter=version)` says which version to sample from; `sync.rollback` takes both back.
"""

import argparse
import random
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lora_grpo import AdapterStore, NativeSync, Sampling, VLLMEngine
from lora_grpo.demo import task
from lora_grpo.demo.base import ensure_base

GROUP = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="hub name or directory; default: the demo's tiny base")
    parser.add_argument("--steps", type=int, default=15)
    arguments = parser.parse_args()

    name = arguments.model or str(ensure_base())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine = VLLMEngine(name, max_lora_rank=16, max_model_len=64, enforce_eager=True, gpu_memory_utilization=0.3)
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0)

    rows, pick = task.training_rows(), random.Random(0)
    with tempfile.TemporaryDirectory() as run_dir, AdapterStore(archive=run_dir) as store:
        sync = NativeSync(model, engine, store, optimizer=optimizer)
        version = sync.push(step=0)
        for step in range(1, arguments.steps + 1):
            batch = pick.sample(rows, 64)
            groups = engine.generate([row["prompt"] for row in batch], Sampling(n=GROUP, max_tokens=4), adapter=version)
            rewards_PG = torch.tensor(
                [[float(c.text == row["answer"]) for c in g.completions] for row, g in zip(batch, groups, strict=True)]
            )
            advantages_PG = (rewards_PG - rewards_PG.mean(1, keepdim=True)) / (rewards_PG.std(1, keepdim=True) + 1e-4)
            loss = -(advantages_PG.flatten().to(device) * completion_logp_B(model, groups)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            store.record(version, reward=rewards_PG.mean().item())
            version = sync.push(step=step)
            receipt = sync.last_receipt
            print(f"step {step}: reward {rewards_PG.mean():.3f}, {version} served in {1000 * receipt.total_s:.1f} ms")
        print(sync.rollback(to="best:reward"))
        sync.close()
    engine.close()


def completion_logp_B(model: torch.nn.Module, groups: list) -> torch.Tensor:
    """Summed log-prob of each completion, (B,), with gradients."""
    rows = [(group.prompt_token_ids, c.token_ids) for group in groups for c in group.completions]
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    device = next(model.parameters()).device
    ids_BL = torch.tensor([[*p, *c, *[0] * (length - len(p) - len(c))] for p, c in rows], device=device)
    mask_BL = torch.tensor(
        [[0] * len(p) + [1] * len(c) + [0] * (length - len(p) - len(c)) for p, c in rows], device=device
    )
    logp_BLV = model(input_ids=ids_BL).logits[:, :-1].log_softmax(-1)
    return (logp_BLV.gather(2, ids_BL[:, 1:, None]).squeeze(2) * mask_BL[:, 1:]).sum(1)


if __name__ == "__main__":
    main()
