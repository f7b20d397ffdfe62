"""What a text must be before anything is done with it, the same for every endpoint and dialect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from embeddings_data_models import compute_text_hash
from llama_embeddings.errors import InvalidInput, RequestTooLarge


@dataclass(frozen=True, slots=True)
class TextLimits:
    """Bounds on one request's texts."""

    max_characters: int
    max_texts: int


def place_of(field: str | Sequence[str], index: int, count: int) -> tuple[str, int | None]:
    """Name and index by which errors speak of one of `count` texts; a text with a name of its own has no index."""
    if not isinstance(field, str):
        return field[index], None
    return field, index if count != 1 else None


def check_texts(texts: Sequence[str], limits: TextLimits, *, field: str | Sequence[str] = "text") -> list[str]:
    """The texts' hashes. Raises InvalidInput or RequestTooLarge, which name the first bad text and why it is bad."""
    if len(texts) > limits.max_texts:
        raise RequestTooLarge(
            f"{len(texts)} texts in one request, at most {limits.max_texts} are taken (MAX_TEXTS_PER_REQUEST). "
            "Send them in several requests.",
            field=place_of(field, 0, len(texts))[0],
        )
    return [_check_text(text, limits, *place_of(field, index, len(texts))) for index, text in enumerate(texts)]


def _check_text(text: str, limits: TextLimits, field: str, index: int | None) -> str:
    if not text.strip():
        raise InvalidInput("The text is empty; send some words.", field=field, index=index)
    if len(text) > limits.max_characters:
        raise RequestTooLarge(
            f"The text has {len(text)} characters, at most {limits.max_characters} are taken "
            "(MAX_TEXT_LENGTH_IN_CHARACTERS). Send it in parts, or as a document.",
            field=field,
            index=index,
        )
    if "\0" in text:
        raise InvalidInput("The text holds a NUL character, which no text has; remove it.", field=field, index=index)
    try:
        return compute_text_hash(text)
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"The text is not valid Unicode: half of a surrogate pair at character {error.start}.",
            field=field,
            index=index,
        ) from None
