"""What learning refuses."""

from evolve.errors import EvolveError


class LearningError(EvolveError, ValueError):
    """Rows or settings that no repetition can make trainable; never retried."""


class TrainingTimeoutError(TimeoutError):
    """A training, or the start of its workers, took longer than it may."""
