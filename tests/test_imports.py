"""Imports point one way, as docs/how-it-fits.md draws it."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
# From the ground up; a room imports from itself and from those before it.
ROOMS = ("runtime", "method", "cohort", "audit", "training", "commands")
METHOD = {"utils_v2", "model_drunet_v2"}
LIBRARY_COMMANDS = {"inference_v2", "dataset_balance_v2"}  # that others may import
PATHS = sorted(
    [*REPOSITORY.glob("*.py"), *(path for room in ROOMS for path in (REPOSITORY / room).glob("*.py"))]
)


def name_of(path: Path) -> str:
    """Return the dotted name of a module."""
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)


def room_of(name: str) -> str:
    """Return the room of a module."""
    first, _, rest = name.partition(".")
    if rest:
        return first
    return "method" if name in METHOD else "commands"


def imported_modules(tree: ast.AST) -> set[str]:
    """Return the dotted name of every module that is imported anywhere, inside functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {"."} if node.level else {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return names


TREES = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in PATHS}
SIBLINGS = {name: imported_modules(tree) & TREES.keys() for name, tree in TREES.items()}


def test_every_folder_with_code_is_a_room():
    folders = {path.parent.name for path in REPOSITORY.glob("*/*.py")} - {"tests", "benchmarks"}
    assert folders <= set(ROOMS)
    assert {"runtime", "cohort", "audit", "training"} <= folders


@pytest.mark.parametrize("name", sorted(TREES))
def test_a_module_imports_from_its_own_room_and_those_below(name):
    reach = ROOMS[: ROOMS.index(room_of(name)) + 1]
    assert {room_of(sibling) for sibling in SIBLINGS[name]} <= set(reach)


def test_a_command_imports_no_other_command_but_those_that_are_libraries_too():
    for name, siblings in SIBLINGS.items():
        commands = {sibling for sibling in siblings if room_of(sibling) == "commands"}
        assert commands <= LIBRARY_COMMANDS, name


def test_imports_have_no_circle():
    waiting, done = dict(SIBLINGS), set()
    while waiting:
        free = {name for name, siblings in waiting.items() if siblings <= done}
        assert free, f"a circle among {sorted(waiting)}"
        done |= free
        waiting = {name: siblings for name, siblings in waiting.items() if name not in free}


def test_loss_metrics_and_network_need_no_cohort_and_the_network_torch_alone():
    assert {room_of(name) for name in SIBLINGS["utils_v2"] | SIBLINGS["model_drunet_v2"]} <= {"runtime"}
    assert "model_drunet_v2" not in SIBLINGS["utils_v2"]
    packages = {name.split(".")[0] for name in imported_modules(TREES["model_drunet_v2"])} - {"runtime"}
    assert packages - {"collections", "contextlib", "copy", "dataclasses", "typing"} == {"torch"}


@pytest.mark.parametrize("name", sorted(TREES))
def test_no_module_imports_stars_relatively_or_by_a_changed_path(name):
    assert "." not in imported_modules(TREES[name])
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom):
            assert "*" not in {alias.name for alias in node.names}
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("sys.path", "importlib.import_module", "site.addsitedir")
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) != "__import__"


def test_the_checks_see_what_they_look_for():
    tree = ast.parse("import a.b\ndef f():\n    from c.d import e\n    from . import g\n    import h as i")
    assert imported_modules(tree) == {"a.b", "c.d", "c.d.e", ".", "h"}
    assert [room_of(name) for name in ("cohort.cache", "utils_v2", "export_v2")] == [
        "cohort",
        "method",
        "commands",
    ]
