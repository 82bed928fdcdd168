"""One reward function's call on one batch: repeated where a connection failed, searched for a failing row, checked."""

import asyncio
import functools
import inspect
import logging
import math
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from traceback import extract_tb
from types import SimpleNamespace
from typing import Any, TypeAlias

from lora_grpo.data.reading import short
from lora_grpo.errors import LoraGrpoError, RewardError, counted
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.types import LARGEST_REWARD
from lora_grpo.worker import Job

logger = logging.getLogger(__name__)

RewardFunction: TypeAlias = Callable[..., Any]
Kwargs: TypeAlias = dict[str, Any]


@dataclass(slots=True)
class RewardContext:
    """The run's state as given to reward functions, under TRL's names, and what they logged: `extra` holds columns of B
    values, which are shown beside the completions in samples.jsonl, `logged` each value given to `log_metric`."""

    global_step: int = 0
    max_steps: int = 0
    extra: dict[str, list[Any]] = field(default_factory=dict)
    logged: dict[str, list[float]] = field(default_factory=dict)

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        self.extra[column] = list(values)

    def log_metric(self, name: str, value: float) -> None:
        self.logged.setdefault(name, []).append(float(value))

    def metrics(self) -> dict[str, float]:
        return {name: sum(values) / len(values) for name, values in self.logged.items()}


@dataclass
class Call:
    name: str
    function: RewardFunction
    inputs: Kwargs
    context: RewardContext
    config: GRPOConfig
    _begun: tuple[Future[Any], RewardContext] | None = None

    def start(self) -> None:
        """An async function begins; a sync one waits for `finish`."""
        if _is_async(self.function):
            self._begun = self._begin(self.inputs)

    def finish(self) -> list[float]:
        """B values. Raises `RewardError`."""
        try:
            values = self._answer()
        except LoraGrpoError:
            raise
        except Exception as error:
            at = "" if is_unreachable(error) else place(error)
            raise RewardError(f"reward {self.name!r} raised {_said(error)}{at} {self._where(error)}") from error
        return self._checked(values)

    def cancel(self) -> None:
        if self._begun:
            self._begun[0].cancel()

    def _answer(self) -> Any:
        """The whole call again, after 1, 2, 4 … seconds, where the way there failed: no row is to blame for that."""
        for made in range(self.config.reward_retries):
            try:
                return self._attempt()
            except Exception as error:
                if not is_unreachable(error):
                    raise
                pause_s = min(2.0**made, 30.0)
                logger.warning("reward %r raised %s; it is called again in %g s", self.name, _said(error), pause_s)
                time.sleep(pause_s)
        return self._attempt()

    def _attempt(self) -> Any:
        begun, logs = self._begun = self._begun or self._begin(self.inputs)
        values = self._result(begun)
        for column, logged in logs.extra.items():
            self._require_rows(logged, f"logged {counted(len(logged), 'value')} of {column!r}")
        self.context.extra |= logs.extra
        for name, numbers in logs.logged.items():
            self.context.logged.setdefault(name, []).extend(numbers)
        return values

    def _begin(self, inputs: Kwargs) -> tuple[Future[Any], RewardContext]:
        """A call under way, and what it logs: an attempt that is given up may go on, unheard."""
        logs = RewardContext(self.context.global_step, self.context.max_steps)
        arguments = self._kwargs(inputs, logs)
        if _is_async(self.function):
            return run_in_background(self.function(**arguments)), logs
        job = Job(functools.partial(self._run, arguments))
        if self.config.reward_timeout_s is None:
            job.run()
        else:
            threading.Thread(target=job.run, name=f"lora_grpo-reward-{self.name}", daemon=True).start()
        return job.result, logs

    def _run(self, arguments: Kwargs) -> Any:
        result = self.function(**arguments)
        return run_in_background(result).result() if inspect.isawaitable(result) else result

    def _result(self, begun: Future[Any]) -> Any:
        try:
            return begun.result(self.config.reward_timeout_s)
        except TimeoutError:
            if begun.done():
                return begun.result()
            begun.cancel()
            raise TimeoutError(f"no answer within reward_timeout_s={self.config.reward_timeout_s:g}") from None
        finally:
            self._begun = None

    def _kwargs(self, inputs: Kwargs, context: RewardContext) -> Kwargs:
        # Copies: what a function does to its lists is seen by no other.
        offered: Kwargs = {name: list(values) for name, values in inputs.items()}
        state = SimpleNamespace(global_step=context.global_step, max_steps=context.max_steps)
        offered |= {"trainer_state": state, "log_extra": context.log_extra, "log_metric": context.log_metric}
        parameters = inspect.signature(self.function).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return offered
        return {key: value for key, value in offered.items() if key in parameters}

    def _where(self, error: Exception) -> str:
        if is_unreachable(error):
            calls = self.config.reward_retries + 1
            return f"in each of {calls} calls of the whole batch (reward_retries, reward_timeout_s)"
        rows = len(self.inputs["prompts"])
        if (index := self._failing_row(error, rows)) is not None:
            return f"for {describe_row(self.inputs, index)}"
        first = describe_row(self.inputs, 0)
        return f"for all {rows} rows together, not for the parts of them that were tried; the first is {first}"

    def _failing_row(self, error: Exception, rows: int) -> int | None:
        """By halving: where the first half passes, the second one fails. At most log2(rows), rounded up, + 1 calls."""
        low, high, known = 0, rows, True
        while high - low > 1:
            middle = (low + high) // 2
            known = self._fails_alike(error, low, middle)
            low, high = (low, middle) if known else (middle, high)
        return low if known or self._fails_alike(error, low, high) else None

    def _fails_alike(self, error: Exception, low: int, high: int) -> bool:
        part = {key: values[low:high] for key, values in self.inputs.items()}
        try:
            self._result(self._begin(part)[0])
        except Exception as again:  # noqa: BLE001 - whatever the user's function raises
            return type(again) is type(error)
        return False

    def _checked(self, values: Any) -> list[float]:
        rows = len(self.inputs["prompts"])
        if isinstance(values, str | Mapping) or not hasattr(values, "__len__") or not hasattr(values, "__iter__"):
            wanted = f"a list of {counted(rows, 'number')}"
            raise RewardError(f"reward {self.name!r} returned {short(values)}; it must return {wanted}")
        self._require_rows(values, f"returned {counted(len(values), 'value')}")
        return [self._number(value, index) for index, value in enumerate(values)]

    def _require_rows(self, values: Sequence[Any], did: str) -> None:
        rows = len(self.inputs["prompts"])
        if len(values) != rows:
            given = f"reward {self.name!r} {did} for {counted(rows, 'completion')}"
            raise RewardError(f"{given}; it must give one for each (None where it does not apply)")

    def _number(self, value: Any, index: int) -> float:
        if value is None:
            return math.nan
        item = value.item() if hasattr(value, "item") else value
        if isinstance(item, int | float) and abs(item) <= LARGEST_REWARD:
            return float(item)
        fix = "return a number, or None where the reward does not apply"
        if isinstance(item, int | float) and abs(item) < math.inf:
            fix = f"float32 ends at {LARGEST_REWARD:.2g}: scale it down"
        raise RewardError(f"reward {self.name!r} returned {short(item)} for {describe_row(self.inputs, index)}; {fix}")


def is_unreachable(error: BaseException | None) -> bool:
    """Whether it is a timeout or a failed connection, or was raised from one; a client library's own are known by name.

    What goes wrong while one is handled is another error, whose row can be found."""
    while error is not None:
        names = " ".join(kind.__name__ for kind in type(error).__mro__)
        known = isinstance(error, TimeoutError | ConnectionError | socket.gaierror)
        if known or any(word in names for word in ("Timeout", "Connect", "Transport")):
            return True
        reason = getattr(error, "reason", None)  # where urllib keeps it
        error = error.__cause__ or (reason if isinstance(reason, BaseException) else None)
    return False


def is_chat(prompt: Any) -> bool:
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def describe_row(inputs: Kwargs, index: int) -> str:
    prompt = inputs["prompts"][index]
    shown = prompt[-1].get("content") if is_chat(prompt) else prompt
    return f"row {index}: prompt {short(shown)}, completion {short(inputs['completions'][index])}"


def _is_async(function: RewardFunction) -> bool:
    inner = function.func if isinstance(function, functools.partial) else function
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(getattr(inner, "__call__", None))  # noqa: B004


def place(error: Exception) -> str:
    last = extract_tb(error.__traceback__)[-1]
    return f" ({last.filename}, line {last.lineno})"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def run_in_background(awaitable: Awaitable[Any]) -> Future[Any]:
    """Starts `awaitable` at once; the future gives its result, and cancelling the future cancels it."""

    async def awaited() -> Any:
        return await awaitable

    return asyncio.run_coroutine_threadsafe(awaited(), _loop())


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """One for the process's life, in a thread of its own: a client that a reward function keeps between steps stays
    bound to a loop that lives, and a caller that runs inside a loop itself (a notebook) can still wait."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="lora_grpo-rewards", daemon=True).start()
    return loop
