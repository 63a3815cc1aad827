"""What the installed package promises beside its Python: its files, its metadata and its compiled libraries."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def library(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} is not installed"
    assert spec.origin is not None
    return Path(spec.origin)


def output_of(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def test_metadata_is_that_of_the_project_file() -> None:
    metadata = importlib.metadata.metadata("grinqh")
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra") or []) == set(PROJECT["optional-dependencies"])


def test_stub_typing_marker_and_licence_are_installed() -> None:
    files = {str(path) for path in importlib.metadata.files("grinqh") or []}
    assert {"grinqh/py.typed", "grinqh/_core.pyi"} <= files
    assert any(name.endswith("licenses/LICENSE") for name in files)


def test_command_is_installed() -> None:
    (command,) = importlib.metadata.distribution("grinqh").entry_points.select(group="console_scripts")
    assert command.name == "grinqh"
    assert callable(command.load())


def test_the_harness_s_model_type_names_the_extra_that_it_needs() -> None:
    code = "import runpy, sys; sys.modules['lm_eval'] = None; runpy.run_module('grinqh.lm_eval', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "pip install 'grinqh[eval]'" in done.stderr


def test_import_prints_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", "import grinqh"], check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_ops_library_needs_torch_by_name_only_and_no_python() -> None:
    dynamic = output_of("readelf", "-d", library("grinqh._ops"))
    needed = set(re.findall(r"Shared library: \[(.*?)\]", dynamic))
    system = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"}
    loaders = {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
    assert needed - loaders - system == {"libtorch.so"}
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    assert " Py" not in output_of("nm", "-D", "--undefined-only", library("grinqh._ops"))


def test_ops_library_uses_torch_through_its_stable_interface_only() -> None:
    undefined = output_of("nm", "-D", "-C", "--undefined-only", library("grinqh._ops"))
    assert "aoti_torch_" in undefined
    assert not re.findall(r"\b(?:at|c10|torch)::", undefined)


@pytest.mark.parametrize("name", ["grinqh._ops", "grinqh._core"])
def test_libraries_export_nothing_of_ours(name: str) -> None:
    exported = output_of("nm", "-D", "-C", "--defined-only", library(name))
    assert not re.findall(r"\b(?:grinqh|cuda)\w*", exported)


@pytest.mark.parametrize("name", ["grinqh._ops", "grinqh._core"])
def test_libraries_hold_no_path_of_the_build(name: str) -> None:
    content = library(name).read_bytes()
    assert str(ROOT).encode() not in content
    assert b"site-packages" not in content


def test_core_and_kernels_include_neither_torch_nor_python() -> None:
    folders = ["cpp/include", "cpp/core", "cpp/cpu", "cuda"]
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    assert sources
    for path in sources:
        includes = re.findall(r"#\s*include\s*[<\"](.*?)[>\"]", path.read_text())
        assert not [name for name in includes if re.match(r"torch|ATen|c10|Python\.h|nanobind|pybind11", name)], path


def test_source_distribution_holds_what_the_build_reads(tmp_path: Path) -> None:
    program = f"from scikit_build_core.build import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("grinqh-*.tar.gz")
    names = {name.partition("/")[2] for name in output_of("tar", "tzf", archive).splitlines()}
    build_files = re.findall(
        r"\b(?:cpp|cuda|third_party)/[\w/.]+\.(?:cpp|cu|cmake)", (ROOT / "CMakeLists.txt").read_text()
    )
    assert {"CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", *build_files} <= names
    assert not [name for name in names if name.startswith(("build/", ".venv/", ".cache/"))]
