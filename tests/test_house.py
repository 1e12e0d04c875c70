"""The house rules: who may import whom, where the environment is read, how long a file may be, what the README promises."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("clips", "convert", "loaders", "models", "training", "benchmarks")
WITHOUT_TORCH = ("clips", "convert")
HEAVY = {"torch", "torchvision", "webdataset", "transformers"}
MAX_LINES = 400
PARTS_OF_TRAIN = {"training.build"}  # train.py's other half: what it is made of, apart from the loop that one reads
SOURCES = ["train.py", "predict.py", *sorted(path.relative_to(ROOT).as_posix() for folder in (*ROOMS, "tests") for path in (ROOT / folder).rglob("*.py"))]
IN_ROOMS = [path for path in SOURCES if path.split("/")[0] in ROOMS]
REGISTRY_ENTRY = re.compile(rf"({'|'.join(ROOMS)})(\.\w+)+:\w+")
NOT_OURS = re.compile(r"(?<![\w.}])/(work|tmp)/|" + "|".join(re.escape(host) for host in ("pypi" + ".org", "python" + "hosted", "download." + "pytorch")))


@cache
def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@cache
def imports(path: str) -> list[tuple[int, int, str]]:
    """Line, level and absolute name of all that a file imports, inside functions and as registry entries too."""
    package = path.split("/")[:-1]
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, 0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found += [(node.lineno, node.level, f"{name}.{alias.name}" if name else alias.name) for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and REGISTRY_ENTRY.fullmatch(node.value):
            found.append((node.lineno, -1, node.value.split(":")[0]))
    return found


@cache
def modules_of_entry_points() -> frozenset[str]:
    """The rooms' `__main__` and the modules that only these import; benchmarks and tests look at anything, so they do not count."""
    importers: dict[str, set[str]] = {module_of(path): set() for path in IN_ROOMS}
    for path in SOURCES:
        if path.split("/")[0] not in ("tests", "benchmarks"):
            for _, _, name in imports(path):
                for module in (name, name.rpartition(".")[0]):
                    if module in importers:
                        importers[module].add(module_of(path))
    exempt = {module for module in importers if module.endswith(".__main__")}
    while more := {module for module, by in importers.items() if "." in module and by and by <= exempt} - exempt:
        exempt |= more
    return frozenset(exempt)


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "benchmarks"])  # benchmarks may join rooms
def test_a_room_imports_only_itself_and_clips(room: str) -> None:
    wrong = []
    for path in IN_ROOMS:
        if path.split("/")[0] == room and module_of(path) not in modules_of_entry_points() | PARTS_OF_TRAIN:
            for line, _, name in imports(path):
                top = name.split(".")[0]
                if top in ({*ROOMS, "train", "predict", "tests"} - {room, "clips"}):
                    wrong.append(f"{path}:{line} imports {name}")
    assert not wrong


def test_the_parts_of_train_are_imported_by_train_alone() -> None:
    importers = {path for path in SOURCES for _, _, name in imports(path) if PARTS_OF_TRAIN & {name, name.rpartition(".")[0]}}
    assert importers == {"train.py"}


def test_imports_are_relative_inside_a_room_and_absolute_between_rooms() -> None:
    wrong = []
    for path in IN_ROOMS:
        room = path.split("/")[0]
        for line, level, name in imports(path):
            if (level == 0 and name.split(".")[0] == room) or (level > 0 and name.split(".")[0] != room):
                wrong.append(f"{path}:{line} imports {name}")
    assert not wrong


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_the_room_never_names_torch(room: str) -> None:
    forbidden = HEAVY | ({*ROOMS} - {"clips", room})
    files = [path for path in IN_ROOMS if path.split("/")[0] == room]
    assert not [f"{path}:{line} imports {name}" for path in files for line, _, name in imports(path) if name.split(".")[0] in forbidden]


def test_importing_all_of_clips_and_convert_brings_no_torch() -> None:
    modules = [module_of(path) for path in IN_ROOMS if path.split("/")[0] in WITHOUT_TORCH]
    code = f"import sys, importlib\nfor name in {modules!r}: importlib.import_module(name)\nprint(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_snippets_are_packed_and_verified_where_there_is_no_torch(tmp_path: Path) -> None:
    """Stands for a CPU node with the base install: importing one of the heavy libraries fails there."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {HEAVY!r}: raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
    )

    def type_(*words: str | Path) -> subprocess.CompletedProcess[str]:
        env = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
        return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=env, capture_output=True, text=True, check=False)

    assert "No module named 'torch'" in type_("-c", "import torch").stderr
    snippets, shards = tmp_path / "snippets", tmp_path / "shards"
    home = snippets / "ellen_show_length_1300_sample_rate_1_iou_0.55"
    for words in (
        ("synthesize", "--output", snippets, "--clips", "4", "--frames", "4", "--size", "32"),
        ("pack", "--dataset-home", home, "--output", shards),
        ("verify", shards, "--dataset-home", home),
    ):
        done = type_("-m", "convert", *words)
        assert done.returncode == 0, done.stderr
    assert list(shards.rglob("*.tar"))


def test_a_file_can_be_read_in_one_sitting() -> None:
    lengths = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_only_one_file_reads_the_environment() -> None:
    readers = set()
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            named = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os" and node.attr in ("environ", "getenv")
            taken = isinstance(node, ast.ImportFrom) and node.module == "os" and any(alias.name in ("environ", "getenv") for alias in node.names)
            if named or taken:
                readers.add(path)
    assert {path for path in readers if not path.startswith("tests/")} == {"clips/environment.py"}


def test_no_file_names_a_machine_or_a_registry() -> None:
    folders = (*ROOMS, "docs", "slurm", ".ci")
    paths = [path for path in ROOT.iterdir() if path.is_file()] + [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    wrong = []
    for path in paths:
        if path.suffix != ".pyc":
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except UnicodeDecodeError:
                continue  # a picture
            wrong += [f"{path.relative_to(ROOT)}:{number}: {line.strip()}" for number, line in enumerate(lines, 1) if NOT_OURS.search(line)]
    assert not wrong


def tables_of_verbs(path: str) -> set[str]:
    """The keys of every dict in a file whose values are all classes named …Config."""
    tables = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Dict) and node.values]
    tables = [table for table in tables if all(isinstance(value, ast.Name) and value.id.endswith("Config") for value in table.values)]
    return {key.value for table in tables for key in table.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}


def test_the_readme_lists_the_commands_that_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| *`python -m (\w+) (\w+)", readme, flags=re.M))
    mains = [room for room in ROOMS if (ROOT / room / "__main__.py").exists()]
    words = {(room, node.value) for room in mains for node in ast.walk(tree(f"{room}/__main__.py")) if isinstance(node, ast.Constant)}
    assert listed - words == set(), "in README.md's table, but no verb"
    assert {(room, verb) for room in mains for verb in tables_of_verbs(f"{room}/__main__.py")} - listed == set(), "a verb, but not in README.md's table"
    for script in ("train.py", "predict.py"):
        assert f"| `python {script}`" in readme
        assert (ROOT / script).exists()


def test_every_word_of_make_that_the_readme_uses_exists() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    words = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    used = set(re.findall(r"(?:^|`)make ([a-z-]+)", readme, flags=re.M))
    assert used
    assert used <= words
