"""The command line: what it lists, what it runs, and how it ends."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest

from sdeblend.shell import cli
from sdeblend.shell.registry import COMMANDS


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that offers a module of the given source as the only command ``try``."""

    def install(source: str) -> None:
        package = tmp_path / "offered"
        package.mkdir()
        # Importing the parent package is noticed: only running the command may do that.
        (package / "__init__.py").write_text("import sys\nsys.offered_imported = True\n")
        (package / "command.py").write_text(source)
        entry = EntryPoint("try", "offered.command:main", COMMANDS)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(cli, "commands", lambda: {"try": entry})
        monkeypatch.delattr(sys, "offered_imported", raising=False)
        for name in ("offered", "offered.command"):
            monkeypatch.delitem(sys.modules, name, raising=False)

    return install


def raising(statement: str) -> str:
    return f"def main(argv):\n    {statement}\n"


def test_commands_of_this_project_are_installed() -> None:
    names = {entry.name for entry in entry_points(group=COMMANDS)}
    assert {"toy", "verify", "generate"} <= names
    assert list(cli.commands()) == sorted(names)


def test_help_lists_summaries_without_importing(
    offer: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    offer('"""Try a thing.\n\nMore.\n"""\nraise RuntimeError("imported")\n')
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "  try  Try a thing\n" in out
    assert not hasattr(sys, "offered_imported")


def test_help_of_this_project_imports_no_command() -> None:
    heavy = {"matplotlib", "diffusers", "scipy", "toy", "stablediffusion", "proofs_checks"}
    program = f"import sys; from sdeblend.shell.cli import main; main(['--help']); print({heavy!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_no_argument_prints_usage_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("usage: sdeblend")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sdeblend 0.")


def test_unknown_command_names_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tyo"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sdeblend: no command 'tyo'; the commands are ")
    assert "toy" in error


WARNS = """import warnings
def main(argv):
    warnings.warn('weights sum\\n to 1.8', {category}, stacklevel=1)
    return 0
"""


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("category", "plain"), [("UserWarning", False), ("RuntimeWarning", True)])
def test_warnings_of_our_packages_are_one_line(
    offer: Callable[..., None], capsys: pytest.CaptureFixture[str], category: str, plain: bool
) -> None:
    offer(WARNS.format(category=category))
    assert cli.main(["try"]) == 0
    error = capsys.readouterr().err
    assert (error == "sdeblend try: warning: weights sum to 1.8\n") is not plain


@pytest.mark.filterwarnings("default")
def test_warnings_of_others_stay_as_they_are(
    offer: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "theirs.py").write_text(WARNS.format(category="UserWarning"))
    offer("from theirs import main\n")
    shown = warnings.showwarning
    assert cli.main(["try"]) == 0
    assert "warning: " not in capsys.readouterr().err
    assert warnings.showwarning is shown


@pytest.mark.parametrize("code", [0, 1, 3])
def test_runs_the_command_with_the_rest(
    offer: Callable[..., None], capsys: pytest.CaptureFixture[str], code: int
) -> None:
    offer(f"def main(argv):\n    print(argv)\n    return {code}\n")
    assert cli.main(["try", "a.toml", "--json", "b"]) == code
    assert capsys.readouterr().out == "['a.toml', '--json', 'b']\n"


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("raise ValueError('weights must sum to 1,\\n  got 2')", "weights must sum to 1, got 2"),
        ("raise TypeError('state must be float32')", "state must be float32"),
        ("open('/nowhere/problem.toml')", "/nowhere/problem.toml: No such file or directory"),
        ("raise ValueError", "ValueError"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    offer: Callable[..., None], capsys: pytest.CaptureFixture[str], statement: str, message: str
) -> None:
    offer(raising(statement))
    assert cli.main(["try"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"sdeblend try: {message}\n"


def test_interrupt_is_130(offer: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    offer(raising("raise KeyboardInterrupt"))
    assert cli.main(["try"]) == 130
    assert capsys.readouterr().err == "sdeblend try: interrupted\n"


def test_errors_of_ours_keep_their_traceback(offer: Callable[..., None]) -> None:
    offer(raising("raise RuntimeError('a bug')"))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["try"])


def test_a_reader_that_goes_away_leaves_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text(raising("while True: print('line')"))
    program = (
        "import sys; from importlib.metadata import EntryPoint; from sdeblend.shell import cli\n"
        "cli.commands = lambda: {'try': EntryPoint('try', 'endless:main', 'sdeblend.commands')}\n"
        "sys.exit(cli.main(['try']))"
    )
    command = [sys.executable, "-c", program]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=tmp_path) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "line\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 1
