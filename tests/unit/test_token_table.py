"""The table by which foreign token ids are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_embeddings.errors import ConfigurationError
from llama_embeddings.services.tokenization import read_token_table


def test_table_is_bytes_by_rank(tmp_path: Path) -> None:
    """Lines of base64 and rank; empty ones are passed over."""
    path = tmp_path / "table"
    path.write_text("IQ== 0\nw6Q= 1\n\n/w== 7\n")
    assert read_token_table(path) == {0: b"!", 1: "ä".encode(), 7: b"\xff"}


@pytest.mark.parametrize("content", [b"IQ==\n", b"IQ== one\n", b"no*base64 1\n", b"\xff\xfe\n", b"IQ== 0 1\n"])
def test_file_that_is_no_table_stops_the_start(content: bytes, tmp_path: Path) -> None:
    """By the setting's name; so does one that is not there."""
    path = tmp_path / "table"
    path.write_bytes(content)
    for bad in (path, tmp_path / "absent"):
        with pytest.raises(ConfigurationError, match="CL100K_TABLE_PATH") as refused:
            read_token_table(bad)
        assert refused.value.field == "CL100K_TABLE_PATH"
