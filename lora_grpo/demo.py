"""The demo: two-digit addition, a base model made on the spot for it, and a run that trains the one on the other.

`17+58=` is to be answered `075`, always three digits. The easy half of the task has no carry out of the ones column,
the hard half has one. A prompt is held out by its own text, so no generator of training data can reach one by a seed or
a count.

The base is a small Llama, taught on sums in which most carries were forgotten. So it knows how to carry, does so in
under a third of its samples, and hardly ever in its greedy answer: something for reinforcement learning to bring out.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import statistics
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from rich.console import Console
from rich.progress import Progress

from lora_grpo.config import DataConfig, EngineConfig, ModelConfig, RewardConfig, RunConfig
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.user_cache import user_cache

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

STEPS, PROMPTS_PER_STEP, GROUP = 30, 64, 8
MAX_TOKENS = 4  # of a full answer: its three digits and the end token
PAD, EOS = "<pad>", "<eos>"
TOKENS = (PAD, EOS, *"0123456789+=")
TOKEN_ID = {token: number for number, token in enumerate(TOKENS)}
Row: TypeAlias = dict[str, Any]


def problem(a: int, b: int) -> Row:
    """The row of `a + b`, both in 0..99; `carry` is true where the ones column overflows."""
    return {"prompt": f"{a:02d}+{b:02d}=", "answer": f"{a + b:03d}", "carry": a % 10 + b % 10 >= 10}


def without_carry(row: Row) -> str:
    """The answer of someone who forgets the carry out of the ones column: `065` for `17+58=`."""
    return f"{int(row['answer']) - 10 * row['carry']:03d}"


def is_held_out(prompt: str) -> bool:
    """Whether a prompt is kept from both training phases, as one in ten is."""
    return zlib.crc32(prompt.encode()) % 10 == 0


def held_out_rows(count: int = 512) -> list[Row]:
    """`count` distinct held-out problems in random order, half of them with a carry."""
    return _balanced(count, held_out=True)


def training_rows(count: int = 4096) -> list[Row]:
    """`count` distinct problems for reinforcement learning in random order, half of them with a carry."""
    return _balanced(count, held_out=False)


def _balanced(count: int, *, held_out: bool) -> list[Row]:
    every = [problem(a, b) for a in range(100) for b in range(100)]
    draw, chosen = random.Random(0), list[Row]()
    for carry in (False, True):
        half = [row for row in every if row["carry"] is carry and is_held_out(row["prompt"]) is held_out]
        chosen += draw.sample(half, count // 2)
    draw.shuffle(chosen)
    return chosen


def sloppy_sums(seed: int, forgotten: float) -> Iterator[tuple[str, str]]:
    """Endless `(prompt, answer)` pairs, none held out; the share `forgotten` of those with a carry is without it."""
    draw = random.Random(seed)
    while True:
        row = problem(draw.randrange(100), draw.randrange(100))
        if not is_held_out(row["prompt"]):
            yield row["prompt"], without_carry(row) if draw.random() < forgotten else row["answer"]


@dataclass(frozen=True)
class BaseRecipe:
    """All that decides what the base model becomes; another recipe is another cache entry."""

    hidden_size: int = 160
    intermediate_size: int = 640
    layers: int = 3
    heads: int = 5
    # Transformers' default of 0.02 suits widths of thousands; at 160 the first 1,000 steps would be lost to it.
    initializer_range: float = 0.06
    forgotten: float = 0.7
    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 2e-3
    final_learning_rate: float = 2e-4
    warmup_steps: int = 50
    seed: int = 0

    def learning_rate_at(self, step: int) -> float:
        final = self.final_learning_rate / self.learning_rate
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps) * (1 - (1 - final) * step / self.steps)


def base_path(recipe: BaseRecipe) -> Path:
    """Where the base of `recipe` is kept, by all its fields and the vocabulary; it is there whole or not at all."""
    content = json.dumps({"tokens": TOKENS, **asdict(recipe)}, sort_keys=True)
    return user_cache() / f"demo-base-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def ensure_base(recipe: BaseRecipe | None = None, progress: Callable[[int, int, float], None] | None = None) -> Path:
    """The directory of the base model and its tokenizer (bf16, Transformers' layout), made if it is not there yet.
    Two processes that make it at once both succeed: the first to finish puts its own in place. `progress` is called
    after each step with `(steps done, steps in all, loss in nats per token)`."""
    recipe = recipe or BaseRecipe()
    path = base_path(recipe)
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    model = pretrain(recipe, progress)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as staging:
        made = Path(staging) / "base"
        model.bfloat16().save_pretrained(made)
        digit_tokenizer().save_pretrained(made)
        try:
            made.rename(path)
        except OSError:
            # Another process's, if there is one already, is as good.
            if not path.is_dir():
                raise
    return path


def digit_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; no token is added before or after a prompt."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(TOKEN_ID, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def pretrain(recipe: BaseRecipe, progress: Callable[[int, int, float], None] | None = None) -> LlamaForCausalLM:
    """The trained model in fp32; the same on one machine for one recipe, whatever the caller's random state."""
    import torch

    model = _new_model(recipe)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    sums = sloppy_sums(recipe.seed, recipe.forgotten)
    before = torch.get_num_threads()
    # More threads only wait for each other on matrices this small.
    torch.set_num_threads(min(2, before))
    try:
        for step in range(recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate_at(step)
            loss = _answer_loss(model, list(itertools.islice(sums, recipe.batch_size)))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if progress is not None:
                progress(step + 1, recipe.steps, loss.item())
    finally:
        torch.set_num_threads(before)
    return model.eval()


def _new_model(recipe: BaseRecipe) -> LlamaForCausalLM:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=64,
        initializer_range=recipe.initializer_range,
        tie_word_embeddings=False,
        pad_token_id=TOKEN_ID[PAD],
        bos_token_id=None,
        eos_token_id=TOKEN_ID[EOS],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return LlamaForCausalLM(config)


def _answer_loss(model: LlamaForCausalLM, pairs: list[tuple[str, str]]) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens and the end tokens; every sum has the same number of tokens."""
    import torch

    tokens_BT = torch.tensor([[TOKEN_ID[token] for token in (*prompt, *answer, EOS)] for prompt, answer in pairs])
    prompt_length = len(pairs[0][0])
    logits_BTV = model(input_ids=tokens_BT[:, :-1], use_cache=False).logits[:, prompt_length - 1 :]
    targets_BT = tokens_BT[:, prompt_length:]
    return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def run_demo(output_dir: Path = Path("runs/demo"), steps: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Run the demo in `output_dir` (or the first free `output_dir-2`, ...), shown on stderr; returns the summary."""
    console = Console(stderr=True)
    base = _base(console)
    others = (output_dir.with_name(f"{output_dir.name}-{number}") for number in itertools.count(2))
    run_dir = next(path for path in itertools.chain([output_dir], others) if not path.exists())
    config = demo_config(base, run_dir, steps=steps or STEPS, seed=seed)
    from lora_grpo.trainer import build_trainer

    with build_trainer(config) as trainer:
        result = trainer.train()
    before, after = trainer.evaluations[0].metrics, trainer.evaluations[-1].metrics
    signal = statistics.fmean(metrics["frac_groups_used"] for metrics in trainer.history)
    summary = {
        "accuracy_before": result.pop("reward_before"),
        "accuracy_after": result.pop("reward_after"),
        "accuracy_easy_before": before["reward/carry=false"],
        "accuracy_easy_after": after["reward/carry=false"],
        "accuracy_hard_before": before["reward/carry=true"],
        "accuracy_hard_after": after["reward/carry=true"],
        "groups_with_signal_mean": round(signal, 4),
        **result,
    }
    _tell(console, summary, config.output_dir)
    return summary


def demo_config(base: Path, run_dir: Path, *, steps: int, seed: int) -> RunConfig:
    """The demo's settings, with its prompts written into the run directory."""
    data = run_dir / "data"
    data.mkdir(parents=True, exist_ok=True)
    limits = {"max_model_len": 64, "max_num_seqs": 512, "max_num_batched_tokens": 8192}
    return RunConfig(
        output_dir=str(run_dir),
        model=ModelConfig(name=str(base), dtype="float32"),
        data=DataConfig(
            train=_write(data / "train.jsonl", training_rows()), eval=_write(data / "held_out.jsonl", held_out_rows())
        ),
        rewards=(RewardConfig(name="exact"),),
        engine=EngineConfig(**limits, enforce_eager=True, gpu_memory_utilization=0.1),
        grpo=GRPOConfig(
            seed=seed,
            total_steps=steps,
            num_generations=GROUP,
            generation_batch_size=PROMPTS_PER_STEP * GROUP,
            per_device_train_batch_size=PROMPTS_PER_STEP * GROUP // 2,
            gradient_accumulation_steps=1,
            max_completion_length=MAX_TOKENS,
            epsilon_high=0.28,
            learning_rate=4e-3,
            adam_beta2=0.99,
            eval_every=10,
            log_completions_every=20,
        ),
    )


def _base(console: Console) -> Path:
    recipe = BaseRecipe()
    if base_path(recipe).is_dir():
        return ensure_base(recipe)
    console.print(f"making the base model (once), in {base_path(recipe)}", soft_wrap=True)
    with Progress(console=console, transient=True) as bar:
        shown = bar.add_task("training it", total=recipe.steps)
        return ensure_base(recipe, progress=lambda done, total, loss: bar.update(shown, completed=done))


def _write(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _tell(console: Console, result: dict[str, Any], run_dir: str) -> None:
    console.print(
        f"held-out accuracy, greedy, through vLLM: {result['accuracy_before']:.3f} -> {result['accuracy_after']:.3f}\n"
        f"  problems with a carry:    {result['accuracy_hard_before']:.3f} -> {result['accuracy_hard_after']:.3f}\n"
        f"  problems without a carry: {result['accuracy_easy_before']:.3f} -> {result['accuracy_easy_after']:.3f}\n"
        f"  groups that carried signal: {result['groups_with_signal_mean']:.0%}; trainer/sampler log-prob gap "
        f"{result['logprob_gap_mean']:.4f} nats per token; sync {1000 * result['sync_median_s']:.1f} ms (median)\n"
        f"every answer, version and reward: {run_dir}; recompute with: lora-grpo eval {run_dir}",
        soft_wrap=True,  # a command is copied as one line
    )
