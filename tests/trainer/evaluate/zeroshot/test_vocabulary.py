import pytest

from trainer.evaluate.datasets import SegmentationDataset
from trainer.evaluate.zeroshot import NAMED, ZeroshotError, make_vocabulary, read_templates
from trainer.evaluate.zeroshot.vocabulary import BACKGROUND_NAMES, readable


def dataset(*classes, background=None):
    return SegmentationDataset("set", "folder", classes, (), (), background=background)


def test_names_are_those_of_the_classes_made_readable():
    found = make_vocabulary(dataset("diningtable", "traffic light", "wall-brick", "water-other"))

    assert found.names == ("dining table", "traffic light", "wall brick", "water")
    assert found.classes == (0, 1, 2, 3)
    assert (found.num_classes, found.background, found.rule) == (4, None, "none")
    assert readable("TVmonitor") == "tv monitor"


def test_a_line_may_have_several_names():
    found = make_vocabulary(dataset("a", "b"), lines=["person, man ,woman,man", "dog"])

    assert found.names == ("person", "man", "woman", "dog")
    assert found.classes == (0, 0, 0, 1)


def test_the_background_is_named_by_things_that_are_no_class():
    found = make_vocabulary(dataset("background", "bed", "dog", background=0))

    assert found.rule == "names"
    assert set(found.names) == {*BACKGROUND_NAMES, "dog"}  # the bed is once, as a class
    by_name = dict(zip(found.names, found.classes, strict=True))
    assert (by_name["sky"], by_name["bed"], by_name["dog"]) == (0, 1, 2)


def test_a_line_of_the_file_may_name_the_background():
    classes = dataset("background", "dog", background=0)

    found = make_vocabulary(classes, lines=["wall, floor", "dog"])
    assert found.names == ("wall", "floor", "dog")
    found = make_vocabulary(classes, lines=["x", "dog"], background_names=["sea", "dog"])
    assert found.names == ("sea", "dog")
    assert found.classes == (0, 1)


def test_a_data_set_that_names_its_surroundings_has_a_threshold():
    found = make_vocabulary(dataset("background", "sky", "dog", background=0))

    assert (found.rule, found.names, found.classes) == ("threshold", ("sky", "dog"), (1, 2))
    assert make_vocabulary(dataset("background", "a", background=0), rule="none").classes == (1,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lines": ["a"]}, "1 lines of class names for the 2 classes"),
        ({"lines": ["a", " , "]}, "class 1 has no name"),
        ({"rule": "threshold"}, "has no background class"),
    ],
)
def test_names_that_fit_no_class_are_refused(options, message):
    with pytest.raises(ZeroshotError, match=message):
        make_vocabulary(dataset("a", "b"), **options)


def test_background_names_that_are_all_classes_are_refused():
    with pytest.raises(ZeroshotError, match="choose the background rule threshold"):
        make_vocabulary(dataset("background", "dog", background=0), background_names=["dog"])


def test_templates_by_name_and_from_a_file(tmp_path):
    assert len(set(read_templates("imagenet80"))) == 80
    assert set(read_templates("short")) < set(read_templates("imagenet80"))
    assert all(sentence.count("{}") == 1 for sentences in NAMED.values() for sentence in sentences)
    (tmp_path / "mine.txt").write_text("# two\na {} here\n\nthe {}\n")
    assert read_templates(str(tmp_path / "mine.txt")) == ("a {} here", "the {}")


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "neither one of imagenet80"), ("# none\n", "no sentence"), ("a\n", "the line 'a'")],
)
def test_other_templates_are_refused(tmp_path, text, message):
    path = tmp_path / "templates.txt"
    if text is not None:
        path.write_text(text)

    with pytest.raises(ZeroshotError, match=message):
        read_templates(str(path))
