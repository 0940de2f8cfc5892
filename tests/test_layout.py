"""The layout rule: actors/ and kernels/ are pdray.actors and pdray.kernels everywhere, and hide no other package."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import ray

from pdray.testing.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("actors", "kernels")
MAX_LINES = 350
GIT_LS_FILES = ("git", "ls-files", "--cached", "--others", "--exclude-standard")

# What each part of pdray may import from the others; the engine knows no Ray, no HTTP and no peers.
VALUES = {"pdray", "pdray.config", "pdray.errors", "pdray.outputs", "pdray.prompt_scores", "pdray.sampling_params"}
VALUES |= {"pdray.gpu_settings", "pdray.partition_settings", "pdray.structured_outputs", "pdray.thinking"}
MODELS = VALUES | {"pdray.cache", "pdray.kernels", "pdray.models"}
ENGINE = MODELS | {"pdray.engine"}
WIRE = VALUES | {"pdray.background", "pdray.wire"}
CONTROL = ENGINE | {"pdray.control", "pdray.wire"}
ALLOWED = {
    "kernels": {"pdray.kernels"},
    "models": MODELS,
    "engine": ENGINE,
    "wire": WIRE,
    "control": CONTROL,
    "transfer": CONTROL | WIRE | {"pdray.transfer"},
    "router": CONTROL | WIRE | {"pdray.router"},
}
NETWORK = {"ray", "fastapi", "starlette", "uvicorn", "openai", "httpx", "httpx2", "aiohttp", "socket", "requests"}
FORBIDDEN = {
    "kernels": NETWORK | {"transformers", "asyncio", "pydantic"},
    "models": NETWORK | {"asyncio"},
    "engine": NETWORK | {"asyncio"},
    "wire": {"ray", "fastapi", "starlette", "uvicorn", "torch"},
    "control": NETWORK | {"torch", "asyncio"},
    "router": {"ray", "fastapi", "starlette", "uvicorn", "torch"},
}


def library_files() -> dict[str, Path]:
    """Every Python file of the library by its path in a wheel, e.g. pdray/kernels/kv/blocks.py."""
    files = {
        f"pdray/{top}/{path.relative_to(ROOT / top)}": path for top in LINKED for path in (ROOT / top).rglob("*.py")
    }
    for path in (ROOT / "pdray").rglob("*.py"):
        if path.relative_to(ROOT).parts[1] not in LINKED:
            files[str(path.relative_to(ROOT))] = path
    return files


def imported_modules(path: Path) -> Iterator[str]:
    """Absolute names of the modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            yield node.module


def part_of(module: str) -> str:
    """pdray.engine.kv.block_pool → pdray.engine; pdray.errors stays."""
    return ".".join(module.split(".")[:2])


def run_python(code: str, cwd: Path, *options: str, **environment: str) -> Any:
    """Run code in a fresh interpreter; it prints one JSON object. PYTHONPATH is not inherited."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    done = subprocess.run(
        [sys.executable, *options, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_actors_kernels_and_tests_are_no_packages() -> None:
    found = [path for top in (*LINKED, "tests") for path in (ROOT / top).rglob("__init__.py")]
    assert not found


@pytest.mark.parametrize("name", LINKED)
def test_links_are_relative(name: str) -> None:
    link = ROOT / "pdray" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"


def test_setup_cfg_names_every_package() -> None:
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    packages = set(parser["options"]["packages"].split())
    assert packages == {str(Path(name).parent).replace("/", ".") for name in library_files()}
    assert {name for name in packages if name.split(".")[1:2] not in (["actors"], ["kernels"])} == {
        str(path.parent.relative_to(ROOT)).replace("/", ".") for path in (ROOT / "pdray").rglob("__init__.py")
    }


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_imports_point_one_way(part: str) -> None:
    files = [path for name, path in library_files().items() if name.startswith(f"pdray/{part}/")]
    assert files
    for path in files:
        for module in imported_modules(path):
            if module.split(".")[0] == "pdray":
                assert part_of(module) in ALLOWED[part], f"{path.relative_to(ROOT)} imports {module}"
            assert module.split(".")[0] not in FORBIDDEN.get(part, ()), f"{path.relative_to(ROOT)} imports {module}"


def test_kernels_and_actors_are_imported_by_their_installed_names() -> None:
    for path in [*library_files().values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]:
        for module in imported_modules(path):
            assert module.split(".")[0] != "actors", f"{path.relative_to(ROOT)} imports {module}"
            assert not module.startswith("kernels."), f"{path.relative_to(ROOT)} imports {module}"


def test_no_python_file_is_too_long() -> None:
    listed = subprocess.run([*GIT_LS_FILES, "-z", "*.py"], cwd=ROOT, capture_output=True, check=True)
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert lengths
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git would commit, symlinks as symlinks."""
    listed = subprocess.run([*GIT_LS_FILES, "-z"], cwd=ROOT, capture_output=True, check=True)
    copy = tmp_path_factory.mktemp("checkout")
    for name in listed.stdout.decode().split("\0"):
        if name and os.path.lexists(ROOT / name):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    return copy


@pytest.fixture(scope="module")
def distributions(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel built from that sdist, as a release would be."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(checkout)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_wheel_holds_every_file_once_and_nothing_else(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted([*library_files(), "pdray/py.typed"])
    top_level = zipfile.ZipFile(wheel).read(
        next(n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("top_level.txt"))
    )
    assert top_level.decode().split() == ["pdray"]


def test_sdist_holds_every_file_once(distributions: Path) -> None:
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = [name.split("/", 1)[1] for name in archive.getnames() if name.endswith(".py")]
    expected = [str(path.relative_to(ROOT)) for path in library_files().values()]
    assert sorted(name for name in members if not name.startswith(("tests/", "examples/"))) == sorted(expected)


def test_wheel_alone_imports(distributions: Path, tmp_path: Path) -> None:
    """Unpacked anywhere, without a symlink, the wheel gives every module under its name."""
    (wheel,) = distributions.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import json, importlib.util as u;"
        f"print(json.dumps({{m: u.find_spec(m).origin for m in {_one_module_each()}}}))"
    )
    found = run_python(code, tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert all(origin.startswith(str(tmp_path / "site")) for origin in found.values())


def _one_module_each() -> list[str]:
    return [f"pdray.{top}.{min(path.stem for path in (ROOT / top).glob('*.py'))}" for top in LINKED]


def test_editable_install_resolves_to_the_checkout(checkout: Path, tmp_path: Path) -> None:
    """`pip install -e`, into a folder of its own, seen from another directory."""
    site = tmp_path / "site"
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", str(site)]
    pip = [sys.executable, "-m", "pip", "install", *options, "--editable", str(checkout)]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    # -I -S: nothing but the standard library, so that pdray can only come from that folder
    look = f"import site; site.addsitedir({str(site)!r}); import json, importlib.util as u;"
    origins = run_python(
        f"{look} print(json.dumps([u.find_spec(module).origin for module in {_one_module_each()}]))",
        tmp_path,
        "-I",
        "-S",
    )
    for module, origin in zip(_one_module_each(), origins, strict=True):
        assert Path(origin).resolve() == checkout / f"{module.removeprefix('pdray.').replace('.', '/')}.py"
    tops = run_python(f"{look} print(json.dumps([str(u.find_spec(m)) for m in {LINKED}]))", tmp_path, "-I", "-S")
    assert tops == ["None", "None"]


def test_huggingface_kernels_is_not_hidden() -> None:
    """With the repository root first on the path, as Ray's workers have it."""
    code = (
        "import json, kernels, transformers, pdray.errors;"
        "print(json.dumps({'kernels': kernels.__file__, 'pdray': pdray.errors.__file__}))"
    )
    found = run_python(code, ROOT, PYTHONPATH=str(ROOT))
    assert not found["kernels"].startswith(str(ROOT / "kernels"))
    assert "site-packages" in found["kernels"]
    assert Path(found["pdray"]).resolve() == ROOT / "pdray" / "errors.py"


@pytest.mark.parametrize(
    ("module", "spared"),
    [
        ("pdray", ["torch", "ray", "transformers"]),
        ("pdray.llm", ["torch", "transformers", "ray.serve"]),
        ("pdray.actors.coordinator", ["torch", "transformers", "ray.serve"]),
    ],
)
def test_imports_are_cheap(module: str, spared: list[str]) -> None:
    code = f"import json, sys, {module}; print(json.dumps([m for m in {spared} if m in sys.modules]))"
    assert run_python(code, ROOT, PYTHONPATH=str(ROOT)) == []


@pytest.fixture(scope="module")
def ray_with_checkout(checkout: Path) -> Iterator[None]:
    """A cluster whose workers get the checkout as their working directory, uploaded."""
    runtime_env = {"working_dir": str(checkout), "env_vars": {"PYTHONPATH": ""}}
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env=runtime_env)
    yield
    ray.shutdown()


@pytest.mark.ray
def test_ray_worker_imports_from_an_uploaded_checkout(ray_with_checkout: None) -> None:
    """The symlinks survive the upload (or are replaced by what they point to), and `kernels` is Hugging Face's."""

    @ray.remote(num_cpus=0)
    def look(modules: list[str]) -> dict[str, str]:
        import importlib.util

        import kernels
        import transformers  # noqa: F401

        found = {module: importlib.util.find_spec(module) for module in [*modules, "pdray.errors"]}
        origins = {module: str(spec and spec.origin) for module, spec in found.items()}
        return origins | {"kernels": str(kernels.__file__)}

    found = ray.get(look.remote(_one_module_each()), timeout=PATIENCE_S)
    assert "site-packages" in found.pop("kernels")
    for module, origin in found.items():
        assert origin.endswith(module.replace(".", "/") + ".py")
        assert "working_dir_files" in origin, f"{module} came from {origin}, not from the uploaded checkout"


def test_no_path_of_a_developers_machine(checkout: Path) -> None:
    words = tuple(f"/{name}/" for name in ("wor" + "k", "ro" + "ot"))
    for path in checkout.rglob("*"):
        if path.is_file():
            text = path.read_text(errors="replace")
            assert not any(word in text for word in words), f"{path.relative_to(checkout)} names a path of one machine"
