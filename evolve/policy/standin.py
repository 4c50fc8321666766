"""What all stand-ins for a vLLM engine have in common: there is nothing to load, and a reload changes a name only."""

from __future__ import annotations


class StandIn:
    """Lives and is reloaded like `evolve.policy.serving.Engine`, without weights."""

    def __init__(self, model: str, digest: str | None = None) -> None:
        """`model` is any name; `digest` is what to serve as, None: the model's name."""
        self.path, self.digest = model, digest or model

    async def start(self) -> str:
        """Ready at once; returns the digest."""
        return self.digest

    async def reload(self, path: str, digest: str | None = None) -> str:
        """Serve as another checkpoint; what is answered stays the same."""
        self.path, self.digest = path, digest or path
        return self.digest

    async def health(self) -> str:
        """The digest being served."""
        return self.digest

    async def close(self) -> None:
        """Nothing is held."""
