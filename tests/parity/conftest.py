"""Shows the worst figures at the end: the numbers that the README quotes."""

import re
from typing import Any

FIGURE = re.compile(r"([^:,\n]+)[^:\n]*: (\d\.\de[+-]\d\d)")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    worst: dict[tuple[str, str], tuple[float, str]] = {}
    for report in terminalreporter.stats.get("passed", []):
        file, _, test = report.nodeid.rpartition("/")[2].partition("::")
        for name, figure in FIGURE.findall(report.capstdout):
            found = (float(figure), test)
            worst[file, name] = max(worst.get((file, name), found), found)
    terminalreporter.section("worst figures")
    for (file, name), (figure, test) in sorted(worst.items()):
        terminalreporter.line(f"{figure:.1e}  {name}, {file}: {test}")
