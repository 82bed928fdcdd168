"""What other processes ask of a run that is going on: done before its next step, answered, and reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from lora_grpo.adapters.asking.requests import Request
from lora_grpo.adapters.asking.target import Target
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.errors import ConfigError, EngineError, LoraGrpoError
from lora_grpo.metrics import Reporter
from lora_grpo.rollback import RollbackReport

RollBack: TypeAlias = Callable[[Target], RollbackReport]


def apply_requests(store: AdapterStore, roll_back: RollBack, reporter: Reporter) -> None:
    """Do what was asked, in order. A request that cannot be done changes nothing, and its answer says why."""
    for listed in store.requests():
        request = store.claim(listed)
        if request is None:
            continue
        try:
            result = _apply(store, roll_back, request)
        except LoraGrpoError as error:
            result = {"error": str(error), "kind": type(error).__name__}
        except BaseException as error:
            store.answer(request, {"error": f"{type(error).__name__}: {error}", "kind": EngineError.__name__})
            raise
        store.answer(request, result)
        said = f"asked from outside: {_words(request)}: {result.get('error') or result['done']}"
        if request.verb == "rollback" and "error" not in result:
            reporter.rollback(result["step"], said)
        else:
            reporter.message(said)


def _apply(store: AdapterStore, roll_back: RollBack, request: Request) -> dict[str, Any]:
    match request.verb:
        case "rollback":
            report = roll_back(_argument(request.args, "to"))
            return {"done": str(report), "version": report.version.number, "step": report.version.step} | {
                "left": report.left.number,
                "weights": report.weights,
            }
        case "pin":
            store.pin(_argument(request.args, "version"))
            return {"done": "pinned", "pins": sorted(store.pins)}
        case "unpin":
            store.unpin(_argument(request.args, "version"))
            return {"done": "unpinned", "pins": sorted(store.pins)}
        case "prune":
            removed = store.prune()
            return {"done": f"removed {len(removed)} versions from tmpfs", "removed": removed}
    raise ConfigError(f"request {request.number} asks for {request.verb!r}; known are rollback, pin, unpin and prune")


def _argument(args: Mapping[str, Any], name: str) -> Any:
    if name not in args:
        raise ConfigError(f"the request names no {name!r}: it holds {dict(args)}")
    return args[name]


def _words(request: Request) -> str:
    return " ".join([request.verb, *map(str, request.args.values())])
