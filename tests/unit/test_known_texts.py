"""The filter in front of the store: never wrong about what was added, seldom about what was not."""

from embeddings_data_models import compute_text_hash
from llama_embeddings.services.known_texts import N_DIGITS, OF_TOKENS, KnownTexts


def test_nothing_is_known_at_first() -> None:
    """An empty filter sends nobody to the store."""
    assert not any(KnownTexts().may_hold(compute_text_hash(str(number))) for number in range(100))


def test_what_was_added_is_never_denied() -> None:
    """A text that is denied would be computed and stored anew."""
    known = KnownTexts()
    hashes = [compute_text_hash(str(number)) for number in range(5_000)]
    known.add(hashes)
    assert all(known.may_hold(text_hash) for text_hash in hashes)


def test_few_new_texts_are_taken_for_known_ones() -> None:
    """With a hundred thousand texts, fewer than one in a thousand."""
    known = KnownTexts()
    known.add(compute_text_hash(f"old {number}") for number in range(100_000))
    n_wrong = sum(known.may_hold(compute_text_hash(f"new {number}")) for number in range(20_000))
    assert n_wrong < 20


def test_adding_many_remembers_what_adding_one_by_one_does() -> None:
    """Bit for bit."""
    one_by_one, at_once = KnownTexts(), KnownTexts()
    hashes = [compute_text_hash(str(number)) for number in range(3_000)]
    one_by_one.add(hashes)
    at_once.add_digits("".join(text_hash[:N_DIGITS] for text_hash in hashes))
    at_once.add_digits("")
    assert one_by_one._bits == at_once._bits


def test_texts_and_their_tokens_are_told_apart() -> None:
    """A text with an embedding has no matrix yet."""
    known = KnownTexts()
    hashes = [compute_text_hash(str(number)) for number in range(1_000)]
    known.add(hashes[:500])
    known.add(hashes[500:], OF_TOKENS)
    assert [known.may_hold(text_hash, OF_TOKENS) for text_hash in hashes] == [False] * 500 + [True] * 500
    assert [known.may_hold(text_hash) for text_hash in hashes] == [True] * 500 + [False] * 500
