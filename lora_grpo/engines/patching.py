"""Functions of others in our hands: for the life of the process, or while a block runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_MARK = "lora_grpo_wrapped"


def wrap_once(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Have `wrapper` called in place of `owner.name`, which it is given first, if there is such a name; done once."""
    stock: Any = getattr(owner, name, None)
    if stock is not None and not is_wrapped(owner, name):

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return wrapper(stock, *args, **kwargs)

        setattr(wrapped, _MARK, True)
        setattr(owner, name, wrapped)


def is_wrapped(owner: Any, name: str) -> bool:
    return hasattr(getattr(owner, name, None), _MARK)


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Meanwhile, a module, class or object has these values by these names, its own or inherited."""
    own = {name: vars(owner)[name] for name in values if name in vars(owner)}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in values:
            delattr(owner, name)
        for name, value in own.items():
            setattr(owner, name, value)
