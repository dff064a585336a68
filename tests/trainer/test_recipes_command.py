"""python -m trainer recipes."""

import json
import re
import shlex

import pytest

from trainer import __main__ as trainer_command
from trainer.recipe_file import recipe_names
from trainer.recipes_command import main


@pytest.fixture(autouse=True)
def _leave_logging_alone(monkeypatch):
    monkeypatch.setattr(trainer_command, "_set_up_logging", lambda *_, **__: None)


def run(capsys, *arguments):
    code = main(arguments)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_the_list_has_a_line_for_every_recipe_with_its_costs_and_licence(capsys):
    code, shown, _ = run(capsys)

    lines = {line.split()[0]: line for line in shown.splitlines() if line.strip()}
    assert code == 0
    assert set(recipe_names()) - {"paper", "release"} <= set(lines)
    row = lines["eva-clip-8b"]
    assert row.split()[1:6] == ["eva-clip-8b-448", "7524", "448", "1", "2"]
    assert "layers 10-15, unmatched, u 1.0" in row
    assert row.rstrip().endswith("Apache-2.0")
    assert "hijack off, r_reg 37, u 0.3" in lines["dinov2-g"]
    assert "computed for H100 80 GB, not measured" in shown
    assert "assumed 40% of its peak" in shown


def test_the_list_says_what_is_too_much_for_a_gpu(capsys):
    _, large, _ = run(capsys, "--gpu", "H200")
    _, small, _ = run(capsys, "--gpu", "rtx4090")

    assert "too much" not in large
    [row] = [line for line in small.splitlines() if line.split()[:1] == ["eva-clip-18b"]]
    assert "(too much)" in row
    assert " 0 / 0 " in row


def test_one_recipe_is_shown_with_its_backbone_every_gpu_and_the_command(capsys):
    code, shown, _ = run(capsys, "eva-clip-8b", "--variant", "release")

    assert code == 0
    for words in (
        "eva-clip-8b (release)",
        "BAAI/EVA-CLIP-8B-448",
        "448 px, 32 x 32 patches of 14 px",
        "Computed, not measured",
        "H100 80 GB",
        "L40S 48 GB",
        "RTX 4090 24 GB",
    ):
        assert words in shown
    assert shown.splitlines()[-1] == (
        "python -m trainer --recipe eva-clip-8b --variant release --images DIR "
        "--output runs/eva-clip-8b-release"
    )


def test_the_command_that_is_shown_is_one_that_the_trainer_takes(capsys):
    settings = ["--set", "crops.area=[0.1, 0.2]"]
    _, shown, _ = run(capsys, "laion-g", "--variant", "release", *settings)
    _, _, _, *arguments = shlex.split(shown.splitlines()[-1])

    code = trainer_command.main([*arguments, "--print-recipe"])

    recipe = json.loads(capsys.readouterr().out)
    assert code == 0
    assert recipe["name"] == "laion-g (release)"
    assert recipe["crops"]["area"] == [0.1, 0.2]


def test_settings_change_what_is_computed(capsys):
    plain = json.loads(run(capsys, "laion-g", "--json")[1])
    small = json.loads(run(capsys, "laion-g", "--set", "data.size=224", "--json")[1])

    assert small["memory_gib"] < plain["memory_gib"]
    assert small["minutes"] < plain["minutes"] / 3
    assert small["size"] == 224


def test_json_has_every_recipe_and_says_that_nothing_was_measured(capsys):
    code, shown, _ = run(capsys, "--json", "--variant", "release", "--gpu", "A100")

    recipes = {recipe["name"]: recipe for recipe in json.loads(shown)}
    assert code == 0
    assert set(recipes) == set(recipe_names()) - {"paper", "release"}
    assert {recipe["variant"] for recipe in recipes.values()} == {"release"}
    assert {recipe["estimates"] for recipe in recipes.values()} == {"computed, not measured"}
    rice = recipes["rice-l"]
    assert rice["licence"].startswith("not confirmed")
    assert rice["hub"] == ["DeepGlint-AI/rice-vit-large-patch14-560"]
    assert rice["largest_batch"] >= rice["batch_size"]
    assert rice["largest_batch_checkpointed"] > rice["largest_batch"]


def test_the_variants_can_be_shown_too(capsys):
    shown = json.loads(run(capsys, "release", "--json")[1])

    assert (shown["variant"], shown["licence"]) == ("release", "Apache-2.0")


def test_a_model_that_is_not_here_leaves_a_line_without_numbers(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the recipe `demo` names a folder of the repository

    code, shown, _ = run(capsys)
    alone, _, error = run(capsys, "demo")
    listed = json.loads(run(capsys, "--json")[1])

    [row] = [line for line in shown.splitlines() if line.split()[:1] == ["demo"]]
    assert code == 0
    assert row.split()[1:8] == ["models/demo-pretrained", "-", "224", "-", "8", "-", "-"]
    assert alone == 2
    assert "models/demo-pretrained" in error
    assert "memory_gib" not in next(recipe for recipe in listed if recipe["name"] == "demo")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["laion"], "no recipe is called 'laion'; .* did you mean laion-g"),
        (["laion-g", "--set", "data.size=500"], "not a whole number of 14 px patches; take 504"),
        (["paper", "--variant", "release"], "is of the variant paper already"),
        (["laion-g", "--set", "data.sizes=3"], "nearest valid key is data.size"),
        (["laion-g", "--set", "filters.attention_hijack.enabled=true", "--set",
          "filters.attention_hijack.layers=[60, 61]"], "layers 60..61, but the backbone's"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_without_a_traceback(capsys, arguments, message):
    code, shown, error = run(capsys, *arguments)

    assert code == 2
    assert shown == ""
    assert re.search(message, error)
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "H900"], "no GPU is called 'H900'; there are H100, H200"),
        (["--set", "data.size=224"], "--set changes one recipe; name it"),
        (["--variant", "papr"], "invalid choice: 'papr'"),
    ],
)
def test_arguments_that_are_not_allowed_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)

    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_trainer_has_the_command(capsys):
    assert trainer_command.main(["recipes", "laion-g", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backbone"] == "laion-g"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([], "paper"),
        (["--variant", "release"], "release"),
        (["--recipe", "rice-l"], "rice-l"),
        (["--recipe", "rice-l", "--variant", "release"], "rice-l (release)"),
    ],
)
def test_the_trainer_takes_recipe_and_variant(capsys, arguments, name):
    assert trainer_command.main([*arguments, "--print-recipe"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == name
