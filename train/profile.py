"""A profile of some steps: what host and device did when, as a trace that Perfetto opens."""

import shutil
from contextlib import AbstractContextManager
from pathlib import Path

import jax


class Profile:
    """Traces the steps `steps` of a run into its directory. Close it: a trace may be cut short."""

    def __init__(self, run: Path, steps: range) -> None:
        self._directory, self._steps = run / "profile", steps
        self._first: int | None = None

    def begin(self, step: int) -> None:
        """Before a step: the trace starts with the first one."""
        if self._first is None and step in self._steps:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every call of Python would hide the rest
            jax.profiler.start_trace(
                self._directory, create_perfetto_trace=True, profiler_options=options
            )
            self._first = step

    def step(self, step: int) -> AbstractContextManager[object]:
        """What a step runs in: its name in the trace."""
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, steps_done: int, result: object) -> list[str]:
        """Once the last step is over, whose `result` is waited for: what to tell the user."""
        if self._first is None or steps_done < self._steps.stop:
            return []
        jax.block_until_ready(result)
        return self.close(steps_done)

    def close(self, steps_done: int) -> list[str]:
        """As `after`, of what there is."""
        if self._first is None:
            return []
        first, self._first, self._steps = self._first, None, range(0)
        jax.profiler.stop_trace()
        made = max(
            self._directory.glob("plugins/profile/*/perfetto_trace.json.gz"),
            key=lambda path: path.stat().st_mtime,
        )
        name = f"steps-{first}-{steps_done - 1}.json.gz"
        shutil.move(made, self._directory / name)
        return [
            f"steps {first} to {steps_done - 1} are traced in {self._directory / name}",
            f"open it in Perfetto (ui.perfetto.dev), or all of it by: xprof {self._directory}",
        ]
