"""The exceptions of this package.

    OffloadError
    ├── ConfigError (ValueError)           an argument of `enable` or a command cannot be used
    │   ├── BudgetError                    a byte budget is too small, or larger than the machine
    │   ├── UnsupportedModelError          the model is built in a way that cannot be offloaded
    │   └── UnsupportedOptimizerError      the optimizer has no kernel
    ├── DiskError (OSError)                a folder for swap files, or a transfer failed
    │   ├── DiskFullError                  not enough free space for the swap files
    │   ├── TransferError                  a read or write failed or moved too few bytes
    │   └── DiskCorruptionError            bytes read are not those that were written
    ├── DeviceError (RuntimeError)         a call to the accelerator failed
    ├── ParameterWritten (RuntimeError)    user code wrote to weights that were not on the device
    ├── PlaceholderGradientError           user code computed with a gradient that is not on the device (RuntimeError)
    ├── NonFiniteError (ArithmeticError)   too many steps in a row were skipped
    ├── RanksDivergedError (RuntimeError)  ranks are about to do different things
    ├── RankFailedError (RuntimeError)     another rank has ended or failed, so this one cannot go on
    ├── WaitTimeoutError (TimeoutError)    no lane made progress for `wait_timeout_s`
    ├── SessionFailedError (RuntimeError)  an earlier failure made the session unusable; `__cause__` is that failure
    ├── SessionClosedError (RuntimeError)  the session was used after it was closed
    └── InternalError (RuntimeError)       a law of this package was broken by this package: please report it

Every message names the object, what was expected, what was found and what to do.
"""


class OffloadError(Exception):
    """Base of all errors that this package raises on purpose."""


class ConfigError(OffloadError, ValueError):
    """An argument cannot be used; nothing was allocated."""


class BudgetError(ConfigError):
    """A byte budget is too small for the model, or larger than the machine."""


class UnsupportedModelError(ConfigError):
    """The model is built in a way that cannot be offloaded."""


class UnsupportedOptimizerError(ConfigError):
    """The optimizer, or one of its options, has no kernel."""


class DiskError(OffloadError, OSError):
    """A folder for swap files cannot be used, or a transfer to it failed."""


class DiskFullError(DiskError):
    """The file system has less free space than the swap files need."""


class TransferError(DiskError):
    """A read or write failed or moved fewer bytes than asked."""


class DiskCorruptionError(DiskError):
    """Bytes that were read are not those that were written; they were not used."""


class DeviceError(OffloadError, RuntimeError):
    """A call to the accelerator failed; the process can seldom use it again."""


class ParameterWritten(OffloadError, RuntimeError):
    """User code wrote to the placeholder of weights that were not on the device."""


class PlaceholderGradientError(OffloadError, RuntimeError):
    """User code computed with a gradient that has left the device."""


GradientTicketError = PlaceholderGradientError
"""Its name in earlier versions."""


class NonFiniteError(OffloadError, ArithmeticError):
    """Too many optimizer steps in a row were skipped for non-finite gradients."""


class RanksDivergedError(OffloadError, RuntimeError):
    """The ranks are about to do different things; nothing was exchanged for them."""


class RankFailedError(OffloadError, RuntimeError):
    """Another rank has ended or failed, so this one cannot go on."""


class WaitTimeoutError(OffloadError, TimeoutError):
    """Nothing moved on any lane for `wait_timeout_s`."""


class SessionFailedError(OffloadError, RuntimeError):
    """The session failed earlier; its weights must not be taken for trained ones."""


class SessionClosedError(OffloadError, RuntimeError):
    """The session was used after it was closed."""


class InternalError(OffloadError, RuntimeError):
    """A law of this package was broken by this package."""


class IllegalMove(InternalError):
    """Something was asked to do what its state does not allow."""
