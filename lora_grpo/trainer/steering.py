"""What other processes ask of a run that is going on, our trainer's or another loop's: done before its next step."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from lora_grpo.adapters.asking.requests import Request, pending
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import Target
from lora_grpo.errors import ConfigError, EngineError, LoraGrpoError, counted
from lora_grpo.metrics.reporter import Reporter
from lora_grpo.rollback import RollbackReport
from lora_grpo.sync import NativeSync

RollBack: TypeAlias = Callable[[Target], RollbackReport]


def answer_requests(sync: NativeSync) -> None:
    """Do what `lora-grpo rollback`, `pin`, `unpin` and `prune` ask of the run that `sync`'s store holds.

    Call it before each step, in every process, when no completions wait to be trained on. The result of a request goes
    to the process that asked, to stderr and to RUN/metrics.jsonl. A request that fails changes nothing.

    >>> for step in range(2):
    ...     answer_requests(sync)
    ...     version = sync.push(step=step)
    """

    def heard(roll_back: RollBack) -> None:
        run = sync.store.archive
        if run is not None and pending(run):
            with Reporter(run, total_steps=0) as reporter:
                apply_requests(sync.store, roll_back, reporter)

    sync.processes.lead(heard, sync.rollback)


def apply_requests(store: AdapterStore, roll_back: RollBack, reporter: Reporter) -> None:
    """Do what was asked, in order. A request that cannot be done changes nothing, and its answer says why."""
    for request in pending(store.archive):
        if not request.claim():
            continue
        try:
            result = _apply(store, roll_back, request)
        except LoraGrpoError as error:
            result = {"error": str(error), "kind": type(error).__name__}
        except BaseException as error:
            request.answer({"error": f"{type(error).__name__}: {error}", "kind": EngineError.__name__})
            raise
        request.answer(result)
        asked = " ".join([request.verb, *map(str, request.args.values())])
        said = f"asked from outside: {asked}: {result.get('error') or result['done']}"
        if result.get("left") != result.get("version"):
            reporter.rollback(result["step"], said)
        else:
            reporter.message(said)


def _apply(store: AdapterStore, roll_back: RollBack, request: Request) -> dict[str, Any]:
    match request.verb:
        case "rollback":
            report = roll_back(_argument(request.args, "to"))
            found = {"version": report.version.number, "step": report.version.step, "left": report.left.number}
            return {"done": str(report), **found, "weights": report.weights}
        case "pin" | "unpin" as verb:
            getattr(store, verb)(_argument(request.args, "version"))
            return {"done": f"{verb}ned", "pins": sorted(store.pins)}
        case "prune":
            removed = store.prune()
            return {"done": f"removed {counted(len(removed), 'version')} from tmpfs", "removed": removed}
    raise ConfigError(f"request {request.name} asks for {request.verb!r}; known are rollback, pin, unpin and prune")


def _argument(args: Mapping[str, Any], name: str) -> Any:
    if name not in args:
        raise ConfigError(f"the request names no {name!r}: it holds {dict(args)}")
    return args[name]
