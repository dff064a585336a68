import tomllib
from importlib import resources

import pytest

from trainer.config import Recipe
from trainer.errors import RecipeError
from trainer.recipe_file import field_names, load_recipe, recipe_names


def test_the_recipes_that_ship_load_by_their_names():
    assert {"demo", "paper", "release"} < set(recipe_names())

    for name in recipe_names():
        assert load_recipe(name).name == name


def test_the_paper_recipe_is_the_default_of_every_field():
    assert load_recipe("paper") == Recipe()


def test_the_release_differs_from_the_paper_where_the_method_says():
    paper, release = load_recipe("paper"), load_recipe("release")

    assert (paper.registers.rounding, release.registers.rounding) == ("ceil", "floor")
    assert (paper.registers.fill, release.registers.fill) == ("gaussian", "zeros")
    assert (paper.loss.lambda_con, release.loss.lambda_con) == (0.0, 0.4)
    hijack = [r.filters.attention_hijack for r in (paper, release)]
    assert [h.variant for h in hijack] == ["paper", "release"]
    assert [h.layer_range(27) for h in hijack] == [range(10, 16), range(10, 16)]


@pytest.mark.parametrize(
    ("setting", "nearest"),
    [
        ("loss.temprature=0.1", "loss.temperature"),
        ("filters.fp_gp.treshold=0.4", "filters.fp_gp.threshold"),
        ("loss.rank=4", "lora.rank"),
        ("crop.area=[0.1, 0.2]", "crops.area"),
        ("fp_gp.threshold=0.4", "filters.fp_gp.threshold"),
        ("data.batchsize=4", "data.batch_size"),
        ("optimizer.lr=1", "optim.lr"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_valid_one(setting, nearest):
    with pytest.raises(RecipeError, match="unknown key") as caught:
        load_recipe("paper", [setting])

    assert str(caught.value).endswith(f"nearest valid key is {nearest}")


def test_an_unknown_key_in_a_file_is_refused_with_the_file_named(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[crops]\nnum_crop = 2\n")

    with pytest.raises(RecipeError, match=r"mine.toml: unknown key crops.num_crop; .*num_crops"):
        load_recipe(str(file))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("loss.temperature=0", "loss.temperature: .*greater than 0"),
        ("filters.fp_gp.criterion=euclid", "'cosine' or 'zscore'"),
        ("registers.fill=checkers", "'gaussian', 'zeros', 'uniform' or 'learnable'"),
        ("crops.area=[0.5, 0.25]", "give the smaller number first"),
        ("crops.area=[0.0, 0.25]", "shows nothing"),
        ("optim.lr=nan", "finite number"),
        ("run.seed=1099511627776", "run.seed: .*less than 4294967296"),
        ("lora.rank=100000", "lora.rank: .*less than or equal to 1024"),
        ("channels.num_tokens=1", "channels.num_tokens: .*greater than or equal to 2"),
        ("registers.seed=-1", "registers.seed: .*greater than or equal to 0"),
        ("loss", "not section.key=value"),
        ("loss.temperature.x=1", "temperature"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused(setting, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("paper", [setting])


def test_settings_are_toml_and_quotes_may_be_left_out():
    recipe = load_recipe(
        "paper",
        [
            "crops.area=[0.1, 0.9]",
            "loss.matched=false",
            "optim.schedule=cosine",
            'backbone.name="a=b"',
            "filters.attention_hijack.layers=[2, 3]",
            "data.max_images=none",
        ],
    )

    assert recipe.crops.area == (0.1, 0.9)
    assert recipe.loss.matched is False
    assert recipe.optim.schedule == "cosine"
    assert recipe.backbone.name == "a=b"
    assert recipe.filters.attention_hijack.layers == (2, 3)
    assert recipe.data.max_images is None


def test_a_recipe_survives_being_stored():
    recipe = load_recipe("release", ["filters.attention_hijack.layers=[2, 3]"])

    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().loss.temperature = 1.0


@pytest.mark.parametrize("source", ["papr", "no/such.toml", "nosuch.toml"])
def test_a_recipe_that_is_not_there_is_an_error(source):
    with pytest.raises(RecipeError, match="papr|cannot be read"):
        load_recipe(source)


def test_broken_toml_is_an_error(tmp_path):
    file = tmp_path / "broken.toml"
    file.write_text("[crops\n")

    with pytest.raises(RecipeError, match=r"broken.toml is not valid TOML"):
        load_recipe(str(file))


def test_layers_that_the_backbone_does_not_have_are_refused():
    section = load_recipe("siglip2-so400m").filters.attention_hijack

    with pytest.raises(RecipeError, match=r"layers 10..15, but the backbone's blocks are 0..11"):
        section.layer_range(12)


def test_every_field_is_documented_and_the_shipped_files_hold_known_keys_only():
    def undocumented(section, prefix=""):
        for name, field in section.model_fields.items():
            if not field.description:
                yield prefix + name
            if hasattr(field.annotation, "model_fields"):
                yield from undocumented(field.annotation, f"{prefix}{name}.")

    assert list(undocumented(Recipe)) == []
    assert "filters.fp_gp.threshold" in set(field_names())
    for name in recipe_names():
        text = (resources.files("trainer") / "recipes" / f"{name}.toml").read_text()
        values = tomllib.loads(text)
        assert values.pop("extends", "paper") in recipe_names()
        Recipe.model_validate(values)
