"""What learning refuses."""


class LearningError(ValueError):
    """Rows or settings that no repetition can make trainable; never retried."""
