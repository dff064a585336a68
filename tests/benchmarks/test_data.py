from benchmarks import data
from tests.support import noise_image


def test_every_source_and_resize_gets_a_row(tmp_path, capsys):
    for number in range(5):
        noise_image(40, 50, seed=number).save(tmp_path / f"{number}.jpg")

    arguments = ["--images", str(tmp_path), "--size", "32", "--batch", "2", "--count", "4"]
    code = data.main([*arguments, "--rounds", "1", "--enlarge", "80", "--device", "cpu"])

    assert code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("4 images of ")
    rows = [line.strip("| ").split(" | ") for line in lines[4:]]
    assert [(row[0], row[1]) for row in rows] == [
        (source, resize) for resize in ("host", "device") for source in ("folder", "list", "shards")
    ]
    assert rows[0][3] == "1.00"
    assert all(float(number) > 0 for row in rows for number in row[2:])
