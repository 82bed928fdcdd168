"""The errors of this package: one small tree, each also a standard-library error; and how messages count."""


class LoraGrpoError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigError(LoraGrpoError, ValueError):
    """A setting that cannot work; the message names the field, the value and the fix."""


class UnsupportedAdapter(LoraGrpoError, ValueError):
    """An adapter or base model that vLLM would not serve as the trainer computes it."""


class UnsupportedVersion(LoraGrpoError, RuntimeError):
    """An installed release that this package was neither tested with nor compared with."""


class StoreError(LoraGrpoError, OSError):
    """The version store could not do what was asked; nothing was lost."""


class NoRoom(StoreError):
    """Too little space for a version; raised before anything is written."""


class StoreCorrupt(StoreError):
    """Stored bytes differ from the digest that was published with them."""


class StoreLocked(StoreError):
    """Another live process holds the run for writing."""


class UnknownVersion(LoraGrpoError, LookupError):
    """A version that the store never had or the engine has not loaded."""


class EngineError(LoraGrpoError, RuntimeError):
    """An inference engine failed; its state was cleaned up before this was raised."""


class DeliveryError(LoraGrpoError, RuntimeError):
    """A proof failed: the engine does not apply what the trainer published."""


class RewardError(LoraGrpoError, RuntimeError):
    """A reward function raised, or did not return one finite number for each completion; names function and prompt."""


class TrainingError(LoraGrpoError, RuntimeError):
    """Training cannot go on: a non-finite loss or gradient, or nothing left to learn from."""


def counted(number: int, noun: str) -> str:
    """As it is said: 1 version, 2 versions, 1,000 versions."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
