"""Every error a user can cause, in one tree.

    NextnError
    ├── ConfigError       a setting is unknown, of the wrong type, or contradicts another
    ├── DataError         a corpus, prompt or tokenizer is missing, empty, too short or unreadable
    ├── CheckpointError   a checkpoint is missing, truncated, foreign, incomplete or a pickle
    ├── DeviceError       the device or the dtype asked for is not there
    ├── DivergenceError   training met a loss or gradient that is NaN or infinite
    ├── StudyError        a run of a study failed
    ├── GenerationError   a decoding request cannot be served (empty prompt, too long, ...)
    └── ExportError       an engine cannot serve this model, or not with its MTP modules

Messages say what was asked, what was found, what is allowed and how to go on. The command line prints them without a
traceback and exits with code 2; anything else is a defect in nextn and shows its traceback.
"""


class NextnError(Exception):
    """Base of all errors that are about the user's input or machine, not about nextn's code."""


class ConfigError(NextnError):
    """A setting is unknown, has the wrong type or value, or contradicts another setting."""


class DataError(NextnError):
    """A corpus, prompt file or tokenizer is missing, empty, too short or unreadable."""


class CheckpointError(NextnError):
    """A checkpoint is missing, truncated, foreign, incomplete, or stored as a pickle."""


class DeviceError(NextnError):
    """The device or the dtype asked for is not available here."""


class DivergenceError(NextnError):
    """The loss or the gradient became NaN or infinite during training."""


class GenerationError(NextnError):
    """A decoding request cannot be served: empty prompt, too long for the context, contradictory sampling."""


class ExportError(NextnError):
    """An engine cannot serve this model, or not with its MTP modules; the message lists every reason."""


class StudyError(NextnError):
    """A run of a study failed, or its parts do not fit together."""
