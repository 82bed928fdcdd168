"""vLLM in this process: adapters loaded as fresh `LoRARequest`s, each load proven by its slots."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lora_grpo.adapters.peft_form.serving import Held
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines import compat, requests
from lora_grpo.engines.base import Adapters, BaseDescription, LoadReceipt, Proof, Samplings
from lora_grpo.engines.delivery.agreement import MAX_BASE_NOISE_NATS, describe
from lora_grpo.engines.delivery.probe import probe_sequences
from lora_grpo.engines.local.residents import Loaded, Residents
from lora_grpo.engines.local.running import StepDriver, Turn, check_may_sleep, hold, vllm_boundary
from lora_grpo.engines.local.starting import adapter_room, start_llm
from lora_grpo.engines.local.weights import SharedBase, cannot_share, refuse_update
from lora_grpo.engines.names import BaseReading, read_base
from lora_grpo.errors import DeliveryError, EngineError, UnknownVersion
from lora_grpo.grpo.forward import mean_abs_difference, teacher_logprobs
from lora_grpo.types import Group, LogProbs, Prompt, Sequences

SAME_BASE_NATS = 0.02
"""What two scorings of the same tokens on the same weights may differ by, mean a token."""


class VLLMEngine:
    """An in-process vLLM engine that serves immutable adapter versions and proves each one it loads.

    `device` is where its weights are; put the trainer on it too. `max_model_len` is the most tokens of a prompt with
    its completion.

    >>> engine = VLLMEngine(base, max_lora_rank=16)
    >>> [group] = engine.generate(["2+2="], Sampling(n=4, max_tokens=8), adapter=None)  # None: the base
    >>> engine.proof, [done.version for done in group.completions]
    ('slots', [None, None, None, None])
    """

    proof: Proof = "slots"
    device: torch.device
    max_lora_rank: int
    lora_dtype: str
    tokenizer: Any

    def __init__(
        self,
        model: str | Path,
        *,
        max_lora_rank: int = 16,
        max_loras: int = 2,
        max_cpu_loras: int | None = None,
        dtype: str = "auto",
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.35,
        target_modules: Sequence[str] | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        cpu_lora_kernels: bool = True,
        direct_load: bool = True,
        share_base_weights: bool = False,
        **vllm_args: Any,
    ) -> None:
        """Start vLLM on `model` (hub name or directory).

        `max_lora_rank` is rounded up to a value that vLLM takes. `max_loras` versions can share a batch, and
        `max_cpu_loras` (default: two more) stay loaded. When there are more, the least recently used is unloaded.
        `target_modules` are the layers wrapped for LoRA, by last name (default: every linear layer but the head).
        `cpu_lora_kernels=False` keeps vLLM's own CPU LoRA code (slower; base rows then get separate batches).
        `direct_load=False` uses vLLM's own loader, which is slower.
        `share_base_weights` keeps the weights in a form that `shared_model` can use. It is needed only on the CPU, and
        makes decoding slower there. Other keywords go to `vllm.LLM`.
        Raises `UnsupportedVersion`, `ConfigError` or `EngineError`.
        """
        room = {"max_loras": max_loras, "max_cpu_loras": adapter_room(max_loras, max_cpu_loras)}
        self.max_lora_rank = compat.allowed_rank(max_lora_rank)
        vllm_args |= {"dtype": dtype, "max_model_len": max_model_len, "gpu_memory_utilization": gpu_memory_utilization}
        vllm_args |= {"max_lora_rank": self.max_lora_rank, **room}
        code = {"revision": revision, "trust_remote_code": trust_remote_code}
        llm, self._mixes_base = start_llm(model, code, target_modules, vllm_args, cpu_lora_kernels, share_base_weights)
        self._open, self._turn, self._let_go = llm, Turn(), hold(llm, self)
        self._asleep: tuple[int, LogProbs] | None = None
        """The level that it sleeps at, and the base's log-probs before it did."""
        self._shared: SharedBase | None = None
        with vllm_boundary(f"take adapters on {model}", self.close):
            self._driver = StepDriver(llm, self._turn)
            self._residents = Residents(llm, self._driver, direct=direct_load, **room)
            self.tokenizer, self.lora_dtype = llm.get_tokenizer(), compat.lora_dtype(llm)
            self.device = next(iter(compat.base_parameters(llm)))[1].device

    @property
    def max_model_len(self) -> int:
        return int(self._llm.llm_engine.vllm_config.model_config.max_model_len)

    @property
    def between_steps(self) -> Callable[[], None] | None:
        """Called before each step of vLLM; it may use this engine, and then the rollout goes on."""
        return self._driver.between_steps

    @between_steps.setter
    def between_steps(self, called: Callable[[], None] | None) -> None:
        self._driver.between_steps = called

    def load(self, version: AdapterVersion, *, held: Held | None = None) -> LoadReceipt:
        """Put `version` into a slot and prove that the slot holds its bytes. The receipt has the seconds of each phase.

        `NativeSync.push` calls it for new versions; call it yourself to sample from an older one. If it raises
        `DeliveryError` or `EngineError`, earlier versions are still loaded, and nothing of `version`.
        """
        with self._turn.take("load"):
            self._check_awake()
            if self._shared is not None:
                self._shared.check_untouched()
            return self._residents.load(version, held)

    def unload(self, version: AdapterVersion) -> None:
        """Forget `version`. Raises `UnknownVersion` when it is not loaded."""
        with self._turn.take("unload"):
            self._residents.unload(self._find(version))

    def loaded(self) -> tuple[AdapterVersion, ...]:
        """The versions that can be sampled from, least recently used first; none once it is closed."""
        return self._residents.versions if self._open is not None else ()

    def generate(self, prompts: Sequence[Prompt], sampling: Samplings, *, adapter: Adapters) -> list[Group]:
        """Sample `sampling.n` completions of each prompt: P groups in the prompts' order, of G completions each.

        A prompt is text, a list of token ids, or a list of chat messages. `adapter` is the version to sample from, or
        a list of P versions; None is the base model. Each completion holds its text, token ids, log-probs (nats, of
        the distribution that was sampled from) and the number of the version that made it.

        `sampling` may also be a list of P settings, for prompts that are sampled differently in one batch.
        Raises `ConfigError` for a prompt that is empty or, with `sampling.max_tokens`, longer than `max_model_len`,
        `UnknownVersion` for a version that is not loaded, `EngineError` when vLLM fails (its requests are aborted).
        """
        base = self.describe_base()
        asked = requests.asked(self.tokenizer, prompts, sampling, adapter)
        requests.check_asked(asked, self.max_model_len, base)
        each = [(one, seed) for one in asked for seed in one.seeds]
        params = [requests.sampling_params(one.sampling, seed, base.placeholders) for one, seed in each]
        made = self._run([(one.ids, how, one.adapter) for (one, _), how in zip(each, params, strict=True)])
        completions = [requests.to_completion(output, one.adapter) for output, (one, _) in zip(made, each, strict=True)]
        return requests.to_groups(asked, completions)

    def logprobs(self, sequences: Sequences, *, adapter: AdapterVersion | None) -> LogProbs:
        """Log-probs (nats, temperature 1) of tokens 1..T-1 of each sequence of token ids. Raises as `generate` does."""
        requests.check_fits(sequences, [1] * len(sequences), self.max_model_len, self.describe_base().vocabulary)
        params = requests.scoring_params()
        return requests.scored_tokens(self._run([(ids, params, adapter) for ids in sequences]), sequences)

    def shared_model(self) -> Any:
        """A transformers model whose parameters are this engine's own weights: one copy of the base for both.

        It has the engine's dtype and is frozen: merging into it or writing to it raises an error. Each call builds a
        new model on the same weights, and every load checks that they are unchanged. Raises `UnsupportedAdapter` for an
        engine or architecture that cannot be shared (quantized, prepacked, unknown).
        """
        self._check_awake()
        if self._shared is not None:
            self._shared.check_untouched()
        shared = SharedBase(self._llm)
        teacher = teacher_logprobs(shared.model, probe_sequences(self.describe_base()))
        gap = mean_abs_difference(self._score_base(), teacher)
        if not gap <= MAX_BASE_NOISE_NATS:
            limit = f"at most {MAX_BASE_NOISE_NATS}"
            raise cannot_share(f"transformers' model on them is {gap:.3f} nats per token off ({limit})")
        compat.refuse_weight_updates(self._llm, refuse_update)
        # The first one's watch stays: it knows the weights as they were loaded.
        self._shared = self._shared or shared
        return shared.model

    def describe_base(self) -> BaseDescription:
        self._check_awake()
        settings = self._llm.llm_engine.vllm_config.model_config
        return describe(settings.hf_config, str(settings.dtype).removeprefix("torch."))

    def read_base(self, shapes: Mapping[str, Sequence[int]]) -> list[BaseReading]:
        self._check_awake()
        return [read_base(compat.runner(self._llm), shapes, "the engine")]

    def sleep(self, level: int = 1) -> None:
        """Free the GPU memory of weights and KV cache until `wake_up`; needs `enable_sleep_mode=True`.

        At level 1 the weights move to host memory and loaded versions stay loaded; at level 2 nothing is kept. While
        it sleeps, you can only wake it, close it or unload versions. If sleep would lose something, it raises
        `ConfigError` and changes nothing. If vLLM fails, it raises `EngineError` and the engine is closed.
        """
        with self._turn.take("sleep"):
            self._check_awake()
            check_may_sleep(self._llm, level, self.loaded(), shared=self._shared is not None)
            with vllm_boundary("fall asleep", self.close):
                before = self._score_base()
                self._llm.sleep(level)
                self._asleep = level, before

    def wake_up(self) -> None:
        """Be what the engine was before `sleep`: the base compared, and every loaded version proven again.

        A version that cannot be proven is unloaded, and its `DeliveryError` or `EngineError` raised when the others
        are; without its base the engine is closed.
        """
        with self._turn.take("wake_up"):
            llm, asleep, self._asleep = self._llm, self._asleep, None
            if asleep is None:
                return
            level, before = asleep
            with vllm_boundary("wake up", self.close):
                llm.wake_up()
                if level == 2:
                    # Makes vLLM forget all adapters.
                    llm.collective_rpc("reload_weights")
                gap = mean_abs_difference(self._score_base(), before)
                if not gap <= SAME_BASE_NATS:
                    said = f"after sleep level {level} the base is not the same, {gap:.3f} nats per token off"
                    raise DeliveryError(f"{said} (at most {SAME_BASE_NATS}); the engine is closed, start another")
            self._residents.prove_all_again()

    def close(self) -> None:
        """Free the engine's memory; it cannot be used afterwards. A second call does nothing."""
        with self._turn.take("close", last=True):
            self._open = None
            self._let_go()
            for holder in ("_driver", "_residents", "_shared"):
                vars(self).pop(holder, None)

    @property
    def _llm(self) -> Any:
        if self._open is None:
            raise EngineError("this engine is closed; start another")
        return self._open

    def _check_awake(self) -> None:
        if self._llm is not None and self._asleep is not None:
            raise EngineError("the engine sleeps; call wake_up() first")

    def _score_base(self) -> LogProbs:
        return self.logprobs(probe_sequences(self.describe_base()), adapter=None)

    def _run(self, asked: Sequence[tuple[Sequence[int], Any, AdapterVersion | None]]) -> list[Any]:
        """vLLM's outputs for (token ids, parameters, version), in as few engine batches as slots and kernels allow."""
        made: dict[int, Any] = {}
        with self._turn.take("generate or logprobs"):
            self._check_awake()
            loaded_B = [None if version is None else self._find(version) for _, _, version in asked]
            if self._driver.answering and not self._mixes_base:
                self._driver.drain()
            slots = self._residents.slots_for(loaded_B)
            for rows in requests.mixed_batches([version for *_, version in asked], slots, self._mixes_base):
                batch = [loaded_B[row] for row in rows]
                self._residents.place(batch)
                named = [one and one.request for one in batch]
                with self._residents.boundary("generate", stepping=True):
                    made |= zip(rows, self._driver.run([asked[row] for row in rows], named), strict=True)
        return [made[row] for row in range(len(asked))]

    def _find(self, version: AdapterVersion) -> Loaded:
        if self._open is None:
            raise UnknownVersion(f"{version} is not loaded: this engine is closed; start another")
        return self._residents.find(version)
