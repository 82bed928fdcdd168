"""What is done with a run, on a model of each kind: trained, gone back, resumed, exported, inside TRL, on servers."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from lora_grpo.adapters.peft_form.checks import active_adapter, check_servable
from lora_grpo.adapters.peft_form.export import Recipe, export_adapter
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.config import KeepConfig, ModelConfig
from lora_grpo.engines import compat
from lora_grpo.engines.base import Engine
from lora_grpo.engines.delivery.probe import probe_sequences
from lora_grpo.engines.server.engine import VLLMServerEngine
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.errors import ConfigError
from lora_grpo.grpo.forward import mean_abs_difference, teacher_logprobs
from lora_grpo.sync import NativeSync
from lora_grpo.trainer import GRPOTrainer
from lora_grpo.types import Sampling
from tests.conftest import ENGINE_ARGS
from tests.families import FAMILIES, build, full_model
from tests.model_table import CONTROLS, Finding, adapted, deliver
from tests.test_cli import lora_grpo
from tests.test_server_engine_real import VLLM_ARGS, free_ports
from tests.tiny_models import VOCAB, refill_lora
from tests.tiny_trainer import CONFIG, ROWS, moments, same, share_of_low_bytes, weights

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

WRAPPER = "qwen3_5"
KINDS = (WRAPPER, "olmo2", "qwen3_moe")
"""A multimodal wrapper, a class of transformers' own, and a mixture of experts."""
SEQUENCES = [list(range(10 + row, 40 + row)) for row in range(4)]


class Served(NamedTuple):
    family: str
    base: Path
    engine: VLLMEngine

    @property
    def lora(self) -> LoraConfig:
        targets = FAMILIES[self.family].targets
        names = targets if isinstance(targets, str) else list(targets)
        return LoraConfig(r=8, lora_alpha=16, target_modules=names, task_type="CAUSAL_LM")


@pytest.fixture(scope="module", params=KINDS)
def served(
    request: pytest.FixtureRequest, llama_engine: VLLMEngine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """Beside another engine in the same process, which has neither a tower nor experts."""
    base = build(request.param, tmp_path_factory.mktemp(request.param))
    engine = VLLMEngine(base, max_lora_rank=8, **ENGINE_ARGS)
    yield Served(request.param, base, engine)
    engine.close()


wrapper_alone = pytest.mark.parametrize("served", [WRAPPER], indirect=True)


def trainer_of(served: Served, run: Path, root: Path, steps: int, **settings: Any) -> GRPOTrainer:
    given = {"engine": served.engine, "keep": KeepConfig(trainer_states=20), "view": False, **settings}
    dtype = "bfloat16" if "share_base_weights" in settings else "float32"
    return GRPOTrainer(
        ModelConfig(name=str(served.base), dtype=dtype),
        share_of_low_bytes,
        CONFIG.replace(total_steps=steps),
        ROWS,
        peft_config=served.lora,
        run_dir=run,
        store_root=root,
        **given,
    )


def test_train_go_back_resume_and_export(served: Served, tmp_path: Path, shm_dir: Path) -> None:
    """What comes back is the same to the bit; plain PEFT loads the export into all that the checkpoint holds."""
    with trainer_of(served, tmp_path / "run", shm_dir / "store", steps=2) as trainer:
        drawn = weights(trainer)
        trainer.train()
        kept, state, head = weights(trainer), moments(trainer), trainer.sync.head
        assert not same(kept, drawn)
        refill_lora(trainer.model, scale=0.1, seed=1)
        assert trainer.rollback(to=head).weights == "exact"
        assert (same(weights(trainer), kept), same(moments(trainer), state)) == (True, True)

    with trainer_of(served, tmp_path / "run", shm_dir / "store", steps=3) as trainer:
        assert trainer.resume() is not None
        assert (same(weights(trainer), kept), same(moments(trainer), state)) == (True, True)
        trainer.train()
        assert not same(weights(trainer), kept)
        assert trainer.sync.export(trainer.sync.head, tmp_path / "export") == "exact"
        policy = teacher_logprobs(trainer.model, SEQUENCES)
        answers = served.engine.logprobs(SEQUENCES, adapter=trainer.sync.head)
        with trainer.model.disable_adapter():  # type: ignore[operator, union-attr]
            unadapted = teacher_logprobs(trainer.model, SEQUENCES)

    loaded = PeftModel.from_pretrained(full_model(served.base), tmp_path / "export").eval()
    assert mean_abs_difference(teacher_logprobs(loaded, SEQUENCES), policy) < 1e-5
    assert mean_abs_difference(policy, unadapted) > 3 * mean_abs_difference(answers, policy)


def test_inside_trl(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    from lora_grpo.integrations import trl
    from tests.test_trl_native import adapter_weights, arguments, native_trainer

    monkeypatch.setattr(trl, "VLLMEngine", lambda model, **_: served.engine)
    monkeypatch.setattr(served.engine, "close", lambda: None)
    args = arguments(tmp_path, max_steps=2, eval_strategy="no", save_strategy="no")
    if served.family == WRAPPER:
        with pytest.raises(ConfigError, match=r"target_modules=None .*'all-linear' is every"):
            native_trainer(str(served.base), args, peft_config=LoraConfig(r=8))
    trainer = native_trainer(str(served.base), args, peft_config=served.lora)
    before = adapter_weights(trainer.model)
    trainer.train()
    assert not same(adapter_weights(trainer.model), before)
    assert trainer.rollback(to=1).weights == "exact"
    assert same(adapter_weights(trainer.model), before)
    trainer.close()


def test_delivery_and_every_control(served: Served, shm_dir: Path) -> None:
    finding = Finding(served.family)
    with AdapterStore(shm_dir / "store") as store:
        deliver(finding, adapted(served.family, served.base), served.engine, store, shm_dir)
    assert len(CONTROLS) == 5
    assert finding.missed == []
    assert finding.gap <= 3 * finding.noise
    assert finding.gap < finding.signal / 3


@wrapper_alone
def test_a_full_model_of_the_users_own(served: Served, shm_dir: Path) -> None:
    """As the refusal of a tower's layers says that its adapter is to be named."""
    named = r"model\.language_model\..*\.(q_proj|up_proj)"
    model = get_peft_model(full_model(served.base), LoraConfig(r=8, target_modules=named))
    assert len(check_servable(model, active_adapter(model))) == 3
    refill_lora(model, scale=0.1, seed=0)
    with AdapterStore(shm_dir / "store") as store:
        sync = NativeSync(model, served.engine, store)
        assert sync.base_match is not None
        assert any("visual" in name for name in sync.base_match.unread["the engine"])
        version = sync.push(step=0)
        gap = mean_abs_difference(
            served.engine.logprobs(SEQUENCES, adapter=version), teacher_logprobs(model, SEQUENCES)
        )
        assert gap <= 3 * sync.noise


@wrapper_alone
def test_what_stands_for_an_image_is_neither_sampled_nor_asked(served: Served) -> None:
    check_placeholders(served.engine)
    base = served.engine.describe_base()
    assert not set(base.placeholders) & {token for row in probe_sequences(base) for token in row}


def check_placeholders(engine: Engine) -> None:
    placeholders = engine.describe_base().placeholders
    assert placeholders == (VOCAB - 2, VOCAB - 1)
    sampling = Sampling(n=32, max_tokens=32, temperature=2.0, seed=0, ignore_eos=True)
    [group] = engine.generate(["a"], sampling, adapter=None)
    sampled = [token for made in group.completions for token in made.token_ids]
    assert not set(placeholders) & set(sampled)
    assert len(set(sampled)) > VOCAB // 2
    with pytest.raises(ConfigError, match=f"prompt 1 has token {VOCAB - 1}, which stands for an image"):
        engine.generate([[5], [5, VOCAB - 1]], sampling, adapter=None)


@wrapper_alone
def test_one_copy_of_the_language_model(served: Served, tmp_path: Path, shm_dir: Path) -> None:
    engine = VLLMEngine(served.base, max_lora_rank=8, share_base_weights=True, **ENGINE_ARGS)
    try:
        with trainer_of(
            served, tmp_path, shm_dir / "store", steps=2, engine=engine, share_base_weights=True
        ) as trainer:
            assert all(".language_model." in name or "lm_head" in name for name, _ in trainer.model.named_parameters())
            own = {place for _, parameter in compat.base_parameters(engine._llm) for place in _storage(parameter)}
            base = [p for name, p in trainer.model.named_parameters() if ".lora_" not in name]
            assert all(_storage(parameter) <= own for parameter in base)
            drawn = weights(trainer)
            trainer.train()
            assert not same(weights(trainer), drawn)
    finally:
        engine.close()


def _storage(parameter: torch.Tensor) -> set[int]:
    return {parameter.untyped_storage().data_ptr()}


@wrapper_alone
def test_a_server_with_the_tower(served: Served, tmp_path: Path) -> None:
    """The command's run on it, and its export, loaded by the names that PEFT gave it."""
    processor = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 16, "merge_size": 2}
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (served.base / name).write_text(json.dumps({**processor, "video_processor_type": "Qwen3VLVideoProcessor"}))
    with serving(served.base, "--no-language-model-only", "--skip-mm-profiling") as url:
        write_run(tmp_path, served.base, url)
        trained = lora_grpo("train", "run.toml", cwd=tmp_path)
        assert trained.returncode == 0, trained.stderr[-2000:]
        with AdapterStore(archive=tmp_path / "run", readonly=True) as store:
            recipe = Recipe.read(tmp_path / "run")
            assert export_adapter(store, store.get("head"), recipe, tmp_path / "export") == "exact"
        engine = VLLMServerEngine([url])
        check_placeholders(engine)
        engine.close()
        body = {"lora_name": "exported", "lora_path": str(tmp_path / "export")}
        assert httpx.post(f"{url}/v1/load_lora_adapter", json=body, timeout=60).status_code == 200
        answers = [scored(url, "exported", ids) for ids in SEQUENCES]
    loaded = PeftModel.from_pretrained(full_model(served.base), tmp_path / "export").eval()
    policy = teacher_logprobs(loaded, SEQUENCES)
    with loaded.disable_adapter():
        unadapted = teacher_logprobs(loaded, SEQUENCES)
    assert mean_abs_difference(policy, unadapted) > 3 * mean_abs_difference(answers, policy)


@contextmanager
def serving(base: Path, *arguments: str, options: Sequence[str] = ()) -> Iterator[str]:
    """The address of a `lora-grpo serve` with these options and arguments of vLLM's."""
    command = [sys.executable, "-m", "lora_grpo", "serve", str(base), "--max-lora-rank", "8", "--json", *options]
    command += ["--port", str(free_ports(1)), "--log-dir", str(base / "logs"), "--", *VLLM_ARGS]
    # On a CPU vLLM has linear attention and nf4 in bfloat16 alone.
    command += ["--dtype", "bfloat16", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            [url] = json.loads(process.stdout.readline())["urls"]
            yield url
        finally:
            process.terminate()


def write_run(folder: Path, base: Path, url: str) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "low.py").write_text(f"from __future__ import annotations\n\n{inspect.getsource(share_of_low_bytes)}")
    (folder / "run.toml").write_text(f"""
output_dir = "run"
rewards = [{{ name = "low:share_of_low_bytes" }}]
[model]
name = "{base}"
dtype = "float32"
[lora]
r = 8
lora_alpha = 16
target_modules = "all-linear"
[data]
train = "rows.jsonl"
[engine]
urls = ["{url}"]
[grpo]
total_steps = 2
num_generations = 4
generation_batch_size = 16
per_device_train_batch_size = 8
gradient_accumulation_steps = 1
max_completion_length = 6
learning_rate = 2e-2
""")


def scored(url: str, name: str, ids: list[int]) -> list[float]:
    body = {"model": name, "prompt": ids, "max_tokens": 1, "prompt_logprobs": 0}
    [choice] = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"]
    entries = choice["prompt_logprobs"][1:]
    return [entry[str(token)]["logprob"] for entry, token in zip(entries, ids[1:], strict=True)]
