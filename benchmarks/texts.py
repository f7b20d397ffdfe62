"""Fresh texts of a wanted length: no two alike, so that nothing can be found again."""

from __future__ import annotations

import random
from collections.abc import Iterator

# Common English words, one token each in the vocabulary measured.
WORD_LIST = (
    "the water house river mountain people school morning evening summer winter travel music garden "
    "window street market doctor teacher student letter picture village forest island animal engine "
    "number question answer problem reason history science nature weather moment minute system power "
    "paper story table office friend family country city light night color voice field money place world "
    "young small large early great little known other under after before between against through during "
    "without within along among across behind beyond above below near walked looked found turned called "
    "asked wanted needed worked played moved lived believed happened provided included continued learned "
    "changed watched followed created opened offered remembered considered appeared bought served died "
    "sent built stayed fell reached killed remained suggested raised passed sold required reported "
    "decided "
)
N_SPECIAL_TOKENS = 2
WORDS = WORD_LIST.split()


def make_texts(n_tokens: int, *, seed: int) -> Iterator[str]:
    """Endless texts with `n_tokens` on average, from a quarter less to a quarter more.

    Words alone tell texts apart, as numbers would make the length depend on the seed: six words of this list make
    more than 10^12 texts, so that a text seen before is rarer than one in a million.
    """
    generator = random.Random(seed)
    while True:
        length = round(n_tokens * generator.uniform(0.75, 1.25)) - N_SPECIAL_TOKENS
        yield " ".join(generator.choices(WORDS, k=max(1, length)))
