"""The variants that there are, and how the user's own are read."""

import pytest

from trainer.ablate.variants import VARIANTS, parse_custom
from trainer.config import Recipe
from trainer.errors import TrainerError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hot", "is not NAME:section.key=value"),
        ("hot:", "is not NAME:section.key=value"),
        ("hot:loss", "is not NAME:section.key=value"),
        ("a/b:loss.temperature=1", "would be a folder's name"),
        ("no-uni:loss.temperature=1", "is the name of something else"),
        ("raw:loss.temperature=1", "is the name of something else"),
        ("served-width-3:loss.temperature=1", "is the name of something else"),
        ("late:loss.temperature=1,run.seed=7", "leave run.seed out"),
    ],
)
def test_a_variant_of_the_user_is_refused_by_what_is_wrong_with_it(text, message):
    with pytest.raises(TrainerError, match=message):
        parse_custom(text)


def test_overrides_name_fields_that_recipes_have():
    fields = set(Recipe().model_dump())
    for variant in VARIANTS:
        assert all(setting.partition(".")[0] in fields for setting in variant.settings)
        assert variant.about
