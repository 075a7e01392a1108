"""Imports point one way: DESIGN's rooms as a table, checked against the code from both sides."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# Every part, in the order they build on each other: one imports only parts before it.
ORDER = (
    "utils_v2",
    "distributed_v2",
    "model_drunet_v2",
    "plots_v2",
    "statistics_v2",
    "lesions_v2",
    "measure_v2",
    "postprocess_v2",
    "audit_plots_v2",
    "report_v2",
    "compare_v2",
    "cases_v2",
    "mapping_v2",
    "layouts_v2",
    "check_v2",
    "leakage_v2",
    "volumes_v2",
    "cache_entry_v2",
    "cache_v2",
    "augmentation_v2",
    "dataset_balance_v2",
    "backends_v2",
    "inference_v2",
    "probe_v2",
    "run_v2",
    "train_drunet_v2",
    "final_evaluation_v2",
    "export_v2",
    "make_phantom_v2",
)
COMMANDS = {"train_drunet_v2", "final_evaluation_v2", "make_phantom_v2", "export_v2"}
PATHS = sorted(REPOSITORY.glob("*.py"))
# What must be there for the network to be used elsewhere: torch, and nothing that reads files.
MODEL_PACKAGES = {"torch"}


def imported_modules(tree: ast.AST) -> set[str]:
    """Return the first name of every module that is imported anywhere, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." if node.level else node.module.split(".")[0])
    return found


TREES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in PATHS}
SIBLINGS = {name: imported_modules(tree) & TREES.keys() for name, tree in TREES.items()}


def test_the_order_names_every_part_and_no_other():
    assert sorted(TREES) == sorted(ORDER)


@pytest.mark.parametrize("name", sorted(TREES))
def test_a_part_imports_only_parts_before_it(name):
    assert SIBLINGS[name] <= set(ORDER[: ORDER.index(name)])


def test_the_network_needs_no_data_and_the_plumbing_no_sibling():
    assert SIBLINGS["utils_v2"] == set()
    assert SIBLINGS["model_drunet_v2"] == {"utils_v2"}  # for the command that prints its size


def test_no_part_imports_a_command():
    for name, siblings in SIBLINGS.items():
        assert not siblings & COMMANDS, name


def test_the_model_needs_torch_alone():
    foreign = imported_modules(TREES["model_drunet_v2"]) - TREES.keys()
    assert foreign - {"collections", "contextlib", "dataclasses"} == MODEL_PACKAGES


@pytest.mark.parametrize("name", sorted(TREES))
def test_no_part_imports_stars_relatively_or_by_a_changed_path(name):
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
    assert imported_modules(tree) == {"a", "c", ".", "h"}
