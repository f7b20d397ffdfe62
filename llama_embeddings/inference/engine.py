"""One loaded model, ready to answer: text in, unit vectors (and token embeddings) out.

Tokenises, applies the window and its truncation rule, hands the tokens to the batcher, pools the parts of split
texts, normalises. A text that cannot be embedded is refused here, before it enters the queue, so that it cannot fail
its neighbours. Knows nothing of stores, recipes or prompts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from embeddings_data_models import TokenisedText, Truncation
from llama_embeddings.errors import ContextLengthExceeded, InferenceFailed, InvalidInput, ServiceError
from llama_embeddings.inference.backend import LoadedModel, ModelInfo, PairFrame, Pooling
from llama_embeddings.inference.batcher import Batcher, BatcherLimits, Job, JobResult
from llama_embeddings.inference.pooling import combine_parts, normalise

# Tokenising this many characters takes about a millisecond; more is done on a thread, off the event loop.
MAX_CHARACTERS_TOKENISED_INLINE = 20_000
STOP_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class PreparedText:
    """A text as token ids, int32 (n,) per part; one part unless it had to be split."""

    parts: tuple[np.ndarray, ...]
    n_tokens_dropped: int

    @property
    def n_tokens(self) -> int:
        """Tokens computed, the special ones included."""
        return sum(len(part) for part in self.parts)

    @property
    def is_whole(self) -> bool:
        """Whether it went into the window as it is, so that the truncation rule had no part in it."""
        return len(self.parts) == 1 and self.n_tokens_dropped == 0


@dataclass(frozen=True, slots=True)
class EngineResult:
    """`vector`: float32 (n_dims,) of unit length. `tokens` and `rows`, float32 (n_tokens, n_dims), if asked for."""

    vector: np.ndarray
    n_tokens: int
    n_tokens_dropped: int
    queue_seconds: float
    compute_seconds: float
    tokens: tuple[str, ...] = ()
    rows: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class PairScore:
    """A reranker's own number for one document, unbounded unless the model gives probabilities."""

    score: float
    n_tokens: int
    n_tokens_dropped: int
    queue_seconds: float
    compute_seconds: float


class EmbeddingEngine:
    """A loaded model with its batcher. Closing it gives all of its memory back."""

    def __init__(self, model: LoadedModel, limits: BatcherLimits) -> None:
        self._model = model
        self.batcher = Batcher(model.open_context, pooling=model.info.pooling, limits=limits)

    @property
    def info(self) -> ModelInfo:
        return self._model.info

    @property
    def has_failed(self) -> bool:
        """Whether a worker has ended, so that no text is answered any more."""
        return self.batcher.failure is not None

    async def prepare(self, texts: Sequence[str], truncation: Truncation) -> list[PreparedText | InvalidInput]:
        """Tokenise all texts; one prepared text or one refusal per text, in order."""
        if sum(map(len, texts)) > MAX_CHARACTERS_TOKENISED_INLINE:
            return await asyncio.to_thread(self._prepare_all, texts, truncation)
        return self._prepare_all(texts, truncation)

    def _prepare_all(self, texts: Sequence[str], truncation: Truncation) -> list[PreparedText | InvalidInput]:
        return [self._prepare(text, truncation) for text in texts]

    def _prepare(self, text: str, truncation: Truncation) -> PreparedText | InvalidInput:
        body = self._model.tokenize(text)
        room = self.info.room_for_text
        if len(body) == 0:
            return InvalidInput("The text has no tokens besides special ones; send some words.")
        if len(body) <= room:
            return PreparedText((self._dress(body),), 0)
        if truncation is Truncation.REFUSE:
            return ContextLengthExceeded(n_tokens=len(body) + self.info.window - room, limit=self.info.window)
        if truncation is Truncation.SPLIT:
            starts = range(0, len(body), room)
            return PreparedText(tuple(self._dress(body[start : start + room]) for start in starts), 0)
        kept = body[:room] if truncation is Truncation.RIGHT else body[-room:]
        return PreparedText((self._dress(kept),), len(body) - room)

    def _dress(self, body: np.ndarray) -> np.ndarray:
        """Put the model's special tokens around; a cut text keeps its closing one."""
        return np.concatenate(
            (self.info.prefix_tokens, body, self.info.suffix_tokens), dtype=np.int32, casting="unsafe"
        )

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, the special ones included, without fitting it into the window."""
        return len(self._model.tokenize(text)) + self.info.window - self.info.room_for_text

    def tokenize(self, text: str) -> tuple[list[int], list[str]]:
        """Ids and texts of the tokens, the special ones included."""
        tokens = self._dress(self._model.tokenize(text))
        return tokens.tolist(), self._model.token_texts(tokens)

    async def describe_tokens(self, texts: Sequence[str], *, adds_special: bool) -> list[TokenisedText]:
        """The tokens of texts of any length."""
        if sum(map(len, texts)) > MAX_CHARACTERS_TOKENISED_INLINE:
            return await asyncio.to_thread(self._describe_all, texts, adds_special)
        return self._describe_all(texts, adds_special)

    def _describe_all(self, texts: Sequence[str], adds_special: bool) -> list[TokenisedText]:
        return [self._describe_tokens(text, adds_special) for text in texts]

    def _describe_tokens(self, text: str, adds_special: bool) -> TokenisedText:
        body = self._model.tokenize(text)
        spans = self._model.token_spans(text)
        if not adds_special:
            return TokenisedText(body.tolist(), self._model.token_texts(body), spans, [False] * len(body))
        n_before, n_after = len(self.info.prefix_tokens), len(self.info.suffix_tokens)
        tokens = self._dress(body)
        return TokenisedText(
            tokens.tolist(),
            self._model.token_texts(tokens),
            [None] * n_before + spans + [None] * n_after,
            [True] * n_before + [False] * len(body) + [True] * n_after,
        )

    def decode(self, tokens: Sequence[int], *, skips_special: bool) -> str:
        """The text that token ids stand for. Raises InvalidInput for one that is not in the vocabulary."""
        n_known = self.info.n_vocabulary
        # llama.cpp ends the process for an id that it does not know.
        strange = next((token for token in tokens if not 0 <= token < n_known), None)
        if strange is not None:
            raise InvalidInput(
                f"The token id {strange} is not in the vocabulary of {self.info.name!r}, which has {n_known} tokens."
            )
        if skips_special:
            return self._model.detokenize(tokens).strip() if len(tokens) else ""
        return "".join(self._model.token_texts(np.asarray(tokens, dtype=np.int32))).strip()

    def read_own_ids(self, tokens: Sequence[int]) -> str | None:
        """The text of ids that are this model's beyond doubt; None otherwise.

        They must stand between the model's special tokens, and the text they stand for must have the same tokens:
        the numbers of another vocabulary are often words of this one, too.
        """
        info = self.info
        n_before, n_after = len(info.prefix_tokens), len(info.suffix_tokens)
        if n_before + n_after == 0 or not all(0 <= token < info.n_vocabulary for token in tokens):
            return None
        text = self._model.detokenize(tokens[n_before : len(tokens) - n_after]).strip()
        return text if self._dress(self._model.tokenize(text)).tolist() == list(tokens) else None

    async def score_pairs(
        self, query: str, documents: Sequence[str], truncation: Truncation
    ) -> list[PairScore | ServiceError]:
        """How well each document answers the query, by a reranker; one score or one error per document, in order.

        A pair that is longer than the window loses tokens of the document by the rule; a rule that averages parts
        has no meaning here, and cuts at the right. Raises ContextLengthExceeded, field `query`, if the query alone
        leaves no room; Overloaded, ShuttingDown.
        """
        frame = self._model.frame_query(query)
        room = self.info.window - len(frame.head) - len(frame.tail)
        if room < 1:
            refusal = ContextLengthExceeded(n_tokens=self.info.window - room, limit=self.info.window)
            raise refusal.located(field="query", index=None)
        prepared = await asyncio.to_thread(self._prepare_pairs, frame, documents, room, truncation)
        ready = [text for text in prepared if isinstance(text, PreparedText)]
        outcomes = iter(await self.batcher.compute([Job(text.parts[0]) for text in ready]))
        return [_read_score(text, next(outcomes)) if isinstance(text, PreparedText) else text for text in prepared]

    def _prepare_pairs(
        self, frame: PairFrame, documents: Sequence[str], room: int, truncation: Truncation
    ) -> list[PreparedText | InvalidInput]:
        return [self._prepare_pair(frame, document, room, truncation) for document in documents]

    def _prepare_pair(
        self, frame: PairFrame, document: str, room: int, truncation: Truncation
    ) -> PreparedText | InvalidInput:
        body = self._model.tokenize(frame.lead + document + frame.trail)
        n_over = max(0, len(body) - room)
        if n_over and truncation is Truncation.REFUSE:
            return ContextLengthExceeded(n_tokens=self.info.window + n_over, limit=self.info.window)
        kept = body[n_over:] if truncation is Truncation.LEFT else body[:room]
        return PreparedText((np.concatenate((frame.head, kept, frame.tail)),), n_over)

    async def embed(
        self, texts: Sequence[PreparedText], *, wants_rows: bool = False, is_probe: bool = False
    ) -> list[EngineResult | ServiceError]:
        """Compute prepared texts; one result or one error per text, in order. Raises Overloaded, ShuttingDown.

        A probe asks whether the engine works, and is let in front of what waits, however much that is.
        """
        if self.info.pooling is Pooling.RANK:
            raise InvalidInput(
                f"The model {self.info.name!r} is a reranker: it scores pairs and gives no embeddings. "
                "Choose an embedding model.",
                field="model_name",
            )
        if not texts:
            return []
        jobs = [Job(part, wants_rows) for text in texts for part in text.parts]
        outcomes = iter(await self.batcher.compute(jobs, is_probe=is_probe))
        return [self._combine(text, [next(outcomes) for _ in text.parts]) for text in texts]

    def _combine(self, text: PreparedText, outcomes: Sequence[JobResult | ServiceError]) -> EngineResult | ServiceError:
        results = [outcome for outcome in outcomes if isinstance(outcome, JobResult)]
        if len(results) < len(outcomes):
            return next(outcome for outcome in outcomes if isinstance(outcome, ServiceError))
        vector = results[0].unit_vector.copy() if len(results) == 1 else _combine_vectors(text, results)
        if vector is None:
            return InferenceFailed("The model gave a vector without a direction for this text.")
        rows = [result.rows for result in results if result.rows is not None]
        return EngineResult(
            vector=vector,
            n_tokens=text.n_tokens,
            n_tokens_dropped=text.n_tokens_dropped,
            queue_seconds=max(result.queue_seconds for result in results),
            compute_seconds=sum(result.compute_seconds for result in results),
            tokens=tuple(self._model.token_texts(np.concatenate(text.parts))) if rows else (),
            rows=np.concatenate(rows) if rows else None,
        )

    def close(self, *, timeout_seconds: float = STOP_TIMEOUT_SECONDS) -> None:
        """Drain the queue, end the threads, free the model once no thread uses it.

        Blocks for at most twice that time; call it on a thread.
        """
        self.batcher.stop(timeout_seconds=timeout_seconds)
        self._model.close()


def _read_score(text: PreparedText, outcome: JobResult | ServiceError) -> PairScore | ServiceError:
    if isinstance(outcome, ServiceError):
        return outcome
    score = float(outcome.vector[0])
    return PairScore(score, text.n_tokens, text.n_tokens_dropped, outcome.queue_seconds, outcome.compute_seconds)


def _combine_vectors(text: PreparedText, results: Sequence[JobResult]) -> np.ndarray | None:
    """One unit vector of a text's parts; None where they cancel each other out."""
    lengths = [len(part) for part in text.parts]
    combined = combine_parts(np.stack([result.vector for result in results]), lengths)
    vector: np.ndarray = normalise(combined[None])[0]
    return vector if np.isfinite(vector).all() else None
