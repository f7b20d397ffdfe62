"""Texts to tokens and back, and texts in place of token ids that callers send.

Clients that tokenise by themselves do so with the vocabulary they know, which is seldom this model's, and an id of one
vocabulary is some other word in the next. So ids are taken only where there is no doubt whose they are, and what is
embedded is always the text that they stand for. Computes no embeddings.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from embeddings_data_models import TokenisedText, Truncation
from llama_embeddings.errors import ConfigurationError, InvalidInput, RequestTooLarge
from llama_embeddings.inference.engine import EmbeddingEngine
from llama_embeddings.services.models import ModelService
from llama_embeddings.services.texts import TextLimits, check_texts, place_of

# Reading this many ids takes a millisecond or two; more is done on a thread, off the event loop.
MAX_IDS_READ_INLINE = 5_000

REFUSAL_OF_IDS = (
    "These token ids are not taken: they are not, beyond doubt, this model's own, special tokens included, as "
    "`/tokenize` gives them. Send strings; LangChain's OpenAIEmbeddings does so with check_embedding_ctx_length=False. "
    "CL100K_TABLE_PATH lets the server read ids of cl100k_base."
)


class TokenizationService:
    """Tokens of any model. `table`: bytes by id of the vocabulary that clients send ids of, where there is one."""

    def __init__(self, models: ModelService, *, limits: TextLimits, table: Mapping[int, bytes] | None = None) -> None:
        self._models = models
        self._limits = limits
        self._table = table

    async def tokenize(
        self, texts: Sequence[str], *, model_name: str | None = None, adds_special: bool = True, field: str = "inputs"
    ) -> list[TokenisedText]:
        """The tokens of each text, of any length."""
        check_texts(texts, self._limits, field=field)
        async with self._models.lease(model_name) as engine:
            return await engine.describe_tokens(texts, adds_special=adds_special)

    async def decode(
        self, ids: Sequence[Sequence[int]], *, model_name: str | None = None, skips_special: bool = True, field: str
    ) -> list[str]:
        """The text of each list of ids. Raises InvalidInput for an id that is not in the vocabulary."""
        self._check_lengths(ids, field)
        async with self._models.lease(model_name) as engine:
            try:
                return await _run(ids, lambda: [engine.decode(tokens, skips_special=skips_special) for tokens in ids])
            except InvalidInput as error:
                raise error.located(field=field, index=None) from None

    async def read_inputs(
        self, inputs: Sequence[str | Sequence[int]], *, model_name: str | None = None, field: str
    ) -> list[str]:
        """The texts that strings and lists of token ids stand for. Raises InvalidInput for ids of doubtful origin."""
        if all(isinstance(given, str) for given in inputs):
            return [given for given in inputs if isinstance(given, str)]
        lists = [given for given in inputs if not isinstance(given, str)]
        self._check_lengths(lists, field)
        async with self._models.lease(model_name) as engine:
            return await _run(lists, lambda: self._read_all(inputs, engine, field))

    def _read_all(self, inputs: Sequence[str | Sequence[int]], engine: EmbeddingEngine, field: str) -> list[str]:
        texts = []
        for index, given in enumerate(inputs):
            text = given if isinstance(given, str) else self._read_foreign(given) or engine.read_own_ids(given)
            if not text:
                name, place = place_of(field, index, len(inputs))
                raise InvalidInput(REFUSAL_OF_IDS, field=name, index=place)
            texts.append(text)
        return texts

    def _read_foreign(self, ids: Sequence[int]) -> str | None:
        if self._table is None or not all(token in self._table for token in ids):
            return None
        try:
            return b"".join(self._table[token] for token in ids).decode("utf-8")
        except UnicodeDecodeError:
            # A client cut a long text between the bytes of a character.
            return None

    def _check_lengths(self, ids: Sequence[Sequence[int]], field: str) -> None:
        """Ids are bounded like the texts that they stand for."""
        if len(ids) > self._limits.max_texts:
            raise RequestTooLarge(
                f"{len(ids)} lists of token ids in one request, at most {self._limits.max_texts} are taken "
                "(MAX_TEXTS_PER_REQUEST).",
                field=field,
            )
        for index, tokens in enumerate(ids):
            name, place = place_of(field, index, len(ids))
            if not tokens:
                raise InvalidInput("The list of token ids is empty.", field=name, index=place)
            if len(tokens) > self._limits.max_characters:
                raise InvalidInput(
                    f"{len(tokens)} token ids, at most {self._limits.max_characters} are taken "
                    "(MAX_TEXT_LENGTH_IN_CHARACTERS).",
                    field=name,
                    index=place,
                )

    async def shorten(
        self, texts: Sequence[str], *, max_tokens: int, truncation: Truncation, model_name: str | None, field: str
    ) -> list[str]:
        """Texts cut to `max_tokens` of the model's tokens, special ones not counted, at the end that the rule names."""
        shortened = []
        for index, (text, tokens) in enumerate(
            zip(
                texts,
                await self.tokenize(texts, model_name=model_name, adds_special=False, field=field),
                strict=True,
            )
        ):
            if len(tokens.ids) <= max_tokens:
                shortened.append(text)
                continue
            is_left = truncation is Truncation.LEFT
            span = tokens.spans[-max_tokens] if is_left else tokens.spans[max_tokens - 1]
            if truncation is Truncation.REFUSE or span is None:
                name, place = place_of(field, index, len(texts))
                raise InvalidInput(
                    f"The text has {len(tokens.ids)} tokens, {max_tokens} were asked for at most.",
                    field=name,
                    index=place,
                )
            encoded = text.encode("utf-8")
            kept = encoded[span[0] :] if is_left else encoded[: span[1]]
            shortened.append(kept.decode("utf-8", "ignore"))
        return shortened


_Result = TypeVar("_Result")


async def _run(ids: Sequence[Sequence[int]], read: Callable[[], _Result]) -> _Result:
    """Do it here if it is quick, else on a thread."""
    return await asyncio.to_thread(read) if sum(map(len, ids)) > MAX_IDS_READ_INLINE else read()


def read_token_table(path: Path) -> dict[int, bytes]:
    """Bytes by id from a file of lines `base64 id`, as tiktoken keeps them. Raises ConfigurationError."""
    try:
        lines = [line.split() for line in path.read_text("ascii").splitlines() if line]
        return {int(number): base64.b64decode(encoded, validate=True) for encoded, number in lines}
    except OSError as error:
        reason = error.strerror
    except (ValueError, binascii.Error):
        reason = "not a table of tokens"
    raise ConfigurationError(f"CL100K_TABLE_PATH: {path} cannot be used ({reason}).", setting="CL100K_TABLE_PATH")
