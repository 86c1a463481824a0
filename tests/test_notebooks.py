"""The notebooks run from top to bottom on tiny checkpoints, and what is committed is the output of a whole run."""

import inspect
import json
import shutil
import textwrap
from pathlib import Path

import nbformat
import pytest
from hub_server import HubServer
from nbclient.exceptions import CellExecutionError


ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
# In place of the demo's checkpoints.
CHECKPOINTS = {"2-midtrain": "base_checkpoint", "3-sft": "float_text_checkpoint", "4-qat": "text_checkpoint"}


@pytest.fixture(scope="module")
def examples(request, tmp_path_factory) -> Path:
    """A directory like `examples/` after `make demo`, only smaller."""
    root = tmp_path_factory.mktemp("repository")
    shutil.copytree(ROOT / "examples", root / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "recipes").mkdir()
    shutil.copytree(ROOT / "recipes/mobilemoe-s", root / "recipes/mobilemoe-s")
    for name, fixture in CHECKPOINTS.items():
        shutil.copytree(request.getfixturevalue(fixture), root / "out/demo" / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        import stdlib_data

        library = {"inspect.py": inspect.getsource(inspect), "textwrap.py": inspect.getsource(textwrap)}
        patch.setattr(stdlib_data, "standard_library_files", lambda: iter(library.items()))
        patch.setattr(stdlib_data, "is_heldout", lambda name: name == "textwrap.py")
        stdlib_data.write_data(root / "out/demo/data")
    return root / "examples"


@pytest.fixture
def run(examples, monkeypatch):
    """Runs a notebook there, with other settings, and returns what it printed and how many pictures it drew."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    from notebooks import run_notebook

    def run(name: str, **settings) -> tuple[str, int]:
        notebook = run_notebook(examples / name, settings)
        outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
        text = "".join(output.text for output in outputs if output.get("name") == "stdout")
        return text, sum("image/png" in output.get("data", {}) for output in outputs)

    return run


def last_numbers(text: str, label: str) -> list[float]:
    return [float(line.split()[-1]) for line in text.splitlines() if line.startswith(label)]


def test_load_and_chat(run):
    text, pictures = run("1_chat.ipynb", MAX_NEW_TOKENS=8)
    assert "in memory" in text and text.count("-" * 40) == 3
    assert pictures == 1


def test_load_and_chat_by_hub_id(run, text_checkpoint, tmp_path, monkeypatch):
    environment = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    for name, value in (environment | {"NO_PROXY": "127.0.0.1,localhost"}).items():
        monkeypatch.setenv(name, value)
    with HubServer() as hub:
        hub.add("user/model", {path.name: path.read_bytes() for path in text_checkpoint.iterdir()})
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        text, _ = run("1_chat.ipynb", MODEL="user/model", MAX_NEW_TOKENS=2)
        assert "GET" in "".join(hub.log)
    assert "in memory" in text


def test_look_inside(run):
    text, pictures = run("2_inside.ipynb", MAX_TOKENS=512)
    assert pictures == 3
    lines = text.splitlines()
    # Per kind of text its loss, and four experts, of which one may prefer two kinds as strongly.
    assert [line.split()[0] for line in lines if "bits per byte" in line] == ["code", "docstrings", "prose", "sums"]
    assert 8 <= sum(line.startswith("layer") for line in lines) <= 16


def test_fine_tune_with_lora_and_merge(run, examples):
    text, pictures = run("3_lora.ipynb", STEPS=2, BATCH=2, NUM_TEST=4)
    assert pictures == 1
    merged, again = last_numbers(text, "largest difference of a logit")
    assert merged < 1e-3 and again < 1e-5
    out = examples.parent / "out/notebooks/lora"
    assert (out / "adapter/adapter_config.json").is_file() and (out / "merged/model.safetensors").is_file()


@pytest.mark.slow
def test_qat_to_pte(run, examples):
    text, pictures = run("4_qat_to_pte.ipynb", STEPS=2, NUM_TEST=4, MAX_SEQ_LEN=256)
    assert pictures == 1
    rows = [line.rsplit(maxsplit=6) for line in text.splitlines() if "nats per token," in line]
    assert [row[0] for row in rows] == ["BF16", "INT4, rounded", "INT4, QAT", "INT4, QAT, .pte"]
    losses, sizes = ([float(row[place]) for row in rows] for place in (1, 5))
    # The program rounds its inputs, the checkpoint does not.
    assert losses[3] == pytest.approx(losses[2], abs=0.05)
    assert sizes[0] > 2 * sizes[1] == pytest.approx(2 * sizes[2], rel=0.01)
    # A checkpoint that is trained already, as for a Hub id.
    trained = str(examples.parent / "out/notebooks/qat-trained")
    shutil.move(examples.parent / "out/notebooks/qat/qat", trained)
    text, _ = run("4_qat_to_pte.ipynb", TRAINED=trained, NUM_TEST=4, MAX_SEQ_LEN=256)
    assert f"INT4, QAT        {losses[2]:.4f}" in text


def test_plan_a_model(run, examples):
    text, pictures = run("5_plan.ipynb")
    assert pictures == 4
    best = json.loads((examples.parent / "out/notebooks/plan/plan.json").read_text())["best"]
    assert f"{best['total_parameters'] / 1e6:,.0f} million parameters" in text
    assert best["memory_bytes"] <= 1.2e9 and best["decode_tokens_per_second"] >= 40


def test_a_setting_that_a_notebook_does_not_have_is_an_error(run):
    with pytest.raises(ValueError, match="5_plan.ipynb has no setting STEPS"):
        run("5_plan.ipynb", STEPS=1)


@pytest.mark.parametrize("name", [path.name for path in NOTEBOOKS if path.name != "5_plan.ipynb"])
def test_without_the_demo_a_notebook_says_to_make_it(run, name):
    with pytest.raises(CellExecutionError) as error:
        run(name, MODEL="../out/demo/nowhere")
    assert error.value.ename == "SystemExit"
    assert error.value.evalue == (
        "../out/demo/nowhere is missing. Run `make demo` in the repository, or name another MODEL above."
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_committed_outputs_are_those_of_one_whole_run(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)


def test_notebooks_stay_small():
    assert len(NOTEBOOKS) == 5
    assert sum(path.stat().st_size for path in NOTEBOOKS) < 600_000
