"""CONFIG.toml: what cannot be used is told in one sentence, and bundled configurations are what they say."""

import pytest

from sdeblend.evaluate.command import main
from sdeblend.evaluate.plan import CONFIGS, find, forms, load_plan
from sdeblend.shell.settings import describe
from tests.support.strategies import refuses

GOOD = """
[backend]
kind = "mixture"
problems = ["ring8"]
[grid]
methods = ["mpa", "code"]
preferences = ["equal", [0.2, 0.8]]
seeds = 10
[methods.code]
block = 3
"""


def plan_of(tmp_path, text):
    file = tmp_path / "c.toml"
    file.write_text(text)
    plan = load_plan(file)
    plan.cells(plan.backend())
    return plan


def test_defaults_are_filled_in(tmp_path):
    plan = plan_of(tmp_path, GOOD)
    options = {name: options.model_dump() for name, options in plan.options.items()}
    assert options == {"mpa": {}, "code": {"candidates": 20, "block": 3}}
    assert plan.report.reference == "mpa" and plan.grid.block == 10 and plan.grid.strengths == (1.0,)
    cells = plan.cells(plan.backend())
    assert [cell.preference.weights for cell in cells[::2]] == [{"right": 0.5, "up": 0.5}, {"right": 0.2, "up": 0.8}]


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ('"mpa", "code"', '"mpa", "cod"', ["[grid] methods must be of", "'cod'", "nearest are code"]),
        ('"mpa", "code"', '"code", "code"', ["none twice"]),
        ("[0.2, 0.8]", "[0.2, 0.3, 0.5]", ["one weight for each reward of 'ring8' (right, up)", "got 3"]),
        ('"equal"', '"even"', ["'equal' or a list of weights", "'even'"]),
        ('"equal"', "[0.2, 0.8]", ["preferences must be at least one and none twice"]),
        ("seeds = 10", "seeds = 1", ["[grid] seeds must be an integer of at least 2, got 1"]),
        ("seeds = 10", "seeds = 10\nstrengths = [-1.0]", ["strengths must be", "at least 0, got -1.0"]),
        ("seeds = 10", "seeds = 10\nfirst_seed = 4294967295", ["2^32 - 1"]),
        ("seeds = 10", "seeds = 10\nblock = 1", ["[grid] block must be at least 2, got 1"]),
        ("seeds = 10", "seeds = 10\nsteps = 3", ["[grid] unknown key 'steps'"]),
        ("block = 3", "blocks = 3", ["[methods.code] unknown key 'blocks'"]),
        ("[methods.code]", "[methods.best-of-n]", ["[methods.best-of-n] must be for one of"]),
        ("[methods.code]\nblock = 3", "[methods]\ncode = 3", ["[methods] code must be a table"]),
        ('kind = "mixture"', 'kind = "oracle"', ["kind must be one of", "'oracle'"]),
        ('kind = "mixture"', "", ["[backend] kind is missing"]),
        ('"ring8"', '"ring9"', ["problems must be a list of any of", "'ring9'"]),
        ('["ring8"]', '["ring8"]\nsolver = "rk4"', ["solver must be one of"]),
        ('["ring8"]', '["ring8"]\nkl_weights = [0.0]', ["kl_weight must be a finite number above 0"]),
        ('["ring8"]', '["ring8"]\nkl_weights = [0.5, 0.5]', ["twice"]),
        ('["ring8"]', '["ring8"]\nsteps = 1', ["steps must be an integer from 2 to 10000, got 1"]),
        ("[methods.code]", '[report]\nreference = "base"\n[methods.code]', ["reference must be one of mpa, code"]),
        ("[methods.code]", "[report]\nconfidence = 0.2\n[methods.code]", ["at least 0.5 and below 1, got 0.2"]),
        ("[methods.code]", '[report]\nhypervolume_over = "base"\n[methods.code]', ["hypervolume_over must be one of"]),
        ("[methods.code]", '[report]\norder = ["base"]\n[methods.code]', ["order must name two or more of mpa, code"]),
        ("[methods.code]", '[[published]]\nlabel = "RL"\n[methods.code]', ["[[published]] 1 reward is missing"]),
    ],
)
def test_bad_input_is_told_in_one_sentence(tmp_path, old, new, parts):
    assert old in GOOD
    refuses(lambda: plan_of(tmp_path, GOOD.replace(old, new)), "c.toml", *parts)


def test_how_results_are_told_is_read(tmp_path):
    report = '[report]\nnote = "at 100 steps"\norder = ["mpa", "<= code"]\n[methods.code]'
    plan = plan_of(tmp_path, GOOD.replace("[methods.code]", report))
    assert plan.report.note == "at 100 steps" and plan.report.order == ("mpa", "<= code")
    wrong = GOOD.replace("[methods.code]", "[report]\nnote = 3\n[methods.code]")
    refuses(lambda: plan_of(tmp_path, wrong), "[report] note must be a string")


def test_configurations_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "soup").mkdir()  # a folder of that name, of results say, is no configuration
    names = [file.stem for file in CONFIGS.glob("*.toml")]
    assert {"ring-tradeoff", "conflict-line", "high-dimension", "rewards-2-to-10", "das-grid", "das-ring"} <= set(names)
    for name in names:
        plan = load_plan(find(name))
        if plan.kind == "mixture":
            assert plan.cells(plan.backend())
    assert find("soup").suffix == ".toml"
    refuses(lambda: main(["no-such-thing"]), "a file or one of", "ring-tradeoff")
    refuses(lambda: main(["no-such-thing.toml"]), "No such file", kind=OSError)


def test_a_key_changes_with_all_that_decides(tmp_path):
    def keys(text):
        plan = plan_of(tmp_path, text)
        backend = plan.backend()
        return {plan.key(cell, backend) for cell in plan.cells(backend)}

    first = keys(GOOD)
    assert keys(GOOD) == first and len(first) == 4
    for old, new in (("seeds = 10", "seeds = 10\nseed = 1"), ('["ring8"]', '["ring8"]\nsteps = 40')):
        assert not keys(GOOD.replace(old, new)) & first
    assert len(keys(GOOD.replace("block = 3", "block = 4")) & first) == 2  # of the other method


def test_keys_are_listed_with_what_they_mean(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--keys"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "[methods.code]" in text and "[methods.mpa]" not in text
    for heading, model in forms().items():
        section = text.partition(f"{heading}\n")[2].partition("\n[")[0]
        for key in describe(model):
            assert key.description and f"\n{key.name} " in section, (heading, key.name)
