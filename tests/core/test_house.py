"""The house has no circles and no upward stairs: what a file of the package imports lies below it or beside it.

The imports are read from the source, those within functions and for type checkers included. Files and functions are
also short enough to be read.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"
FILES = sorted((SOURCE / "peft_trex").rglob("*.py"))

# From the ground up, files and folders by name. Those on one floor may import each other, but in no circle.
FLOORS = [
    {"callers", "mixture", "quantized", "source", "undo", "version"},
    {"fast"},
    {"fused", "router_losses", "unsuited"},
    {"prior"},
    {
        *("card", "checks", "config", "keys", "loading", "room", "saved_rows", "targets", "words"),
        *("registration", "peft_patches", "transformers_patches"),
    },
    {"convolution", "expert_block", "layer", "parameters"},
    {"model"},
    {"data_pass", "notes", "steer"},
    {"fit"},
    {"analysis"},
    {"lora"},
    {"deploy", "serve_router"},
    {"files"},
    {"cli"},
    {"__init__"},
]
MOST_LINES = 350
MOST_PARAMETERS = 7
# These are public functions whose options are keywords.
MANY_OPTIONS = {"calibrate_trex_merge", "initialize_trex_prior", "rank_one_mixture"}


def module_of(path):
    """The dotted name of a file; a package's name is that of its folder."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def imports_of(path):
    """The modules of this package that a file imports."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: 1 - node.level or None] if node.level else []
            origin = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names:
                # `from . import gpu` imports a module, `from .gpu import mix` something in one.
                yield from [name for name in (f"{origin}.{alias.name}", origin) if name in MODULES][:1]


IMPORTS = {name: set(imports_of(path)) for name, path in MODULES.items()}


def floor_of(module):
    room = "__init__" if module == "peft_trex" else module.split(".")[1]
    floors = [number for number, rooms in enumerate(FLOORS) if room in rooms]
    assert floors, f"{module} has no place in FLOORS; say on which floor {room} is."
    return floors[0]


def test_the_imports_are_found():
    assert len(IMPORTS) == len(FILES) > 30
    assert {"peft_trex.layer", "peft_trex.config", "peft_trex.prior.hooks"} <= IMPORTS["peft_trex.model"]
    assert "peft_trex.peft_patches" in IMPORTS["peft_trex.registration"], "imports within functions count"
    assert "peft_trex.lora.semantic_router" in IMPORTS["peft_trex.lora.export"], "a module is told from its package"
    assert "peft_trex.prior.semantic_prior" in IMPORTS["peft_trex.prior.adapters"]


def test_no_circle():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail("These files import each other in a circle: " + " <- ".join(error.args[1]))


@pytest.mark.parametrize("module", IMPORTS)
def test_no_import_runs_upwards(module):
    upwards = sorted(name for name in IMPORTS[module] if floor_of(name) > floor_of(module))
    assert not upwards, f"{module} (floor {floor_of(module)}) imports from above: {', '.join(upwards)}"


def test_registration_stands_alone():
    """It is loaded without torch and PEFT, so all that it imports at load is Python's own."""
    tree = ast.parse(MODULES["peft_trex.registration"].read_text(encoding="utf-8"))
    statements = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert {ast.unparse(node).split()[1] for node in statements} == {"__future__", "enum", "typing", "warnings"}


def functions_of(module):
    """The functions and methods of a file by name, but for Triton's kernels, which take no tuples."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if not any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                yield node


def parameters_of(function):
    names = [argument.arg for argument in ast.walk(function.args) if isinstance(argument, ast.arg)]
    return [name for name in names if name not in ("self", "cls")]


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_are_short(module):
    lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{module} has {lines} lines"
    for function in functions_of(module):
        names = parameters_of(function)
        if function.name not in MANY_OPTIONS:
            assert len(names) <= MOST_PARAMETERS, f"{module}.{function.name} has {len(names)} parameters: {names}"


def test_no_exception_is_left_over():
    functions = [function for module in MODULES for function in functions_of(module)]
    assert {one.name for one in functions if len(parameters_of(one)) > MOST_PARAMETERS} >= MANY_OPTIONS
    assert all(one.args.kwonlyargs for one in functions if one.name in MANY_OPTIONS)
    rooms = {name.split(".")[1] for name in MODULES if "." in name} | {"__init__"}
    assert rooms == set().union(*FLOORS)
