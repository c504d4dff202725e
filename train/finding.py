"""One thing that is wrong with a run, or likely to be."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """`name` is the setting, the data or the quantity it is about; `text` a sentence with the
    numbers and, where there is one, the cure."""

    name: str
    text: str

    def __str__(self) -> str:
        return f"({self.name}) {self.text}"
