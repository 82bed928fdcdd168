"""What leaves a run: a folder that PEFT's and transformers' own loaders take, and a word on what it is."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModel, AutoPeftModelForCausalLM, LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_grpo import AdapterStore, FakeEngine, GRPOTrainer, ModelConfig, NativeSync, push_to_hub
from lora_grpo.adapters.peft_form.export import Recipe, _unscaled, export_adapter
from lora_grpo.adapters.version import CONFIG_FILE, WEIGHTS_FILE
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.errors import ConfigError, StoreCorrupt, UnknownVersion
from lora_grpo.metrics.render import number
from lora_grpo.report import _reward_rows
from tests.test_cli_versions import ENVIRONMENT, command, lora_grpo
from tests.test_fake_engine import tiny_peft
from tests.tiny_run import fake_engine
from tests.tiny_trainer import CONFIG, ROWS, share_of_low_bytes


def trained(base: Path, engine: Any, run: Path, **settings: Any) -> GRPOTrainer:
    """A run as the README's example makes one: a checkpoint by name, a `LoraConfig` without a task type."""
    config = CONFIG.replace(total_steps=2, vllm_importance_sampling_correction=False)
    arguments = {"peft_config": LoraConfig(r=8, target_modules="all-linear"), "view": False, **settings}
    return GRPOTrainer(
        ModelConfig(name=str(base), revision="v1.0", dtype="float32"),
        share_of_low_bytes,
        config,
        ROWS,
        engine=engine,
        run_dir=run,
        **arguments,
    )


def test_auto_classes_load_an_export_with_its_tokenizer(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the base was named as a folder relative to where the training ran."""
    monkeypatch.chdir(llama_dir.parent)
    umask = os.umask(0o022)
    try:
        with trained(Path(llama_dir.name), fake_engine(llama_dir), tmp_path / "run") as trainer:
            trainer.train()
            trainer.save_model(tmp_path / "saved")
            weights = {name: value.detach().clone() for name, value in trainer.policy.parameters.items()}
        done = lora_grpo("export", tmp_path / "run", "head", tmp_path / "exported")
        assert done.returncode == 0, done.stderr
    finally:
        os.umask(umask)
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    for folder in (tmp_path / "saved", tmp_path / "exported"):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"
        assert (config["base_model_name_or_path"], config["revision"]) == (str(llama_dir), "v1.0")
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
        mine = AutoTokenizer.from_pretrained(folder)
        assert mine.get_vocab() == tokenizer.get_vocab()
        assert mine.chat_template == tokenizer.chat_template
        for auto in (AutoPeftModelForCausalLM, AutoPeftModel):
            loaded = auto.from_pretrained(folder, is_trainable=True)
            own = {name: value for name, value in loaded.named_parameters() if value.requires_grad}
            assert own.keys() == weights.keys()
            assert all(torch.equal(value, weights[name]) for name, value in own.items())


@pytest.mark.vllm
def test_an_engines_tokenizer_is_found_again_by_its_own_name(
    llama_dir: Path, llama_engine: VLLMEngine, shm_dir: Path, tmp_path: Path
) -> None:
    """vLLM wraps tokenizers in classes made at run time; without an archive the export takes it from the engine."""
    from tests.tiny_models import load_model, tiny_lora

    with AdapterStore(shm_dir / "root") as store:
        sync = NativeSync(tiny_lora(load_model(llama_dir), r=8), llama_engine, store)
        sync.export(sync.push(step=0), tmp_path / "out")
        sync.close()
    plain = AutoTokenizer.from_pretrained(llama_dir)
    saved = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert "Cached" in type(llama_engine.tokenizer).__name__
    assert "Cached" not in saved["tokenizer_class"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("fox") == plain.encode("fox")


def test_a_base_wrapped_at_run_time_is_named_by_its_own_class() -> None:
    model = tiny_peft()
    base = model.get_base_model()
    base.__class__ = type("FSDPLlama", (type(base),), {})
    assert Recipe.of(model, "default", []).config["auto_mapping"] == {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
    }
    assert isinstance(base, AutoModelForCausalLM._model_mapping[type(base.config)])


def test_a_recipe_of_another_run_is_told() -> None:
    with pytest.raises(StoreCorrupt, match=r"adapter\.json has no scaling for model\.up, which the version adapts"):
        _unscaled("base_model.model.model.up.lora_B.weight", torch.ones(1), Recipe({}, {"model.down": 2.0}))


@pytest.mark.vllm
def test_save_model_says_which_version_it_chose_and_by_what(
    llama_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with trained(llama_dir, fake_engine(llama_dir), tmp_path / "run", eval_dataset=ROWS[:2], view=True) as trainer:
        trainer.train()
        for number, reward in ((1, 0.2), (2, 0.9), (3, 0.4)):
            trainer.store.record(number, **{"eval/reward": reward, "reward": -reward})
        for which in ("bestest", "LAST", 3.0, True, ""):
            with pytest.raises(ConfigError, match="names no version; use a number"):
                trainer.save_model(tmp_path / "wrong", which=which)  # type: ignore[arg-type]
        with pytest.raises(UnknownVersion, match="no kept version has a recorded 'charm'"):
            trainer.save_model(tmp_path / "wrong", which="best:charm")
        assert not (tmp_path / "wrong").exists()
        capfd.readouterr()
        assert trainer.save_model(tmp_path / "best", which="best").number == 2
        assert f"saved v2 (best:eval/reward) to {tmp_path / 'best'}, weights exact" in capfd.readouterr().err
        assert trainer.save_model(tmp_path / "reward", which="best:reward").number == 1
        assert trainer.save_model(tmp_path / "first", which=trainer.store.get(1)).number == 1
        assert trainer.save_model(tmp_path / "last").number == 3
        assert f"saved v3 (head) to {tmp_path / 'last'}" in capfd.readouterr().err


def test_a_rollback_without_the_optimizer_says_so(shm_dir: Path) -> None:
    model = tiny_peft()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with AdapterStore(shm_dir / "store") as store:
        sync = NativeSync(model, FakeEngine(lambda prompt, version, seed: "4"), store)
        sync.push(step=0)
        sync.push(step=1)
        with pytest.warns(RuntimeWarning, match="knows no optimizer, so its moments are those of v2 still; pass optim"):
            sync.rollback(to=1)
        sync.optimizer = optimizer
        sync.push(step=2)
        assert sync.rollback(to="parent").version.number == 1


@pytest.mark.parametrize("there", [False, True], ids=["new folder", "folder with a file"])
def test_a_killed_export_leaves_no_half_adapter(llama_dir: Path, tmp_path: Path, there: bool) -> None:
    """Killed before each file or folder that it makes or renames; a new folder can be exported to again."""
    run, out = tmp_path / "run", tmp_path / "exported"
    with trained(llama_dir, fake_engine(llama_dir), run) as trainer:
        trainer.train()
    if there:
        out.mkdir()
        (out / "notes.md").touch()
    moments = 0
    while exit_code_of_export(run, out, killed_at=moments) == KILLED:
        moments += 1
        assert there == out.exists()
        assert (out / WEIGHTS_FILE).exists() or not (out / CONFIG_FILE).exists()
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            (out / name).unlink(missing_ok=True)
    assert moments > 5
    assert load_file(out / WEIGHTS_FILE).keys()
    assert json.loads((out / CONFIG_FILE).read_text())["r"] == 8
    assert AutoTokenizer.from_pretrained(out).get_vocab()
    assert not [*out.parent.glob(".*"), *out.glob(".*")]


KILLED = 9


def exit_code_of_export(run: Path, out: Path, *, killed_at: int) -> int:
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = [killed_at]

    def kill(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.mkdir", "os.rename") and "exported" in str(arguments[0]):
            left[0] -= 1
            if left[0] < 0:
                os._exit(KILLED)

    try:
        sys.addaudithook(kill)
        with AdapterStore(archive=run, readonly=True) as store:
            export_adapter(store, "head", Recipe.read(run), out)
        os._exit(0)
    finally:
        os._exit(1)


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as an upload asks for."""

    asked: list[tuple[str, bytes, str]]

    def do_POST(self) -> None:
        body = b""
        if self.headers["Content-Length"]:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        else:
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size + 2)[:-2]
            self.rfile.readline()
        self.asked.append((self.path, body, self.headers["Authorization"]))
        address = f"http://{self.headers['Host']}/me/adder"
        answer: dict[str, Any] = {"url": address, "commitUrl": f"{address}/commit/c0ffee", "commitOid": "c0ffee"}
        if "preupload" in self.path:
            answer = {
                "files": [
                    {**each, "uploadMode": "regular", "shouldIgnore": False} for each in json.loads(body)["files"]
                ]
            }
        self.answer(answer | {"warnings": [], "errors": []})

    def do_GET(self) -> None:
        self.answer({})

    def answer(self, document: dict[str, Any]) -> None:
        content = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, list[tuple[str, bytes, str]]]]:
    """A stand-in's address, and what it was asked."""
    asked: list[tuple[str, bytes, str]] = []
    with HTTPServer(("127.0.0.1", 0), type("Asked", (Hub,), {"asked": asked})) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_a_cards_steps_are_whole_numbers_however_many() -> None:
    steps = [{"event": "step", "step": step, "version": step, "reward": 0.123456} for step in range(1, 12_346)]
    assert [*map(number, _reward_rows(steps, [])[-1])] == ["12345", "12345", "0.1235", "-"]


def test_a_push_to_the_hub_is_one_commit_of_the_export_and_a_card(
    llama_dir: Path, tmp_path: Path, hub: tuple[str, list[tuple[str, bytes, str]]]
) -> None:
    run, exported = tmp_path / "run", tmp_path / "exported"
    with trained(llama_dir, fake_engine(llama_dir), run, eval_dataset=ROWS[:2]) as trainer:
        trainer.train()
        history = trainer.history
    with pytest.raises(ConfigError, match=r"'me/adder' on http.* did not accept the upload: .*offline.*hf auth login"):
        push_to_hub(run, "best", "me/adder")
    environment = {**ENVIRONMENT, "HF_ENDPOINT": hub[0], "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret"}
    arguments = ("export", run, "head", exported, "--push-to-hub", "me/adder", "--private")
    done = subprocess.run(command(*arguments), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"v3 is at {hub[0]}/me/adder/commit/c0ffee"
    assert {header for *_, header in hub[1]} == {"Bearer hf_secret"}
    [made] = [json.loads(body) for path, body, _ in hub[1] if path == "/api/repos/create"]
    assert (made["name"], made["organization"], made["visibility"]) == ("adder", "me", "private")
    [lines] = [body.splitlines() for path, body, _ in hub[1] if path == "/api/models/me/adder/commit/main"]
    values = [json.loads(line)["value"] for line in lines[1:]]
    files = {value["path"]: base64.b64decode(value["content"]) for value in values}
    card = files.pop("README.md").decode()
    assert files == {path.name: path.read_bytes() for path in exported.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= files.keys()
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\S+) \| (\S+) \|$", card, re.M)
    assert [row[:3] for row in rows] == [
        (str(step), str(step), f"{metrics['reward']:.4g}") for step, metrics in enumerate(history, 1)
    ]
    assert rows[0][3] == f"{trainer.evaluations[0].metrics['reward']:.4g}"
    for words in ("version 3, after step\n2", "exact", "`grpo.total_steps`: 2", f"torch {version('torch')}"):
        assert words in card, card
    for private in (str(run), str(llama_dir), "base_model:", "`output_dir`"):
        assert private not in card
