"""What a run would end with hours later is said when its trainer is built, with the row, before an engine starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from lora_grpo import EngineConfig, FakeEngine, GRPOConfig, GRPOTrainer, ModelConfig
from lora_grpo.data import load_prompts
from lora_grpo.engines.requests import token_prompts
from lora_grpo.errors import ConfigError
from lora_grpo.metrics.log import read_metrics
from lora_grpo.trainer import room
from lora_grpo.types import Chat, Group, Prompt, Sampling
from tests.tiny_models import CHAT_TEMPLATE, tiny_model, tiny_tokenizer

CONFIG = GRPOConfig(
    total_steps=1,
    num_generations=2,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=1,
    max_completion_length=8,
    vllm_importance_sampling_correction=False,
)
LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
NO_SYSTEM = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + (
    "{{ m.content }}{% endfor %}"
)
THINKING = CHAT_TEMPLATE + "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"


def by_seed(completions: Sequence[Any], **columns: Any) -> list[float]:
    return [float(index % 2) for index in range(len(completions))]


def by_answer(completions: Sequence[Any], answer: Sequence[str]) -> list[float]:
    return [1.0] * len(completions)


def chat(text: str, role: str = "user") -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def tokenizer_with(template: str | None, **settings: Any) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    return tokenizer


class Listening(FakeEngine):
    """A fake that keeps what it was asked."""

    def __init__(self, tokenizer: Any, reply: str = "ab") -> None:
        super().__init__(lambda prompt, version, seed: reply, tokenizer=tokenizer)
        self.asked: list[tuple[list[Prompt], Sampling]] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, adapter: Any) -> list[Group]:
        self.asked.append((list(prompts), sampling))
        return super().generate(prompts, sampling, adapter=adapter)


@pytest.fixture
def build(llama_dir: Path, tmp_path: Path, shm_dir: Path) -> Iterator[Callable[..., GRPOTrainer]]:
    """Builds trainers on the tiny Llama, and closes them."""
    built: list[GRPOTrainer] = []

    def trainer(rows: Any, config: GRPOConfig = CONFIG, **settings: Any) -> GRPOTrainer:
        arguments: dict[str, Any] = {
            "model": ModelConfig(name=str(llama_dir), dtype="float32"),
            "reward_funcs": by_seed,
            "config": config,
            "train_dataset": rows,
            "peft_config": LORA,
            "run_dir": tmp_path / f"run{len(built)}",
            "store_root": shm_dir / f"root{len(built)}",
            "view": False,
        }
        built.append(GRPOTrainer(**{**arguments, **settings}))
        return built[-1]

    yield trainer
    for each in built:
        each.close()


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine may start."""

    def started(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("an engine starts")

    monkeypatch.setattr(room, "build_engine", started)


def test_prompts_are_rendered_with_processing_class_and_its_end_token_ends_completions(build: Any) -> None:
    """The base's own tokenizer has no chat template, as bases have none."""
    engine = Listening(tokenizer_with(None), reply="abc")
    own = tokenizer_with(CHAT_TEMPLATE, eos_token="<|im_end|>")
    trainer = build([{"prompt": chat("hi")}, {"prompt": "plain"}], engine=engine, processing_class=own)
    trainer.model.generation_config.eos_token_id = [1, 7]
    trainer.train()
    prompts, sampling = engine.asked[0]
    wanted = {tuple(own.apply_chat_template(chat("hi"), add_generation_prompt=True, return_dict=False))}
    assert {tuple(ids) for ids in prompts} == wanted | {tuple(own.encode("plain"))}
    assert own.eos_token_id in sampling.stop_token_ids


def test_end_tokens_of_the_generation_config_end_completions_too(llama_dir: Path) -> None:
    from lora_grpo.engines.wrapped import end_tokens, rendering

    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[1, 7]))
    own = tokenizer_with(CHAT_TEMPLATE, eos_token="<|im_end|>")
    assert end_tokens(own, model) == [1, own.eos_token_id, 7]
    letter = own.encode("b")[0]
    engine = Listening(own, reply="abc")
    model.generation_config.eos_token_id = letter
    asked = rendering(engine, own, model)
    [group] = asked.generate([chat("x")], Sampling(max_tokens=8, stop_token_ids=(5,)), adapter=None)
    assert group.prompt == chat("x")
    assert group.completions[0].token_ids == tuple(own.encode("ab"))
    assert group.completions[0].finish_reason == "stop"
    assert set(engine.asked[0][1].stop_token_ids) == {5, letter, own.eos_token_id}
    asked.generate(["x"], Sampling(max_tokens=8, ignore_eos=True), adapter=None)
    assert engine.asked[1][1].stop_token_ids == ()


@pytest.mark.vllm
def test_a_real_engine_ends_completions_there(build: Any, llama_dir: Path, llama_engine: Any) -> None:
    """Half of all tokens end a completion: hardly one has eight."""
    from tests.tiny_models import load_model, tiny_lora

    model = tiny_lora(load_model(llama_dir), r=8)
    ends = set(range(4, 134))
    model.generation_config.eos_token_id = sorted(ends)
    config = CONFIG.replace(per_device_train_batch_size=16, num_generations=16, report_to="none")
    groups: list[Any] = []

    def reward(completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        groups.extend(completion_ids)
        return by_seed(completions)

    build([{"prompt": "a"}], config, model=model, peft_config=None, engine=llama_engine, reward_funcs=reward).train()
    assert len(groups) == 16
    for ids in groups:
        assert not ends & set(ids[:-1])
        assert ids[-1] in ends or len(ids) == 8


def test_a_rollout_function_asks_an_engine_that_renders_alike(build: Any) -> None:
    seen: list[Prompt] = []

    def rollout(prompts: Sequence[Prompt], engine: Any, version: Any) -> list[Group]:
        seen.extend(prompts)
        longer = [prompt + chat("more", "tool") for prompt in prompts]
        return engine.generate(longer, Sampling(n=2, max_tokens=4), adapter=version)

    engine = Listening(tokenizer_with(None))
    own = tokenizer_with(THINKING)
    config = CONFIG.replace(chat_template_kwargs={"enable_thinking": False})
    build([{"prompt": chat("hi")}], config, engine=engine, processing_class=own, rollout_func=rollout).train()
    assert seen == [chat("hi")] * 2
    wanted = own.apply_chat_template(
        chat("hi") + chat("more", "tool"), add_generation_prompt=True, return_dict=False, enable_thinking=False
    )
    assert list(engine.asked[0][0][0]) == wanted


@pytest.mark.usefixtures("no_engine")
@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        (
            ["short", "x" * 200, "y" * 300],
            {"engine_config": EngineConfig(max_model_len=128)},
            [
                "the data, row 1: the prompt has 200 tokens, and max_model_len=128 less max_completion_length=8 allows",
                "120 (2 of 3 rows are longer, up to 300): raise max_model_len to 308, or shorten the prompts, or leave",
                "'drop'",
            ],
        ),
        (
            ["short", "shorter"],
            {"engine_config": EngineConfig(max_model_len=128), "max_completion_length": 200},
            [
                "allows 0 (2 of 2",
                "up to 7): raise max_model_len to 207, or lower max_completion_length to 121, or shorten",
            ],
        ),
        (["abc", "x" * 40], {"max_prompt_length": 39}, ["row 1", "40 tokens", "max_prompt_length=39", "'drop'"]),
        ([chat("a"), chat("b", "system")], {"template": NO_SYSTEM}, ["row 1", "chat template", "no system role"]),
        (["text", chat("a")], {"template": None}, ["row 1", "no chat template", "processing_class"]),
        (["x" * 99] * 2, {"max_prompt_length": 39, "overlong_prompts": "drop"}, ["row 0", "2 of 2"]),
        (
            [chat("a")],
            {"template": THINKING, "chat_template_kwargs": {"enable_thinkin": True}},
            ["row 0", "'enable_thinkin'", "did you mean 'enable_thinking'?"],
        ),
        ([chat("a")], {"chat_template_kwargs": {"reasoning_effort": "low"}}, ["'reasoning_effort'", "leave it out"]),
        (["a"], {"reward_weights": (1.0, 0.5)}, ["reward_weights=[1.0, 0.5]", "2 weights for the 1 reward functions"]),
        (["a"], {"num_generations": 3}, ["a step of 4 completions", "num_generations"]),
        (["a"], {"reward_funcs": "org/reward-model"}, ["'org/reward-model' is not a function", "NativeGRPOTrainer"]),
        (["a"], {"reward_funcs": [by_seed, torch.nn.Linear(2, 1)]}, ["a Linear is not a function"]),
        (["a"], {"reward_funcs": by_answer}, ["'by_answer' asks for column 'answer'"]),
        (["a"], {"eval_dataset": ["x" * 500], "max_prompt_length": 99}, ["row 0", "500 tokens", "raise that to 500"]),
    ],
)
def test_rows_and_rewards_that_cannot_work_are_told_before_an_engine_starts(
    build: Any, tmp_path: Path, rows: list[Any], settings: dict[str, Any], words: list[str]
) -> None:
    """As the first rollout of their batch would, perhaps hours later."""
    own = settings.keys() & GRPOConfig.model_fields
    others = {name: value for name, value in settings.items() if name not in own}
    others["processing_class"] = tokenizer_with(others.pop("template", CHAT_TEMPLATE))
    others["eval_dataset"] = [{"prompt": text} for text in others.pop("eval_dataset", [])] or None
    with pytest.raises(ConfigError) as caught:
        build([{"prompt": row} for row in rows], CONFIG.replace(**{n: settings[n] for n in own}), **others)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert ("'drop'" in str(caught.value)) == ("'drop'" in " ".join(words)), "where it would leave rows"
    assert not (tmp_path / "run0" / "versions").exists()


@pytest.mark.usefixtures("no_engine")
def test_held_out_rows_have_the_columns_too(build: Any) -> None:
    with pytest.raises(ConfigError, match="asks for column 'answer'"):
        build([{"prompt": "a", "answer": "b"}], reward_funcs=by_answer, eval_dataset=[{"prompt": "a"}])


def test_longer_prompts_are_dropped_and_counted(build: Any) -> None:
    rows = [{"prompt": "x" * n, "answer": str(n)} for n in (3, 50, 4, 60, 5)]
    config = CONFIG.replace(max_prompt_length=10, overlong_prompts="drop")
    trainer = build(rows, config, engine=Listening(tiny_tokenizer()), eval_dataset=rows[:2])
    assert list(trainer.source.data.prompts()) == ["xxx", "xxxx", "xxxxx"]
    assert len(trainer.source.data) == trainer.source.sampler.num_prompts == 3
    assert trainer.source.data.select([1])[1] == {"answer": ["4"]}
    assert len(trainer.eval_data) == 1
    told = [event["text"] for event in read_metrics(trainer.run_dir) if event["event"] == "message"]
    assert any("3 prompts of at most 5 tokens, 2 longer ones dropped" in text for text in told), told


def test_what_only_the_engine_knows_is_checked_once_it_has_started(build: Any, monkeypatch: Any) -> None:
    """Without `engine.max_model_len` the limit is the engine's to say."""
    engine = Listening(tiny_tokenizer())
    engine.max_model_len = 32  # type: ignore[attr-defined]
    monkeypatch.setattr(room, "build_engine", lambda *arguments, **settings: engine)
    with pytest.raises(ConfigError, match=r"row 1: the prompt has 30 tokens, and max_model_len=32 less"):
        build([{"prompt": "a"}, {"prompt": "x" * 30}])


def test_an_engine_is_started_for_the_adapters_rank_also_where_its_setting_is_smaller(
    build: Any, monkeypatch: Any
) -> None:
    """It was planned so; one of the smaller rank would be refused once it has started."""
    started: list[EngineConfig] = []

    def start(model: Any, config: EngineConfig, *_: Any, **__: Any) -> Listening:
        started.append(config)
        return Listening(tiny_tokenizer())

    monkeypatch.setattr(room, "build_engine", start)
    trainer = build([{"prompt": "a"}], engine_config=EngineConfig(max_lora_rank=1))
    assert [config.max_lora_rank for config in started] == [trainer.sync.training.modules[0].a_RI.shape[0]]


def test_the_chat_template_gets_settings_and_a_column_of_its_own(build: Any) -> None:
    own = tokenizer_with(THINKING)
    rows = [{"prompt": chat("a")}, {"prompt": chat("b"), "chat_template_kwargs": {"enable_thinking": True}}]
    engine = Listening(own)
    build(rows, CONFIG.replace(chat_template_kwargs={"enable_thinking": False}), engine=engine).train()
    rendered = {own.decode(list(ids)) for ids in engine.asked[0][0]}
    assert {text[text.index("assistant") :] for text in rendered} == {"assistant\nFalse", "assistant\nTrue"}


def test_template_settings_of_a_text_prompt_are_refused() -> None:
    kwargs = {"enable_thinking": False}
    with pytest.raises(ConfigError, match=r"row 0, column 'chat_template_kwargs': the prompt is text"):
        load_prompts([{"prompt": "a", "chat_template_kwargs": kwargs}])
    made = load_prompts([{"prompt": "a", "chat_template_kwargs": kwargs}], system_prompt="").select([0])[0][0]
    assert isinstance(made, Chat)
    assert made.template_kwargs == kwargs
    with pytest.raises(ConfigError, match="'enable_thinking': false"):
        load_prompts([{"prompt": chat("a"), "chat_template_kwargs": "no"}])


def test_a_text_that_begins_with_the_begin_token_gets_no_second_one() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    start = tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    assert tokenizer.encode("<|im_start|>a")[:2] == [start, start]
    plain, begun = token_prompts(tokenizer, ["a", "<|im_start|>a"])
    assert plain == begun == [start, *tokenizer.encode("a", add_special_tokens=False)]


@pytest.mark.usefixtures("no_engine")
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma"])
def test_a_model_folder_without_a_tokenizer_is_told_as_that(build: Any, tmp_path: Path, arch: str) -> None:
    """Of Qwen and Gemma, transformers makes up one that turns text into nothing, or into "unknown"."""
    base = tiny_model(arch, tmp_path / "base")
    for path in base.glob("*token*"):
        path.unlink()
    model = ModelConfig(name=str(base), dtype="float32")
    with pytest.raises(ConfigError, match=r"base has no tokenizer.*tokenizer\.json") as caught:
        build([{"prompt": "a"}], model=model)
    assert "row" not in str(caught.value)
    if arch != "llama":
        made_up = AutoTokenizer.from_pretrained(base)
        for prompt in ("text", chat("text")):
            with pytest.raises(ConfigError, match=r"prompt 0 is .*, but .*base has no tokenizer"):
                token_prompts(made_up, [prompt])
        assert token_prompts(made_up, [[1, 2]]) == [[1, 2]]
    with pytest.raises(ConfigError, match="prompt 0 is text, but the model's folder has no tokenizer"):
        token_prompts(None, ["text"])


@pytest.mark.usefixtures("no_engine")
def test_a_model_directory_that_is_not_there_is_told_as_that(build: Any) -> None:
    """Not as a hub name that is misspelt."""
    for name in ("./nowhere", "~/nowhere"):
        with pytest.raises(ConfigError, match=rf"model '{name}': there is no directory {Path(name).absolute()}$"):
            build([{"prompt": "a"}], model=ModelConfig(name=name))


@pytest.mark.usefixtures("no_engine")
def test_a_base_that_was_cut_short_is_told_before_an_engine_starts(build: Any, tmp_path: Path) -> None:
    base = tiny_model("llama", tmp_path / "base")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"base/model\.safetensors is damaged or was cut short .*again"):
        build([{"prompt": "a"}], model=ModelConfig(name=str(base), dtype="float32"))


@pytest.mark.usefixtures("no_engine")
def test_an_adapter_is_no_base(build: Any, llama_dir: Path, tmp_path: Path) -> None:
    from tests.tiny_models import load_model, tiny_lora

    tiny_lora(load_model(llama_dir)).save_pretrained(tmp_path / "adapter")
    for engine in (None, Listening(tiny_tokenizer())):
        with pytest.raises(ConfigError, match=r"is an adapter, not a base model: name its base \(.*PeftModel"):
            build([{"prompt": "a"}], model=str(tmp_path / "adapter"), engine=engine)


def test_arguments_of_trls_trainer_are_answered(build: Any) -> None:
    for wrong in ("org/model", 3):
        with pytest.raises(ConfigError, match=f"processing_class={wrong!r} is not a tokenizer: pass AutoTokenizer"):
            build([{"prompt": "a"}], processing_class=wrong)
    with pytest.raises(ConfigError, match=r"no argument 'args': pass config=lora_grpo\.GRPOConfig"):
        build([{"prompt": "a"}], args=CONFIG)
    with pytest.raises(ConfigError, match="no argument 'callbacks': use guard="):
        build([{"prompt": "a"}], callbacks=[])
    with pytest.raises(TypeError, match="no argument 'modle'"):
        build([{"prompt": "a"}], modle="x")
    trl = pytest.importorskip("trl")
    with pytest.raises(ConfigError, match=r"config is a trl\..*GRPOConfig: .*NativeGRPOTrainer"):
        build([{"prompt": "a"}], trl.GRPOConfig("out", use_cpu=True, bf16=False, report_to="none"))


@pytest.mark.usefixtures("no_engine")
@pytest.mark.parametrize("given", [False, True])
def test_an_adapter_that_is_there_twice_or_not_at_all_is_refused(build: Any, llama_dir: Path, given: bool) -> None:
    """Also with an engine at hand and nothing of memory open, so that nothing is planned."""
    from tests.tiny_models import load_model, tiny_lora

    settings = {"config": CONFIG.replace(gradient_checkpointing=False), "engine": None}
    settings |= {"engine": Listening(tiny_tokenizer())} if given else {}
    with pytest.raises(ConfigError, match="PeftModel already: leave peft_config out"):
        build([{"prompt": "a"}], model=tiny_lora(load_model(llama_dir)), **settings)
    with pytest.raises(ConfigError, match="pass peft_config"):
        build([{"prompt": "a"}], peft_config=None, **settings)
