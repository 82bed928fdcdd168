"""The errors of this package: one small tree, each also a standard-library error.

LoraGrpoError
├── ConfigError (ValueError)            a setting that cannot work; names the field, the value and the fix
├── UnsupportedAdapter (ValueError)     an adapter or base that cannot be served faithfully
├── UnsupportedVersion (RuntimeError)   a release of vLLM (or TRL) outside the supported range
├── StoreError (OSError)                the version store could not do what was asked; nothing was lost
│   ├── NoRoom (StoreError)             too little space, found before anything was written
│   ├── StoreCorrupt (StoreError)       bytes on disk differ from what was published
│   └── StoreLocked (StoreError)        another process holds the run
├── UnknownVersion (LookupError)        a version that the store or the engine does not have
├── EngineError (RuntimeError)          vLLM failed; it was cleaned up after and the last good version serves on
├── DeliveryError (RuntimeError)        a proof failed: what the engine applies is not what the trainer published
├── RewardError (RuntimeError)          a reward function failed; names the function and the prompt
└── TrainingError (RuntimeError)        the optimisation went wrong (non-finite loss, no signal left)
"""


class LoraGrpoError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigError(LoraGrpoError, ValueError):
    """A setting that cannot work."""


class UnsupportedAdapter(LoraGrpoError, ValueError):
    """An adapter or base model that vLLM would not serve as the trainer computes it."""


class UnsupportedVersion(LoraGrpoError, RuntimeError):
    """An installed release that this package was neither run with nor read against."""


class StoreError(LoraGrpoError, OSError):
    """The version store could not do what was asked."""


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
    """The engine does not apply what the trainer published."""


class RewardError(LoraGrpoError, RuntimeError):
    """A reward function raised or returned something other than one finite number a completion."""


class TrainingError(LoraGrpoError, RuntimeError):
    """Training cannot go on: a non-finite loss or gradient, or nothing left to learn from."""
