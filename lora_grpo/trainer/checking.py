"""`lora-grpo check`: what a run would end with, found without training it, and what it would train with."""

import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lora_grpo.adapters.files.disk import tmpfs_home
from lora_grpo.adapters.files.places import expected_root, require_kept
from lora_grpo.adapters.peft_form.checks import active_adapter
from lora_grpo.adapters.peft_form.modules import lora_modules
from lora_grpo.config import RunConfig
from lora_grpo.data import PromptDataset, load_data, load_prompts
from lora_grpo.engines.compat import import_vllm
from lora_grpo.engines.local.targets import check_served, checkpoint_config, full_class
from lora_grpo.errors import ConfigError, LoraGrpoError, UnsupportedAdapter, counted
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.metrics.reporter import check_trackers
from lora_grpo.rewards import RewardContext, RewardFunction, load_reward, reward_names, score
from lora_grpo.trainer.build import check_place, effective_grpo, lora_config, spec_of
from lora_grpo.trainer.grpo_trainer import GRPOTrainer
from lora_grpo.trainer.memory import mib
from lora_grpo.trainer.models import adapted_modules, default_device, shared_base
from lora_grpo.trainer.preflight import Preflight
from lora_grpo.trainer.room import Room, Wanted, available_memory, plan_room
from lora_grpo.types import Completion, Group, Sampling

SWAPS, SWAP_TOKENS = 3, 8
STAND_IN = "This is a stand-in for a completion."
KEPT_BY_LAYERS = ("A_log", "D", "dt_bias")  # what state-space layers start from; other values would not be stable
Part: TypeAlias = tuple[str, Callable[[], str]]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Finding:
    what: str
    ok: bool
    found: str  # or what has to change


def check_run(
    config: RunConfig, *, engine: bool = False, rewards: bool = False, alone: bool = False
) -> Iterator[Finding]:
    """What can be known of a run without training it, as it is found; nothing of it is written. `engine` starts the
    run's engine, if all else is well; `rewards` calls each reward function once (errors and types count, values do
    not); `alone`: a base without data and rewards."""
    run, well = _Run(config, alone), True
    for finding in _findings([*run.parts(), *(run.reward_calls() if rewards else ())]):
        well = well and finding.ok
        yield finding
    if engine and well:
        with ExitStack() as opened:
            yield from _findings(run.engine_parts(opened))


def _findings(parts: Iterable[Part]) -> Iterator[Finding]:
    """What each part says; one that ends with the error of another before it says nothing new."""
    told: set[str] = set()
    for what, look in parts:
        try:
            yield Finding(what, True, look())
        except LoraGrpoError as error:
            if str(error) not in told:
                yield Finding(what, False, str(error))
            told.add(str(error))


def _or_none(look: Callable[[], T]) -> T | None:
    """What there is; what is wrong with it is told by its own part."""
    with suppress(LoraGrpoError):
        return look()
    return None


class _Run:
    trainer: GRPOTrainer

    def __init__(self, config: RunConfig, base_alone: bool) -> None:
        if base_alone:  # completions are those of the swaps then, for which every engine has room
            config = config.replace(grpo=config.grpo.replace(max_completion_length=SWAP_TOKENS))
        self.config, self.base_alone, self.grpo = config, base_alone, effective_grpo(config)

    def parts(self) -> Iterator[Part]:
        if not self.base_alone:
            run, goes_on = Path(self.config.output_dir), "a run, which goes on with --resume"
            yield "run directory", lambda: f"{run} holds {goes_on if check_place(run) else 'no run'}"
            yield "reward functions", lambda: ", ".join(reward_names(self.functions))
            yield "data", lambda: "; ".join(map(_columns, filter(None, self.data)))
        yield "base and adapter", self._adapter
        yield "vLLM", self._served
        planned = _or_none(lambda: self.plan)
        for name, size_bytes in planned.memory.parts().items() if planned else ():
            yield f"memory: {name}", partial(mib, size_bytes)
        yield "memory", self._memory
        if not self.base_alone:
            if planned:
                root, kept = self.config.store_root, self.config.keep.on_tmpfs
                yield "room for versions", lambda: require_kept(expected_root(root, run), kept, planned.version_bytes)
            if self.grpo.report_to:
                yield "trackers", lambda: check_trackers(self.grpo.report_to)
            yield "steps", lambda: self.preflight.check_steps()
            yield "rewards", lambda: self.preflight.check_rewards()
            if planned:  # a base that cannot be read has no tokenizer either
                yield "prompts", lambda: self.preflight.check_prompts(self.preflight.known_room)

    def reward_calls(self) -> Iterator[Part]:
        """Each function alone, so that one that fails hides no other."""
        if _or_none(lambda: self.functions and self.data):
            for name, function in zip(reward_names(self.functions), self.functions, strict=True):
                yield f"reward {name}", partial(call_once, function, self.data[0], self.grpo)

    def _start(self, opened: ExitStack) -> str:
        run = opened.enter_context(tempfile.TemporaryDirectory(prefix="lora-grpo-check-"))
        root = opened.enter_context(tempfile.TemporaryDirectory(prefix="lora-grpo-check-", dir=tmpfs_home()))
        places = {"run_dir": run, "store_root": Path(root) / "store", "config": self.grpo.replace(report_to=())}
        arguments = replace(self.preflight.spec, **places).arguments()
        self.trainer = GRPOTrainer(self.config.model, **arguments, engine_config=self.config.engine, view=False)
        opened.callback(self.trainer.close)
        engine = self.trainer.engine
        return f"{type(engine).__name__}, max_lora_rank {engine.max_lora_rank}, adapters in {engine.lora_dtype}"

    def engine_parts(self, opened: ExitStack) -> Iterator[Part]:
        yield "engine", lambda: self._start(opened)
        if not hasattr(self, "trainer"):  # it did not start
            return
        sync = self.trainer.sync
        if (probe := sync.probe) is not None:
            agreed = f"{sync.base_match}; engine and trainer agree to {sync.noise:.4f} nats per token"
            yield "base match", lambda: agreed
            yield "probe", lambda: f"a loud adapter moves {probe.signal:.3g} nats per token, {probe.error:.2g} apart"
        for number in range(1, SWAPS + 1):
            yield f"swap {number}", partial(self._swap, number)
        yield "one copy of the base", self._one_copy

    @cached_property
    def functions(self) -> list[RewardFunction]:
        return [_no_reward] if self.base_alone else [load_reward(reward) for reward in self.config.rewards]

    @cached_property
    def data(self) -> tuple[PromptDataset, PromptDataset | None]:
        return (load_prompts([{"prompt": STAND_IN}]), None) if self.base_alone else load_data(self.config.data)

    @cached_property
    def plan(self) -> Room:
        wanted = _or_none(lambda: self.preflight.wanted) or Wanted(lora_config(self.config.lora), self.grpo, 0)
        return plan_room(self.config.model, [wanted], self.config.engine, False, 1).require()

    @cached_property
    def preflight(self) -> Preflight:
        spec = spec_of(self.config, self.functions, self.data)
        return Preflight(self.config.model, spec, engine_config=self.config.engine)

    def _adapter(self) -> str:
        modules = adapted_modules(self.config.model, lora_config(self.config.lora))
        values = sum(module.a_RI.numel() + module.b_OR.numel() for module in modules)
        leaves = ", ".join(sorted({module.path.rsplit(".", 1)[-1] for module in modules}))
        on = f"{counted(len(modules), 'layer')} ({leaves}), {values:,} values"
        return f"{self.config.model.name}: rank {self.plan.rank} on {on}"

    def _served(self) -> str:
        if self.config.engine.urls:
            return "its servers are asked when the run starts"
        import_vllm()
        return check_served(self.config.model.name, **self.config.model.loading)

    def _one_copy(self) -> str:
        """Whether `share_base_weights` would do; no fault where it would not."""
        try:
            shared: Any = shared_base(True, self.config.model, self.trainer.engine, print)
        except (ConfigError, UnsupportedAdapter) as reason:
            return f"not with this engine: {reason}"
        return f"{len(list(shared.parameters()))} tensors of the trainer's can be the engine's own (share_base_weights)"

    def _memory(self) -> str:
        planned, device = self.plan, default_device()
        twice = "; activations are computed twice (gradient_checkpointing)" if planned.checkpointing else ""
        unknown = " without activations, which cannot be estimated," if planned.memory.activations_bytes is None else ""
        free = f"{mib(available_memory(device))} free on {device}"
        return f"{mib(planned.memory.total_bytes)}{unknown} of {free}{twice}"

    def _swap(self, number: int) -> str:
        trainer, sync, temperature = self.trainer, self.trainer.sync, self.grpo.temperature
        generator = torch.Generator().manual_seed(number)
        for module in lora_modules(trainer.model, active_adapter(trainer.model)):
            module.b_OR.data.copy_(torch.randn(module.b_OR.shape, generator=generator) * 0.02)
        version, receipt, data = sync.push(step=number), sync.last_receipt, trainer.source.data
        assert receipt is not None
        prompts, _ = data.select(range(min(2, len(data))))
        most = min(SWAP_TOKENS, self.grpo.max_completion_length)
        sampling = Sampling(max_tokens=most, temperature=temperature, seed=number)
        groups = trainer.parts.rendering.generate(prompts, sampling, adapter=version)
        said = f"{receipt.load.proof}: {receipt.load.modules} modules, {receipt.load.proven_bytes:,} bytes compared"
        if sync.probe is not None:
            said += f"; canary {sync.canary(groups, temperature=temperature).verdict}"
        return f"{version} in {receipt.total_s * 1000:.0f} ms, {said}"


def call_once(function: RewardFunction, data: PromptDataset, config: GRPOConfig) -> str:
    """Call one reward function on two rows with a stand-in completion; raises `RewardError` for errors and types."""
    prompts, columns = data.select([0, min(1, len(data) - 1)])
    completion = Completion(STAND_IN, tuple(STAND_IN.encode()), (-1.0,) * len(STAND_IN.encode()), "stop", None)
    groups = [Group(prompt, (0,), (completion,)) for prompt in prompts]
    score([function], groups, columns, RewardContext(max_steps=config.total_steps), config.replace(reward_retries=0))
    return f"called on {len(groups)} rows with a stand-in completion"


def _no_reward(completions: Sequence[Any], **columns: Any) -> list[None]:
    return [None] * len(completions)


def _columns(data: PromptDataset) -> str:
    return f"{data.label}: {counted(len(data), 'row')}, other columns: {', '.join(data.column_names) or 'none'}"


# A base of which only the configuration is there.


@contextmanager
def random_base(model: str) -> Iterator[str]:
    """A temporary folder with `model`'s configuration, its tokenizer or one of bytes, and weights of a normal
    distribution, loud enough to tell an adapter from rounding. Raises `ConfigError` for what cannot be built."""
    config = checkpoint_config(model)
    try:
        full = full_class(config)
        whole = full._from_config(config) if full else AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{model}: no model can be built from its configuration: {error}") from error
    generator = torch.Generator().manual_seed(0)
    for name, parameter in whole.named_parameters():
        if name.rpartition(".")[2] not in KEPT_BY_LAYERS and parameter.ndim > 1:
            # A layer's output is about as large as its input.
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1]))
    with tempfile.TemporaryDirectory(prefix="lora-grpo-random-") as folder:
        whole.to(config.dtype or torch.bfloat16).save_pretrained(folder)
        patterns = ("token*", "vocab*", "merges*", "*.model", "chat_template*")
        own = [path for pattern in patterns for path in Path(model).glob(pattern)]
        for path in own:
            shutil.copy(path, folder)
        if not own:
            byte_tokenizer().save_pretrained(folder)
        yield folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and an end token: any text encodes and comes back as it was."""
    end = "<|endoftext|>"
    tokens = [end, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    of_bytes = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    of_bytes.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=of_bytes, pad_token=end, eos_token=end, unk_token=end)
