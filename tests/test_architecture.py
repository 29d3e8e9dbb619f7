"""What may import what, and what no module may do: read off the syntax trees of the packages.

Each rule is a function from a module's tree to the lines that break it. A rule is shown to have power on a
snippet that breaks it before it is trusted with the code that should not.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("sdeblend", "toy", "stablediffusion", "proofs_checks")
ARROWS = {
    "sdeblend": set(),
    "toy": {"sdeblend"},
    "stablediffusion": {"sdeblend"},
    "proofs_checks": {"sdeblend", "toy"},
}
DIFFUSERS_FAMILY = {"diffusers", "transformers", "peft"}
# Imported on demand by what needs them, so that `import sdeblend` costs little more than torch.
HEAVY = {"diffusers", "transformers", "peft", "matplotlib", "torchsde", "scipy", "accelerate", "pydantic", "rich"}
PICKLERS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve"}
DRAWS = {
    "bernoulli", "multinomial", "normal", "poisson", "rand", "rand_like", "randint", "randint_like", "randn",
    "randn_like", "randperm", "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_",
    "random_", "uniform_",
}  # fmt: skip
GLOBAL_SEEDS = {"manual_seed", "seed", "initial_seed", "set_rng_state"}
# What surrounds the theory may import more than the theory; each library in the module that it is there for.
PYDANTIC = {"pydantic", "pydantic_core", "annotated_types"}
SHELL = {"settings": PYDANTIC, "console": {"rich"}, "figures": {"matplotlib", "PIL"}}
ROOMS = {"finetune", "evaluate", "methods", "shell"}
# Imported name -> name on the index, where they differ; what pydantic consists of counts as pydantic.
DISTRIBUTIONS = {"PIL": "pillow", "pydantic_core": "pydantic", "annotated_types": "pydantic"}


@dataclass(frozen=True)
class Import:
    """One import: the dotted name, its line, and whether it runs when its module is imported."""

    name: str
    line: int
    eager: bool

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class Module:
    """A parsed module: its path from the repository's root and its tree."""

    path: Path
    tree: ast.Module

    @property
    def package(self) -> str:
        return self.path.parts[0]

    @property
    def draws_figures(self) -> bool:
        return any(part.startswith(("plotting", "figures")) for part in self.path.parts)

    def imports(self) -> Iterator[Import]:
        """Yield every import, those inside functions and by ``importlib.import_module`` among them."""
        pending: list[tuple[ast.AST, bool]] = [(self.tree, True)]
        while pending:
            node, eager = pending.pop()
            yield from (Import(name, getattr(node, "lineno", 0), eager) for name in imported(node, self.path))
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                pending += [(child, False) for child in node.body] + [(child, eager) for child in node.orelse]
                continue
            inner = eager and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            pending += [(child, inner) for child in ast.iter_child_nodes(node)]

    def calls(self) -> Iterator[tuple[str, ast.Call]]:
        """Yield each call with the dotted name of what is called, as written."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                yield ast.unparse(node.func), node


def imported(node: ast.AST, path: Path) -> list[str]:
    """Return the dotted names that a node imports; a relative name is made absolute."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = ".".join(path.with_suffix("").parts[: -node.level]) if node.level else ""
        stem = ".".join(part for part in (base, node.module or "") if part)
        return [f"{stem}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
        return [str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant)]
    return []


Rule = Callable[[Module], list[int]]


def follows_the_arrows(module: Module) -> list[int]:
    allowed = ARROWS[module.package] | {module.package}
    return [found.line for found in module.imports() if found.top in PACKAGES and found.top not in allowed]


def keeps_diffusers_in_stablediffusion(module: Module) -> list[int]:
    if module.package == "stablediffusion":
        return []
    return [found.line for found in module.imports() if found.top in DIFFUSERS_FAMILY]


def plots_in_plotting_modules_only(module: Module) -> list[int]:
    if module.draws_figures:
        return []
    plotting = re.compile(r"(^|\.)(plotting|figures)")
    return [
        found.line
        for found in module.imports()
        if found.top == "matplotlib" or (found.eager and found.top in PACKAGES and plotting.search(found.name))
    ]


def builds_the_core_on_torch(module: Module) -> list[int]:
    if module.package != "sdeblend" or module.path.parts[1] in ("finetune", "evaluate"):
        return []
    room = module.path.parts[1]
    own = SHELL.get(module.path.stem, set()) if room == "shell" else {"pydantic"} if room == "methods" else set()
    allowed = {"torch", "numpy", "sdeblend"} | own | sys.stdlib_module_names
    return [found.line for found in module.imports() if found.eager and found.top not in allowed]


def keeps_the_book_to_itself(module: Module) -> list[int]:
    if module.package != "sdeblend" or module.path.parts[1] in ROOMS:
        return []
    return [found.line for found in module.imports() if found.name.startswith(tuple(f"sdeblend.{r}" for r in ROOMS))]


def loads_weights_only(module: Module) -> list[int]:
    wrong = []
    for name, call in module.calls():
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name == "torch.load" and keywords.get("weights_only") != "True":
            wrong.append(call.lineno)
        if keywords.get("allow_pickle", "False") != "False":
            wrong.append(call.lineno)
    return wrong + [found.line for found in module.imports() if found.name == "torch.load"]


def never_pickles(module: Module) -> list[int]:
    return [found.line for found in module.imports() if found.top in PICKLERS]


def draws_from_given_generators(module: Module) -> list[int]:
    # Networks are initialised from the global generator whatever one does: seed it inside fork_rng.
    forked = {
        line
        for node in ast.walk(module.tree)
        if isinstance(node, ast.With) and any("fork_rng(" in ast.unparse(item) for item in node.items)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    wrong = []
    for name, call in module.calls():
        owner, _, function = name.rpartition(".")
        explicit = any(keyword.arg in ("generator", None) for keyword in call.keywords)
        draws = function in DRAWS and (owner == "torch" or function.endswith("_")) and not owner.endswith("init")
        seeds = function in GLOBAL_SEEDS and owner in ("torch", "torch.random", "torch.cuda", "random", "np.random")
        if ((draws and not explicit) or seeds) and call.lineno not in forked:
            wrong.append(call.lineno)
    return wrong


def looks_at_pipelines_in_one_file(module: Module) -> list[int]:
    # In a message a class may be named.
    if module.path == Path("stablediffusion/pipelines/families.py"):
        return []
    messages = (node for node in ast.walk(module.tree) if isinstance(node, ast.JoinedStr))
    told = {id(part) for message in messages for part in ast.walk(message)}
    wrong = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and node.attr in ("__name__", "__qualname__") and id(node) not in told:
            owner = ast.unparse(node.value)
            if re.fullmatch(r"type\((\w+\.)*pipe(line)?\)|(\w+\.)*pipe(line)?\.__class__", owner):
                wrong.append(node.lineno)
    for name, call in module.calls():
        if name in ("isinstance", "issubclass") and re.search(r"Pipeline\b", ast.unparse(call.args[1])):
            wrong.append(call.lineno)
    return wrong


RULES: dict[Rule, tuple[str, str]] = {
    # rule: a snippet that breaks it, and the module it would stand in
    follows_the_arrows: ("def f():\n    from stablediffusion.attach import blend", "toy/problems.py"),
    keeps_diffusers_in_stablediffusion: ("import diffusers.models", "sdeblend/schedule.py"),
    plots_in_plotting_modules_only: ("from toy import plotting", "toy/command.py"),
    builds_the_core_on_torch: ("import scipy.integrate", "sdeblend/solve.py"),
    keeps_the_book_to_itself: ("def f():\n    from sdeblend.shell import console", "sdeblend/steps/heun.py"),
    loads_weights_only: ("import torch\ntorch.load('a.pt', weights_only=False)", "stablediffusion/lora.py"),
    never_pickles: ("def f():\n    import pickle", "sdeblend/finetune/state.py"),
    draws_from_given_generators: ("import torch\ntorch.randn(3)", "toy/mixture.py"),
    looks_at_pipelines_in_one_file: (
        "def f(self):\n    return type(self.pipe).__name__.startswith('Flux')",
        "stablediffusion/blending/latents.py",
    ),
}
OTHER_BREAKS: list[tuple[Rule, str, str]] = [
    (follows_the_arrows, "import toy", "sdeblend/steps/heun.py"),
    (follows_the_arrows, "import importlib\nimportlib.import_module('toy.problems')", "sdeblend/shell/cli.py"),
    (follows_the_arrows, "from ..toy import mixture", "stablediffusion/schedule.py"),
    (builds_the_core_on_torch, "import rich.table", "sdeblend/shell/settings.py"),
    (builds_the_core_on_torch, "from pydantic import Field", "sdeblend/blend.py"),
    (plots_in_plotting_modules_only, "from sdeblend.shell import figures", "sdeblend/evaluate/compare.py"),
    (plots_in_plotting_modules_only, "def f():\n    import matplotlib.pyplot as plt", "toy/command.py"),
    (plots_in_plotting_modules_only, "from .figures_bounds import draw", "proofs_checks/lemma1.py"),
    (loads_weights_only, "import torch\ntorch.load('a.pt')", "sdeblend/shell/files.py"),
    (loads_weights_only, "import numpy as np\nnp.load('a.npz', allow_pickle=True)", "toy/metrics.py"),
    (draws_from_given_generators, "x.normal_()", "sdeblend/noise.py"),
    (draws_from_given_generators, "import torch\ntorch.manual_seed(0)", "toy/mixture.py"),
    (looks_at_pipelines_in_one_file, "name = pipe.__class__.__name__", "stablediffusion/pipelines/inputs.py"),
    (looks_at_pipelines_in_one_file, "isinstance(pipe, diffusers.FluxPipeline)", "stablediffusion/evaluate/case.py"),
]
ALLOWED: list[tuple[Rule, str, str]] = [
    (follows_the_arrows, "from toy.mixture import GaussianMixture\nimport sdeblend", "proofs_checks/lemma1.py"),
    (plots_in_plotting_modules_only, "def f():\n    from toy import plotting", "toy/command.py"),
    (plots_in_plotting_modules_only, "import matplotlib.pyplot as plt", "toy/plotting_plane.py"),
    (plots_in_plotting_modules_only, "import matplotlib.pyplot as plt", "toy/plotting/plane.py"),
    (builds_the_core_on_torch, "import rich.table", "sdeblend/shell/console.py"),
    (builds_the_core_on_torch, "from pydantic import Field", "sdeblend/methods/guidance.py"),
    (builds_the_core_on_torch, "def f():\n    import torchsde", "sdeblend/torchsde_bridge.py"),
    (loads_weights_only, "import torch\ntorch.load('a.pt', weights_only=True)", "stablediffusion/lora.py"),
    (draws_from_given_generators, "import torch\ntorch.randn(3, generator=g)", "toy/mixture.py"),
    (
        draws_from_given_generators,
        "with torch.random.fork_rng():\n    torch.manual_seed(0)\n    torch.nn.init.normal_(weight)",
        "stablediffusion/testing.py",
    ),
    (looks_at_pipelines_in_one_file, "raise ValueError(f'got {type(pipe).__name__}')", "stablediffusion/finetune/a.py"),
    (looks_at_pipelines_in_one_file, "type(pipe).__name__ == 'A'", "stablediffusion/pipelines/families.py"),
]


def parsed(source: str, path: str) -> Module:
    return Module(Path(path), ast.parse(source))


def modules() -> list[Module]:
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    return [Module(file.relative_to(ROOT), ast.parse(file.read_text(encoding="utf-8"))) for file in files]


def test_there_is_something_to_check() -> None:
    assert Path("sdeblend/schedule.py") in [module.path for module in modules()]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_packages_follow_the_rule(rule: Rule) -> None:
    broken = [f"{module.path}:{line}" for module in modules() for line in rule(module)]
    assert not broken


@pytest.mark.parametrize(
    ("rule", "source", "path"), [(rule, *snippet) for rule, snippet in RULES.items()] + OTHER_BREAKS
)
def test_rule_rejects_what_breaks_it(rule: Rule, source: str, path: str) -> None:
    assert rule(parsed(source, path))


@pytest.mark.parametrize(("rule", "source", "path"), ALLOWED)
def test_rule_accepts_what_keeps_it(rule: Rule, source: str, path: str) -> None:
    assert not rule(parsed(source, path))


def test_no_file_is_over_400_lines() -> None:
    folders = [*PACKAGES, "tests", "benchmarks", "notebooks"]
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    lengths = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8").count("\n") for file in files}
    assert not {name: length for name, length in lengths.items() if length > 400}


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[^\w-]", requirement)[0] for requirement in project["dependencies"]}
    known = set(PACKAGES) | sys.stdlib_module_names
    names = {found.top for module in modules() for found in module.imports()} - known
    assert {DISTRIBUTIONS.get(name, name) for name in names} <= declared


def test_data_files_are_packaged() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    patterns = settings["package-data"]["*"]
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *PACKAGES]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    data = [Path(name) for name in listed if not name.endswith(".py")]
    assert {file.parent.name for file in data if file.name == "py.typed"} == set(PACKAGES)
    assert not [str(file) for file in data if not any(file.match(pattern) for pattern in patterns)]


def test_importing_the_core_imports_nothing_heavy() -> None:
    program = f"import sys, sdeblend, sdeblend.shell.cli; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
    control = subprocess.run(
        [sys.executable, "-c", f"import scipy; {program}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert control.stdout.split() == ["scipy"]
