"""vLLM engines whose own weights are replaced, or that load adapters the stock way: what the benchmark compares with.

The product never merges and never pushes base weights; nothing outside the benchmark uses this file."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines import compat, requests
from lora_grpo.engines.local import running
from lora_grpo.engines.local.shared_weights import plain_cpu_weights, view_of
from lora_grpo.engines.names import NameMap
from lora_grpo.errors import EngineError
from lora_grpo.types import Group, LogProbs, Sampling, Sequences


class PlainEngine:
    """A stock in-process vLLM engine, without LoRA by default; `lora_rank` has it take adapters with vLLM's own loader
    and kernels. `prepack=False` keeps the CPU's linear weights as tensors that can be written to, which is slower."""

    def __init__(self, model: str | Path, *, lora_rank: int | None = None, prepack: bool = True, **vllm_args: Any):
        vllm = compat.import_vllm()
        lora = {} if lora_rank is None else {"enable_lora": True, "max_lora_rank": compat.allowed_rank(lora_rank)}
        plain = plain_cpu_weights(heads=False) if compat.is_cpu() and not prepack else nullcontext()
        with running.vllm_boundary(f"start on {model}"), plain:
            self._llm = vllm.LLM(model=str(model), logprobs_mode="processed_logprobs", **lora, **vllm_args)
        self._names = NameMap(compat.runner(self._llm).get_model())
        self._request: Any = None
        self._requests = 0

    def generate(self, prompts: Sequences, sampling: Sampling) -> list[Group]:
        asked = requests.asked(None, prompts, sampling, None)
        params = [requests.sampling_params(sampling, seed) for one in asked for seed in one.seeds]
        outputs = self._run([one.ids for one in asked for _ in one.seeds], params)
        return requests.to_groups(asked, [requests.to_completion(output, None) for output in outputs])

    def logprobs(self, sequences: Sequences) -> LogProbs:
        return requests.scored_tokens(self._run(sequences, [requests.scoring_params()] * len(sequences)), sequences)

    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]], *, at_once: bool = False) -> int:
        """Put checkpoint tensors in place of the engine's, every member of a fused layer among them; returns how many
        calls of vLLM's it took: one a tensor, one `at_once`, or where weights are prepacked (CPU) `reload_weights`."""
        if compat.is_cpu():
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(named)})
            return 1
        model = compat.runner(self._llm).get_model()
        batches = [named] if at_once else ([one] for one in named)
        return len([model.load_weights(batch) for batch in batches])

    def reset_prefix_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise EngineError("vLLM did not reset its prefix cache; are there unfinished requests?")

    def load_adapter(self, path: Path) -> Any:
        from vllm.lora.request import LoRARequest

        self._requests += 1
        self.serve(LoRARequest(f"adapter-{self._requests}", self._requests, str(path)))
        return self._request

    def serve(self, request: Any) -> None:
        if not self._llm.llm_engine.add_lora(request):
            raise EngineError(f"vLLM refused the adapter at {request.lora_path}")
        self._request = request

    def linear_weight(self, path: str, shape: Sequence[int]) -> torch.Tensor:
        """A writable view: of a fused layer, its rows."""
        return view_of(f"{path}.weight", shape, dict(compat.base_parameters(self._llm)), self._names)[1]

    def layer_of(self, path: str) -> str | None:
        place = self._names.module(path)
        return None if place is None else place.name

    def close(self) -> None:
        running.shutdown(self._llm, last=True)
        del self._llm, self._names

    def _run(self, ids_B: Sequences, params_B: list[Any]) -> Any:
        prompts = [{"prompt_token_ids": list(ids)} for ids in ids_B]
        return self._llm.generate(prompts, params_B, lora_request=self._request, use_tqdm=False)


def drop_weights(engine: Any) -> None:
    """Forget the base's weights of a `VLLMEngine` or `PlainEngine`, to see what they took; then it can only close."""
    # Each holds further references: the watch over shared weights, and the CPU backend's prepacked layers.
    vars(engine)["_shared"] = None
    for module in compat.runner(engine._llm).get_model().modules():
        module._parameters.clear()
        vars(module).pop("cpu_linear", None)


def lora_tensors(engine: Any, path: str, version: AdapterVersion | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B (scaling in B) of a checkpoint's layer in its slot, a `VLLMEngine`'s `version` or a `PlainEngine`'s."""
    llm, lora_id = engine._llm, engine._request.lora_int_id if version is None else engine._find(version).lora_id
    slot, place = compat.slot_of(llm, lora_id), NameMap(compat.runner(llm).get_model()).module(path)
    if slot is None or place is None:
        raise EngineError(f"adapter {lora_id} is in no slot" if slot is None else f"the engine has no layer for {path}")
    layer = compat.wrapped_modules(llm)[place.name]
    slices = range(len(layer.lora_a_stacked)) if place.slices is None else place.slices
    b_OR = torch.cat([layer.lora_b_stacked[index][slot, 0] for index in slices])
    return layer.lora_a_stacked[slices[0]][slot, 0], b_OR
