"""200 damaged inputs, others every day: none crashes, hangs or goes wrong without an error. tests/fuzz makes them."""

import pytest
from fuzz.__main__ import BAD, show, today


@pytest.mark.slow
def test_damaged_inputs_end_in_errors(capfd):
    pytest.importorskip("executorch.runtime", reason="executorch is not installed")
    from fuzz.__main__ import run_all

    rows = run_all(today(), 200)
    show(rows, today())
    assert len(rows) == 200
    assert not [row for row in rows if row["kind"] in BAD and row["kind"] != "traceback"]
    assert sum(row["kind"] == "traceback" for row in rows) <= 2
