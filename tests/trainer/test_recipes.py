"""The recipes that ship: one for each backbone, in both variants; and how recipes lie on others."""

import tomllib
from importlib import resources

import pytest

from backbone.catalog import CATALOG
from backbone.registers import border_width
from trainer.crops import strip_width
from trainer.errors import RecipeError
from trainer.recipe_file import VARIANTS, field_names, load_recipe, recipe_names, variant_of

BACKBONES = [name for name in recipe_names() if name not in (*VARIANTS, "demo")]

# What the authors' released recipes have: size, r_reg, layers, matched, uniformity, batch.
AUTHORS = {
    "dinov2-g": (518, 37, None, True, 0.3, 8),
    "siglip2-so400m": (512, 32, (10, 15), True, 0.3, 16),
    "siglip2-giant": (512, 32, (20, 25), True, 1.0, 8),
    "eva-clip-8b": (448, 32, (10, 15), False, 1.0, 2),
    "internvit-6b": (448, 32, (29, 31), True, 1.0, 2),
    "laion-g": (448, 32, None, True, 0.3, 8),
    "rice-l": (560, 32, (9, 11), True, 0.3, 16),
}


def text_of(name):
    return (resources.files("trainer") / "recipes" / f"{name}.toml").read_text()


def test_every_backbone_of_the_catalogue_has_one_recipe():
    recipes = {name: load_recipe(name) for name in BACKBONES}

    assert {name: recipe.name for name, recipe in recipes.items()} == {n: n for n in BACKBONES}
    assert sorted(recipe.backbone.name for recipe in recipes.values()) == sorted(CATALOG)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", AUTHORS)
def test_the_authors_numbers_hold_in_both_variants(name, variant):
    recipe = load_recipe(name, variant=variant)

    hijack = recipe.filters.attention_hijack
    assert AUTHORS[name] == (
        recipe.data.size,
        recipe.registers.r_reg,
        hijack.layers if hijack.enabled else None,
        recipe.loss.matched,
        recipe.loss.uniformity,
        recipe.data.batch_size,
    )
    assert recipe.filters.fp_gp.threshold == 0.5
    assert hijack.threshold == -0.5


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", BACKBONES)
def test_every_number_of_a_recipe_lies_within_its_backbone(name, variant):
    recipe = load_recipe(name, variant=variant)
    entry = CATALOG[recipe.backbone.name]
    registers, hijack = recipe.registers, recipe.filters.attention_hijack

    assert recipe.data.size == entry.size
    assert entry.size % entry.patch == 0
    assert registers.r_reg == entry.r_reg
    side = entry.size // entry.patch
    width = border_width((side, side), registers.r_reg, registers.rounding)
    # As the method's table has it, RICE's 40 tokens over 32 are two in the paper's rounding.
    assert width == (2 if (name, variant) == ("rice-l", "paper") else 1)
    assert strip_width(side, recipe.crops.strip_share) < side
    if hijack.enabled:
        hijack.layer_range(entry.depth)
    if entry.hijack_layers is not None:
        assert hijack.layers == entry.hijack_layers


@pytest.mark.parametrize("name", BACKBONES)
def test_the_variants_of_a_recipe_differ_where_paper_and_release_do(name):
    def different(one, other):
        pairs = {key: (flat(one)[key], flat(other)[key]) for key in field_names()}
        return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}

    def flat(recipe):
        values = {}
        for key in field_names():
            value = recipe
            for part in key.split("."):
                value = getattr(value, part)
            values[key] = value
        return values

    method = different(load_recipe("paper"), load_recipe("release")) | {
        "name": (name, f"{name} (release)")
    }

    assert different(load_recipe(name), load_recipe(name, variant="release")) == method


def test_a_recipe_of_the_variants_is_a_variant():
    assert [variant_of(name) for name in ("paper", "release", "demo")] == [
        "paper",
        "release",
        "paper",
    ]
    assert variant_of("laion-g", "release") == "release"
    assert load_recipe("release", variant="release") == load_recipe("release")
    with pytest.raises(RecipeError, match="is of the variant paper already, and --variant release"):
        load_recipe("paper", variant="release")


def test_the_release_says_nothing_of_a_backbone():
    said = tomllib.loads(text_of("release"))

    assert "backbone" not in said
    assert "data" not in said
    assert "layers" not in said["filters"]["attention_hijack"]


def test_settings_go_on_top_of_the_variant():
    recipe = load_recipe("laion-g", ["registers.fill=uniform"], variant="release")

    assert recipe.registers.fill == "uniform"
    assert recipe.registers.rounding == "floor"


def test_a_file_extends_a_recipe_that_ships_or_a_file_beside_it(tmp_path):
    (tmp_path / "base.toml").write_text('extends = "eva-clip-8b"\n[data]\nbatch_size = 4\n')
    file = tmp_path / "mine.toml"
    file.write_text('extends = "base.toml"\n[loss]\ntemperature = 0.1\n')

    recipe = load_recipe(str(file))

    shipped = load_recipe("eva-clip-8b")
    assert recipe.name == "mine"
    assert (recipe.data.batch_size, recipe.loss.temperature) == (4, 0.1)
    assert recipe.loss.matched is False
    assert recipe.filters == shipped.filters
    assert load_recipe(str(file), variant="release").name == "mine (release)"


def test_a_file_may_state_its_variant_by_what_it_extends(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('extends = "release"\nname = "ours"\n')

    assert load_recipe(str(file)).model_copy(update={"name": "release"}) == load_recipe("release")
    assert load_recipe(str(file)).name == "ours (release)"
    with pytest.raises(RecipeError, match="--variant paper was asked"):
        load_recipe(str(file), variant="paper")


def test_a_file_that_extends_nothing_lies_on_the_paper(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[lora]\nrank = 4\n")

    assert load_recipe(str(file)) == load_recipe("paper", ["name=mine", "lora.rank=4"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('extends = "b.toml"', r"extends itself: .*a.toml -> .*b.toml -> .*a.toml"),
        ('extends = "papr"', "no recipe is called 'papr'.*did you mean paper"),
        ('extends = "c.toml"', "c.toml cannot be read"),
        ("extends = 3", r"a.toml: extends is 3; give the name"),
        ('[data]\nextends = "paper"', "unknown key data.extends"),
    ],
)
def test_a_base_that_cannot_be_is_an_error(tmp_path, text, message):
    (tmp_path / "a.toml").write_text(text)
    (tmp_path / "b.toml").write_text(f'extends = "../{tmp_path.name}/a.toml"')

    with pytest.raises(RecipeError, match=message):
        load_recipe(str(tmp_path / "a.toml"))
