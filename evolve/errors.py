"""Failures that are the user's to mend: shown as one message, without a traceback."""


class EvolveError(RuntimeError):
    """Something cannot go on; the message says what, where, and how to mend it."""


class StorageError(EvolveError):
    """What holds the run does not take what must be written, or does not answer; what was published stays as it is."""
