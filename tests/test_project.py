"""What the repository says of itself: workflows, versions, the pages of the site, what the type checker reads."""

import ast
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from conftest import ROOT

import mobilemoe


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = mobilemoe.__version__


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_targets_that_exist(workflow):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    content = yaml.safe_load(workflow.read_text())
    # Nothing may be written unless a job asks for it.
    assert content["permissions"] == {"contents": "read"}
    for job in content["jobs"].values():
        for step in job["steps"]:
            assert set(re.findall(r"\bmake ([\w-]+)", step.get("run", ""))) <= targets
            # A branch of an action, "main" say, may change under us.
            assert re.fullmatch(r"[\w./-]+@(v\d+|release/v\d+)", step.get("uses", "none@v1"))


def test_one_version_everywhere():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == VERSION
    assert f"## [{VERSION}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_module_of_the_api_pages_exists():
    pages = sorted((ROOT / "docs" / "api").glob("*.md"))
    modules = [name for page in pages for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)]
    assert modules
    for name in modules:
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), name


def test_every_page_of_the_site_exists():
    # As text: its tags are mkdocs' own.
    pages = re.findall(r"^ +- .*?([\w./-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(pages) > 10
    assert [page for page in pages if not (ROOT / page).is_file()] == []


def test_the_page_of_tools_lists_those_that_are_tested():
    marks = [
        ast.literal_eval(decorator.args[0])
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef)
        for decorator in function.decorator_list
        if ast.unparse(decorator).startswith("pytest.mark.works_with(")
    ]
    listed = re.findall(r"^\| `(.+?)` \|", (ROOT / "docs" / "works-with.md").read_text(), re.MULTILINE)
    assert len(marks) > 3 and sorted(listed) == sorted(marks), "run `python docs/works_with.py`"


def test_the_page_of_installing_has_every_extra():
    listed = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "install.md").read_text(), re.MULTILINE)
    assert set(listed) == PROJECT["project"]["optional-dependencies"].keys() - {"dev", "docs"}


def test_the_type_checker_reads_files_that_exist():
    assert [name for name in PROJECT["tool"]["ty"]["src"]["include"] if not (ROOT / name).is_file()] == []


def test_every_benchmark_imports():
    """They take hours, so nothing else here would notice a name that moved."""
    names = ", ".join(path.stem for path in sorted((ROOT / "benchmarks").glob("*.py")))
    subprocess.run([sys.executable, "-c", f"import {names}"], cwd=ROOT / "benchmarks", check=True)


def test_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
