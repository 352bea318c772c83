"""Which rooms of the house know each other: the ground knows nothing above it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "diffdistill"
GROUND = {"diffusion": (), "data": ("places",), "training": ()}  # and what each may import beside itself


@pytest.mark.parametrize("room", GROUND)
def test_the_ground_imports_nothing_from_above(room):
    for file in (PACKAGE / room).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("diffdistill"):
                names = [node.module] if node.module != "diffdistill" else [f"diffdistill.{a.name}" for a in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name.startswith("diffdistill")]
            else:
                continue
            for name in names:
                assert name.split(".")[1] in (room, *GROUND[room]), f"{file} imports {name}"
