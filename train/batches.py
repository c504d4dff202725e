"""What a step trains on, in words and as text: for errors, and for who wants to look."""

from train.data import Windows, drawn
from train.manifest import Manifest
from train.packing import Packed, PackedWindows


def describe_batch(
    data: Manifest,
    windows: Windows | PackedWindows,
    step: int,
    batch_size: int,
    n_row: int | None = None,
    n_character: int | None = None,
) -> list[str]:
    """Of the first `n_row` windows of a step: epoch, window, place, and how the text begins."""
    batch = windows.batch(step, batch_size)
    tokens = batch.tokens if isinstance(batch, Packed) else batch
    tokenizer = data.tokenizer()
    rows = []
    for row, (epoch, window) in enumerate(placed(windows, step, batch_size)[:n_row]):
        text = tokenizer.decode(tokens[row].tolist())
        shown = text[:n_character]
        more = "..." if len(shown) < len(text) else ""
        rows.append(f"row {row}, epoch {epoch}, window {window}: {shown!r}{more}")
    return rows


def placed(windows: Windows | PackedWindows, step: int, batch_size: int) -> list[tuple[int, int]]:
    """(epoch, window) of every row of a step, both counted from 0."""
    found: list[tuple[int, int]] = [(0, 0)] * batch_size
    first = step * batch_size
    for rows, order, _ in drawn(first, batch_size, windows.per_epoch, windows.seed):
        for row, window in zip(rows.nonzero()[0].tolist(), order.tolist(), strict=True):
            found[row] = ((first + row) // windows.per_epoch, window)
    return found


def bad_steps(
    data: Manifest,
    windows: Windows | PackedWindows,
    step: int,
    batch_size: int,
    in_row: int,
    out_dir: str,
) -> str:
    """What to tell who comes to a run that skipped `in_row` steps, the last of them `step`."""
    rows = describe_batch(data, windows, step, batch_size, 2, 100)
    more = f"\n  and {batch_size - 2} more" if batch_size > 2 else ""
    return (
        f"{in_row} steps in a row were skipped, the last of them step {step}; no parameter has "
        f"changed since, and the last checkpoint, if there is one, is kept. Step {step} would "
        "learn from\n  "
        + "\n  ".join(rows)
        + f"{more}\nSee it whole: python scripts/batch.py --out_dir {out_dir} --step {step}\n"
        f"Then go on with a lower --learning_rate, or past it with --max_skipped above {in_row}: "
        f"python scripts/train.py --init_from resume --out_dir {out_dir}"
    )
