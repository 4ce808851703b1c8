"""Exceptions of linocut. Each message says what was expected, what was found and what to do.

All derive from `LinocutError`; the command line prints one of them as a single line and exits with code 2.
All but `Cancelled` also derive from the built-in that a Python caller would expect.
"""


class LinocutError(Exception):
    """Base of every error that a user can cause or mend."""


class FormatError(LinocutError, ValueError):
    """A file or a tensor does not have the structure or the values that the format asks for."""

    def __init__(self, problem: str, *, path: object = None, tensor: str | None = None,
                 expected: object = None, found: object = None, advice: str | None = None) -> None:
        self.path, self.tensor, self.expected, self.found, self.advice = path, tensor, expected, found, advice
        where = ": ".join(str(part) for part in (path, tensor) if part is not None)
        text = f"{where}: {problem}" if where else problem
        if expected is not None or found is not None:
            text += f" (expected {expected}, found {found})"
        super().__init__(f"{text}; {advice}" if advice else text)


class PolicyError(LinocutError, ValueError):
    """A quantization policy is malformed or does not match the model."""


class KernelError(LinocutError, RuntimeError):
    """No kernel can run a problem, or a kernel gave a wrong result."""


class UsageError(LinocutError, ValueError):
    """An argument is outside what is possible: a size, a name, a path, a number of steps."""


class ModelNotFoundError(LinocutError, FileNotFoundError):
    """A model name, folder or file does not exist where it was looked for."""


class HubError(LinocutError, ConnectionError):
    """A model could not be fetched from the hub, or not be put there."""


class Cancelled(LinocutError):
    """The user stopped a generation. Nothing was written."""
