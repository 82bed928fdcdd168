"""All training processes: sums and metrics over them, what one tells the others, and errors that all of them get."""

import os
import pickle
import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, gather_object, reduce
from torch import Tensor

from lora_grpo.errors import ConfigError, LoraGrpoError

Reduction = Literal["mean", "min", "max"]
T = TypeVar("T")
Order = TypeVar("Order")
Result = TypeVar("Result")


class Observed(NamedTuple):
    """One process's values of a metric, and how they become one number; NaN is no value."""

    values_N: Tensor
    how: Reduction


def counted(values: Tensor, mask_BT: Tensor) -> Tensor:
    """(N,) fp32: the values of tokens that count, of (B, T), or all values of (B, 1)."""
    return (values[mask_BT] if values.shape == mask_BT.shape else values.flatten()).detach().float()


def row_means(values: Tensor, mask_BT: Tensor) -> Tensor:
    """(B,): each row's mean over its tokens that count, NaN where none does; the row's value where it has one."""
    if values.shape != mask_BT.shape:
        return values.squeeze(1).float()
    return (values * mask_BT).sum(dim=1) / mask_BT.sum(dim=1)


def told(error: BaseException, process: int) -> BaseException:
    """What the other processes raise for `error`: its kind, with the process that it is from.

    A class that they could not import, or not build from a sentence, becomes a `RuntimeError`."""
    process = getattr(error, "process", process)
    message = str(error).removeprefix(f"process {process}: ")
    try:
        other: Any = pickle.loads(pickle.dumps(type(error)(f"process {process}: {message}")))
    except (TypeError, AttributeError, pickle.PicklingError):
        other = RuntimeError(f"process {process}: {type(error).__name__}: {message}")
    other.process = process
    return other


class Processes:
    """This process among all those that train; without an accelerator it is the only one.

    Every method is called by all of them, in one order. They wait for each other as long as their process group's
    timeout says (accelerate's `InitProcessGroupKwargs`); one that dies is an error in the others at once."""

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        """Raises `ConfigError` for an accelerator that is not joined with all the processes that were launched."""
        self.count: int = accelerator.num_processes if accelerator else 1
        self.index: int = accelerator.process_index if accelerator else 0

        launched = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else self.count
        if accelerator is not None and launched != self.count:
            said = f"one of {launched} processes, but its process group has {self.count}, so it would train alone"
            raise ConfigError(f"this is {said}: build accelerate's Accelerator() before any engine")

    def share(self, value: T) -> T:
        """The first process's value, pickled; what the others give is not looked at."""
        return value if self.count == 1 else broadcast_object_list([value])[0]

    def gather(self, value: T) -> list[T]:
        """Every process's value, in their order, everywhere."""
        return [value] if self.count == 1 else gather_object([value])

    def first(self, act: Callable[[], T]) -> T:
        """What `act` gives in the first process, everywhere; it runs nowhere else. What it raises, all raise."""
        if self.count == 1:
            return act()
        tried = attempt(act, self.index) if self.index == 0 else None
        value, error = self.share((tried.value, tried.told) if tried else (None, None))
        if error is not None:
            raise error from (tried and tried.error)
        return value  # type: ignore[return-value]

    def each(self, act: Callable[[], T]) -> T:
        """What `act` gives here; it runs in all. What it raises in any, all raise, the culprit's index in the message.

        Collectives in `act` must be ones that no process leaves out by raising before them."""
        if self.count == 1:
            return act()
        tried = attempt(act, self.index)
        if errors := [error for error in self.gather(tried.told) if error is not None]:
            raise errors[0] from tried.error
        return tried.value  # type: ignore[return-value]

    def lead(self, act: Callable[[Callable[[Order], Result]], T], follow: Callable[[Order], Result]) -> T:
        """`act` runs in the first process; each order that it gives to its argument, all carry out with `follow`.

        What `act` gives or raises, all give or raise. Errors of this package end an order alike in all processes, and
        the next may come; after any other there is no saying where each of them stands, and this one just raises."""
        if self.count == 1:
            return act(follow)
        if self.index:
            return self._obey(follow)
        one_at_a_time, broken = threading.Lock(), False

        def order(what: Order) -> Result:
            nonlocal broken
            with one_at_a_time:  # whatever thread it is from
                broken = True
                try:
                    self.share(what)
                    result = follow(what)
                except LoraGrpoError:
                    broken = False
                    raise
                broken = False
                return result

        tried = attempt(lambda: act(order), self.index)
        if not broken:
            self.share(Attempt(tried.value, tried.told))
        if tried.error is not None:
            raise tried.error
        return tried.value  # type: ignore[return-value]

    def _obey(self, follow: Callable[[Any], object]) -> Any:
        """Until the last word, which is how the leader's own call ended."""
        nothing: Any = None
        while not isinstance(said := self.share(nothing), Attempt):
            try:
                follow(said)
            except LoraGrpoError:
                continue
        if said.error is not None:
            raise said.error
        return said.value

    def part(self, length: int) -> slice:
        """This process's part of a list of `length`: parts are contiguous and differ by one item at most."""
        return slice(self.index * length // self.count, (self.index + 1) * length // self.count)

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor if self.count == 1 else reduce(tensor, reduction="sum")

    def max(self, tensor: Tensor) -> Tensor:
        return tensor if self.count == 1 else reduce(tensor, reduction="max")

    def from_first(self, tensor: Tensor) -> Tensor:
        """The first process's tensor; of one shape everywhere."""
        return tensor if self.count == 1 else broadcast(tensor.clone(), from_process=0)

    def metrics(self, observed: Mapping[str, Observed]) -> dict[str, float]:
        """One number a metric, the same in every process: all have to ask for the same ones. 0 without any value."""
        if not observed:
            return {}
        known = [values[~values.isnan()] for values, _ in observed.values()]
        sums = self.sum(torch.stack([torch.stack([v.sum(), v.new_tensor(v.numel())]) for v in known]))
        # Minima travel negated, so that one maximum over the processes serves both.
        ends = [torch.cat([torch.stack([-v, v]), v.new_full((2, 1), -torch.inf)], dim=1) for v in known]
        edges = self.max(torch.stack([both.amax(dim=1) for both in ends]))
        numbers = torch.stack([sums[:, 0] / sums[:, 1], -edges[:, 0], edges[:, 1]], dim=1)
        found = numbers.masked_fill(sums[:, 1:] == 0, 0.0).tolist()
        columns: dict[Reduction, int] = {"mean": 0, "min": 1, "max": 2}
        return {name: row[columns[how]] for (name, (_, how)), row in zip(observed.items(), found, strict=True)}


class Attempt(NamedTuple):
    """How a call ended: with a value, or with an error and what the others are told of it."""

    value: object
    error: BaseException | None = None
    told: BaseException | None = None


def attempt(act: Callable[[], object], process: int) -> Attempt:
    """Whatever ends the call, Ctrl-C included: the others wait to be told, so nothing may pass by unsaid."""
    try:
        return Attempt(act())
    except BaseException as error:  # noqa: BLE001 - raised again by all processes
        return Attempt(None, error, told(error, process))
