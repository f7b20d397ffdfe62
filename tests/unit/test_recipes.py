"""Recipes: what makes vectors comparable, and what keeps them apart."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embeddings_data_models import Recipe, Truncation, recipe_family

RECIPE = Recipe(model_digest="ab" * 32, pooling="mean")
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
RECIPES = st.builds(Recipe, model_digest=WORDS, pooling=WORDS, prompt=WORDS, normalisation=WORDS)


def test_family_is_the_published_digest() -> None:
    """Written out here once more: databases hold it, so it must not change."""
    parts = b"\0".join([b"ab" * 32, b"mean", b"l2", b""])
    assert RECIPE.family == hashlib.sha3_256(parts).hexdigest()[:16]
    assert RECIPE.family == "681e9611403e4037"


@pytest.mark.parametrize(
    "change", [{"model_digest": "cd" * 32}, {"pooling": "cls"}, {"prompt": "query: "}, {"normalisation": "none"}]
)
def test_every_ingredient_makes_another_family(change: dict[str, str]) -> None:
    """File, pooling, prompt, normalisation."""
    assert replace(RECIPE, **change).family != RECIPE.family


@given(RECIPES, RECIPES)
def test_families_are_equal_only_for_equal_ingredients(first: Recipe, second: Recipe) -> None:
    """The parts cannot run into each other."""
    assert (first.family == second.family) == (first == second)


@given(RECIPES, st.sampled_from(Truncation), st.integers(1, 10**6))
def test_cut_text_has_a_recipe_of_its_own_in_the_same_family(
    recipe: Recipe, truncation: Truncation, window: int
) -> None:
    """It is found by the same search and never taken for the whole text's vector."""
    cut = recipe.for_cut_text(truncation, window)
    assert cut != recipe.family
    assert recipe_family(cut) == recipe.family
    assert recipe_family(recipe.family) == recipe.family


def test_cut_texts_of_other_rules_and_windows_are_kept_apart() -> None:
    """What the window cuts off depends on both."""
    cut = {RECIPE.for_cut_text(truncation, window) for truncation in Truncation for window in (256, 512)}
    assert len(cut) == 2 * len(Truncation)
