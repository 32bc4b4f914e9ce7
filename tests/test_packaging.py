"""What an installation puts on a user's machine, and what importing it costs them."""

import json
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest
import yaml
from packaging.requirements import Requirement

import weightspace

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "weightspace"
TAKEN_NAMES = ("datasets", "models", "utils", "nets", "zoo", "spec", "tasks", "cli", "testing")
HEAVY = {"matplotlib", "lightning", "pytorch_lightning", "sklearn", "tensorboard", "torchmetrics", "pandas"}


def run_python(code: str, cwd: Path) -> str:
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel_members(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The paths inside the wheel, built with what is installed (no network)."""
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(out),
        str(REPOSITORY),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_wheel_claims_one_name(wheel_members: list[str]) -> None:
    top_level = {PurePosixPath(member).parts[0] for member in wheel_members}
    names = {name for name in top_level if not name.endswith(".dist-info")}
    assert names == {"weightspace"}
    assert len(top_level) == 2


def test_the_wheel_holds_every_file_of_the_package(wheel_members: list[str]) -> None:
    files = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    missing = {path.relative_to(REPOSITORY).as_posix() for path in files} - set(wheel_members)
    assert not missing


def test_the_wheel_is_typed_and_brings_its_recipes_and_licence(wheel_members: list[str]) -> None:
    recipes = [
        m for m in wheel_members if m.startswith("weightspace/datagen/recipes/") and m.endswith(".yaml")
    ]
    assert "weightspace/py.typed" in wheel_members
    assert recipes
    assert any(member.endswith(".dist-info/licenses/LICENSE") for member in wheel_members)


def test_importing_weightspace_leaves_heavy_libraries_alone(tmp_path: Path) -> None:
    loaded = json.loads(
        run_python("import json, sys, weightspace; print(json.dumps(list(sys.modules)))", tmp_path)
    )
    assert not HEAVY & {name.partition(".")[0] for name in loaded}


def test_no_common_name_is_importable_from_weightspace(tmp_path: Path) -> None:
    code = f"""
import importlib.util, json, weightspace
specs = {{name: importlib.util.find_spec(name) for name in {TAKEN_NAMES}}}
print(json.dumps({{name: str(spec.origin) for name, spec in specs.items() if spec}}))
"""
    # Another library may own the name: that is why it is not ours.
    origins = json.loads(run_python(code, tmp_path))
    ours = {name: origin for name, origin in origins.items() if PACKAGE in Path(origin).parents}
    assert not ours


def test_one_version_everywhere() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert weightspace.__version__ == project["version"] == citation["version"]


def test_every_direct_dependency_is_pinned() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    names = {Requirement(requirement).name.lower() for requirement in wanted}
    pins = [Requirement(line) for line in (REPOSITORY / "constraints.txt").read_text().splitlines()]
    assert names <= {pin.name.lower() for pin in pins}
    assert all(str(pin.specifier).startswith("==") for pin in pins)
    assert "torchvision" not in names | {pin.name.lower() for pin in pins}
