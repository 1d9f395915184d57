# SPDX-License-Identifier: Apache-2.0
from dqrelo_tools.text_table import text_table


def test_cells_are_aligned_and_lines_end_without_spaces():
    rows = [("module", "rank", "error"), ("q_proj", 12, "0.25"), ("up", "9-120", "")]
    assert text_table(rows) == (
        "module   rank  error\n"
        "q_proj     12   0.25\n"
        "up      9-120"
    )  # fmt: skip
    assert text_table(rows, "><") == (
        "module  rank   error\n"
        "q_proj  12     0.25\n"
        "    up  9-120"
    )  # fmt: skip
    assert text_table(rows[:1], "<") == "module  rank  error"
