"""vLLM servers as one engine: checked at connect, loaded all or none, never answering for another version.

Failures are driven in a fake server (tests/fake_vllm.py); what works is shown on real ones in
tests/test_server_engine_real.py.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.base import BaseDescription, Witness
from lora_grpo.engines.delivery.probe import probe_sequences
from lora_grpo.engines.fake import FakeEngine
from lora_grpo.engines.requests import asked
from lora_grpo.engines.server import client, replica
from lora_grpo.engines.server.engine import VLLMServerEngine
from lora_grpo.engines.server.replica import Names
from lora_grpo.errors import ConfigError, DeliveryError, EngineError, LoraGrpoError, UnknownVersion, UnsupportedVersion
from lora_grpo.metrics.log import quiet_libraries
from lora_grpo.types import Sampling
from tests.fake_vllm import FakeServer, logprob, scores, weights_of
from tests.store_files import digest_of
from tests.tiny_models import VOCAB

PROMPTS = [[10, 11, 12], [20, 21], [30, 31, 32, 33]]
SAMPLING = Sampling(n=4, max_tokens=3, seed=7)
SEQUENCES = probe_sequences(BaseDescription("float32", {}, VOCAB))

Pair = tuple[FakeServer, FakeServer]
MakeEngine = Callable[..., VLLMServerEngine]


@pytest.fixture
def pair(llama_dir: Path) -> Iterator[Pair]:
    with FakeServer(str(llama_dir)) as one, FakeServer(str(llama_dir)) as two:
        yield one, two


@pytest.fixture
def connect(pair: Pair) -> Iterator[MakeEngine]:
    """Engines on both servers, closed in the end."""
    with ExitStack() as closing:

        def make(*servers: FakeServer, **settings: Any) -> VLLMServerEngine:
            engine = VLLMServerEngine([server.url for server in servers or pair], **{"patience_s": 3.0, **settings})
            closing.callback(engine.close)
            return engine

        yield make


@pytest.fixture
def versions(shm_dir: Path) -> list[AdapterVersion]:
    return [version(shm_dir, number) for number in (1, 2, 3)]


def version(folder: Path, number: int) -> AdapterVersion:
    """A sound adapter of one module, other bytes for every number."""
    path = folder / "run" / "versions" / f"{number:06d}"
    path.mkdir(parents=True)
    generator = torch.Generator().manual_seed(number)
    prefix, rows = "base_model.model.model.layers.0.self_attn.q_proj", torch.randn(4, 64, generator=generator)
    (path / "adapter_model.safetensors").write_bytes(
        save({f"{prefix}.lora_A.weight": rows, f"{prefix}.lora_B.weight": rows.T.contiguous()})
    )
    settings = {"r": 4, "lora_alpha": 4, "target_modules": ["model.layers.0.self_attn.q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return AdapterVersion(number, None, path, digest_of(path), 0, 0.0)


def answers(known: AdapterVersion) -> list[list[float]]:
    """What a sound server answers to the probe's sequences."""
    return scores(weights_of(known.path), SEQUENCES)


def probed(engine: VLLMServerEngine, folder: Path, loud: AdapterVersion | None = None) -> VLLMServerEngine:
    """The engine after what `run_probe` does to it."""
    loud = loud or version(folder / "loud", 1)
    engine.keep_probe(loud, Witness(scores("", SEQUENCES), answers(loud), 0.3, 0.2), noise=0.001)
    return engine


def check_made_by(groups: Any, known: AdapterVersion | None) -> None:
    """Every completion's log-probs are those of `known`, from its weights' bytes on."""
    weights = "" if known is None else weights_of(known.path)
    for group in groups:
        for completion in group.completions:
            ids = [group.prompt_token_ids[-1], *completion.token_ids]
            assert list(completion.logprobs) == scores(weights, [ids])[0]
            assert completion.version == (known and known.number)


# Connecting


@pytest.mark.parametrize(
    ("defect", "error", "names"),
    [
        ({"runtime_loading": False}, ConfigError, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"),
        ({"lora": False}, ConfigError, "--enable-lora"),
        ({"processed_logprobs": False}, ConfigError, "--logprobs-mode processed_logprobs"),
        ({"sees_files": False}, ConfigError, "adapters='resolver'"),
        ({"api_key": "secret"}, ConfigError, "api_key="),
        ({"release": "0.12.1"}, UnsupportedVersion, "0.12.1"),
        ({"root": "/nonexistent/model"}, ConfigError, "start all replicas alike"),
        ({"down": True}, EngineError, "503"),
        ({"dies_computing": True}, EngineError, 'failed at the first request.*"exit code: -4".*lora-grpo serve'),
    ],
)
def test_what_a_server_lacks_is_named(
    pair: Pair, connect: MakeEngine, defect: dict[str, Any], error: type[Exception], names: str
) -> None:
    for name, value in defect.items():
        setattr(pair[1], name, value)
    with pytest.raises(error, match=names.replace("(", r"\(")) as raised:
        connect()
    assert pair[1].url in str(raised.value) or error is UnsupportedVersion


@pytest.mark.parametrize("urls", ["http://127.0.0.1:1", [None], None, [b"http://127.0.0.1:1"]])
def test_what_is_no_list_of_urls_is_told(urls: Any) -> None:
    with pytest.raises(ConfigError, match=r'^urls=.* must be a list of texts; give \["http://\.\.\."\]'):
        VLLMServerEngine(urls)


@pytest.mark.parametrize("wrong", [{"on_failure": "dropp"}, {"adapters": "pull"}])
def test_a_word_that_is_no_choice_is_told(wrong: dict[str, Any]) -> None:
    ((name, given),) = wrong.items()
    with pytest.raises(ConfigError, match=f"{name}='{given}' must be one of"):
        VLLMServerEngine(["http://127.0.0.1:9"], **wrong)


def test_no_server_at_all(connect: MakeEngine) -> None:
    with pytest.raises(EngineError, match="lora-grpo serve"):
        VLLMServerEngine(["http://127.0.0.1:9"])


def test_what_the_servers_say(pair: Pair, connect: MakeEngine) -> None:
    pair[1].rank = 8
    engine = connect()
    assert (engine.max_lora_rank, engine.max_model_len, engine.lora_dtype) == (8, 128, "bfloat16")
    assert engine.describe_base().vocabulary == VOCAB
    assert (engine.proof, engine.device) == ("behaviour", None)
    for asks in (
        lambda ids: engine.generate([[1], ids], SAMPLING, adapter=None),
        lambda ids: engine.logprobs([[1], ids], adapter=None),
    ):
        with pytest.raises(ConfigError, match=rf"prompt 1 has token {VOCAB} at place 0, .*\({VOCAB} tokens\)"):
            asks([VOCAB])


def test_an_api_key_is_sent(pair: Pair, connect: MakeEngine) -> None:
    for server in pair:
        server.api_key = "secret"
    assert set(connect(api_key="secret").replicas.values()) == {"serving"}


def test_too_few_slots_are_said(pair: Pair, connect: MakeEngine, shm_dir: Path) -> None:
    pair[0].slots = 1
    with pytest.warns(UserWarning, match=r"1 adapter slots .* --max-loras 2"):
        probed(connect(), shm_dir)


def test_leftovers_of_a_dead_run_are_unloaded_and_those_of_a_live_one_stay(
    pair: Pair, connect: MakeEngine, versions: list[AdapterVersion]
) -> None:
    dead, live = Names(), Names()
    left = dead.fresh(versions[0])
    dead.close()
    pair[0].adapters = {name: str(versions[0].path) for name in (left, live.fresh(versions[0]), "somebody's")}
    connect()
    live.close()
    assert len(pair[0].adapters) == 2
    assert left not in pair[0].adapters


# Generating


def test_groups_are_stamped_and_seeded_as_in_process(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion]
) -> None:
    engine = connect()
    engine.load(versions[0])
    groups = engine.generate(PROMPTS, SAMPLING, adapter=versions[0])
    check_made_by(groups, versions[0])
    assert [list(group.prompt_token_ids) for group in groups] == PROMPTS
    seeds = {tuple(body["prompt"]): set() for body in pair[0].completions() + pair[1].completions()}
    for body in pair[0].completions() + pair[1].completions():
        seeds[tuple(body["prompt"])].add(body["seed"])
    assert [seeds[tuple(ids)] for ids in PROMPTS] == [set(one.seeds) for one in asked(None, PROMPTS, SAMPLING, None)]


def test_every_setting_is_said_so_that_no_default_of_the_server_counts(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion]
) -> None:
    connect(pair[0]).generate([[5, 6]], Sampling(max_tokens=2, temperature=0.7, stop=("x",)), adapter=None)
    body = pair[0].completions()[-1]
    assert (body["temperature"], body["top_p"], body["top_k"], body["min_p"]) == (0.7, 1.0, 0, 0.0)
    assert (body["repetition_penalty"], body["presence_penalty"], body["frequency_penalty"]) == (1.0, 0.0, 0.0)
    assert (body["n"], body["logprobs"], body["stop"]) == (1, 0, ["x"])


def test_one_version_a_prompt_and_the_base(connect: MakeEngine, versions: list[AdapterVersion]) -> None:
    engine = connect()
    for known in versions[:2]:
        engine.load(known)
    adapters = [versions[1], None, versions[0]]
    for group, known in zip(engine.generate(PROMPTS, SAMPLING, adapter=adapters), adapters, strict=True):
        check_made_by([group], known)


def test_base_and_adapters_share_no_batch_before_033(
    pair: Pair, connect: MakeEngine, versions: list[AdapterVersion]
) -> None:
    """Stock CPU kernels give base rows of such a batch an adapter."""
    one = pair[0]
    one.release, one.delay_s = "0.32.0", 0.02
    engine = connect(one)
    engine.load(versions[0])
    one.asked.clear()
    seen: list[set[bool]] = []
    answer = one._answer

    def noting(body: dict[str, Any]) -> dict[str, Any]:
        seen.append({other["model"] == "base" for other in one.asked[-one.in_flight :]})
        return answer(body)

    one._answer = noting  # type: ignore[method-assign]
    engine.generate(PROMPTS * 2, SAMPLING, adapter=[versions[0], None] * 3)
    assert len(seen) == 24
    assert all(len(kinds) == 1 for kinds in seen)


def test_scores(connect: MakeEngine, versions: list[AdapterVersion]) -> None:
    engine = connect()
    engine.load(versions[2])
    assert engine.logprobs(SEQUENCES, adapter=versions[2]) == answers(versions[2])
    assert engine.logprobs_of_each(SEQUENCES, adapter=None) == [scores("", SEQUENCES)] * 2


def test_replicas_share_what_there_is_to_do(pair: Pair, connect: MakeEngine) -> None:
    for server in pair:
        server.delay_s = 0.1
    connect().generate([[10 + i, 11] for i in range(8)], SAMPLING, adapter=None)
    assert [len(server.completions()) for server in pair] == [16, 16]


def test_the_slower_replica_gets_less_and_none_more_than_its_share(pair: Pair, connect: MakeEngine) -> None:
    pair[0].delay_s, pair[1].delay_s = 0.2, 0.01
    engine = connect(concurrency=8)
    engine.generate([[10 + i, 11] for i in range(24)], SAMPLING, adapter=None)
    assert len(pair[0].completions()) < len(pair[1].completions())
    assert len(pair[0].completions()) + len(pair[1].completions()) == 96
    assert max(server.most_in_flight for server in pair) <= 8


def test_a_version_that_is_not_loaded_is_refused_before_anything_is_asked(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion]
) -> None:
    engine = connect()
    engine.load(versions[0])
    asked = len(pair[0].asked)
    with pytest.raises(UnknownVersion, match="v2 is not loaded"):
        engine.generate(PROMPTS, SAMPLING, adapter=versions[1])
    assert len(pair[0].asked) == asked


def test_an_answer_by_another_model_is_an_error(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion]
) -> None:
    engine = connect()
    engine.load(versions[0])
    pair[0].answers_as = pair[1].answers_as = "base"
    with pytest.raises(DeliveryError, match="'base' answered"):
        engine.generate(PROMPTS, SAMPLING, adapter=versions[0])


# Loading


def test_a_version_is_on_every_server_under_a_name_of_its_own(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion]
) -> None:
    engine = connect()
    receipt = engine.load(versions[0])
    assert (receipt.proof, receipt.verdict, receipt.modules, receipt.proven_bytes) == (
        "behaviour",
        "inconclusive",
        1,
        0,
    )
    first = engine.served_names(versions[0])
    assert {server.url: next(iter(server.adapters)) for server in pair} == first
    assert len(set(first.values())) == 2
    engine.unload(versions[0])
    assert not pair[0].adapters
    engine.load(versions[0])
    assert set(engine.served_names(versions[0]).values()).isdisjoint(first.values())


def test_the_least_recently_used_goes_once_a_newer_one_is_proven(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion]
) -> None:
    engine = connect(max_loras=2)
    for known in versions[:2]:
        engine.load(known)
    engine.generate([[5, 6]], SAMPLING, adapter=versions[0])
    engine.load(versions[2])
    assert engine.loaded() == (versions[0], versions[2])
    assert [len(server.adapters) for server in pair] == [2, 2]


def test_verdicts(connect: MakeEngine, versions: list[AdapterVersion], shm_dir: Path) -> None:
    engine = connect()
    assert engine.load(versions[1]).verdict == "inconclusive"
    probed(engine, shm_dir)
    assert engine.load(versions[0], expected=answers(versions[0])).verdict == "ok"
    assert engine.load(versions[0]).verdict == "ok"


def test_a_version_that_answers_as_the_one_before_is_inconclusive(
    connect: MakeEngine, versions: list[AdapterVersion], shm_dir: Path
) -> None:
    engine = probed(connect(), shm_dir)
    engine.load(versions[0], expected=answers(versions[0]))
    same = version(shm_dir / "again", 1)
    assert engine.load(same, expected=answers(same)).verdict == "inconclusive"


def test_a_load_that_fails_now_and_then_is_tried_again(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion]
) -> None:
    engine = connect()
    pair[1].failing_loads = 2
    engine.load(versions[0])
    check_made_by(engine.generate(PROMPTS, SAMPLING, adapter=versions[0]), versions[0])


def test_a_load_that_goes_on_failing_is_on_no_server(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion]
) -> None:
    engine = connect()
    engine.load(versions[0])
    pair[1].failing_loads = 100
    with pytest.raises(EngineError, match=f"v2 failed on 1 of 2 replicas: {pair[1].url}.*out of memory"):
        engine.load(versions[1])
    assert engine.loaded() == (versions[0],)
    assert {len(server.adapters) for server in pair} == {1}
    check_made_by(engine.generate(PROMPTS, SAMPLING, adapter=versions[0]), versions[0])


def test_wrong_weights_are_noticed_and_loaded_again_under_another_name(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion], shm_dir: Path
) -> None:
    engine = probed(connect(), shm_dir)
    taken, why_not = [], pair[0]._why_not
    pair[0]._why_not = lambda name, path: taken.append(name) or why_not(name, path)  # type: ignore[func-returns-value,method-assign]
    pair[0].wrong_weights = 1
    engine.load(versions[0], expected=answers(versions[0]))
    check_made_by(engine.generate(PROMPTS, SAMPLING, adapter=versions[0]), versions[0])
    wrong, right = taken
    assert wrong != right == engine.served_names(versions[0])[pair[0].url]


def test_wrong_weights_for_good_fail_the_load(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion], shm_dir: Path
) -> None:
    engine = probed(connect(), shm_dir)
    pair[0].wrong_weights = 100
    with pytest.raises(DeliveryError, match="v1 failed on 1 of 2"):
        engine.load(versions[0], expected=answers(versions[0]))
    assert not engine.loaded()
    assert not pair[1].adapters


def test_replicas_that_are_far_apart_fail_a_load_that_nobody_said_what_to_expect_of(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion]
) -> None:
    engine, answer = connect(), pair[0]._answer
    pair[0]._answer = lambda body: answer(body) | other_base(body, apart=5.0)  # type: ignore[method-assign]
    with pytest.raises(DeliveryError, match=f"{pair[1].url} does not serve v1"):
        engine.load(versions[0])
    assert not engine.loaded()
    assert not pair[1].adapters


def test_where_a_trainer_has_shown_itself_a_version_is_proven_by_it_or_not_loaded(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion], shm_dir: Path
) -> None:
    """Two replicas that are wrong alike agree with one another. A probe comes before its trainer's figures."""
    engine = probed(connect(), shm_dir)
    for server in pair:
        server.wrong_weights = 100
    with pytest.raises(ConfigError, match=r"v1 cannot be proven.*expected="):
        engine.load(versions[0])
    with pytest.raises(DeliveryError, match="v1 failed on 2 of 2"):
        engine.load(versions[0], expected=answers(versions[0]))
    assert not engine.loaded()
    for server in pair:
        server.wrong_weights = 0
    engine.load(replace(versions[1], step=-1))


def test_stale_weights_are_told_from_the_version_before(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion], shm_dir: Path
) -> None:
    engine = probed(connect(pair[0]), shm_dir)
    engine.load(versions[0], expected=answers(versions[0]))
    with pytest.raises(DeliveryError, match="v2"):
        engine.load(versions[1], expected=answers(versions[0]))


def test_changed_or_unsound_files_reach_no_server(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion]
) -> None:
    engine = connect()
    with pytest.raises(DeliveryError, match="not the ones that were published"):
        engine.load(replace(versions[0], digest="0" * 32))
    assert not pair[0].adapters


# Replicas that go and come


def test_the_other_replica_does_what_one_cannot(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion]
) -> None:
    engine = connect()
    engine.load(versions[0])
    pair[0].down = True
    check_made_by(engine.generate(PROMPTS, SAMPLING, adapter=versions[0]), versions[0])
    assert "serving" not in engine.replicas[pair[0].url]


def test_a_restarted_replica_answers_only_after_it_is_proven_again(
    connect: MakeEngine,
    pair: Pair,
    versions: list[AdapterVersion],
    shm_dir: Path,
    tmp_path: Path,
) -> None:
    """And whoever watches hears that it went and came."""
    told: list[str] = []
    engine = probed(connect(), shm_dir)
    engine.load(versions[0], expected=answers(versions[0]))
    pair[0].restart()
    pair[0].asked.clear()
    with quiet_libraries(tmp_path / "engine.log", told.append):
        for _ in range(3):
            check_made_by(engine.generate(PROMPTS, SAMPLING, adapter=versions[0]), versions[0])
            time.sleep(0.3)
    assert set(engine.replicas.values()) == {"serving"}
    assert [pair[0].url in line for line in told] == [True, True]
    assert "out of use, waited for up to 3 s" in told[0]
    assert told[1] == f"warning: {pair[0].url} is back and proven"
    assert list(pair[0].adapters) == [engine.served_names(versions[0])[pair[0].url]]
    assert [body for body in pair[0].completions() if body["model"] in pair[0].adapters]


def test_a_restart_is_noticed_before_a_load_and_another_base_is_not_let_in(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion], shm_dir: Path
) -> None:
    engine = probed(connect(), shm_dir)
    pair[1].restart()
    answer = pair[1]._answer
    pair[1]._answer = lambda body: answer(body) | other_base(body)  # type: ignore[method-assign]
    with pytest.raises(EngineError, match=r"1 of 2 replicas cannot take a version: .*nats"):
        engine.load(versions[0], expected=answers(versions[0]))
    assert "lost" in engine.replicas[pair[1].url]


def test_a_server_that_comes_back_with_another_base_is_not_let_in(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion], shm_dir: Path
) -> None:
    """Its log-probs are as they were: only what it reads of its base can tell."""
    pair[0].plugin = pair[1].plugin = True
    engine = probed(connect(), shm_dir)
    assert {read.where for read in engine.read_base({"w": (4, 8)})} == {f"{s.url} (worker 0)" for s in pair}
    for server in pair:
        server.restart()
    pair[1].base = "of another revision"
    with pytest.raises(EngineError, match=r"1 of 2 replicas cannot take .* came back with a base of other values"):
        engine.load(versions[0], expected=answers(versions[0]))
    assert "lost" in engine.replicas[pair[1].url]


def test_a_server_without_the_plugin_is_not_read(connect: MakeEngine, pair: Pair) -> None:
    pair[1].plugin = True
    unread, read = connect().read_base({"w": (4, 8), "bias": (4,)})
    reason = "the server does not have the lora_grpo plugin's route"
    assert (unread.where, unread.tensors, unread.unread) == (pair[0].url, {}, {"w": reason, "bias": reason})
    assert (read.tensors["bias"].slices, read.unread) == (((4, pair[1].base),), {})


def test_a_restart_is_noticed_by_what_the_server_forgot_where_it_has_no_metrics(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion], shm_dir: Path
) -> None:
    for server in pair:
        server.has_metrics = False
    engine = probed(connect(), shm_dir)
    engine.load(versions[0], expected=answers(versions[0]))
    pair[0].restart()
    engine.load(versions[1], expected=answers(versions[1]))
    assert [len(server.adapters) for server in pair] == [2, 2]


def other_base(body: dict[str, Any], apart: float = 1.0) -> dict[str, Any]:
    """What a server with other base weights scores."""
    if "prompt_logprobs" not in body:
        return {}
    prompt = body["prompt"]
    entries = [
        None,
        *({str(b): {"logprob": logprob("other", a, b) - apart}} for a, b in itertools.pairwise(prompt)),
    ]
    choice = {"text": "", "token_ids": [4], "logprobs": None, "finish_reason": "length"}
    return {"choices": [{**choice, "prompt_token_ids": prompt, "prompt_logprobs": entries}]}


def test_a_load_waits_for_a_replica_that_comes_back(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion], shm_dir: Path
) -> None:
    engine = probed(connect(), shm_dir)
    engine.load(versions[0], expected=answers(versions[0]))
    pair[0].down = True

    def come_back() -> None:
        pair[0].restart()
        pair[0].down = False

    threading.Timer(1.0, come_back).start()
    engine.load(versions[1], expected=answers(versions[1]))
    assert len(pair[0].adapters) == 2
    check_made_by(engine.generate(PROMPTS, SAMPLING, adapter=versions[1]), versions[1])


def test_a_load_fails_whole_when_a_replica_stays_away(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion]
) -> None:
    engine = connect()
    engine.load(versions[0])
    pair[0].down = True
    with pytest.raises(EngineError, match=f"1 of 2 replicas cannot take a version: .*{pair[0].url}"):
        engine.load(versions[1])
    assert engine.loaded() == (versions[0],)
    check_made_by(engine.generate(PROMPTS, SAMPLING, adapter=versions[0]), versions[0])


def test_a_dropped_replica_is_out_of_rotation_until_it_has_everything(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion], shm_dir: Path
) -> None:
    engine = probed(connect(on_failure="drop"), shm_dir)
    pair[0].failing_loads = 5
    engine.load(versions[0], expected=answers(versions[0]))
    assert "failed to load v1" in engine.replicas[pair[0].url] or "out of memory" in engine.replicas[pair[0].url]
    pair[0].asked.clear()
    check_made_by(engine.generate(PROMPTS, SAMPLING, adapter=versions[0]), versions[0])
    assert not pair[0].completions()
    for _ in range(40):
        if set(engine.replicas.values()) == {"serving"}:
            break
        time.sleep(0.1)
    assert len(pair[0].adapters) == 1
    check_made_by(engine.generate(PROMPTS, SAMPLING, adapter=versions[0]), versions[0])
    assert pair[0].completions()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("how", ["down", "frozen"])
def test_a_server_that_stays_away_is_told_of_once(
    how: str, connect: MakeEngine, pair: Pair, versions: list[AdapterVersion], caplog: pytest.LogCaptureFixture
) -> None:
    """Each load looks for it again, for up to patience_s; only what is new of it is said."""
    engine = connect(on_failure="drop", patience_s=0.5)
    setattr(pair[0], how, True)
    for version in versions[:3]:
        engine.load(version)
        time.sleep(1)
    assert engine.replicas[pair[0].url].count("not back within") == 1
    assert caplog.text.count("not back within") == 1


def test_nothing_hangs_when_all_are_gone(connect: MakeEngine, pair: Pair, versions: list[AdapterVersion]) -> None:
    engine = connect()
    engine.load(versions[0])
    for server in pair:
        server.down = True
    with pytest.raises(LoraGrpoError, match=r"no replica is left|failed wherever"):
        engine.generate(PROMPTS, SAMPLING, adapter=versions[0])


def test_a_prompt_s_completions_are_all_by_one_server_though_one_fails_among_them(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion]
) -> None:
    engine = connect()
    engine.load(versions[0])
    pair[0].asked.clear()
    answer, left = pair[0]._answer, itertools.count(5, -1)

    def failing(body: dict[str, Any]) -> dict[str, Any]:
        pair[0].down = next(left) <= 0
        return answer(body)

    pair[0]._answer = failing  # type: ignore[method-assign]
    pair[0].delay_s = 0.05
    check_made_by(engine.generate(PROMPTS * 2, SAMPLING, adapter=versions[0]), versions[0])
    assert pair[0].down
    made = Counter(tuple(body["prompt"]) for body in pair[1].completions())
    assert set(made.values()) <= {SAMPLING.n, 2 * SAMPLING.n}


def test_a_load_and_a_rollout_do_not_wait_for_each_other(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion]
) -> None:
    engine = connect(concurrency=4)
    engine.load(versions[0])
    for server in pair:
        server.delay_s = 0.3
    made: list[Any] = []
    rollout = threading.Thread(target=lambda: made.extend(engine.generate(PROMPTS * 10, SAMPLING, adapter=versions[0])))
    rollout.start()
    time.sleep(0.2)
    for known in versions[1:]:
        engine.load(known)
    assert rollout.is_alive()
    assert engine.loaded() == (versions[0], versions[2]), "a version that a rollout needs stays"
    rollout.join()
    check_made_by(made, versions[0])


def test_close_leaves_nothing_behind(pair: Pair, versions: list[AdapterVersion]) -> None:
    engine = VLLMServerEngine([server.url for server in pair])
    engine.load(versions[0])
    folder = engine._names.folder
    engine.close()
    engine.close()
    assert not pair[0].adapters
    assert not folder.exists()


# Replicas that stop answering, or answer oddly


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds takes tenths of them."""
    monkeypatch.setattr(client, "LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(client, "QUICK_TIMEOUT_S", 0.3)


@pytest.mark.usefixtures("impatient")
def test_the_requests_of_a_server_that_will_never_answer_go_to_another(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion]
) -> None:
    """As vLLM does that is asked to end: requests in flight are forgotten, their connections stay open."""
    engine = connect()
    engine.load(versions[0])
    pair[0].delay_s = 0.3
    threading.Timer(0.15, lambda: setattr(pair[0], "frozen", True)).start()
    started = time.monotonic()
    check_made_by(engine.generate(PROMPTS, SAMPLING, adapter=versions[0]), versions[0])
    assert time.monotonic() - started < 3
    assert "serving" not in engine.replicas[pair[0].url]


@pytest.mark.usefixtures("impatient")
def test_a_slow_server_that_is_well_is_waited_for(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion]
) -> None:
    engine = connect()
    engine.load(versions[0])
    for server in pair:
        server.delay_s = 1.5
    check_made_by(engine.generate(PROMPTS, SAMPLING, adapter=versions[0]), versions[0])
    assert set(engine.replicas.values()) == {"serving"}


@pytest.mark.usefixtures("impatient")
def test_all_that_waits_for_frozen_servers_ends(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion], caplog: pytest.LogCaptureFixture
) -> None:
    """A rollout, a load, and in the end `close`; patience_s is 3."""
    engine = connect()
    engine.load(versions[0])
    for server in pair:
        server.frozen = True
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"no replica is left to answer: .*not back within patience_s=3 s"):
        engine.generate(PROMPTS, SAMPLING, adapter=versions[0])
    assert caplog.text.count("not back within patience_s=3 s") == 2
    with pytest.raises(EngineError, match="2 of 2 replicas cannot take a version"):
        engine.load(versions[1])
    engine.close()
    assert time.monotonic() - started < 12


@pytest.mark.usefixtures("impatient")
def test_patience_ends_though_a_returning_server_goes_on_answering_slowly(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion]
) -> None:
    """It is well, but takes longer to be proven than it is waited for."""
    engine = connect()
    engine.load(versions[0])
    pair[0].restart()
    pair[0].delay_s = 20.0
    started = time.monotonic()
    with pytest.raises(EngineError, match="1 of 2 replicas cannot take a version"):
        engine.load(versions[1])
    assert time.monotonic() - started < 10
    pair[0].delay_s = 0.0


def test_what_takes_longer_than_its_time_is_not_sent_to_the_same_server_again(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion]
) -> None:
    engine = connect(timeout_s=1.0)
    engine.load(versions[0])
    pair[0].delay_s = 2.5
    pair[0].asked.clear()
    check_made_by(engine.generate([[5, 6]], Sampling(max_tokens=2, seed=1), adapter=versions[0]), versions[0])
    assert len(pair[0].completions()) == 1


def test_an_odd_answer_of_a_server_that_comes_back_is_one_more_reason_to_wait(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion]
) -> None:
    engine = connect(pair[0])
    engine.load(versions[0])
    pair[0].version_text, pair[0].down = "<html>starting</html>", True
    threading.Timer(0.5, lambda: setattr(pair[0], "down", False)).start()
    threading.Timer(1.0, lambda: setattr(pair[0], "version_text", None)).start()
    check_made_by(engine.generate(PROMPTS, SAMPLING, adapter=versions[0]), versions[0])


@pytest.mark.parametrize("text", ["<html>", "{}", "[1]", '{"version": "dev"}'])
def test_an_odd_answer_is_an_error_that_names_the_server(pair: Pair, connect: MakeEngine, text: str) -> None:
    pair[1].version_text = text
    with pytest.raises(EngineError, match=f"{pair[1].url}/version answered .* is it a vLLM server"):
        connect()


def test_what_nobody_foresaw_on_the_way_back_reaches_those_who_wait(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = connect(pair[0])
    engine.load(versions[0])

    async def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(replica.Replica, "reconnect", broken)
    pair[0].down = True
    with pytest.raises(EngineError, match=r"no replica is left to answer: .*ZeroDivisionError\('a bug'\)"):
        engine.generate(PROMPTS, SAMPLING, adapter=versions[0])
    with pytest.raises(ZeroDivisionError):
        engine.load(versions[1])


def test_a_version_in_use_is_scored_again_before_a_failure_counts(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion], shm_dir: Path
) -> None:
    engine = probed(connect(), shm_dir)
    engine.load(versions[0], expected=answers(versions[0]))
    names, answer = engine.served_names(versions[0]), pair[1]._answer
    odd = iter([{"choices": []}])
    pair[1]._answer = lambda body: answer(body) | next(odd, {})  # type: ignore[method-assign]
    assert engine.load(versions[0]).verdict == "ok"
    assert next(odd, None) is None
    assert engine.served_names(versions[0]) == names


def test_a_replica_that_answers_otherwise_than_before_is_dropped_where_that_is_the_policy(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion], shm_dir: Path
) -> None:
    """The version stays in use on the other one; where all have to agree, it goes out of use."""
    for policy, loaded in (("drop", (versions[0],)), ("raise", ())):
        engine = probed(connect(on_failure=policy), shm_dir / policy)
        engine.load(versions[0], expected=answers(versions[0]))
        pair[0].weights[engine.served_names(versions[0])[pair[0].url]] = "wrong"
        if policy == "drop":
            assert engine.load(versions[0]).verdict == "ok"
            assert "serving" not in engine.replicas[pair[0].url]
            check_made_by(engine.generate(PROMPTS, SAMPLING, adapter=versions[0]), versions[0])
        else:
            with pytest.raises(DeliveryError, match="v1 failed on 1 of 2"):
                engine.load(versions[0])
        assert engine.loaded() == loaded


def test_a_replica_that_came_back_with_wrong_weights_loads_them_anew(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion], shm_dir: Path
) -> None:
    engine = probed(connect(), shm_dir)
    engine.load(versions[0], expected=answers(versions[0]))
    pair[0].restart()
    why_not, wrong = pair[0]._why_not, iter([1])

    def wrong_at_first(name: str, path: Path) -> Any:
        if ".run.v1." in name:
            pair[0].wrong_weights = next(wrong, 0)
        return why_not(name, path)

    pair[0]._why_not = wrong_at_first  # type: ignore[method-assign]
    engine.load(versions[1], expected=answers(versions[1]))
    assert next(wrong, None) is None
    assert [len(server.adapters) for server in pair] == [2, 2]


def test_one_slot_is_too_few(pair: Pair) -> None:
    with pytest.raises(ConfigError, match="max_loras=1 must be at least 2"):
        VLLMServerEngine([pair[0].url], max_loras=1)


def test_versions_in_use_are_never_missed_by_another_thread(
    connect: MakeEngine, versions: list[AdapterVersion]
) -> None:
    """Being used moves a version to the end of the line; meanwhile it is in use."""
    engine = connect()
    for known in versions[:2]:
        engine.load(known)
    fleet, done, seen = engine._fleet, threading.Event(), set()

    def look() -> None:
        while not done.is_set():
            seen.add(len(engine.loaded()))

    looking, interval_s = threading.Thread(target=look), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        looking.start()
        for turn in range(20_000):
            fleet.in_use.add(fleet.in_use.find(versions[turn % 2]))
    finally:
        sys.setswitchinterval(interval_s)
        done.set()
        looking.join()
    assert seen == {2}


def test_closing_waits_for_a_frozen_server_only_as_long_as_a_well_one_takes(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "QUICK_TIMEOUT_S", 0.3)
    engine = connect()
    engine.load(versions[0])
    pair[0].frozen = True
    started = time.monotonic()
    engine.close()
    assert time.monotonic() - started < 2


def test_a_container_of_the_same_name_leaves_the_versions_of_another_alone(
    pair: Pair, connect: MakeEngine, versions: list[AdapterVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own tmpfs has none of the other's locks, which says nothing of the other's life."""
    with monkeypatch.context() as elsewhere, tempfile.TemporaryDirectory() as disk:
        elsewhere.setattr(replica, "tmpfs_home", lambda: Path(disk))
        other = Names()
    pair[0].adapters = {other.fresh(versions[0]): str(versions[0].path)}
    connect()
    assert pair[0].adapters


# Servers that pull


@pytest.fixture
def pulling(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion], shm_dir: Path
) -> Iterator[tuple[VLLMServerEngine, AdapterVersion]]:
    """An engine whose servers pull, and a version that they have."""
    with AdapterStore(shm_dir / "store") as store:
        published, loud = (
            store.publish({path.name: [path.read_bytes()] for path in one.path.iterdir()}, step=0)
            for one in versions[:2]
        )
        for server in pair:
            server.resolves_from, server.sees_files = store.root / "versions", False
        engine = probed(connect(adapters="resolver"), shm_dir, loud)
        engine.load(published, expected=answers(published))
        yield engine, published


def test_what_a_restarted_server_pulled_and_answered_unproven_does_not_count(
    pulling: tuple[VLLMServerEngine, AdapterVersion], pair: Pair
) -> None:
    """It knows every name as soon as it is up; here it came back with weights of its own."""
    engine, published = pulling
    pair[0].restart()
    right, pair[0].resolves_from = pair[0].resolves_from, None
    pair[0].adapters[f"{engine.served_names(published)[pair[0].url]}"] = "pulled"
    pair[0].weights[engine.served_names(published)[pair[0].url]] = "wrong"
    check_made_by(engine.generate(PROMPTS, SAMPLING, adapter=published), published)
    assert pair[0].completions(), "it did answer"
    pair[0].resolves_from = right


def test_the_base_of_a_restarted_server_does_not_count_before_it_is_proven(
    connect: MakeEngine, pair: Pair, shm_dir: Path
) -> None:
    engine = probed(connect(), shm_dir)
    engine.generate(PROMPTS, SAMPLING, adapter=None)
    pair[0].restart()
    answer = pair[0]._answer
    pair[0]._answer = lambda body: answer({**body, "model": "other"}) | {"model": body["model"]}  # type: ignore[method-assign]
    pair[0].weights["other"] = "another base"
    check_made_by(engine.generate(PROMPTS, SAMPLING, adapter=None), None)
    assert "serving" not in engine.replicas[pair[0].url]


def test_a_server_that_pulls_has_to_say_when_it_started(pair: Pair, connect: MakeEngine) -> None:
    pair[0].has_metrics = False
    with pytest.raises(ConfigError, match=f"{pair[0].url} has no /metrics"):
        connect(adapters="resolver")


def test_servers_that_pull_are_asked_for_run_and_number(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion], shm_dir: Path
) -> None:
    store = AdapterStore(shm_dir / "store")
    files = {path.name: [path.read_bytes()] for path in versions[0].path.iterdir()}
    published = store.publish(files, step=0)
    for server in pair:
        server.resolves_from, server.sees_files = store.root / "versions", False
    engine = connect(adapters="resolver")
    engine.load(published)
    assert set(engine.served_names(published).values()) == {f"{store.run}@1"}
    check_made_by(engine.generate(PROMPTS, SAMPLING, adapter=published), published)
    pair[0].resolves_from = None
    pair[0].restart()
    with pytest.raises(EngineError, match=r"cannot resolve .*@1.*LORA_GRPO_STORE_URL"):
        engine.load(published)
    store.close()


def test_a_version_of_no_store_cannot_be_pulled(
    connect: MakeEngine, pair: Pair, versions: list[AdapterVersion]
) -> None:
    with pytest.raises(ConfigError, match=r"v1 .* is in no store"):
        connect(adapters="resolver").load(versions[0])


def test_the_fake_engine_is_no_remote_one() -> None:
    assert FakeEngine(lambda prompt, version, seed: "").proof != "behaviour"
