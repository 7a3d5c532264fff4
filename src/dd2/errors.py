"""What reaches the command line as one line: bad input (exit code 2), and what ends a run (1, or 130 after an interruption)."""


class InputError(ValueError):
    """What the user gave cannot be used.

    The message names what is wrong, where it stands, what was expected and what to do. It is one line, whatever stands in the
    names and values that it quotes.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class Interrupted(Exception):
    """A signal stopped the work after it had saved; the message says how to go on."""


class PeerLost(RuntimeError):
    """Another process of the job has ended or does not answer."""


class NumericalError(ArithmeticError):
    """A loss or a gradient is NaN or infinite. Nothing was saved after it appeared."""


class TrainingFailed(RuntimeError):
    """A training shows a sign of failure that it was told to stop on."""
