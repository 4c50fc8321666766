"""What learning refuses."""

from evolve.errors import EvolveError


class LearningError(EvolveError, ValueError):
    """Rows or settings that no repetition can make trainable; never retried."""


class TrainingTimeoutError(EvolveError, TimeoutError):
    """A training, or the start of its workers, took longer than it may."""


class TrainingStopped(EvolveError):
    """A training was told to stop; it has left a checkpoint."""


class TrainerDied(EvolveError):
    """The workers of a trainer group died more often than they may."""
