"""Attacks on a real vLLM on a tiny model, in this process."""

import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from timeit import timeit
from typing import Any, cast

from benchmarks.attack import Outcome, scratch
from lora_grpo.errors import EngineError

PROMPT = list(range(100, 112))


@contextmanager
def tiny_engine() -> Iterator[tuple[Any, list[Any]]]:
    import torch

    from lora_grpo.adapters.peft_form.serving import ServingForm
    from lora_grpo.adapters.store import AdapterStore
    from lora_grpo.engines.vllm_local import VLLMEngine
    from tests.tiny_models import load_model, refill_lora, tiny_lora, tiny_model

    with ExitStack() as held:
        base = tiny_model("llama", Path(held.enter_context(tempfile.TemporaryDirectory())))
        store = held.enter_context(AdapterStore(held.enter_context(scratch()) / "store"))
        model = cast(Any, tiny_lora(load_model(base)))
        form, versions = ServingForm(model, "default", torch.bfloat16), []
        for seed in range(3):
            refill_lora(model, scale=0.3, seed=seed)
            versions.append(store.publish(form.files(), step=seed))
        engine = VLLMEngine(base, max_model_len=128, enforce_eager=True, gpu_memory_utilization=0.1)
        held.callback(engine.close)
        for version in versions:
            engine.load(version)
        yield engine, versions


def _asking(engine: Any, versions: Sequence[Any]) -> Callable[[int], Any]:
    """Token ids for a question, of which there are four: which versions, the base among them, and how many tokens."""
    from lora_grpo.types import Sampling

    def ask(question: int) -> Any:
        adapters = [None, versions[question % 3], versions[(question + 1) % 3]]
        sampling = Sampling(n=2, max_tokens=4 + 4 * (question % 2), temperature=0.0, ignore_eos=True)
        groups = engine.generate([PROMPT] * 3, sampling, adapter=adapters)
        return [completion.token_ids for group in groups for completion in group.completions]

    return ask


def two_threads(seed: int, calls: int = 200) -> Outcome:
    """Both ask as fast as they can: each answer is the right one, or a sentence."""
    outcome, met = Outcome("two threads on one engine"), Counter[str]()
    with tiny_engine() as (engine, versions):
        ask = _asking(engine, versions)
        right = [ask(question) for question in range(4)]

        def asking(draw: random.Random) -> None:
            for _ in range(calls // 2):
                question = draw.randrange(4)
                try:
                    same = ask(question) == right[question]
                    met["answered"] += 1
                    outcome.expect(same, f"question {question} was answered with other tokens")
                except EngineError as error:
                    met["refused"] += 1
                    outcome.expect("one thread at a time" in str(error), str(error))
                    time.sleep(draw.random() * 0.2)  # so long that the two take turns
                except Exception as error:  # noqa: BLE001 - whatever it raises is a fault to be counted
                    outcome.expect(False, f"{type(error).__name__}: {error}")

        threads = [threading.Thread(target=asking, args=(random.Random(seed + i),), daemon=True) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(600)
        outcome.expect(not any(thread.is_alive() for thread in threads), "a thread hangs")
        outcome.expect(ask(0) == right[0], "afterwards, question 0 was answered with other tokens")
    outcome.figures = dict(met)
    return outcome


def interrupts(seed: int, times: int = 200) -> Outcome:
    """Ctrl-C at a random time of a call; the next one is answered rightly, and every version can be swapped."""
    outcome, draw = Outcome("Ctrl-C in a running engine"), random.Random(seed)
    # A shell has what it starts in the background ignore Ctrl-C, and then nothing would be attacked.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    raised = 0
    with tiny_engine() as (engine, versions):
        ask = _asking(engine, versions)
        right = [ask(question) for question in range(4)]
        usual_s = timeit(lambda: [ask(question) for question in range(4)], number=1) / 4
        for index in range(times):
            raised += _interrupted(lambda: ask(draw.randrange(4)), draw.random() * usual_s)
            question = draw.randrange(4)
            try:
                engine.unload(versions[index % 3])
                engine.load(versions[index % 3])
                outcome.expect(ask(question) == right[question], f"after interrupt {index}: other tokens")
            except Exception as error:  # noqa: BLE001 - whatever it raises is a fault to be counted
                outcome.expect(False, f"after interrupt {index}: {type(error).__name__}: {error}")
    outcome.expect(raised >= times // 2, f"Ctrl-C ended {raised} of {times} calls only")
    outcome.figures = {"raised_in_the_call": raised}
    return outcome


def _interrupted(call: Callable[[], Any], after_s: float) -> bool:
    """Whether Ctrl-C, that long after the call's start, ended it; it is over when this returns."""
    timer = threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGINT))
    ended = False
    # What comes a moment late belongs to the call too.
    with suppress(KeyboardInterrupt):
        timer.start()
        call()
        ended = True
        timer.join()
        time.sleep(0.05)
    return not ended
