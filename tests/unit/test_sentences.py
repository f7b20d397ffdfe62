"""Text to sentences: the phenomena of the golden rules, layout, scripts, provenance and hostile input."""

from __future__ import annotations

import random
import time

import pysbd
import pytest

from llama_embeddings.documents.extracted import ExtractedDocument
from llama_embeddings.documents.extraction import extract_text
from llama_embeddings.documents.segmentation import SEGMENTATION_NAME, segmentation_key
from llama_embeddings.documents.sentences import (
    _SEGMENTER,
    MAXIMUM_SENTENCE_CHARACTERS,
    split_into_sentences,
)
from tests.pdf_writing import write_text_pdf


def split(text: str, minimum_length: int = 1) -> list[str]:
    document = ExtractedDocument("text/plain", text)
    return [sentence.text for sentence in split_into_sentences(document, minimum_length=minimum_length)]


# One row for each of the 48 English golden rules, in their order, with sentences of its own; "|" marks the boundaries.
GOLDEN_RULES = [
    ("full stop", "The boat came home.| Her crew was tired."),
    ("question mark", "Where is the boat?| She came home late."),
    ("exclamation mark", "What a storm!| Nobody slept."),
    ("initial in a name", "The captain was Clara B. Hansen."),
    ("abbreviation before a number", "The map is on p. 17."),
    ("co. inside", "Did Clara and co. arrive on time?"),
    ("company inside", "She sold the boat to Hansen, Berg & Co. in March."),
    ("co. at the end", "We wrote to Clara and co.| They have not answered."),
    ("company at the end", "She sold it to Hansen, Berg & Co.| It was cheap."),
    ("mountain", "You see Mt. Etna from the deck."),
    ("two meanings of st.", "St. Mary's Chapel stands on 3rd st. near the pier."),
    ("possessive abbreviation", "This was Hansen Jr.'s boat."),
    ("letters with full stops inside", "We sailed to the U.S.A. in spring."),
    ("letters at the end, E.U.", "They trade in the E.U.| How about you?"),
    ("letters at the end, U.S.", "They trade in the U.S.| How about you?"),
    ("letters before a capital", "She works for the U.S. Government in Boston."),
    ("letters before a number", "He has sailed for the U.S. for 12 years."),
    ("time of day", "At 6 a.m. Mr. Berg left the pier.| He came back at 9 P.M.| Mr. Berg was wet."),
    ("decimal number", "The ticket costs $20.00 on board."),
    ("decimal number at the end", "The ticket costs $20.00.| It is sold on board."),
    ("sentence in brackets", "She mends nets (She sailed for 9 years as a cook.) at the old pier."),
    ("mail address", "Write to Clara.Hansen@example.org.| She answers quickly."),
    ("web address", "The timetable is at https://www.example.org/ferries/summer_2.html.| Have a look."),
    ("single quotes inside", "He called out, 'It is over.' she wrote."),
    ("double quotes inside", 'He called out, "It is over." she wrote.'),
    ("double quotes at the end", 'He called out, "It is over."| She put down the rope.'),
    ("two exclamation marks", "Ahoy!!| The boat is here."),
    ("two question marks", "What??| Who said so?"),
    ("exclamation and question mark", "What!?| Is that so?"),
    ("question and exclamation mark", "What?!| Is that so?"),
    ("list 1.) without full stops", "1.) The oars |2.) The sails"),
    ("list 1.) with full stops", "1.) Lift the oars. |2.) Set the sails."),
    ("list 1) without full stops", "1) The oars |2) The sails"),
    ("list 1) with full stops", "1) Lift the oars. |2) Set the sails."),
    ("list 1. without full stops", "1. The oars |2. The sails"),
    ("list 1. with full stops", "1. Lift the oars. |2. Set the sails."),
    ("bulleted numbers", "• 9. The long oars |• 10. The short sails"),
    ("hyphen bullets", "⁃9. The long oars |⁃10. The short sails"),
    ("alphabetical list", "a. The long oars |b. The short sails |c. The old anchor"),
    ("number sign", "The boat is N°. 2041.118.907.| That is on her bow."),
    ("exclamation mark in a name", "He works for Yahoo! in the harbour office."),
    ("I at the end", "Nobody knew it but you and I.| Have you met Clara I. Berg?"),
    ("ellipsis in quotes", "Berg writes that at sea, “the hours of the day lose their names. . . .”"),
    ("ellipsis in brackets", '"Berg [...] never speaks of the storm [...]" (Hansen 12).'),
    (
        "ellipsis with its own full stop",
        "The rest of the letter was lost at sea in that year . . . .| Nobody missed it.",
    ),
    ("four dots", "We could have waited....| The tide turned."),
    (
        "ellipses inside",
        "It was not ... well, how shall I say...you know . . . what we meant, the tide . . . I forgot.",
    ),
    ("ellipsis after a sentence", "He forgot . . . the names of all boats.| . . . The storm remained. . . ."),
]


@pytest.mark.parametrize(("rule", "marked"), GOLDEN_RULES, ids=[rule for rule, _ in GOLDEN_RULES])
def test_each_golden_rule_of_english_holds(rule: str, marked: str) -> None:
    """Sentences end at the marks and nowhere else."""
    assert split(marked.replace("|", "")) == [part.strip() for part in marked.split("|")]


def test_the_table_has_all_48_rules() -> None:
    """The number that splitters are compared by."""
    assert len(GOLDEN_RULES) == 48


@pytest.mark.parametrize(
    "marked",
    [
        "風が強くなった。|舟は戻ってきた！|本当ですか？|はい。",
        "彼は「もう帰ろう。」と言った。|誰も答えなかった。",
        "傍晚起了风。|渔船回来了！|真的吗？",
        "हवा तेज़ हो गई।| नावें लौट आईं।",
        "هل عادت القوارب؟| نعم عادت القوارب.",
        "Ветер усилился.| Лодки вернулись рано.",
        "Der Wind frischte auf.| Über den Dächern wurde es dunkel.",
    ],
)
def test_sentences_of_other_scripts_end_at_their_own_marks(marked: str) -> None:
    """Also where no space follows, and not inside Japanese quotation marks."""
    assert split(marked.replace("|", "")) == [part.strip() for part in marked.split("|")]


def test_wrapped_lines_are_one_sentence_and_blank_lines_end_one() -> None:
    """A single newline is a space; a hyphen at a line's end stays without one."""
    text = (
        "The wind rose in the even-\ning and the well-\nknown boats of\nthe harbour came home\n\nNobody was surprised"
    )
    assert split(text) == [
        "The wind rose in the even-ing and the well-known boats of the harbour came home",
        "Nobody was surprised",
    ]


def test_headings_and_list_items_stand_alone() -> None:
    """They have no full stop, and must not be glued to what follows."""
    text = (
        "# The Harbour\nThe boats came home before the storm and nobody on the pier was surprised.\n"
        "What they carried\n- herring and cod\n- a letter from Clara\n1. the first net\n2. the second net\n"
        "=====\nThe End"
    )
    assert split(text) == [
        "# The Harbour",
        "The boats came home before the storm and nobody on the pier was surprised.",
        "What they carried",
        "- herring and cod",
        "- a letter from Clara",
        "1. the first net",
        "2. the second net",
        "The End",
    ]


def test_wrapped_chinese_continues_without_a_space() -> None:
    """Chinese has no spaces, so a line end must not become one."""
    assert split("傍晚起了风，渔船比平时更早回到港口，大家都在岸\n边等着。") == [
        "傍晚起了风，渔船比平时更早回到港口，大家都在岸边等着。"
    ]


def test_offsets_cover_the_sentence_in_the_document() -> None:
    """Apart from whitespace, text[start:end] is the sentence."""
    text = "  The   boats\ncame home.\tNobody\n was  surprised.\n\n"
    text += "夕方になると海の上では風が強く\nなった。舟は戻った。\n- Größe: 5 €.\n"
    sentences = split_into_sentences(ExtractedDocument("text/plain", text), minimum_length=1)
    assert len(sentences) == 5
    for sentence in sentences:
        covered = text[sentence.start : sentence.end]
        assert covered == covered.strip()
        assert "".join(covered.split()) == "".join(sentence.text.split())
    assert [sentence.page for sentence in sentences] == [None] * 5


def test_sentences_know_the_page_they_start_on() -> None:
    """Crossing a page boundary does not change that, and an empty page is counted."""
    pages = [
        ["The first page has this sentence. The second one goes on and on and on"],
        ["over the end of the page. The third is on page two."],
        [],
        ["The fourth is on page four."],
    ]
    sentences = split_into_sentences(extract_text(write_text_pdf(pages)), minimum_length=15)
    assert [(sentence.page, sentence.text.split()[1]) for sentence in sentences] == [
        (1, "first"),
        (1, "second"),
        (2, "third"),
        (4, "fourth"),
    ]


def test_sentences_shorter_than_the_minimum_are_left_out() -> None:
    """The minimum itself is long enough."""
    assert split("Exactly so long. Too short. Long enough to be kept.", minimum_length=16) == [
        "Exactly so long.",
        "Long enough to be kept.",
    ]


def test_no_letter_is_lost_even_if_pysbd_uses_it_as_a_placeholder() -> None:
    """pySBD replaces these characters in its answers; ours come from the document."""
    text = "Signs like ∯ and ♬ and ȸ and ∮ are kept. So are & and ♭ and &ᓴ& here. Even ☉ and ☄!? Yes."
    assert " ".join(split(text)) == text


@pytest.mark.parametrize("unit", ["a", "word ", "U.S. ", "1. ", "(a ", "“a ", "a\n", "。", "Mr. ", '"a. '])
def test_hostile_repetition_takes_time_in_proportion_and_sentences_stay_bounded(unit: str) -> None:
    """100,000 characters without a sentence end are split, within seconds."""
    began = time.perf_counter()
    sentences = split(unit * (100_000 // len(unit)))
    assert time.perf_counter() - began < 10
    assert max(map(len, sentences), default=0) <= MAXIMUM_SENTENCE_CHARACTERS


def test_a_line_of_ten_million_characters_is_split() -> None:
    """Nothing is lost of it, and it is no heavier than a long book."""
    assert sum(map(len, split("x" * 10_000_000))) == 10_000_000


def test_a_long_paragraph_is_split_at_sentence_ends_only() -> None:
    """Handing pySBD pieces of a paragraph tears no sentence."""
    sentence = "The wind rose in the evening and the boats came home early."
    assert split(" ".join([sentence] * 500)) == [sentence] * 500


def test_fewer_abbreviations_are_looked_for_and_the_same_sentences_found() -> None:
    """pySBD as it comes, and as it is used here, on abbreviations in every neighbourhood that its rules know."""
    as_it_comes = pysbd.Segmenter(language="en", clean=False)
    abbreviations = [each.strip() for each in as_it_comes.language_module.Abbreviation.ABBREVIATIONS]
    generator = random.Random(1)
    for _ in range(400):
        words = []
        for _ in range(generator.randint(2, 60)):
            abbreviation = generator.choice(abbreviations)
            written = generator.choice([abbreviation, abbreviation.title(), abbreviation.upper()])
            end = generator.choice([".", "", ",", ". 5", ".:", ".:5", ". The", ". (a)", ".-", ".?", ". I'm"])
            words.append(generator.choice([written + end, "no.", "in the", "He said.", "Is it?", "U.S. The", "5 p.m."]))
        text = " ".join(words)
        assert list(_SEGMENTER.processor(text).process()) == list(as_it_comes.processor(text).process())


def test_the_segmentation_key_tells_minimum_lengths_and_rules_apart() -> None:
    """It becomes part of the key under which a document is remembered."""
    assert SEGMENTATION_NAME in segmentation_key(15)
    assert segmentation_key(15) != segmentation_key(16)
