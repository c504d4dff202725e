"""One thing that is wrong with a run, or likely to be."""

from dataclasses import dataclass
from typing import Literal

Weight = Literal["alarm", "note"]


@dataclass(frozen=True)
class Finding:
    """`name` is the setting, the data or the quantity it is about; `text` a sentence with the
    numbers and, where there is one, the cure. A note is worth knowing and may well be as it
    should."""

    name: str
    text: str
    weight: Weight = "alarm"

    def __str__(self) -> str:
        return f"({self.name}) {self.text}"

    @property
    def line(self) -> str:
        """For a person."""
        return f"{'WATCH OUT' if self.weight == 'alarm' else 'NOTE'} {self}"
