"""Every error that Protege raises on purpose, as one small tree.

`UserError` is the user's to fix: the command line ends with its message and exit code 2.
Every message names the value, what was expected, and the way out.
"""


class ProtegeError(Exception):
    """Base of every deliberate error."""


class UserError(ProtegeError):
    """Something the user can fix: exit code 2, no traceback."""


class ConfigError(UserError):
    """An option's value, or two options together, make no sense."""


class DataError(UserError):
    """A dataset is missing, or a row in it is broken. Names the file and the line."""


class ModelError(UserError):
    """A model or tokenizer folder cannot be loaded or used."""


class TemplateError(ModelError):
    """A chat template cannot be rendered append-only."""


class TokenizerMismatchError(ModelError):
    """Student and teacher do not give the same ids the same meaning."""


class CheckpointError(ProtegeError):
    """A checkpoint cannot be written or read."""


class InfrastructureError(ProtegeError):
    """Our side failed, not the student: the episode is dropped and counted under `reason`."""

    reason = "infrastructure"


class TeacherError(InfrastructureError):
    """A teacher failed to score."""

    reason = "teacher"


class SamplerError(InfrastructureError):
    """A sampler failed to answer."""

    reason = "sampler"


class SamplerUnavailableError(ProtegeError):
    """No engine is left that could answer: the run ends, and goes on from its last checkpoint."""


class NoSignalError(ProtegeError):
    """A step has nothing to train on, or too many episodes were dropped."""


class SandboxUnavailableError(UserError):
    """There is no container engine to talk to."""


class SandboxError(InfrastructureError):
    """A sandbox could not be made, reached, or trusted any longer."""

    reason = "sandbox"


class SandboxCommandTimeout(SandboxError):
    """A command ran out of time and is proven dead, its children too: the one sandbox error a model is told."""


class ImageBuildError(SandboxError):
    """An image could not be built; names the failing step and where the log is."""

    reason = "image"
