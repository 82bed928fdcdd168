"""A vLLM engine's own weights: shared with a trainer as one copy, or replaced, which the benchmark alone does.

What is shared is never merged, so it can be the same memory, in the engine's dtype: a transformers model's parameters
are views into it. vLLM fuses q/k/v and gate/up, members below each other, and pads the vocabulary: every checkpoint
tensor is a row slice of one of its tensors. On the CPU it must be kept from prepacking, which makes decoding slower."""

import importlib
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partialmethod
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines import compat, requests
from lora_grpo.engines.compat.patching import replaced
from lora_grpo.engines.local import running
from lora_grpo.engines.local.targets import checkpoint_config, model_class
from lora_grpo.engines.names import NameMap
from lora_grpo.errors import ConfigError, DeliveryError, EngineError, UnsupportedAdapter
from lora_grpo.types import Group, LogProbs, Sampling, Sequences

_OWN_COPY = "give the trainer its own copy (share_base_weights=False)"


class SharedBase:
    def __init__(self, llm: Any) -> None:
        """Raises `UnsupportedAdapter` with what about the engine or the architecture stands against it."""
        self._llm = llm
        _check_engine(llm)
        self.model = _skeleton(llm)
        served = dict(compat.base_parameters(llm))
        _fill(self.model, served, NameMap(compat.runner(llm).get_model()))
        self._tensors = [(name, p.detach(), p._version) for name, p in self.model.named_parameters()]
        self._places = {name: parameter.data_ptr() for name, parameter in served.items()}

    def check_untouched(self) -> None:
        """Raises `DeliveryError` when the shared weights were written to, or the engine has put others in their place.
        Sees what autograd's version counters see: in-place writes through any view that is not `.data`."""
        for name, tensor, version in self._tensors:
            if tensor._version != version:
                raise DeliveryError(f"{name}, which trainer and engine share, was changed; start both again")
        for name, parameter in compat.base_parameters(self._llm):
            if parameter.data_ptr() != self._places[name]:
                raise DeliveryError(f"the engine replaced {name}, which it shared with the trainer; start both again")


def plain_cpu_weights(*, heads: bool = True) -> AbstractContextManager[None]:
    """Meanwhile vLLM's CPU backend keeps the linear weights that it loads; else it prepacks them into buffers that
    nothing else can read. `heads=False` leaves it the output layer, of which it packs a second copy."""
    layers = importlib.import_module("vllm.model_executor.layers.utils")
    stock = layers.dispatch_cpu_unquantized_gemm

    def dispatch(layer: Any, remove_weight: bool) -> None:
        if layer.weight.ndim == 2 and (heads or remove_weight):
            layer.cpu_linear = nn.functional.linear
        else:
            stock(layer, remove_weight)

    return replaced(layers, dispatch_cpu_unquantized_gemm=dispatch)


def check_shareable(arguments: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for arguments of an engine whose weights could not be shared, before it starts."""
    if arguments.get("enable_sleep_mode"):
        said = "enable_sleep_mode=True with share_base_weights: sleep frees the weights"
        raise ConfigError(f"{said}; leave it out, or {_OWN_COPY}")
    if compat.is_cpu() and compat.vllm_release() not in compat.TESTED_CPU:
        release = ".".join(map(str, compat.vllm_release()))
        raise ConfigError(f"share_base_weights on the CPU was not tested with vLLM {release}; {_OWN_COPY}")


def cannot_share(reason: str) -> UnsupportedAdapter:
    return UnsupportedAdapter(f"the engine's weights cannot be shared: {reason}; {_OWN_COPY}")


def refuse_update(*_: Any, **__: Any) -> None:
    raise ConfigError(f"vLLM may not change weights that a trainer shares: start both on the new ones, or {_OWN_COPY}")


def _check_engine(llm: Any) -> None:
    config = llm.llm_engine.vllm_config
    name, weights = type(compat.runner(llm).get_model()).__name__, [one for _, one in compat.base_parameters(llm)]
    found = {
        f"its weights are quantized ({config.model_config.quantization})": config.quant_config is not None,
        "it can sleep, which unmaps its weights": bool(config.model_config.enable_sleep_mode),
        f"{name} is vLLM's wrapper of a transformers model": name.startswith("Transformers"),
        "it has prepacked its weights (build it with share_base_weights=True)": any(w.numel() == 0 for w in weights),
        "its weights are inference tensors, which autograd cannot go through": any(w.is_inference() for w in weights),
    }
    if reasons := [reason for reason, stands_against in found.items() if stands_against]:
        raise cannot_share(reasons[0])


def _skeleton(llm: Any) -> Any:
    """The checkpoint's transformers model: parameters without memory, buffers (rotary frequencies, scales) computed."""
    from accelerate import init_empty_weights

    settings = llm.llm_engine.vllm_config.model_config
    trusted = settings.trust_remote_code
    config = checkpoint_config(settings.model, revision=settings.revision, trust_remote_code=trusted)
    with init_empty_weights(include_buffers=False):
        model: Any = model_class(config).from_config(config, dtype=settings.dtype, trust_remote_code=trusted)
    model.config._name_or_path = settings.model
    if persistent := [name for name, _ in model.named_buffers() if name in model.state_dict()]:
        raise cannot_share(f"its checkpoint has buffers ({persistent[0]}), which vLLM keeps in a form of its own")
    device = next(iter(compat.base_parameters(llm)))[1].device
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model.eval()


def _fill(model: Any, served: Mapping[str, Tensor], names: NameMap) -> None:
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    if model.config.get_text_config().tie_word_embeddings:
        head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
        wanted.pop(f"{head}.weight", None)
    taken = set()
    for name, shape in wanted.items():
        source, view = view_of(name, shape, served, names)
        taken.add(source)
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._parameters[leaf] = FrozenParameter(view)
    model.tie_weights()
    left = [name for name, parameter in model.named_parameters() if not isinstance(parameter, FrozenParameter)]
    unused = sorted(served.keys() - taken)
    if left or unused:
        where = "transformers" if left else "vLLM"
        raise cannot_share(f"{(left or unused)[0]} is in {where}'s {type(model).__name__} only")


def view_of(name: str, shape: Sequence[int], served: Mapping[str, Tensor], names: NameMap) -> tuple[str, Tensor]:
    """The engine's parameter that holds `name`, and the rows of it that are `name`."""
    place = names.tensor(name)
    if place is None or place.name not in served:
        raise cannot_share(f"vLLM has no weights for {name}")
    whole = served[place.name].detach().as_subclass(Tensor)
    rows = names.rows(place, shape, whole.shape)
    first = -1 if rows is None else next(iter(rows.values()))[0]
    if rows is None or list(rows) != list(range(min(rows), max(rows) + 1)):
        raise cannot_share(f"{name} is {tuple(shape)}, {place.name} in vLLM {tuple(whole.shape)}")
    return place.name, whole[first : first + shape[0]]


_IN_PLACE = re.compile(
    r"(?!requires_grad_|rename_)[a-z]\w*_"
    r"|__i(add|sub|mul|matmul|div|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift)__|__setitem__"
)
_REASON = "an engine computes with the same memory"


class FrozenParameter(nn.Parameter):
    """A view of an engine's weights. In-place methods and `.data`, by which PEFT's merge and optimizers write, raise
    `ConfigError`; so do casting and moving, which would copy it. `copy.deepcopy` gives an ordinary parameter."""

    def __new__(cls, view: Tensor) -> Self:
        return Tensor._make_subclass(cls, view, False)

    @property
    def data(self) -> Tensor:
        raise ConfigError(f"a base parameter's .data cannot be used: {_REASON}; nothing may merge into it")

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.data_ptr() != self.data_ptr() or value.dtype != self.dtype or value.shape != self.shape:
            raise ConfigError(f"a base parameter cannot be replaced, moved or cast: {_REASON}; {_OWN_COPY}")

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        if requires_grad:
            raise ConfigError(f"a base parameter cannot be trained: {_REASON}; train an adapter")
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        return memo.setdefault(id(self), nn.Parameter(self.detach().clone(), requires_grad=False))


def _refuse(self: FrozenParameter, name: str, *args: Any, **kwargs: Any) -> Any:
    raise ConfigError(f"a base parameter cannot be written to ({name}): {_REASON}")


for _name in filter(_IN_PLACE.fullmatch, dir(Tensor)):
    setattr(FrozenParameter, _name, partialmethod(_refuse, _name))


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

    def load_weights(self, named: Iterable[tuple[str, Tensor]], *, at_once: bool = False) -> int:
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

    def linear_weight(self, path: str, shape: Sequence[int]) -> Tensor:
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


def lora_tensors(engine: Any, path: str, version: AdapterVersion | None = None) -> tuple[Tensor, Tensor]:
    """A and B (scaling in B) of a checkpoint's layer in its slot, a `VLLMEngine`'s `version` or a `PlainEngine`'s."""
    llm, lora_id = engine._llm, engine._request.lora_int_id if version is None else engine._find(version).lora_id
    slot, place = compat.slot_of(llm, lora_id), NameMap(compat.runner(llm).get_model()).module(path)
    if slot is None or place is None:
        raise EngineError(f"adapter {lora_id} is in no slot" if slot is None else f"the engine has no layer for {path}")
    layer = compat.wrapped_modules(llm)[place.name]
    slices = range(len(layer.lora_a_stacked)) if place.slices is None else place.slices
    b_OR = torch.cat([layer.lora_b_stacked[index][slot, 0] for index in slices])
    return layer.lora_a_stacked[slices[0]][slot, 0], b_OR
