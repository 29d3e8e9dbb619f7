"""``--keys`` lists what a settings file may hold, fitted to the terminal."""

from __future__ import annotations

import argparse

import pytest
from pydantic import Field

from sdeblend.finetune.config import forms
from sdeblend.shell import cli
from sdeblend.shell.keys import ShowKeys, keys_text
from sdeblend.shell.settings import Settings, describe


class Blend(Settings):
    """How rewards are blended.

    Attributes:
        weights: one a reward, in the order of the tables [[rewards]], which is the order of names in all results.
        steps: of the solver ``solve``.
    """

    weights: tuple[float, ...]
    steps: int = Field(200, ge=2)


def test_a_table_of_keys() -> None:
    assert keys_text({"[blend]": Blend}).splitlines() == [
        "[blend]",
        "",
        "key      default   takes                     meaning",
        "weights  required  a list of finite numbers  one a reward, in the order of the tables [[rewards]], which is "
        "the order of names in all results",
        "steps    200       an integer of at least 2  of the solver solve",
    ]


@pytest.mark.parametrize("width", [60, 120])
def test_fits_the_width(width: int) -> None:
    text = keys_text({"[blend]": Blend}, width=width)
    assert max(map(len, text.splitlines())) <= width
    assert text.count("weights") == text.count("steps") == 1
    assert {"[blend]", "required", "200", "solve"} <= set(text.split())


def test_the_option_prints_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--keys", action=ShowKeys, tables=lambda: {"[blend]": Blend})
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--keys"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == keys_text({"[blend]": Blend}) + "\n"
    assert "list what a settings file may hold" in parser.format_help()


def test_finetune_lists_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--keys"])
    said = capsys.readouterr().out
    found = forms()
    assert {"[trainer]", '[trainer], name = "ddpo"', '[model], kind = "mixture"', "[output]"} <= set(found)
    assert said == keys_text(found) + "\n"
    assert all(f"\n{key.name} " in said for model in found.values() for key in describe(model))
