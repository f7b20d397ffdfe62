"""Text to sentences, each with its page and its place in the extracted text.

The text is first cut into paragraphs (blank lines, list items, headings), in which lines that were only wrapped are
put together; a paragraph is then split by pySBD, whose rules for English were the best of three splitters measured
(47 of the 48 golden rules; syntok 34, blingfire 36). pySBD sees at most 2,000 characters at a time, because its time
grows with the square of the length; only its sentence ends are used, so that no character can be lost in it. Ends of
sentences that need no space (Chinese, Japanese) or that it does not know (Hindi, Arabic and others) are found here.

Nothing is embedded or translated here, and no language is detected.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pysbd
from pysbd.lang.english import English

from embeddings_data_models import Sentence
from llama_embeddings.documents.extracted import ExtractedDocument
from llama_embeddings.documents.layout import ends_paragraph, is_written_without_spaces, measure_width

MAXIMUM_SENTENCE_CHARACTERS = 2_000
"""Longer runs without a sentence end are split at whitespace, or anywhere if they have none."""

# What is held at once has to stay small whatever the file: one line of all its bytes, or lines without a blank one.
_MAXIMUM_PARAGRAPH_CHARACTERS = 100_000
_MAXIMUM_BLOCK_LINES = 5_000


class _English(English):
    """pySBD's English, which looks through a text for those abbreviations only that stand before a period in it.

    All that it does about an abbreviation is to change the period behind it. Its own search takes "in" or "no" for one
    wherever a word begins with it, and goes over the whole text for each: three quarters of all its time.
    """

    class AbbreviationReplacer(English.AbbreviationReplacer):
        lang: Any

        def search_for_abbreviations_in_string(self, text: str) -> str:
            lowered = text.lower()
            known = self.lang
            self.lang = SimpleNamespace(
                Abbreviation=SimpleNamespace(
                    ABBREVIATIONS=[each for each in known.Abbreviation.ABBREVIATIONS if f"{each.strip()}." in lowered],
                    PREPOSITIVE_ABBREVIATIONS=known.Abbreviation.PREPOSITIVE_ABBREVIATIONS,
                    NUMBER_ABBREVIATIONS=known.Abbreviation.NUMBER_ABBREVIATIONS,
                )
            )
            try:
                changed: str = super().search_for_abbreviations_in_string(text)
                return changed
            finally:
                self.lang = known


_SEGMENTER = pysbd.Segmenter(language="en", clean=False)
_SEGMENTER.language_module = _English


def split_into_sentences(document: ExtractedDocument, *, minimum_length: int) -> list[Sentence]:
    """Split a document; sentences of fewer than `minimum_length` characters are left out.

    `document.text[start:end]` covers a sentence; its `text` has single spaces for all whitespace. A sentence that
    crosses a page boundary belongs to the page on which it starts.
    """
    return list(find_sentences(document, minimum_length=minimum_length))


def find_sentences(document: ExtractedDocument, *, minimum_length: int) -> Iterator[Sentence]:
    """The same one by one, so that a long document's sentences need not be held at once."""
    for start, end in _cut_long_paragraphs(document.text, _find_paragraphs(document.text)):
        paragraph = _Paragraph.unwrap(document.text, start, end)
        for first, last in _find_sentences(paragraph.text):
            if last - first >= minimum_length:
                origin, origin_end = paragraph.locate(first), paragraph.locate(last - 1) + 1
                page = bisect_right(document.page_starts, origin) or None
                yield Sentence(paragraph.text[first:last], page, origin, origin_end)


# --- Paragraphs ------------------------------------------------------------------------------------------------------

_LINE = re.compile(r"[^\n]+")


def _find_paragraphs(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each paragraph, heading and list item."""
    for block in _find_blocks(text):
        width = measure_width([text[start:end] for start, end in block])
        first = block[0][0]
        for (start, end), (next_start, next_end) in pairwise(block):
            if ends_paragraph(text[start:end], text[next_start:next_end], width):
                yield first, end
                first = next_start
        yield first, block[-1][1]


def _cut_long_paragraphs(text: str, paragraphs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Paragraphs of bounded length: cut after a certain sentence end, at a space, or anywhere."""
    for start, end in paragraphs:
        while end - start > _MAXIMUM_PARAGRAPH_CHARACTERS:
            limit = start + _MAXIMUM_PARAGRAPH_CHARACTERS
            certain = [match.end() for match in _CERTAIN_END.finditer(text, limit - MAXIMUM_SENTENCE_CHARACTERS, limit)]
            space = text.rfind(" ", limit - MAXIMUM_SENTENCE_CHARACTERS, limit)
            cut = certain[-1] if certain else (space + 1 if space > 0 else limit)
            yield start, cut
            start = cut
        yield start, end


def _find_blocks(text: str) -> Iterator[list[tuple[int, int]]]:
    """Runs of neighbouring lines, stripped; a line without letters and digits parts them as a blank one does."""
    block: list[tuple[int, int]] = []
    previous_end = 0
    for match in _LINE.finditer(text):
        line = match.group()
        is_blank = not any(map(str.isalnum, line))
        is_full = len(block) >= _MAXIMUM_BLOCK_LINES
        if block and (is_blank or is_full or match.start() > previous_end + 1):
            yield block
            block = []
        if not is_blank:
            start = match.start() + len(line) - len(line.lstrip())
            block.append((start, match.start() + len(line.rstrip())))
        previous_end = match.end()
    if block:
        yield block


@dataclass(frozen=True, slots=True)
class _Paragraph:
    """A paragraph on one line. Piece i begins at `starts[i]` in `text` and came from `origins[i]` of the document."""

    text: str
    starts: list[int]
    origins: list[int]

    @classmethod
    def unwrap(cls, text: str, start: int, end: int) -> _Paragraph:
        parts: list[str] = []
        starts: list[int] = []
        origins: list[int] = []
        length, previous_end = 0, start
        for match in re.compile(r"\S+").finditer(text, start, end):
            separator = _choose_separator(text, previous_end, match.start()) if parts else ""
            starts.append(length + len(separator))
            origins.append(match.start())
            parts += [separator, match.group()]
            length, previous_end = starts[-1] + len(match.group()), match.end()
        return cls("".join(parts), starts, origins)

    def locate(self, position: int) -> int:
        """The offset in the document of the character at `position`, which is not a space."""
        piece = bisect_right(self.starts, position) - 1
        return self.origins[piece] + position - self.starts[piece]


def _choose_separator(text: str, gap_start: int, gap_end: int) -> str:
    """A space, or nothing where a line was wrapped inside a word: after a hyphen, or in Chinese and Japanese."""
    if "\n" not in text[gap_start:gap_end]:
        return " "
    before, after = text[gap_start - 1], text[gap_end]
    if is_written_without_spaces(before) and is_written_without_spaces(after):
        return ""
    inside_word = before == "-" and text[gap_start - 2].islower() and after.islower()
    return "" if inside_word else " "


# --- Sentences -------------------------------------------------------------------------------------------------------

# A place where no splitter would hesitate: long paragraphs are handed over in pieces that end there.
# The lookbehind has a fixed width: a repetition there would make runs without spaces quadratic.
_CERTAIN_END = re.compile(r"(?<=[^\W\d_]{4})[.!?][\"'”’)]?\s(?=[A-ZÀ-ÖØ-Þ])|[。！？।]")

# Ends of sentences in scripts that pySBD's English rules do not know, with the brackets and quotes that close there.
_FOREIGN_END = r"[。！？｡।॥؟۔።။។]+[」』”’）)\"']*"

# "You and I. Have you met?": pySBD takes the I for an initial, unless one of a few words follows that it knows.
_PRONOUN_END = (
    r"\bI\.(?=\s(?:Am|And|Are|But|Can|Could|Did|Do|Does|Had|Has|Have|How|Is|It|If|In|Now|Or|Our|Shall|She|Should|So"
    r"|That|Then|There|They|This|Was|We|Were|What|When|Where|Who|Why|Would|Yes|You|Your)\b)"
)

# Japanese quotations are skipped as a whole: their full stops do not end the sentence around them.
_OWN_END = re.compile(rf"「[^「」]{{0,300}}」|『[^『』]{{0,300}}』|({_FOREIGN_END}|{_PRONOUN_END})")

# Without any of these there is nothing to split at, and pySBD need not be asked.
_POSSIBLE_END = re.compile(r"[.!?．)\]•⁃]")

# "At 5 a.m." is no sentence, although a name follows: the one golden rule that pySBD misses.
_TIME_OF_DAY = re.compile(r"(?:About|After|Around|At|Before|By|From|Since|Until)\s[\d:.\s]+[ap]\.?m\.", re.IGNORECASE)


def _find_sentences(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each sentence of a paragraph, without the spaces around it."""
    start = 0
    for end in _find_sentence_ends(text):
        fragment = text[start:end]
        first = start + len(fragment) - len(fragment.lstrip())
        last = first + len(fragment.strip())
        if last > first:
            yield first, last
        start = end


def _find_sentence_ends(text: str) -> Iterator[int]:
    for chunk_start, chunk_end in _find_chunks(text):
        for start, end in _split_at_own_ends(text, chunk_start, chunk_end):
            yield from (start + offset for offset in _find_ends_in_chunk(text[start:end]))


def _find_chunks(text: str) -> Iterator[tuple[int, int]]:
    """Pieces of at most MAXIMUM_SENTENCE_CHARACTERS: cut after a certain sentence end, at whitespace, or anywhere."""
    start = 0
    while len(text) - start > MAXIMUM_SENTENCE_CHARACTERS:
        limit = start + MAXIMUM_SENTENCE_CHARACTERS
        certain = [match.end() for match in _CERTAIN_END.finditer(text, start, limit)]
        space = text.rfind(" ", start + 1, limit)
        end = certain[-1] if certain else (space + 1 if space > 0 else limit)
        yield start, end
        start = end
    yield start, len(text)


def _split_at_own_ends(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    for match in _OWN_END.finditer(text, start, end):
        if match.group(1):
            yield start, match.end()
            start = match.end()
    if start < end:
        yield start, end


def _find_ends_in_chunk(text: str) -> list[int]:
    """Ends of sentences by pySBD, with fragments that are none put back."""
    if not _POSSIBLE_END.search(text.rstrip()[:-1]):
        return [len(text)]
    ends: list[int] = []
    start = 0
    for end in _ask_pysbd(text):
        fragment = text[start:end].strip()
        if ends and not any(map(str.isalnum, fragment)):
            ends[-1] = end
        elif not _TIME_OF_DAY.fullmatch(fragment):
            ends.append(end)
        else:
            continue
        start = end
    return [*ends[:-1], len(text)]


def _ask_pysbd(text: str) -> Iterator[int]:
    """Where pySBD ends sentences; an end is skipped if pySBD changed the sentence beyond recognition."""
    cursor = 0
    # The processor is asked directly: `segment` searches the whole text once more for every sentence.
    for sentence in _SEGMENTER.processor(text).process():
        stripped = sentence.strip()
        found = text.find(stripped, cursor, cursor + len(stripped) + 16) if stripped else -1
        if found >= 0:
            cursor = found + len(stripped)
            yield cursor
    if cursor < len(text):
        yield len(text)
