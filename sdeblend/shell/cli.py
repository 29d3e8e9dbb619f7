"""The command ``sdeblend``: finds the commands that installed packages offer, and runs one of them.

A command is an entry point of the group ``sdeblend.commands``: a name and a function ``main(argv) -> int``
taking the arguments after the name. The summary that ``sdeblend --help`` lists is the first line of the
docstring of the function's module, read without importing it. So this module knows no command, and a
command imports only what it needs.

Exit codes: what the command returns; 2 for input that cannot be used, told in one sentence on stderr;
1 for a reader that went away; 130 for an interrupt. What our packages warn of is one line on stderr.
"""

from __future__ import annotations

import ast
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

from sdeblend.shell.registry import COMMANDS, offered, versions


def commands() -> dict[str, EntryPoint]:
    """Return the installed commands by name, in alphabetical order, none of them imported."""
    return offered(COMMANDS)


def summary(entry: EntryPoint) -> str:
    """Return the first line of the docstring of a command's module, without importing the module.

    Args:
        entry: The command's entry point.

    Returns:
        The line without its full stop; empty where there is no source or no docstring to read.
    """
    package, *parts = entry.module.split(".")
    # Only a top-level package: the finder would import the parent of a module inside one.
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    files = [Path(folder, *parts).with_suffix(".py") for folder in folders or ()]
    source = next((file for file in files if file.is_file()), None)
    if source is None:
        return ""
    docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].rstrip(".")


def usage() -> str:
    """Return the text of ``sdeblend --help``."""
    known = commands()
    width = max(map(len, known), default=0)
    lines = [f"  {name:<{width}}  {summary(entry)}".rstrip() for name, entry in known.items()]
    head = "usage: sdeblend [--help | --version] COMMAND [ARGUMENTS]"
    tail = "'sdeblend COMMAND --help' tells the arguments of one command."
    return "\n".join([head, "", "commands:", *lines, "", tail])


def sentence(error: Exception) -> str:
    """Return an error's message on one line; for an error of the system, the file and the reason.

    Args:
        error: What was raised.

    Returns:
        The line, never empty.
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(text.split()) or type(error).__name__


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``sdeblend`` on ``argv``.

    Args:
        argv: The arguments after the program's name; None takes the process's own.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        print(usage(), file=sys.stderr)
        return 2
    name, *rest = arguments
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"sdeblend {versions(['sdeblend'])['sdeblend']}")
        return 0
    known = commands()
    if name not in known:
        print(f"sdeblend: no command {name!r}; the commands are {', '.join(known)}", file=sys.stderr)
        return 2
    return run(lambda: known[name].load()(rest), f"sdeblend {name}")


def run(command: Callable[[], int], name: str) -> int:
    """Run a command so that whatever ends it is told in one line.

    Args:
        command: what to run.
        name: what its lines on stderr begin with.

    Returns:
        The exit code.
    """
    try:
        with _warnings_told(name):
            code = command()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit; it must not find the closed pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"{name}: {sentence(error)}", file=sys.stderr)
        return 2


@contextmanager
def _warnings_told(name: str) -> Iterator[None]:
    """Print what packages that offer commands warn of as a line each; other packages' warnings as ever."""
    packages = {"sdeblend", *(entry.module.partition(".")[0] for entry in commands().values())}
    specs = [spec for spec in map(find_spec, sorted(packages)) if spec is not None]
    folders = [Path(folder) for spec in specs for folder in spec.submodule_search_locations or ()]
    shown = warnings.showwarning

    def tell(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
        line: str | None = None,
    ) -> None:  # fmt: skip
        if category is UserWarning and any(Path(filename).is_relative_to(folder) for folder in folders):
            print(f"{name}: warning: {' '.join(str(message).split())}", file=sys.stderr)
        else:
            shown(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.showwarning = tell
        yield


if __name__ == "__main__":
    sys.exit(main())
