"""The tokens that open the door: the server's own, and those of a file that may change while it runs.

Does not know how a request carries a token; `security.py` does. The file's form, a token a line:

    # comments and empty lines do not count
    reporting   Zx3k...   a name in front says in the log whose request it was
    Bq8w...
"""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from llama_embeddings.errors import ConfigurationError

logger = logging.getLogger(__name__)

MIN_TOKEN_LENGTH = 16
# How often the file is looked at, at most.
SECONDS_BETWEEN_LOOKS = 1.0

_Signature = tuple[int, int, int]


class Tokens:
    """Tokens by the names of their holders. Looks at its file when asked, not by itself."""

    def __init__(self, own: str | None, path: Path | None = None) -> None:
        """`own` is the server's token, `path` a file with more. Raises ConfigurationError for a file without tokens."""
        self._own = {"": own.encode()} if own is not None else {}
        self._path = path
        self._signature: _Signature | None = None
        self._next_look = time.monotonic() + SECONDS_BETWEEN_LOOKS
        self._known: Mapping[str, bytes] = self._own
        if path is not None:
            self._signature = _look_at(path)
            self._known = self._own | read_tokens_file(path)
            if not self._known:
                raise ConfigurationError(
                    f"SECURITY_TOKENS_FILE: {path} holds no token.", setting="SECURITY_TOKENS_FILE"
                )

    def __len__(self) -> int:
        return len(self._known)

    def find_holder(self, sent: str) -> str | None:
        """The name of a token's holder, empty if it has none; None for a token that opens nothing.

        Compared with every token in constant time, so that the time of the answer says nothing about them.
        """
        if self._path is not None and time.monotonic() >= self._next_look:
            self._read_again_if_changed(self._path)
        candidate = sent.encode("utf-8", "surrogatepass")
        found = None
        for name, token in self._known.items():
            if hmac.compare_digest(candidate, token):
                found = name
        return found

    def _read_again_if_changed(self, path: Path) -> None:
        self._next_look = time.monotonic() + SECONDS_BETWEEN_LOOKS
        signature = _look_at(path)
        if signature == self._signature:
            return
        self._signature = signature
        try:
            self._known = self._own | read_tokens_file(path)
        except ConfigurationError as error:
            # Half-written, misspelt or gone for a moment: nobody is locked out, and nobody let in, by accident.
            logger.error("%s The tokens known before stay in force.", error.message)
        else:
            logger.info("Read %s again: %d tokens open the door now", path, len(self._known))


def _look_at(path: Path) -> _Signature | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def read_tokens_file(path: Path) -> dict[str, bytes]:
    """Tokens by name; those without a name are called by their line. Raises ConfigurationError that names the line.

    An empty file is read as no tokens: what was in it is revoked.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no UTF-8"
        raise _refuse(path, f"cannot be read ({reason}).") from None
    tokens: dict[str, bytes] = {}
    for number, line in enumerate(lines, start=1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) > 2 or len(words[-1]) < MIN_TOKEN_LENGTH:
            # The line itself is not repeated: it may hold a token.
            raise _refuse(
                path, f"line {number} is not `TOKEN` or `NAME TOKEN` of at least {MIN_TOKEN_LENGTH} characters."
            )
        name = words[0] if len(words) == 2 else f"line-{number}"
        if name in tokens:
            raise _refuse(path, f"line {number} has a name that another line has.")
        tokens[name] = words[-1].encode()
    return tokens


def _refuse(path: Path, reason: str) -> ConfigurationError:
    return ConfigurationError(f"SECURITY_TOKENS_FILE: {path}: {reason}", setting="SECURITY_TOKENS_FILE")
