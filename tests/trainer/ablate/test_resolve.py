"""Variants of a recipe: what they reach, and when they are no rows."""

import pytest

from tests.trainer.refining import model_folder
from trainer.ablate.resolve import RecipeSource, choose_variants, resolve
from trainer.ablate.variants import FULL, VARIANTS
from trainer.errors import RecipeError, TrainerError
from trainer.recipe_file import load_recipe


def rows_of(name, *, settings=(), names=None, custom=()):
    source = RecipeSource(name, tuple(settings))
    return {row.name: row for row in resolve(choose_variants(names, custom, source), source)}


def changed(row, full):
    """Dotted values of a row's recipe that are not the full one's."""

    def flat(values, prefix=""):
        for key, value in values.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    before = dict(flat(full.model_dump(exclude={"name"})))
    return {
        key: value
        for key, value in flat(row.recipe.model_dump(exclude={"name"}))
        if value != before[key]
    }


AH = "filters.attention_hijack.enabled"
# One value each, whatever the recipe.
SINGLE = {
    "learnable-registers": {"registers.fill": "learnable"},
    "no-uni": {"loss.lambda_uni": 0},
    "no-spu": {"loss.lambda_spu": 0},
    "no-fp-gp": {"filters.fp_gp.enabled": False},
    "no-register-guided": {"filters.register_guided.enabled": False},
    "fill-zeros": {"registers.fill": "zeros"},
    "fill-uniform": {"registers.fill": "uniform"},
}
RELEASE = {
    "registers.rounding": "floor",
    "registers.fill": "zeros",
    "filters.attention_hijack.variant": "release",
    "loss.lambda_con": 0.4,
    "optim.clip_norm": 0.0,
}
RECIPES = {
    "demo": SINGLE
    | {
        "with-ah": {AH: True},
        "wide-registers": {"registers.r_reg": 13},  # 2 on a grid of 14
        "unmatched": {"loss.matched": False},
        "release": RELEASE,  # tau_reg is the recipe's own
    },
    "siglip2-so400m": SINGLE
    | {
        "no-ah": {AH: False},
        "wide-registers": {"registers.r_reg": 16},
        "unmatched": {"loss.matched": False},
        "release": RELEASE | {"filters.register_guided.threshold": 0.55},
    },
    "eva-clip-8b": SINGLE
    | {
        "no-ah": {AH: False},
        "wide-registers": {"registers.r_reg": 16},
        "matched": {"loss.matched": True},
        "release": RELEASE | {"filters.register_guided.threshold": 0.55},
    },
    "dinov2-g": SINGLE
    | {
        "with-ah": {AH: True},
        "wide-registers": {"registers.r_reg": 19},
        "unmatched": {"loss.matched": False},
        "release": RELEASE | {"filters.register_guided.threshold": 0.55},
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_variant_changes_its_own_values_of_a_shipped_recipe_and_no_others(name):
    rows = rows_of(name)
    full = load_recipe(name)

    trained = {
        row.name: changed(row, full)
        for row in rows.values()
        if row.recipe is not None and row.name != FULL and row.variant.served_width is None
    }

    assert trained == RECIPES[name]
    assert list(rows)[0] == FULL
    assert rows[FULL].recipe == full
    skipped = {row.name for row in rows.values() if row.skipped}
    assert skipped == {variant.name for variant in VARIANTS} - set(trained)


def test_a_variant_that_equals_the_recipe_is_skipped_with_the_values_that_make_it_so():
    rows = rows_of("dinov2-g")

    assert rows["no-ah"].skipped == f"equals the full recipe, which has {AH}=false already"
    assert rows["paper"].skipped == "equals the full recipe, which is on paper already"


def test_a_method_alone_is_ablated_against_the_other_one():
    rows = rows_of("release", names="paper,release,fill-zeros")

    assert rows["paper"].recipe.registers.fill == "gaussian"
    assert "registers.rounding=ceil" in rows["paper"].changes
    assert rows["release"].skipped == "equals the full recipe, which is on release already"
    assert rows["fill-zeros"].skipped


def test_a_recipe_file_that_lies_on_a_method_cannot_lie_on_the_other(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text('extends = "release"\n[loss]\nuniformity = 0.5\n')

    rows = rows_of(str(path), names="paper,no-uni")

    assert "is of the variant release already" in rows["paper"].skipped
    assert rows["no-uni"].recipe.loss.lambda_uni == 0


def test_settings_of_the_user_hold_for_every_row_and_a_variant_comes_on_top():
    rows = rows_of("demo", settings=["run.max_steps=7", "loss.lambda_uni=2"], names="no-uni,no-spu")

    assert {row.recipe.run.max_steps for row in rows.values()} == {7}
    assert rows["no-spu"].recipe.loss.lambda_uni == 2
    assert rows["no-uni"].recipe.loss.lambda_uni == 0


def test_served_widths_are_rows_of_the_full_run():
    rows = rows_of("rice-l")  # its border is two patches wide

    served = {name: row for name, row in rows.items() if row.variant.served_width is not None}
    assert list(served) == ["served-width-4", "served-width-8"]
    assert all(row.recipe == rows[FULL].recipe for row in served.values())
    assert served["served-width-4"].changes == "full run, --register-width 4"


def test_a_served_width_that_the_run_has_anyway_is_skipped():
    rows = rows_of("demo", names="served-width-0,served-width-1")

    assert rows["served-width-1"].skipped == ("the full run is served with a border of 1 already")
    assert not rows["served-width-0"].skipped


def test_a_border_that_cannot_be_doubled_is_skipped(tmp_path):
    model = model_folder(tmp_path / "model")
    settings = [f"backbone.name={model}", "registers.r_reg=2", "registers.rounding=floor"]

    rows = rows_of("paper", settings=[*settings, "data.size=48"], names="wide-registers")

    assert (
        "no registers.r_reg makes the border of 1 on a grid of 3" in rows["wide-registers"].skipped
    )


def test_a_learned_border_has_no_row_where_a_recipe_trains_at_several_sizes():
    rows = rows_of("demo", settings=["data.other_sizes=[192]"], names="learnable-registers,no-uni")

    assert "a learnable border is made for one size" in rows["learnable-registers"].skipped
    assert rows["no-uni"].recipe is not None


def test_variants_of_the_user_may_set_several_values_and_lists():
    custom = [
        "Hot_2:loss.temperature=0.5, filters.attention_hijack.layers=[1, 2],loss.lambda_spu=1"
    ]

    row = rows_of("demo", names="no-uni", custom=custom)["Hot_2"]

    assert row.recipe.loss.temperature == 0.5
    assert row.recipe.loss.lambda_spu == 1
    assert row.recipe.filters.attention_hijack.layers == (1, 2)


def test_a_variant_that_repeats_another_is_skipped():
    rows = rows_of("demo", names="no-uni", custom=["zero:loss.lambda_uni=0.0"])

    assert rows["zero"].skipped.startswith("equals the variant no-uni")


def test_two_variants_of_one_name_are_refused():
    with pytest.raises(TrainerError, match="two variants are called 'a'"):
        rows_of("demo", custom=["a:loss.temperature=1", "a:loss.temperature=2"])


def test_a_value_that_the_recipe_does_not_take_names_the_variant():
    with pytest.raises(RecipeError, match=r"variant hot: .*nearest valid key is loss.temperature"):
        rows_of("demo", custom=["hot:loss.temprature=1"])


def test_an_unknown_variant_lists_the_known_ones():
    with pytest.raises(TrainerError, match="did you mean no-uni") as error:
        rows_of("demo", names="no-unii")

    assert all(variant.name in str(error.value) for variant in VARIANTS)
