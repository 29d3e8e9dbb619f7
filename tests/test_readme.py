"""The README's first example runs and prints what the README says."""

import contextlib
import io
import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language):
    """Return the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def run(code):
    """Run a block; return its names and what it printed."""
    out, names = io.StringIO(), {}
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), names)
    return names, out.getvalue()


def numbers(text):
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


@pytest.mark.rng_untouched
def test_first_example_prints_what_the_readme_says():
    code, printed = blocks("python")[0], blocks("text")[0]
    assert len(code.strip().splitlines()) <= 15
    names, out = run(code)
    # Other processors round the noise differently: the figures agree to a few standard errors, not to the digit.
    assert numbers(out) == pytest.approx(numbers(printed), abs=0.03)

    corrected, _ = run(code.replace('"certify"', '"resample"'))
    shares = corrected["target"].responsibilities(corrected["run"].samples)
    weighted = corrected["run"].log_weights.softmax(0) @ shares
    assert weighted.tolist() == pytest.approx(corrected["target"].weights.tolist(), abs=0.04)
    assert abs(float(names["blended"][0] - weighted[0])) > 0.3  # the control: the plain blend is far off


def test_every_module_that_the_readme_names_is_there():
    root = Path(__file__).parents[1]
    paths = set(re.findall(r"`((?:sdeblend|toy|stablediffusion|proofs_checks|benchmarks|notebooks)/[\w/.]*)`", README))
    assert len(paths) > 15
    assert [path for path in sorted(paths) if not (root / path).exists()] == []
