"""The table from results written by hand."""

import json

import pytest

from tests.trainer.ablate.sweeps import finish_training, sweep_arguments, write_result
from trainer.ablate.__main__ import _parser, _settings
from trainer.ablate.markdown import as_markdown
from trainer.ablate.measures import Measure
from trainer.ablate.plan import SweepSettings, make_plan
from trainer.ablate.resolve import RecipeSource, choose_variants, resolve
from trainer.ablate.sweep import Outcome
from trainer.ablate.table import Table, make_table, without_folders

COMMAND = "python -m trainer.ablate --images /data/photos --output runs/out"
KINDS = {
    "segmentation": {"task": "segmentation"},
    "depth": {"task": "depth", "score": "RMSE", "unit": "metres", "better": "lower"},
    "spurious": {"task": "spurious", "score": "FP or GP", "better": "lower"},
}


def plan_of(tmp_path, *, seeds=1, kinds=("segmentation",), names="no-uni,no-ah,with-ah"):
    options = _parser().parse_args(sweep_arguments(tmp_path))
    source = RecipeSource(options.recipe, _settings(options))
    settings = SweepSettings(
        source=source,
        images=options.images,
        output=options.output,
        num_seeds=seeds,
        num_probe_seeds=2,
        measures=tuple(Measure(kind, tmp_path / "scenes", (), "scenes") for kind in kinds),
    )
    return make_plan(settings, resolve(choose_variants(names, [], source), source))


def put(plan, row, values, *, seed=0, kind="segmentation", subject="refined", raw=None):
    """Writes what a step would have found."""
    step = next(
        s
        for s in plan.of(row)
        if s.seed == seed and s.measure is not None and s.measure.kind == kind
    )
    before = [] if raw is None else [("raw", raw)]
    write_result(step.product, [*before, (subject, values)], **KINDS[kind])


def table_of(plan):
    table = make_table(plan, Outcome(), command=COMMAND)
    return table, {row.name: row for row in table.rows}


def test_one_run_has_an_interval_over_its_probe_seeds_and_differences_seed_by_seed(tmp_path):
    plan = plan_of(tmp_path)
    put(plan, "full", [50.0, 54.0], raw=[40.0, 43.0])
    put(plan, "no-uni", [49.0, 53.0])

    table, rows = table_of(plan)

    cell = rows["no-uni"].cells[0]
    assert cell.interval.mean == 51.0
    assert (cell.spread, cell.interval.count) == ("probe seeds", 2)
    assert cell.difference is not None
    assert (cell.difference.mean, cell.difference.std) == (-1.0, 0.0)
    raw = rows["raw"].cells[0]
    assert (raw.interval.mean, raw.difference.mean) == (41.5, -10.5)
    assert rows["full"].cells[0].difference is None
    page = as_markdown(table)
    assert "| -1.00 ± 0.00" in page
    assert "they do not hold what another training" in page


def test_several_runs_have_an_interval_over_their_means(tmp_path):
    plan = plan_of(tmp_path, seeds=2)
    for seed, shift in ((0, 0.0), (1, 2.0)):
        put(
            plan,
            "full",
            [50 + shift, 52 + shift],
            seed=seed,
            raw=[40.0, 42.0] if not seed else None,
        )
        put(plan, "no-uni", [47 + 2 * shift, 49 + 2 * shift], seed=seed)

    table, rows = table_of(plan)

    full, ours = rows["full"].cells[0], rows["no-uni"].cells[0]
    assert (full.interval.mean, full.interval.count, full.spread) == (52.0, 2, "training seeds")
    assert full.values == {0: (50.0, 52.0), 1: (52.0, 54.0)}
    # -3 with the first seed, -1 with the second.
    assert ours.difference is not None
    assert (ours.difference.mean, ours.difference.count) == (-2.0, 2)
    # The raw backbone has no training seed: it stands against each run.
    raw = rows["raw"].cells[0]
    assert (raw.spread, raw.difference.mean) == ("probe seeds", -11.0)
    assert "over training seeds, each the mean of its own probes" in as_markdown(table)


def test_a_seed_that_is_missing_leaves_the_pairs_that_are_there(tmp_path):
    plan = plan_of(tmp_path, seeds=2)
    put(plan, "full", [50.0, 50.0], raw=[40.0, 40.0])
    put(plan, "full", [60.0, 60.0], seed=1)
    put(plan, "no-uni", [59.0, 59.0], seed=1)

    _, rows = table_of(plan)

    assert rows["no-uni"].cells[0].difference.mean == -1.0
    assert rows["no-uni"].status == "not yet"


def test_columns_are_in_the_order_of_the_command_line_and_rows_in_that_of_the_variants(tmp_path):
    plan = plan_of(tmp_path, kinds=("segmentation", "depth", "spurious"))
    for kind in KINDS:
        put(plan, "full", [5.0, 6.0], kind=kind, raw=[4.0, 4.0])
        put(plan, "no-uni", [3.0, 3.0], kind=kind)
    finish_training(tmp_path / "out" / "no-uni" / "seed-0", seconds=45)

    table, rows = table_of(plan)
    page = as_markdown(table)

    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    head = next(line for line in lines if line[:1] == ["row"])
    assert head == [
        "row",
        *("mIoU (%), scenes", "against full"),
        *("RMSE (m), scenes", "against full"),
        *("FP or GP (%), scenes", "training (min)"),
    ]
    first = [line[0] for line in lines if len(line) == len(head)]
    assert first[2:] == ["raw", "full", "no-uni", "no-ah"]
    assert rows["no-uni"].minutes == 1.5
    no_ah = next(line for line in lines if line[:1] == ["no-ah"])
    assert set(no_ah[1:]) == {"–"}
    assert rows["with-ah"].status == "skipped"
    assert "- with-ah: equals the full recipe" in page
    assert "higher is better: mIoU; lower is better: RMSE, FP or GP." in page.replace("H", "h", 1)


def test_the_page_says_how_it_was_made_and_nothing_of_one_machine(tmp_path):
    plan = plan_of(tmp_path)
    put(plan, "full", [50.0, 54.0], raw=[40.0, 43.0])

    table, _ = table_of(plan)
    page = as_markdown(table)

    assert "    python -m trainer.ablate --images photos --output runs/out\n" in page
    assert table.versions["torch"] in page
    assert table.dates[0] in page
    assert str(tmp_path) not in page
    assert Table.model_validate_json(table.model_dump_json()) == table
    assert json.loads(table.model_dump_json())["schema_version"] == 1


def test_a_table_without_any_result_says_so(tmp_path):
    table, rows = table_of(plan_of(tmp_path))

    assert "Nothing was measured yet." in as_markdown(table)
    assert {row.status for row in rows.values()} == {"not yet", "skipped"}


def test_a_damaged_result_is_one_that_is_not_there(tmp_path):
    plan = plan_of(tmp_path)
    put(plan, "full", [50.0, 54.0], raw=[40.0, 43.0])
    plan.of("full")[1].product.write_text("{")

    _, rows = table_of(plan)

    assert rows["full"].cells == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--images /a/b/c --output runs/x", "--images c --output runs/x"),
        ("--segmentation '/a/b/camvid --size 3 4'", "--segmentation 'camvid --size 3 4'"),
        ('--set backbone.name="/models/demo"', '--set backbone.name="demo"'),
        ("--output ../runs/x --output ~/runs/x", "--output ../runs/x --output ~/runs/x"),
        ("--set a.b=/x/y.toml", "--set a.b=y.toml"),
    ],
)
def test_commands_are_shown_without_folders_of_one_machine(text, expected):
    assert without_folders(text) == expected
