"""llama.cpp through the C functions of llama-cpp-python; the only importer of `llama_cpp`.

Batches are NumPy arrays that llama.cpp reads in place, results NumPy views on its memory. ctypes releases
the GIL for the length of each call, so that contexts on several Python threads compute side by side.

Contexts always ask for the rows of single tokens (pooling NONE) and leave pooling to `pooling.py`: the same
vectors at the same speed, without an assertion in llama.cpp that ends the process for some
combinations of batch and sequence counts, and with token-level results from the same pass. Only rerankers
(pooling RANK) need llama.cpp's own head.

A failed assertion inside llama.cpp ends the process and cannot be caught here. What is loaded has been checked by
`catalogue.gguf_check` before, and contexts are made from the few combinations known to work.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from llama_embeddings.errors import InferenceFailed, ModelLoading, ModelUnusable
from llama_embeddings.inference.backend import ModelInfo, PairFrame, Pooling
from llama_embeddings.inference.lifetimes import Lifetime
from llama_embeddings.inference.word_piece import WordPieceTokenizer

logger = logging.getLogger(__name__)

# Contexts hold at least this many tokens even if the model's window is smaller: smaller ones can fail
# an assertion in llama.cpp, and a short-windowed model still packs several texts into a pass.
MIN_CONTEXT_TOKENS = 512
MAX_SEQUENCES = 64
MAX_RANKED_SEQUENCES = 16
# Piece texts are a few bytes; a longer one is fetched again with the size llama.cpp asks for.
PIECE_BUFFER_SIZE = 64

_POOLING_OF_LLAMA = {0: Pooling.NONE, 1: Pooling.MEAN, 2: Pooling.CLS, 3: Pooling.LAST, 4: Pooling.RANK}
_LOG_LEVELS = {3: logging.WARNING, 4: logging.ERROR}
# llama.cpp warns of these though they are meant: we pool ourselves, and BERT has no end of generation.
_EXPECTED_WARNINGS = ("model default pooling_type is", "special_eos_id is not in special_eog_ids")

_immortal_callbacks: list[Any] = []


class LlamaBackend:
    """Loads GGUF files with llama.cpp."""

    def __init__(self) -> None:
        # Read by libgomp when it is loaded with llama.cpp: how long a helper thread that has nothing to do keeps its
        # core. The default, some milliseconds, is taken from everybody else after each lone text.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        import llama_cpp

        self._llama: Any = llama_cpp
        # llama.cpp calls it as long as the process lives, so it must outlive this object.
        callback = llama_cpp.llama_log_callback(_forward_log)
        _immortal_callbacks.append(callback)
        llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()

    def load(self, path: Path, *, name: str, digest: str, max_window: int, pooling: Pooling | None) -> LlamaModel:
        """Take the file into memory and read its facts. Raises ModelUnusable if llama.cpp refuses it."""
        parameters = self._llama.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.load_mode = self._choose_load_mode(path)
        pointer = self._llama.llama_model_load_from_file(str(path).encode(), parameters)
        if not pointer:
            raise ModelUnusable(f"llama.cpp cannot load the model {name!r} ({path.name}); the log has its reason.")
        try:
            return LlamaModel(self._llama, pointer, name=name, digest=digest, max_window=max_window, pooling=pooling)
        except BaseException:
            self._llama.llama_model_free(pointer)
            raise

    def _choose_load_mode(self, path: Path) -> int:
        """Map a file that nobody may write to, as a copy on the RAM disk is; read any other.

        A file that is written over while it is mapped changes the loaded weights, and one that is cut short ends the
        process (SIGBUS).
        """
        may_be_written = path.stat().st_mode & 0o222
        return int(self._llama.LLAMA_LOAD_MODE_NONE if may_be_written else self._llama.LLAMA_LOAD_MODE_MMAP)


def _forward_log(level: int, text: bytes, _user_data: Any) -> None:
    if level not in _LOG_LEVELS:
        return
    message = text.decode("utf-8", "replace").rstrip()
    is_expected = any(expected in message for expected in _EXPECTED_WARNINGS)
    logger.log(logging.DEBUG if is_expected else _LOG_LEVELS[level], "llama.cpp: %s", message)


class LlamaModel:
    """A model that llama.cpp holds in memory, until it is closed and no call and no context uses it any more."""

    def __init__(
        self, llama: Any, pointer: Any, *, name: str, digest: str, max_window: int, pooling: Pooling | None
    ) -> None:
        self._llama = llama
        self._pointer = pointer
        self._vocabulary = llama.llama_model_get_vocab(pointer)
        self._word_piece = self._make_word_piece()
        self._piece_lock = threading.Lock()
        self._pieces: dict[int, str] = {}
        self._lifetime = Lifetime(
            lambda: llama.llama_model_free(pointer),
            lambda: ModelLoading(f"The model {name!r} has just been unloaded; try again."),
        )
        self.info = self._read_info(name, digest, max_window, pooling)
        if self.info.room_for_text < 1:
            raise ModelUnusable(f"The model {name!r} has a window of {self.info.window} tokens: no room for a text.")

    def _read_info(self, name: str, digest: str, max_window: int, pooling: Pooling | None) -> ModelInfo:
        llama, pointer = self._llama, self._pointer
        architecture = self._metadata("general.architecture") or "unknown"
        chosen, warnings = self._choose_pooling(architecture, pooling)
        prefix, suffix = self._read_special_tokens()
        if chosen is Pooling.LAST and not suffix:
            warnings.append("its tokenizer adds no closing token (EOS), though its pooling takes the last token")
        if chosen is Pooling.CLS and not prefix:
            warnings.append("its tokenizer adds no opening token (BOS), though its pooling takes the first token")
        trained_window = llama.llama_model_n_ctx_train(pointer)
        return ModelInfo(
            name=name,
            architecture=architecture,
            n_dims=llama.llama_model_n_embd_out(pointer),
            window=min(trained_window, max_window),
            trained_window=trained_window,
            pooling=chosen,
            is_causal=self._metadata(f"{architecture}.attention.causal") not in ("false", "0"),
            prefix_tokens=prefix,
            suffix_tokens=suffix,
            n_vocabulary=llama.llama_vocab_n_tokens(self._vocabulary),
            digest=digest,
            size_in_bytes=llama.llama_model_size(pointer),
            warnings=tuple(warnings),
            # Their yes and no are put through a softmax by llama.cpp, and the share of yes is the score.
            scores_are_probabilities=chosen is Pooling.RANK and architecture.startswith("qwen3"),
        )

    def _choose_pooling(self, architecture: str, override: Pooling | None) -> tuple[Pooling, list[str]]:
        stated = self._metadata(f"{architecture}.pooling_type")
        if override is not None:
            return override, []
        if stated is not None and stated.isdigit() and int(stated) in _POOLING_OF_LLAMA:
            return _POOLING_OF_LLAMA[int(stated)], []
        return Pooling.MEAN, ["its file does not say how to pool, so the mean is taken"]

    def _metadata(self, key: str) -> str | None:
        buffer = ctypes.create_string_buffer(256)
        length = self._llama.llama_model_meta_val_str(self._pointer, key.encode(), buffer, len(buffer))
        return None if length < 0 else buffer.value.decode("utf-8", "replace")

    def _read_special_tokens(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the tokenizer puts before and after a text, found by comparing a probe with and without."""
        bare = self._tokenize("a", add_special=False).tolist()
        dressed = self._tokenize("a", add_special=True).tolist()
        for start in range(len(dressed) - len(bare) + 1):
            if dressed[start : start + len(bare)] == bare:
                return tuple(dressed[:start]), tuple(dressed[start + len(bare) :])
        return (), ()

    def tokenize(self, text: str) -> np.ndarray:
        """Token ids of a text without the special tokens around it, int32 (n,).

        What looks like a special token in the text ("[SEP]", "</s>") is read as the characters it is.
        """
        if self._word_piece is not None:
            return self._word_piece.tokenize(text)
        with self._lifetime:
            return self._tokenize(text, add_special=False)

    def _make_word_piece(self) -> WordPieceTokenizer | None:
        """The reference's tokenizer for BERT vocabularies; None for other kinds."""
        llama, vocabulary = self._llama, self._vocabulary
        if llama.llama_vocab_type(vocabulary) != llama.LLAMA_VOCAB_TYPE_WPM:
            return None
        n_tokens = llama.llama_vocab_n_tokens(vocabulary)
        unknown = self._metadata("tokenizer.ggml.unknown_token_id")
        try:
            spellings = [llama.llama_vocab_get_text(vocabulary, token).decode("utf-8") for token in range(n_tokens)]
            unknown_token = int(unknown) if unknown is not None else spellings.index("[UNK]")
        except ValueError as error:  # no UTF-8, or no unknown token
            raise ModelUnusable(f"The model's vocabulary is damaged: {error}.") from error
        return WordPieceTokenizer(
            spellings,
            unknown_token=unknown_token,
            lower_case=self._metadata("tokenizer.ggml.normalizer.lowercase") != "false",
            strip_accents=self._metadata("tokenizer.ggml.normalizer.strip_accents") != "false",
        )

    def _tokenize(self, text: str, *, add_special: bool, reads_special: bool = False) -> np.ndarray:
        encoded = text.encode("utf-8")
        capacity = len(encoded) + 8
        while True:
            tokens = np.empty(capacity, dtype=np.int32)
            pointer = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
            count = self._llama.llama_tokenize(
                self._vocabulary, encoded, len(encoded), pointer, capacity, add_special, reads_special
            )
            if count >= 0:
                return tokens[:count].copy()
            capacity = -count

    def token_texts(self, tokens: np.ndarray) -> list[str]:
        """What each token stands for; special tokens by their names."""
        with self._lifetime:
            return [self._piece(int(token)) for token in tokens]

    def _piece(self, token: int) -> str:
        known = self._pieces.get(token)
        if known is None:
            known = self._read_piece(token)
            with self._piece_lock:
                self._pieces[token] = known
        return known

    def _read_piece(self, token: int) -> str:
        return self._read_piece_bytes(token).decode("utf-8", "replace")

    def _read_piece_bytes(self, token: int) -> bytes:
        size = PIECE_BUFFER_SIZE
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = self._llama.llama_token_to_piece(self._vocabulary, token, buffer, size, 0, True)
            if length >= 0:
                return bytes(buffer.raw[:length])
            size = -length

    def token_spans(self, text: str) -> list[tuple[int, int] | None]:
        """See LoadedModel.token_spans. All are None where the pieces do not add up to the text."""
        if self._word_piece is not None:
            return self._word_piece.spans(text)
        with self._lifetime:
            pieces = [self._read_piece_bytes(int(token)) for token in self._tokenize(text, add_special=False)]
        joined, encoded = b"".join(pieces), text.encode("utf-8")
        # SentencePiece vocabularies put a space in front of the text that is not in it.
        n_added = len(joined) - len(encoded)
        if joined[max(n_added, 0) :] != encoded or n_added not in (0, 1):
            return [None] * len(pieces)
        ends = np.cumsum([0, *map(len, pieces)]) - n_added
        return [(max(0, int(start)), int(end)) for start, end in pairwise(ends)]

    def frame_query(self, query: str) -> PairFrame:
        """By the template that the file states for pairs, else as the tokenizer's special tokens stand around pairs."""
        with self._lifetime:
            template = self._llama.llama_model_chat_template(self._pointer, b"rerank")
            if template:
                return self._fill_template(template.decode("utf-8", "replace"), query)
            separator = self._pair_separator()
        prefix, suffix = self.info.prefix_tokens, self.info.suffix_tokens
        head = np.concatenate((prefix, self.tokenize(query), suffix, separator))
        return PairFrame(head.astype(np.int32), np.array(suffix, dtype=np.int32))

    def _pair_separator(self) -> tuple[int, ...]:
        """What stands between the parts of a pair besides the first one's closing token: RoBERTa's kind doubles it."""
        llama = self._llama
        doubles = (llama.LLAMA_VOCAB_TYPE_UGM, llama.LLAMA_VOCAB_TYPE_BPE)
        is_encoder = not self.info.is_causal and len(self.info.suffix_tokens) == 1
        if is_encoder and llama.llama_vocab_type(self._vocabulary) in doubles:
            return self.info.suffix_tokens
        return ()

    def _fill_template(self, template: str, query: str) -> PairFrame:
        """Special tokens are read in the template, not in what people send."""
        before, _, rest = template.partition("{query}")
        between, _, after = rest.partition("{document}")
        # White space beside a slot may share a token with what is put into the slot, so it goes with that.
        opening, question_lead = _split_trailing_space(before)
        question_trail, middle = _split_leading_space(between)
        middle, lead = _split_trailing_space(middle)
        trail, closing = _split_leading_space(after)
        head = (
            self._tokenize(opening, add_special=False, reads_special=True),
            self._tokenize(question_lead + query + question_trail, add_special=False),
            self._tokenize(middle, add_special=False, reads_special=True),
        )
        tail = self._tokenize(closing, add_special=False, reads_special=True)
        return PairFrame(np.concatenate(head), tail, lead, trail)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text that token ids stand for, special tokens left out."""
        ids = np.asarray(tokens, dtype=np.int32)
        pointer = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        size = 8 * len(ids) + 64
        with self._lifetime:
            while True:
                buffer = ctypes.create_string_buffer(size)
                length = self._llama.llama_detokenize(self._vocabulary, pointer, len(ids), buffer, size, True, False)
                if length >= 0:
                    return buffer.raw[:length].decode("utf-8", "replace")
                size = -length

    def open_context(self) -> LlamaContext:
        """Make a context for one window's worth of tokens. Raises ModelUnusable if llama.cpp cannot."""
        with self._lifetime:
            return LlamaContext(self._llama, self._pointer, self.info, self._lifetime)

    def close(self) -> None:
        """Give the memory back, as soon as the last call has returned and the last context is closed."""
        self._lifetime.end()


def _split_trailing_space(text: str) -> tuple[str, str]:
    kept = text.rstrip()
    return kept, text[len(kept) :]


def _split_leading_space(text: str) -> tuple[str, str]:
    kept = text.lstrip()
    return text[: len(text) - len(kept)], kept


class LlamaContext:
    """A llama.cpp context and the arrays of its one batch. Never used by two threads at once, nor while it is closed.

    It is one of the users of its model.
    """

    def __init__(self, llama: Any, model: Any, info: ModelInfo, lifetime_of_model: Lifetime) -> None:
        self._llama = llama
        self._info = info
        self._ranks = info.pooling is Pooling.RANK
        self.max_tokens = max(info.window, MIN_CONTEXT_TOKENS)
        self.max_sequences = MAX_RANKED_SEQUENCES if self._ranks else MAX_SEQUENCES
        self._pointer = llama.llama_init_from_model(model, self._parameters())
        if not self._pointer:
            raise ModelUnusable(f"llama.cpp cannot make a context of {self.max_tokens} tokens for {info.name!r}.")
        self._model_in_use = ExitStack()
        self._model_in_use.enter_context(lifetime_of_model)
        self._memory = llama.llama_get_memory(self._pointer)
        self._n_threads = 1
        self._make_batch()

    def _parameters(self) -> Any:
        parameters = self._llama.llama_context_default_params()
        # A model that sees both ways needs a whole text in one micro-batch, so all three are the same.
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = self.max_tokens
        parameters.n_seq_max = self.max_sequences
        # One buffer for all sequences: otherwise each gets an equal share of n_ctx.
        parameters.kv_unified = True
        parameters.n_threads = parameters.n_threads_batch = 1
        parameters.embeddings = True
        parameters.pooling_type = 4 if self._ranks else 0
        parameters.no_perf = True
        return parameters

    def _make_batch(self) -> None:
        n = self.max_tokens
        self._tokens = np.zeros(n, dtype=np.int32)
        self._positions = np.zeros(n, dtype=np.int32)
        self._sequence_ids = np.zeros(n, dtype=np.int32)
        self._ones = np.ones(n, dtype=np.int32)
        self._outputs = np.ones(n, dtype=np.int8)
        # llama.cpp wants a list of sequences per token; each list is one element of `_sequence_ids`.
        self._sequence_pointers = self._sequence_ids.ctypes.data + 4 * np.arange(n, dtype=np.uintp)
        self._counting = np.arange(n, dtype=np.int32)
        int32_pointer = ctypes.POINTER(ctypes.c_int32)
        batch = self._llama.llama_batch()
        batch.token = self._tokens.ctypes.data_as(int32_pointer)
        batch.pos = self._positions.ctypes.data_as(int32_pointer)
        batch.n_seq_id = self._ones.ctypes.data_as(int32_pointer)
        batch.seq_id = self._sequence_pointers.ctypes.data_as(ctypes.POINTER(int32_pointer))
        batch.logits = self._outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        self._batch = batch

    def compute(self, sequences: Sequence[np.ndarray], *, n_threads: int) -> np.ndarray:
        """See Context.compute."""
        n_tokens = self._fill(sequences)
        if n_threads != self._n_threads:
            self._llama.llama_set_n_threads(self._pointer, n_threads, n_threads)
            self._n_threads = n_threads
        if self._memory:
            self._llama.llama_memory_clear(self._memory, False)
        status = self._llama.llama_decode(self._pointer, self._batch)
        if status != 0:
            raise InferenceFailed(f"llama.cpp returned {status} for a batch of {n_tokens} tokens.")
        return self._read_scores(len(sequences)) if self._ranks else self._read_rows(n_tokens)

    def _fill(self, sequences: Sequence[np.ndarray]) -> int:
        start = 0
        for number, sequence in enumerate(sequences):
            end = start + len(sequence)
            if end > self.max_tokens or number >= self.max_sequences:
                raise InferenceFailed(f"A batch of {end} tokens or {number + 1} texts does not fit the context.")
            self._tokens[start:end] = sequence
            self._positions[start:end] = self._counting[: len(sequence)]
            self._sequence_ids[start:end] = number
            start = end
        self._batch.n_tokens = start
        return start

    def _read_rows(self, n_tokens: int) -> np.ndarray:
        address = self._llama.llama_get_embeddings(self._pointer)
        if not address:
            raise InferenceFailed("llama.cpp gave no embeddings.")
        return np.ctypeslib.as_array(address, shape=(n_tokens, self._info.n_dims))

    def _read_scores(self, n_sequences: int) -> np.ndarray:
        rows = []
        for number in range(n_sequences):
            address = self._llama.llama_get_embeddings_seq(self._pointer, number)
            if not address:
                raise InferenceFailed(f"llama.cpp gave no score for text {number} of the batch.")
            rows.append(np.ctypeslib.as_array(address, shape=(1,)).copy())
        return np.stack(rows)

    def close(self) -> None:
        """Give the context's memory back, and the model's if it waits for this context alone."""
        if self._pointer:
            self._llama.llama_free(self._pointer)
            self._pointer = None
            self._model_in_use.close()
