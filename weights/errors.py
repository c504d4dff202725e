"""The one error of this package, and JSON that may be anything."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

SHOWN = 40
LARGEST_JSON = 2**28  # bytes; the largest tokenizers take a tenth


class WeightsError(ValueError):
    """A model cannot be read or written. The message names every problem found, and the fix."""


def raise_problems(subject: str, problems: Sequence[str]) -> NoReturn:
    """All problems as one WeightsError; of a long list, the first ones and how many follow."""
    if len(problems) == 1:
        raise WeightsError(f"{subject}: {problems[0]}")
    lines = [f"  - {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"  ... and {len(problems) - SHOWN} more")
    raise WeightsError("\n".join([f"{subject}: {len(problems)} problems", *lines]))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. WeightsError for anything else, NaN and Infinity included."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        n_bytes = path.stat().st_size
        if n_bytes > LARGEST_JSON:
            raise ValueError(f"{n_bytes} bytes, expected at most {LARGEST_JSON}")
        values = json.loads(path.read_text("utf-8"), parse_constant=refuse)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(
            f"{path}: not valid JSON ({error}); the file is damaged, fetch or write it again"
        ) from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values
