"""What a replica has where a writer has its write queue: every write is refused by name.

A replica reads a database that another server writes to. Its connections are opened for reading alone.
"""

from __future__ import annotations

from typing import Any, NoReturn

from llama_embeddings.errors import ReadOnlyReplica
from llama_embeddings.storage.write_queue import WriteCounters


class RefusedWrites:
    """See WriteQueue."""

    depth = 0

    def __init__(self) -> None:
        self.counters = WriteCounters()

    async def submit(self, _function: Any, _payload: Any, *, is_probe: bool = False) -> NoReturn:
        """Raises ReadOnlyReplica."""
        raise ReadOnlyReplica

    async def stop(self) -> None:
        """Nothing waits."""
