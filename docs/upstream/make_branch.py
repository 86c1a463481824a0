"""
Makes the branch `add-mobilemoe` in a checkout of transformers, as a pull request would have it:

    git clone --depth 1 --branch v5.24.0 https://github.com/huggingface/transformers
    git -C transformers switch -c main
    pip install -e "transformers[quality]"
    python docs/upstream/make_branch.py transformers

It copies `modular_mobilemoe.py` into `src/transformers/models/mobilemoe/`, generates the configuration and the model
from it, adds the model to the Auto mappings, applies the patches of this directory, commits, and runs the checks of
the checkout. The documentation page and the tests of the model are not written.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path


HERE = Path(__file__).resolve().parent
BRANCH = "add-mobilemoe"
PATCHES = ("serve_custom_models.patch", "tokenizer_fallback.patch")
# By file under src/transformers/models/auto: the mapping and what it says of the model.
ENTRIES = (
    ("auto_mappings.py", "CONFIG_MAPPING_NAMES", '"MobileMoEConfig"'),
    ("modeling_auto.py", "MODEL_MAPPING_NAMES", '"MobileMoEModel"'),
    ("modeling_auto.py", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", '"MobileMoEForCausalLM"'),
    ("tokenization_auto.py", "TOKENIZER_MAPPING_NAMES", '"TokenizersBackend" if is_tokenizers_available() else None'),
)
# Names of utils/checkers.py: what lists the models, and what must hold of every model before its documentation and
# tests are there.
FIXES = "sort_auto_mappings,inits"
CHECKS = f"modular_conversion,{FIXES},copies,dummies,docstrings"


def git(checkout: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=checkout, check=True, stdout=subprocess.PIPE, text=True).stdout


def run(checkout: Path, script: str, *arguments: str) -> None:
    """Runs a script of the checkout on its own sources, with the ruff of this environment."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, ("src", os.environ.get("PYTHONPATH")))),
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
    }
    subprocess.run([sys.executable, f"utils/{script}", *arguments], cwd=checkout, env=environment, check=True)


def check_checkout(checkout: Path) -> None:
    """
    Raises:
        ValueError: for a directory that is no clean git checkout of transformers with the branch `main`, or that has
            the model or the branch.
    """
    for name in (".git", "src/transformers/models/auto/modeling_auto.py", "utils/modular_model_converter.py"):
        if not (checkout / name).exists():
            raise ValueError(
                f"{checkout} has no {name}, so it is no checkout of transformers. Give the directory that "
                "`git clone https://github.com/huggingface/transformers` made; the source distribution lacks utils/."
            )
    if (checkout / "src/transformers/models/mobilemoe").exists():
        raise ValueError(f"{checkout} has MobileMoE. Give a checkout without src/transformers/models/mobilemoe.")
    branches = git(checkout, "branch", "--format=%(refname:short)").split()
    if "main" not in branches:
        raise ValueError(
            f"{checkout} has no branch main, and its checks compare with that branch. Make it: git switch -c main."
        )
    if BRANCH in branches:
        raise ValueError(f"{checkout} has the branch {BRANCH}. Delete it: git branch -D {BRANCH}.")
    if git(checkout, "status", "--porcelain"):
        raise ValueError(f"{checkout} has uncommitted changes, which the commit would contain. Commit or stash them.")


def register(file: Path, mapping: str, value: str) -> None:
    """
    Adds the model as the first entry of a mapping; the checkout's own script sorts it.

    Raises:
        ValueError: for a file without that mapping.
    """
    text, count = re.subn(
        rf"(^{mapping} = OrderedDict.*\(\n    \[\n(?: +#.*\n)*)",
        rf'\g<1>        ("mobilemoe", {value}),\n',
        file.read_text(),
        flags=re.MULTILINE,
    )
    if count != 1:
        raise ValueError(f"{file} has no {mapping} in the form of transformers 5.24. Check out that version.")
    file.write_text(text)


def make_branch(checkout: Path) -> None:
    """
    Makes the branch, and leaves the checkout on it.

    Raises:
        ValueError: for a directory that cannot take it.
        subprocess.CalledProcessError: for a patch that does not apply or a check that fails; its output says why.
    """
    check_checkout(checkout)
    git(checkout, "switch", "--quiet", "--create", BRANCH)
    models = checkout / "src/transformers/models"
    (models / "mobilemoe").mkdir()
    shutil.copy(HERE / "modular_mobilemoe.py", models / "mobilemoe")
    # Every model has this file; only the name differs.
    text = (models / "olmoe/__init__.py").read_text()
    (models / "mobilemoe/__init__.py").write_text(text.replace("olmoe", "mobilemoe"))
    for file, mapping, value in ENTRIES:
        register(models / "auto" / file, mapping, value)
    for patch in PATCHES:
        git(checkout, "apply", str(HERE / patch))
    # After the entries: it takes the spelling of the name from them.
    run(checkout, "modular_model_converter.py", "mobilemoe")
    run(checkout, "checkers.py", FIXES, "--fix")
    git(checkout, "add", "--all")
    git(checkout, "commit", "--quiet", "--message", "Add MobileMoE")
    # After the commit: the check of modular files looks at what differs from main.
    run(checkout, "checkers.py", CHECKS, "--keep-going")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="directory of a git checkout of transformers")
    make_branch(parser.parse_args().checkout.resolve())
