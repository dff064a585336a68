import pytest

from backbone import RegisterBorder, save_artifact
from tests.support import tiny_backbone
from trainer.prepare import load_backbone
from trainer.recipe_file import load_recipe


@pytest.mark.parametrize(("setting", "expected"), [((), False), (("true",), True)])
def test_an_artifact_that_is_refined_again_keeps_its_dense_norm(tmp_path, setting, expected):
    backbone = tiny_backbone()
    backbone.dense_norm = False
    save_artifact(tmp_path / "a", backbone, border=RegisterBorder(), model_card="# tiny\n")
    settings = [f"backbone.dense_norm={value}" for value in setting]

    again = load_backbone(load_recipe("paper", [f"backbone.name={tmp_path / 'a'}", *settings]))

    assert again.dense_norm is expected
