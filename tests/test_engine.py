"""`VLLMEngine` as its users meet it: prompts, groups, seeds, versions that come and go, failures that it survives."""

from __future__ import annotations

import ast
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from lora_grpo.adapters.peft_form.serving import ServingForm
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines import compat, vllm_local
from lora_grpo.engines.base import Engine
from lora_grpo.engines.delivery.slots import SlotProver
from lora_grpo.engines.local import residents, running
from lora_grpo.engines.local.running import engines_alive
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.errors import ConfigError, DeliveryError, EngineError, UnknownVersion
from lora_grpo.grpo.forward import mean_abs_difference, teacher_logprobs
from lora_grpo.types import Completion, Group, Sampling
from tests.conftest import ENGINE_ARGS
from tests.tiny_models import SPECIAL_TOKENS, load_model, refill_lora, tiny_lora

pytestmark = pytest.mark.vllm

GREEDY = Sampling(max_tokens=8, temperature=0.0)
PROMPT = list(range(100, 112))
EOS = SPECIAL_TOKENS.index("<eos>")
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2 = ?"}]


@dataclass
class Shelf:
    """Publishes versions that all differ, and loads none of them."""

    store: AdapterStore
    model: Any
    form: ServingForm

    def publish(self, count: int) -> list[AdapterVersion]:
        versions = []
        for _ in range(count):
            refill_lora(self.model, scale=0.3, seed=len(self.store.list()))
            versions.append(self.store.publish(self.form.files(), step=0))
        return versions


@pytest.fixture
def shelf(llama_dir: Path, shm_dir: Path) -> Iterator[Shelf]:
    model = tiny_lora(load_model(llama_dir), r=8)
    with AdapterStore(shm_dir / "store") as store:
        yield Shelf(store, model, ServingForm(model, "default", torch.bfloat16))


@pytest.fixture
def engine(llama_engine: VLLMEngine) -> Iterator[VLLMEngine]:
    """The session's engine with nothing loaded, before and after."""
    empty(llama_engine)
    yield llama_engine
    empty(llama_engine)


@pytest.fixture(scope="module")
def long_engine(llama_dir: Path) -> Iterator[VLLMEngine]:
    """One whose prompts span several blocks of the prefix cache (128 tokens on a CPU)."""
    engine = VLLMEngine(llama_dir, max_loras=1, **{**ENGINE_ARGS, "max_model_len": 512})
    yield engine
    engine.close()


def empty(engine: VLLMEngine) -> None:
    for version in engine.loaded():
        engine.unload(version)


def load_all(engine: VLLMEngine, versions: Sequence[AdapterVersion]) -> None:
    for version in versions:
        engine.load(version)


def greedy(engine: VLLMEngine, adapter: AdapterVersion | None) -> Completion:
    return engine.generate([PROMPT], GREEDY, adapter=adapter)[0].completions[0]


def slot(engine: VLLMEngine, version: AdapterVersion) -> int | None:
    return compat.slot_of(engine._llm, engine._find(version).request.lora_int_id)


def ascii_of(text: str) -> str:
    return "".join(character for character in text if character.isascii())


def random_prompt(seed: int, tokens: int) -> list[int]:
    return torch.randint(4, 260, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def fail_once(monkeypatch: pytest.MonkeyPatch, engine: VLLMEngine, error: BaseException, *, at_step: int = 0) -> None:
    """Have vLLM's model runner raise `error` in its step `at_step` from now; before and after, it works."""
    runner = compat.runner(engine._llm)
    execute, steps = runner.execute_model, iter(range(at_step + 1))

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(steps, None) == at_step:
            raise error
        return execute(*args, **kwargs)

    monkeypatch.setattr(runner, "execute_model", failing)


# Prompts and completions


def test_it_is_an_engine(engine: VLLMEngine) -> None:
    assert isinstance(engine, Engine)
    assert (engine.proof, engine.max_lora_rank, engine.lora_dtype) == ("slots", 16, "bfloat16")
    assert engine.device == torch.device("cpu") or engine.device.type == "cuda"


def test_text_token_ids_and_chats_become_the_tokens_that_transformers_makes(
    engine: VLLMEngine, llama_dir: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    prompts = ["Hello, world", PROMPT, CHAT]
    groups = engine.generate(prompts, GREEDY, adapter=None)
    rendered = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert rendered.endswith("<|im_start|>assistant\n")
    chat_ids = tokenizer(rendered, add_special_tokens=False).input_ids
    assert [list(group.prompt_token_ids) for group in groups] == [tokenizer("Hello, world").input_ids, PROMPT, chat_ids]
    assert [group.prompt for group in groups] == prompts
    again = engine.generate([list(group.prompt_token_ids) for group in groups], GREEDY, adapter=None)
    assert [group.completions for group in again] == [group.completions for group in groups]


def test_n_samples_a_prompt_with_log_probs_and_finish_reasons(engine: VLLMEngine) -> None:
    """2048 tokens at about 1/260 a token for the end token: that none ended has a chance of e-8."""
    prompts = ["one", "two", "three", "four"]
    groups = engine.generate(prompts, Sampling(n=8, max_tokens=64, seed=1), adapter=None)
    assert [group.prompt for group in groups] == prompts
    completions = [completion for group in groups for completion in group.completions]
    assert [len(group.completions) for group in groups] == [8] * 4
    for completion in completions:
        ended = completion.token_ids[-1] == EOS
        assert EOS not in completion.token_ids[:-1]
        assert ended or len(completion.token_ids) == 64
        assert completion.finish_reason == ("stop" if ended else "length")
        assert completion.truncated is not ended
        assert len(completion.logprobs) == len(completion.token_ids)
        assert all(logprob < 0 for logprob in completion.logprobs)
        assert completion.version is None
        decoded = engine.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        # Random bytes make halves of characters, which vLLM's incremental decoder leaves out at the end.
        assert ascii_of(completion.text) == ascii_of(decoded)
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}


def test_a_stop_string_ends_a_completion(engine: VLLMEngine) -> None:
    free = engine.generate([PROMPT], Sampling(max_tokens=24, temperature=0.0), adapter=None)[0].completions[0]
    texts = [engine.tokenizer.decode([token]) for token in free.token_ids]
    at = next(i for i, text in enumerate(texts) if i and text.isascii() and text.strip() and text not in texts[:i])
    sampling = Sampling(max_tokens=24, temperature=0.0, stop=(texts[at],))
    stopped = engine.generate([PROMPT], sampling, adapter=None)[0].completions[0]
    assert (stopped.finish_reason, stopped.token_ids) == ("stop", free.token_ids[: at + 1])
    assert texts[at] not in stopped.text
    assert len(stopped.logprobs) == at + 1


def test_groups_come_back_in_the_order_of_their_prompts(engine: VLLMEngine) -> None:
    prompts = [random_prompt(seed, 5 + 3 * seed) for seed in range(6)]
    together = engine.generate(prompts, GREEDY, adapter=None)
    alone = [engine.generate([prompt], GREEDY, adapter=None)[0] for prompt in prompts]
    assert [group.completions[0].token_ids for group in together] == [g.completions[0].token_ids for g in alone]


def test_greedy_takes_the_likeliest_token_and_reports_its_log_prob(engine: VLLMEngine, llama_dir: Path) -> None:
    first, second = engine.generate([PROMPT], Sampling(n=2, max_tokens=16, temperature=0.0), adapter=None)[
        0
    ].completions
    assert first == second
    model, ids = load_model(llama_dir), [*PROMPT, *first.token_ids]
    trainer = teacher_logprobs(model, [ids])[0][-16:]
    assert mean_abs_difference([first.logprobs], [trainer]) < 0.05
    with torch.no_grad():
        best = model(torch.tensor([ids])).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1).amax(-1)
    assert max(best - torch.tensor(trainer)) < 0.1


def test_teacher_forced_log_probs_are_the_trainers(engine: VLLMEngine, llama_dir: Path, shelf: Shelf) -> None:
    (version,) = shelf.publish(1)
    engine.load(version)
    sequences = [random_prompt(seed, 3 + 8 * seed) for seed in range(4)]
    scored = engine.logprobs(sequences, adapter=version)
    assert [len(row) for row in scored] == [len(ids) - 1 for ids in sequences]
    assert mean_abs_difference(scored, teacher_logprobs(shelf.model, sequences)) < 0.05
    assert mean_abs_difference(scored, engine.logprobs(sequences, adapter=None)) > 0.2


# Seeds


def ids_of(groups: Sequence[Group]) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in group.completions] for group in groups]


def test_the_seed_decides(engine: VLLMEngine) -> None:
    prompts = [PROMPT, PROMPT]

    def sample(seed: int | None) -> list[list[tuple[int, ...]]]:
        return ids_of(engine.generate(prompts, Sampling(n=4, max_tokens=12, seed=seed), adapter=None))

    once = sample(5)
    assert sample(5) == once
    assert not {ids for group in sample(6) for ids in group} & {ids for group in once for ids in group}
    assert len({ids for group in once for ids in group}) == 8, "samples of one group, or of equal prompts, repeat"
    assert sample(None) != sample(None)


def drawn_after_seeding(meanwhile: Callable[[], None]) -> tuple[float, float, float]:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    meanwhile()
    return random.random(), np.random.random(), torch.rand(()).item()


def test_a_program_draws_by_its_own_seed_after_the_start(llama_dir: Path) -> None:
    """vLLM seeds every generator of the process; two seeds of a program would make one run."""
    expected = drawn_after_seeding(lambda: None)
    assert drawn_after_seeding(lambda: VLLMEngine(llama_dir, max_lora_rank=16, **ENGINE_ARGS).close()) == expected


@pytest.mark.timeout(120)
def test_a_prompt_that_is_cut_over_steps_gives_the_same_tokens(llama_dir: Path) -> None:
    """With more prompt tokens than one step holds. Each cut draws a token that is thrown away."""
    prompts = [random_prompt(seed, 40) for seed in range(16)]
    made = []
    for budget in (4096, 300, 64):
        settings = {**ENGINE_ARGS, "enable_prefix_caching": False, "max_num_batched_tokens": budget}
        engine = VLLMEngine(llama_dir, **settings)
        try:
            groups = engine.generate(prompts, Sampling(n=4, max_tokens=6, seed=3), adapter=None)
            made.append([completion.token_ids for group in groups for completion in group.completions])
        finally:
            engine.close()
    assert made[0] == made[1] == made[2]


def test_a_completion_does_not_depend_on_what_shares_its_batch(engine: VLLMEngine) -> None:
    """Rounding may depend on the batch's size and flip a rare token; a seed that did would change every completion."""
    prompts = [random_prompt(seed, 10) for seed in range(4)]
    sampling = Sampling(n=4, max_tokens=8, seed=3)
    few = ids_of(engine.generate(prompts, sampling, adapter=None))
    others = [random_prompt(seed, 20) for seed in range(10, 14)]
    crowd = engine.generate([*prompts, *others], Sampling(n=6, max_tokens=8, seed=3), adapter=None)
    many = [group[:4] for group in ids_of(crowd)[:4]]
    same = [a == b for left, right in zip(few, many, strict=True) for a, b in zip(left, right, strict=True)]
    assert sum(same) >= 14


# Versions


def test_the_base_is_served_only_when_it_is_asked_for(engine: VLLMEngine, shelf: Shelf) -> None:
    version, other = shelf.publish(2)
    engine.load(version)
    with pytest.raises(TypeError, match="adapter"):
        engine.generate([PROMPT], GREEDY)  # type: ignore[call-arg]
    with pytest.raises(UnknownVersion, match=r"v2 is not loaded \(loaded: v1\); call engine.load"):
        engine.generate([PROMPT, PROMPT], GREEDY, adapter=[version, other])
    with pytest.raises(UnknownVersion, match="v2 is not loaded"):
        engine.logprobs([PROMPT], adapter=other)
    with pytest.raises(ConfigError, match="adapter names 1 versions for 2 prompts"):
        engine.generate([PROMPT, PROMPT], GREEDY, adapter=[version])
    assert greedy(engine, None).version is None
    assert greedy(engine, version).version == 1
    assert greedy(engine, version).token_ids != greedy(engine, None).token_ids


def test_more_versions_in_a_call_than_slots(engine: VLLMEngine, shelf: Shelf) -> None:
    versions = shelf.publish(4)
    load_all(engine, versions)
    first, second, third, fourth = versions
    asked = [third, None, first, fourth, second, third, None, first]
    groups = engine.generate([PROMPT] * len(asked), GREEDY, adapter=asked)
    assert [group.completions[0].version for group in groups] == [3, None, 1, 4, 2, 3, None, 1]
    alone = {adapter: greedy(engine, adapter) for adapter in (None, *versions)}
    assert len({completion.token_ids for completion in alone.values()}) == 5
    for group, adapter in zip(groups, asked, strict=True):
        assert group.completions[0].token_ids == alone[adapter].token_ids
        assert group.completions[0].logprobs == pytest.approx(alone[adapter].logprobs, abs=0.05)


def test_the_least_recently_used_goes_and_comes_back_as_it_was(engine: VLLMEngine, shelf: Shelf) -> None:
    """A version loaded again takes a new id and name: the prefix cache keys on the name."""
    first, second, third, fourth, fifth = shelf.publish(5)
    load_all(engine, [first, second, third, fourth])
    before, request = engine.logprobs([PROMPT], adapter=second), engine._find(second).request
    engine.generate([PROMPT] * 3, GREEDY, adapter=[third, fourth, first])
    engine.load(fifth)
    assert engine.loaded() == (third, fourth, first, fifth)
    assert request.lora_int_id not in compat.lora_manager(engine._llm).list_adapters()
    with pytest.raises(UnknownVersion, match=r"v2 is not loaded \(loaded: v3, v4, v1, v5\)"):
        greedy(engine, second)
    receipt = engine.load(second)
    assert (receipt.proof, receipt.proven_bytes, receipt.modules) == ("slots", shelf.form.nbytes, 14)
    assert engine.logprobs([PROMPT], adapter=second) == before
    assert engine._find(second).request.lora_int_id != request.lora_int_id
    assert engine._find(second).request.lora_name != request.lora_name


def test_loading_again_counts_as_use(engine: VLLMEngine, shelf: Shelf) -> None:
    """After a rollback to the oldest loaded version, the next push must not make room by dropping it."""
    first, second, third, fourth, fifth = shelf.publish(5)
    load_all(engine, [first, second, third, fourth])
    assert engine.load(first).proven_bytes == shelf.form.nbytes
    engine.load(fifth)
    assert engine.loaded() == (third, fourth, first, fifth)


def test_a_version_back_in_a_slot_is_proven_again(
    engine: VLLMEngine, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    proven: list[str] = []
    prove = SlotProver.prove

    def noted(self: SlotProver, version: AdapterVersion, *args: Any) -> int:
        proven.append(str(version))
        return prove(self, version, *args)

    monkeypatch.setattr(SlotProver, "prove", noted)
    first, second, third = shelf.publish(3)
    load_all(engine, [first, second, third])
    assert (slot(engine, first), proven) == (None, ["v1", "v2", "v3"])
    engine.generate([PROMPT] * 2, GREEDY, adapter=[third, second])
    assert proven == ["v1", "v2", "v3"]
    greedy(engine, first)
    assert proven == ["v1", "v2", "v3", "v1"]


def test_a_version_that_comes_back_into_its_slot_changed_is_not_served(engine: VLLMEngine, shelf: Shelf) -> None:
    """What goes into the slot is a copy in host memory, not the file: the proof must not take that for the truth."""
    first, second, third = shelf.publish(3)
    load_all(engine, [first, second, third])
    held = compat.lora_manager(engine._llm).get_adapter(engine._find(first).request.lora_int_id)
    held.loras["model.layers.1.self_attn.o_proj"].lora_b.mul_(2)
    answer = greedy(engine, second)
    with pytest.raises(DeliveryError, match=r"v1: .* differs from the published bytes"):
        greedy(engine, first)
    assert set(engine.loaded()) == {second, third}
    assert greedy(engine, second) == answer


def test_unload(engine: VLLMEngine, shelf: Shelf) -> None:
    first, second = shelf.publish(2)
    load_all(engine, [first, second])
    lora_id = engine._find(first).request.lora_int_id
    engine.unload(first)
    assert engine.loaded() == (second,)
    assert lora_id not in compat.lora_manager(engine._llm).list_adapters()
    with pytest.raises(UnknownVersion, match="v1 is not loaded"):
        engine.unload(first)


def test_a_loaded_version_outlives_its_directory(engine: VLLMEngine, shelf: Shelf) -> None:
    versions = shelf.publish(3)
    load_all(engine, versions)
    before = [greedy(engine, version) for version in versions]
    for version in versions:
        shutil.rmtree(version.path)
    assert [greedy(engine, version) for version in versions] == before


# Failures


@pytest.mark.timeout(120)
@pytest.mark.parametrize("at_step", [0, 3], ids=["prefill", "decode"])
def test_an_exception_in_a_step_leaves_nothing_scheduled(
    engine: VLLMEngine, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, at_step: int
) -> None:
    """vLLM would keep the requests, and spin on them in its next `generate` for ever."""
    first, second = shelf.publish(2)
    load_all(engine, [first, second])
    asked = [None, first, second]
    before = engine.generate([PROMPT] * 3, GREEDY, adapter=asked)
    fail_once(monkeypatch, engine, RuntimeError("out of memory"), at_step=at_step)
    with pytest.raises(EngineError, match="vLLM could not generate: RuntimeError: out of memory"):
        engine.generate([PROMPT] * 3, GREEDY, adapter=asked)
    assert not engine._llm.llm_engine.has_unfinished_requests()
    assert engine.loaded() == (first, second)
    assert engine.generate([PROMPT] * 3, GREEDY, adapter=asked) == before


@pytest.mark.timeout(120)
def test_ctrl_c_in_a_step_comes_through_and_the_engine_goes_on(
    engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = greedy(engine, None)
    fail_once(monkeypatch, engine, KeyboardInterrupt(), at_step=2)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([PROMPT] * 2, GREEDY, adapter=None)
    assert not engine._llm.llm_engine.has_unfinished_requests()
    assert greedy(engine, None) == before


@pytest.mark.timeout(120)
def test_ctrl_c_while_a_version_is_proven_again(
    engine: VLLMEngine, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    (version,) = shelf.publish(1)
    engine.load(version)

    def interrupted(*args: Any) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(SlotProver, "prove", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.load(version)
    assert engine.loaded() == ()
    engine.load(version)
    assert greedy(engine, version).version == 1


@pytest.mark.timeout(120)
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_a_prompt_that_failed_is_not_answered_from_blocks_that_were_never_computed(
    long_engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """vLLM enters a prompt's blocks into its prefix cache before it computes them."""
    prompt = random_prompt(1, 300)
    before = long_engine.generate([prompt], GREEDY, adapter=None)
    assert long_engine._llm.llm_engine.reset_prefix_cache()
    fail_once(monkeypatch, long_engine, error)
    with pytest.raises((EngineError, KeyboardInterrupt)):
        long_engine.generate([prompt], GREEDY, adapter=None)
    assert long_engine.generate([prompt], GREEDY, adapter=None) == before


@pytest.fixture
def tight(engine: VLLMEngine, shelf: Shelf) -> tuple[VLLMEngine, list[AdapterVersion]]:
    """As many versions as there are slots, of which every interrupt could leave one behind."""
    versions = shelf.publish(2)
    load_all(engine, versions)
    return engine, versions


def signalled(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, times: int = 1, after: bool = False) -> None:
    """Have Ctrl-C come in the next call of a method, before its work or after it."""
    stock, left = getattr(owner, name), iter([True])

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        strikes = times if next(left, False) else 0
        made = stock(*args, **kwargs) if after else None
        for _ in range(strikes):
            signal.raise_signal(signal.SIGINT)
        return made if after else stock(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)


PLACES = [
    ("runner", "execute_model", True),
    ("runner", "sample_tokens", False),
    ("runner", "sample_tokens", True),
    ("scheduler", "schedule", True),
    ("scheduler", "update_from_output", False),
    ("scheduler", "finish_requests", True),
    ("llm", "enqueue", True),
    ("output_processor", "process_outputs", False),
]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("owner", "name", "after"), PLACES)
def test_ctrl_c_anywhere_in_a_step_leaves_an_engine_that_goes_on(
    tight: tuple[VLLMEngine, list[AdapterVersion]],
    monkeypatch: pytest.MonkeyPatch,
    owner: str,
    name: str,
    after: bool,
) -> None:
    """A signal, not an exception of our making: Python raises it between any two of its instructions."""
    engine, versions = tight
    asked = [None, *versions]
    before = engine.generate([PROMPT] * 3, GREEDY, adapter=asked)
    places = {
        "runner": compat.runner(engine._llm),
        "scheduler": engine._llm.llm_engine.engine_core.engine_core.scheduler,
        "output_processor": engine._llm.llm_engine.output_processor,
        "llm": engine._llm,
    }
    if name == "finish_requests":
        fail_once(monkeypatch, engine, RuntimeError("so that requests are dropped"), at_step=1)
    with monkeypatch.context() as patched:
        signalled(patched, places[owner], name, after=after)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([PROMPT] * 3, GREEDY, adapter=asked)
    assert engine._residents._driver.answering.total() == 0
    for _ in range(2):
        assert engine.generate([PROMPT] * 3, GREEDY, adapter=asked) == before
    engine.unload(versions[0])
    engine.load(versions[0])


@pytest.mark.timeout(120)
def test_a_step_that_fails_between_its_halves_leaves_an_engine_that_goes_on(
    tight: tuple[VLLMEngine, list[AdapterVersion]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "sample_tokens() must be called after execute_model()", for ever."""
    engine, versions = tight
    before = engine.generate([PROMPT] * 2, GREEDY, adapter=versions)
    runner = compat.runner(engine._llm)
    with monkeypatch.context() as patched:

        def failing(*args: Any) -> Any:
            raise RuntimeError("out of memory")

        patched.setattr(runner, "sample_tokens", failing)
        with pytest.raises(EngineError, match="out of memory"):
            engine.generate([PROMPT] * 2, GREEDY, adapter=versions)
    assert engine.generate([PROMPT] * 2, GREEDY, adapter=versions) == before


@pytest.mark.timeout(120)
def test_a_second_ctrl_c_in_one_step_is_obeyed_and_the_engine_says_so(llama_dir: Path) -> None:
    engine = VLLMEngine(llama_dir, **ENGINE_ARGS)
    try:
        with pytest.MonkeyPatch.context() as patched:
            signalled(patched, compat.runner(engine._llm), "execute_model", times=2, after=True)
            with pytest.raises(KeyboardInterrupt):
                engine.generate([PROMPT], GREEDY, adapter=None)
        with pytest.raises(EngineError, match=r"interrupted twice.*start another"):
            greedy(engine, None)
    finally:
        engine.close()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# Threads, and calls between two steps


@pytest.mark.timeout(120)
def test_another_thread_is_told_at_its_call(engine: VLLMEngine, shelf: Shelf) -> None:
    """It would hang, or meet vLLM's data structures half-way."""
    (version,) = shelf.publish(1)
    engine.load(version)
    calls = {
        "generate": lambda: greedy(engine, None),
        "logprobs": lambda: engine.logprobs([PROMPT], adapter=None),
        "load": lambda: engine.load(version),
        "unload": lambda: engine.unload(version),
        "close": engine.close,
    }
    said: dict[str, str] = {}

    def meanwhile() -> None:
        for name, call in calls.items():
            try:
                call()
            except EngineError as error:
                said[name] = str(error)

    def between() -> None:
        if not said:
            other = threading.Thread(target=meanwhile, name="other")
            other.start()
            other.join()

    before = greedy(engine, version)
    engine.between_steps = between
    try:
        assert greedy(engine, version) == before
    finally:
        engine.between_steps = None
    assert set(said) == set(calls)
    assert all("'other'" in told and "one thread at a time" in told for told in said.values())
    other = threading.Thread(target=lambda: said.update(later=str(greedy(engine, version) == before)))
    other.start()
    other.join()
    assert said["later"] == "True"


@pytest.mark.timeout(120)
def test_a_call_between_steps_that_finds_no_slot_is_told(
    tight: tuple[VLLMEngine, list[AdapterVersion]], shelf: Shelf
) -> None:
    """Those that hold the slots can be asked, and so can the base."""
    engine, versions = tight
    (third,) = shelf.publish(1)
    engine.load(third)
    load_all(engine, versions)
    before = [greedy(engine, version) for version in (*versions, None)]
    made: list[Completion] = []
    asked: list[bool] = []

    def between() -> None:
        if not asked:
            asked.append(True)
            with pytest.raises(EngineError, match=r"v3 .*2 versions of a rollout .* hold all slots.*max_loras=2"):
                greedy(engine, third)
            made.extend(greedy(engine, version) for version in (*versions, None))

    engine.between_steps = between
    try:
        engine.generate([PROMPT] * 2, GREEDY, adapter=versions)
    finally:
        engine.between_steps = None
    assert made == before
    assert greedy(engine, third).version == 3


def test_prompts_that_do_not_fit_are_named(engine: VLLMEngine) -> None:
    fits = [7] * 120
    assert len(engine.generate([fits], GREEDY, adapter=None)[0].completions[0].token_ids) <= 8
    with pytest.raises(ConfigError, match=r"prompt 1 has 121 tokens; with max_tokens=8 .* max_model_len=128"):
        engine.generate([fits, [7] * 121], GREEDY, adapter=None)
    with pytest.raises(ConfigError, match=r"prompt 2 \(''\) has no tokens"):
        engine.generate(["a", "b", ""], GREEDY, adapter=None)
    with pytest.raises(ConfigError, match=r"prompt 0 \(\[\]\) has no tokens"):
        engine.generate([[]], GREEDY, adapter=None)
    with pytest.raises(ConfigError, match=r"prompt 1 has token 260 at place 1, .*ends at 259 \(260 tokens\)"):
        engine.generate([[5], [5, 260]], GREEDY, adapter=None)
    with pytest.raises(ConfigError, match="prompt 0 has token -1 at place 2"):
        engine.logprobs([[5, 6, -1]], adapter=None)
    assert engine.generate([], GREEDY, adapter=None) == []


def test_a_chat_needs_a_template(engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.tokenizer, "chat_template", None)
    with pytest.raises(ConfigError, match="prompt 1 is a chat, but the tokenizer has no chat template"):
        engine.generate(["text", CHAT], GREEDY, adapter=None)


@pytest.mark.parametrize("target_modules", [None, ["q_proj"]])
def test_no_such_model(tmp_path: Path, target_modules: list[str] | None) -> None:
    missing = tmp_path / "nowhere"
    with pytest.raises((ConfigError, EngineError), match=f"{missing}"):
        VLLMEngine(missing, target_modules=target_modules, **ENGINE_ARGS)


@pytest.mark.parametrize(("loras", "cpu_loras"), [(0, None), (3, 2)])
def test_slots_and_loaded_versions_must_fit(llama_dir: Path, loras: int, cpu_loras: int | None) -> None:
    with pytest.raises(ConfigError, match=f"max_loras={loras} must be between 1 and max_cpu_loras=2"):
        VLLMEngine(llama_dir, max_loras=loras, max_cpu_loras=cpu_loras, **ENGINE_ARGS)


def test_there_is_room_for_the_served_version_and_the_next(llama_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_cpu_loras=1: .* would push out the served one; set at least 2"):
        VLLMEngine(llama_dir, max_loras=1, max_cpu_loras=1, **ENGINE_ARGS)


def test_an_engine_that_cannot_be_proven_is_shut_down(
    engine: VLLMEngine, llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else holds it: its memory would be lost to the process."""
    stopped: list[bool] = []
    shutdown = running.shutdown

    def unprovable(llm: Any) -> Callable[..., Any]:
        raise ConfigError("an adapter of lm_head cannot be proven")

    def noted(llm: Any, *, last: bool, **rest: Any) -> None:
        stopped.append(last)
        shutdown(llm, last=last, **rest)

    before, living = greedy(engine, None), engines_alive()
    with monkeypatch.context() as patched:
        patched.setattr(residents, "SlotProver", unprovable)
        patched.setattr(running, "shutdown", noted)
        with pytest.raises(ConfigError, match="lm_head cannot be proven"):
            VLLMEngine(llama_dir, max_loras=1, **ENGINE_ARGS)
    assert stopped == [False]
    assert engines_alive() == living
    assert greedy(engine, None) == before


def test_an_executor_that_ends_vllms_groups_leaves_them_to_other_engines(
    engine: VLLMEngine, llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As 0.33's does in a trainer's process group."""
    from vllm.distributed import parallel_state
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    stock = UniProcExecutor.shutdown

    def shutdown(self: Any) -> None:
        stock(self)
        parallel_state.destroy_model_parallel()

    before = greedy(engine, None)
    monkeypatch.setattr(UniProcExecutor, "shutdown", shutdown)
    VLLMEngine(llama_dir, max_loras=1, **ENGINE_ARGS).close()
    assert greedy(engine, None) == before


def test_an_engine_that_nobody_has_any_more_is_stopped_and_others_go_on(engine: VLLMEngine, llama_dir: Path) -> None:
    before, living = greedy(engine, None), engines_alive()
    dropped: list[VLLMEngine] = [VLLMEngine(llama_dir, max_loras=1, **ENGINE_ARGS)]
    assert engines_alive() == living + 1
    dropped.clear()
    assert engines_alive() == living
    assert greedy(engine, None) == before


def test_a_closed_engine_says_so_and_closing_twice_leaves_others_alone(
    long_engine: VLLMEngine, engine: VLLMEngine, shelf: Shelf
) -> None:
    (version,) = shelf.publish(1)
    long_engine.load(version)
    before = greedy(engine, None)
    long_engine.close()
    long_engine.close()
    uses: list[Callable[[], Any]] = [
        lambda: long_engine.load(version),
        lambda: greedy(long_engine, None),
        lambda: long_engine.logprobs([PROMPT], adapter=None),
        lambda: long_engine.max_model_len,
        long_engine.describe_base,
        long_engine.shared_model,
        long_engine.sleep,
    ]
    for use in uses:
        with pytest.raises(EngineError, match="this engine is closed; start another"):
            use()
    assert long_engine.loaded() == ()
    assert greedy(engine, None) == before


def test_only_the_boundary_catches_broadly() -> None:
    """Elsewhere an error that nobody foresaw would be taken for one of vLLM's, or go by unseen. Cleaning up after one
    is another thing: it ends in a bare `raise`."""

    def keeps(handler: ast.ExceptHandler) -> bool:
        broad = handler.type is None or ast.unparse(handler.type) in ("Exception", "BaseException")
        last = handler.body[-1]
        return broad and not (isinstance(last, ast.Raise) and last.exc is None)

    keeping = {
        path.name
        for path in Path(vllm_local.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler) and keeps(node)
    }
    assert keeping == {"running.py"}
