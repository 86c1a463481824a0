"""docs/training-s.md: its table is what docs/training_costs.py prints, its arithmetic holds, its launcher parses."""

import re
import runpy
import shlex
import subprocess
import sys

import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT


PAGE = (ROOT / "docs/training-s.md").read_text()
SCRIPT = ROOT / "docs/training_costs.py"


def printed(*options):
    return subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True)


def test_table_is_what_the_script_prints():
    result = printed()
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() in PAGE


def test_flops_of_pre_training_by_hand():
    """From the published 272.4M active parameters, and sequences of 2,048 tokens."""
    script = runpy.run_path(str(SCRIPT))
    row = next(row for row in script["costs"]([0.3], 989e12, 2.5) if row[:2] == ("S", "pre-training"))
    config = script["MobileMoEConfig"].from_pretrained(ROOT / "recipes/mobilemoe-s")
    width = config.num_attention_heads * config.head_dim
    # Forward: 4 per layer, channel and pair, of which a token has 1,024.5 on average; thrice with the backward pass.
    per_token = 6 * 272.4e6 + 3 * 4 * config.num_hidden_layers * width * 1024.5
    assert float(row[3]) == pytest.approx(6e12 * per_token, rel=5e-3)
    assert float(row[4].replace(",", "")) == pytest.approx(6e12 * per_token / (989e12 * 0.3 * 3600), rel=5e-3)


def test_share_of_the_peak_that_the_secondary_sources_imply():
    flops = 1.09e22
    assert f"Pre-training of S has {flops:.2e}".replace("e+", "e") in PAGE
    for days in (21, 28):
        assert f"{flops / (64 * 989e12 * days * 86400):.2g}".rstrip("0") in PAGE
    hours = re.search(r"\| S \| all \|.*\| ([\d,]+) \| \$[\d,]+ \|$", PAGE, re.MULTILINE)[1]
    assert f"S needs {hours} / 64 / 24 = {float(hours.replace(',', '')) / 64 / 24:.0f} days" in PAGE


@pytest.mark.parametrize("option", [("--mfu", "nan"), ("--peak", "0"), ("--price", "-1")])
def test_numbers_that_cannot_work_are_refused(option):
    result = printed(*option)
    assert result.returncode == 2 and "cannot work. Set finite numbers above 0" in result.stderr


def test_launcher_knows_its_options():
    command = re.search(r'srun bash -c "(accelerate launch .*?)"\n', PAGE, re.DOTALL)[1]
    command = command.replace("\\\n", " ").replace("\\$SLURM_NODEID", "3").replace("$first", "node0")
    program, verb, *options = shlex.split(command)
    arguments = launch_command_parser().parse_args(options)
    assert (program, verb) == ("accelerate", "launch")
    assert (arguments.num_machines, arguments.num_processes, arguments.machine_rank) == (8, 64, 3)
    # As many sequences as the recipe's on 8 GPUs.
    given = arguments.training_script_args
    accumulation = int(given[given.index("--gradient_accumulation_steps") + 1])
    recipe = (ROOT / "recipes/pretrain.yaml").read_text()
    of_recipe = [
        int(re.search(rf"^{name}: (\d+)", recipe, re.MULTILINE)[1])
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
    ]
    assert 64 * of_recipe[0] * accumulation == 8 * of_recipe[0] * of_recipe[1]
    assert int(given[given.index("--num_data_readers") + 1]) % 64 == 0
