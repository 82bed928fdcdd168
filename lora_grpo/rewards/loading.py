"""From a reward's name in a config file to the function."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from lora_grpo.config import RewardConfig
from lora_grpo.errors import ConfigError
from lora_grpo.rewards.call import RewardFunction
from lora_grpo.rewards.ready import READY


def load_reward(config: RewardConfig) -> RewardFunction:
    """The reward function that `config` names, with its options.

    'package.module:function' is imported and gets the options as keyword arguments; any other name is a ready-made
    reward's, whose factory gets them. Raises `ConfigError` naming what is not there and the nearest that is.
    """
    if ":" not in config.name:
        if config.name not in READY:
            hint = _nearest(config.name, list(READY))
            raise ConfigError(
                f"no ready-made reward {config.name!r}{hint}; they are {', '.join(READY)}, and your own function "
                "is named as 'package.module:function'"
            )
        factory = READY[config.name]
        _check_options(config, factory)
        return factory(**config.options)
    function = _imported(config.name)
    if not config.options:
        return function
    _check_options(config, function)
    return functools.partial(function, **config.options)


def _imported(name: str) -> RewardFunction:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        if module_name != missing and not module_name.startswith(f"{missing}."):
            raise ConfigError(f"reward {name!r}: importing {module_name!r} needs the module {missing!r}") from error
        raise ConfigError(
            f"reward {name!r}: no module {missing!r}; it has to be installed or below the current directory"
        ) from error
    function = getattr(module, attribute, None)
    if function is None:
        callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"reward {name!r}: {module_name} has no {attribute!r}{_nearest(attribute, callables)}")
    if not callable(function):
        raise ConfigError(f"reward {name!r}: {attribute!r} is {function!r}, which is no function")
    return function


def _check_options(config: RewardConfig, function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for option in config.options:
        if option not in parameters and not open_ended:
            hint = _nearest(option, list(parameters))
            raise ConfigError(f"reward {config.name!r} has no option {option!r}{hint}; it takes {list(parameters)}")
    if config.name in READY:
        missing = [key for key, value in parameters.items() if value.default is value.empty]
        for option in missing:
            if option not in config.options:
                raise ConfigError(f"reward {config.name!r} needs the option {option!r}: options.{option} = ...")


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
