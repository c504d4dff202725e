"""The loop that ties data, step, evaluation, checkpoints and what a person sees together."""

import dataclasses
import math
import operator
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from eqx_gpt import lora
from eqx_gpt.config import GPTConfig
from eqx_gpt.generate import generate
from eqx_gpt.gpt import GPT
from eqx_gpt.text import with_tokens_of
from eqx_gpt.tree import cast, count_params
from train.checkpoint import Checkpoints
from train.clock import Clock
from train.cluster import Hosts
from train.config import TrainConfig
from train.data import prefetched
from train.devices import Execution
from train.display import Display
from train.evaluate import sampled_loss
from train.header import header
from train.hosts import Vote, ending_together, is_writer, join
from train.interrupt import Interrupted, Interruption
from train.manifest import SPLITS, Manifest
from train.mesh import (
    around,
    batch_on,
    choose_mesh,
    n_parts,
    n_peaks,
    on_every_device,
    with_shardings,
)
from train.metrics import MetricsFile, extra_loggers, flops_per_token, peak_flops
from train.optimizer import learning_rate, make_optimizer
from train.packing import Packed, windows_of
from train.plot import plot_losses
from train.run import RunError, check_startable, has_checkpoint, resumed_model, write_run
from train.start import computing, new_state, skeleton, started_model
from train.step import (
    Gradients,
    Recipe,
    StepMetrics,
    TrainState,
    add_gradients,
    apply_gradients,
    train_step,
)

PLOT_EVERY_S = 60.0  # drawing takes a second, and a short run gets its plot at the end


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the steps done, the signal that interrupted it, its last evaluation."""

    steps_done: int
    interrupted_by: str | None
    val_loss: float | None


@dataclass(frozen=True)
class Progress:
    """What a checkpoint holds beside the state. Times are of all the run's processes."""

    elapsed_s: float = 0.0
    evaluated_at: int | None = None
    val_loss: float | None = None
    best_val_loss: float | None = None


def train(
    config: TrainConfig,
    data: Manifest,
    *,
    pretrained: Callable[..., GPT] | None = None,
    resume: bool = False,
    process: str | None = None,
    hosts: Hosts | None = None,
) -> Outcome:
    """Run `config` on `data`, in `config.out_dir`.

    **Arguments:**

    - `pretrained`: loads the model to start from, on a mesh if called with `mesh=`; None is a new
      one. Not called to resume, once there is a checkpoint.
    - `resume`: go on with the run in `config.out_dir`, exactly where it was.
    - `process`: what the header says of the process's environment.
    - `hosts`: where the run's other processes are; None is a run of this process, or of those that
      have joined already.

    **Raises:** ValueError (also as RunError, DatasetError) for what the user can mend. Whatever
    happens, the directory keeps its last whole checkpoint.
    """
    config.check_together()
    if hosts is not None:
        join(hosts)

    def run() -> Outcome:
        mesh = choose_mesh(config.mesh_shape, config.global_batch_size)
        with around(mesh):
            return _train(config, data, pretrained, resume, process, mesh)

    return ending_together(run)


def _train(
    config: TrainConfig,
    data: Manifest,
    pretrained: Callable[..., GPT] | None,
    resume: bool,
    process: str | None,
    mesh: Mesh | None,
) -> Outcome:
    if not resume:
        check_startable(config.out_dir)
    from_start = not has_checkpoint(config.out_dir)
    start = None
    if pretrained is not None and from_start:
        start = lora.merge(pretrained() if mesh is None else pretrained(mesh=mesh))
    if resume:
        model_cfg = resumed_model(config, data)
    else:
        config, model_cfg = started_model(config, data, start)
        skeleton(config, model_cfg, jnp.float32)  # wrong names end here, with nothing written
        if is_writer():
            write_run(config, model_cfg, data)
    with Display(config.max_iters, silent=not is_writer()) as display:
        trainer = Trainer(config, data, model_cfg, start, display, process, mesh)
        del start  # its arrays are copied
        if resume and not config.eval_only and is_writer():
            write_run(config, model_cfg, data)
        try:
            with Interruption(
                lambda: display.line("stopping soon; once more ends at once, unsaved"), Vote()
            ) as signals:
                return trainer.run(signals)
        finally:
            trainer.close()


class Trainer:
    """A run in this process: what it is made of, and the methods that `run` is told in."""

    def __init__(
        self,
        config: TrainConfig,
        data: Manifest,
        model_cfg: GPTConfig,
        pretrained: GPT | None,
        display: Display,
        process: str | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        self.config, self.data, self.display, self.mesh = config, data, display, mesh
        self.directory = Path(config.out_dir)
        self.windows = windows_of(data, "train", config.block_size, config.seed)
        # Evaluations of different runs compare, so their batches do not depend on the seed.
        self.eval_windows = {
            split: windows_of(data, split, config.block_size, seed=0) for split in SPLITS
        }
        shapes = skeleton(config, model_cfg, jnp.float32)
        n_params, n_frozen = count_params(shapes.model), count_params(shapes.frozen)
        platform = jax.default_backend()
        self.execution = Execution.choose(
            config, model_cfg, n_params, platform, n_frozen, n_parts(mesh)
        )
        model_cfg = dataclasses.replace(model_cfg, unroll=self.execution.unroll)
        self.flops_per_token = flops_per_token(
            n_params, model_cfg.n_layer, model_cfg.n_embd, config.block_size, n_frozen
        )
        peak = peak_flops(self.execution.dtype)
        self.peak_flops = None if peak is None else peak * n_peaks(mesh)

        key_model, key_steps = jax.random.split(jax.random.key(config.seed))
        key_steps = on_every_device(key_steps, mesh)
        self.recipe = Recipe(make_optimizer(config), self.execution.dtype, key_steps)
        self.learning_rate = jax.jit(learning_rate(config))
        self.checkpoints = Checkpoints(self.directory)
        if self.checkpoints.latest_step() is None:
            if not config.eval_only:
                self.checkpoints.clear()
            state = new_state(config, model_cfg, key_model, pretrained)
            if n_frozen and not config.eval_only:
                self.checkpoints.save_base(state.frozen)
            self.state = computing(state, self.execution.dtype)
            self.progress = Progress()
        else:
            shapes = with_shardings(skeleton(config, model_cfg, self.execution.dtype), mesh)
            self.state, progress = self.checkpoints.restore(shapes)
            self.progress = Progress(**progress)
        self.steps_done = int(self.state.step)
        self.saved = (self.steps_done, self.progress.evaluated_at)
        if self.steps_done >= config.max_iters and not config.eval_only:
            self.checkpoints.close()
            raise RunError(
                f"the run in {config.out_dir!r} has done {self.steps_done} steps of "
                f"max_iters={config.max_iters}; to go on, give a larger --max_iters"
            )

        self.loggers = []
        self.metrics: MetricsFile | None = None
        if is_writer():
            self.metrics = MetricsFile(
                self.directory / "metrics.jsonl", self.steps_done, self.progress.evaluated_at
            )
            self.loggers = [self.metrics.write, *extra_loggers(config, n_params)]
        if config.eval_only and self.steps_done:
            self.loggers = []  # a look at a run is no part of it
        self.clocks = Vote()
        self.saved_at = self.plotted_at = time.monotonic()
        self.started_at = self.saved_at - self.progress.elapsed_s
        self.display.header(
            header(
                config, model_cfg, data,
                windows=self.windows, execution=self.execution, n_params=n_params,
                n_frozen=n_frozen, peak_flops=self.peak_flops, steps_done=self.steps_done,
                mesh=mesh,
            )
            | ({} if process is None else {"process": process})
        )  # fmt: skip

    def close(self) -> None:
        self.checkpoints.close()
        if self.metrics is not None:
            self.metrics.close()

    def run(self, signals: Interruption) -> Outcome:
        """Train to the end or to the interruption, and leave the last whole step on disk."""
        out_dir, interrupted_by = self.config.out_dir, None
        try:
            if self.config.eval_only:
                self._evaluate(signals)
            else:
                self._train(signals)
        except Interrupted as interrupted:
            interrupted_by = str(interrupted)
        if not self.config.eval_only:
            if self.steps_done:
                self._save()
                self.checkpoints.wait()
                self.display.line(f"step {self.steps_done} is saved in {out_dir}")
            else:
                self.display.line("no step was complete, so there was nothing to save")
            if interrupted_by is None:
                self.display.line(f"sample from it: python scripts/sample.py --out_dir {out_dir}")
            else:
                self.display.line(
                    f"stopped by {interrupted_by}; go on with: python scripts/train.py "
                    f"--init_from resume --out_dir {out_dir}"
                )
        if is_writer():
            plot_losses(self.directory)
        return Outcome(self.steps_done, interrupted_by, self.progress.val_loss)

    def _train(self, signals: Interruption) -> None:
        config = self.config
        self._between_steps(signals)
        clock = Clock(self.steps_done, config.global_batch_size * config.block_size)
        previous: StepMetrics | None = None
        with prefetched(self._windows_of, self.steps_done, config.max_iters) as batches:
            for windows in batches:
                signals.check()
                step = self.steps_done
                if self.execution.accumulate == "device":
                    self.state, metrics = train_step((self.recipe, windows), self.state)
                else:
                    self.state, metrics = self._step_from_host(windows, signals)
                self.steps_done += 1
                # The device works on this step while the host prepares the next; waiting for the
                # one before keeps the host from running further ahead.
                jax.block_until_ready(previous)
                previous = metrics
                if step % config.log_interval == 0 or self.steps_done == config.max_iters:
                    jax.block_until_ready(metrics)
                    self._log_step(step, metrics, clock.tokens_per_s(self.steps_done))
                with clock.paused():
                    self._between_steps(signals)

    def _windows_of(self, step: int) -> Array | Packed:
        """Of a step, with the axes accum, micro, seq_plus_1."""
        n_sequence, n_micro = self.config.global_batch_size, self.execution.n_micro
        return batch_on(self.mesh, self.windows, step, n_sequence, n_micro)

    def _step_from_host(
        self, windows: Array | Packed, signals: Interruption
    ) -> tuple[TrainState, StepMetrics]:
        """A step whose micro-batches are seen one by one. Interrupted, it leaves no trace."""
        gradients = Gradients.zero(self.state.params)
        n_micro = self.execution.n_micro
        tokens = self.execution.micro_batch_size * self.config.block_size
        start = time.monotonic()
        for i in range(n_micro):
            micro = jax.tree.map(operator.itemgetter(i), windows)
            gradients = add_gradients((self.recipe, micro, self.state), gradients)
            loss = float(gradients.loss) / (i + 1)
            if i + 1 < n_micro:
                signals.check()
            rate = tokens * (i + 1) / (time.monotonic() - start)
            self.display.micro(
                self.steps_done, i + 1, n_micro, loss, rate, self._mfu(rate), self._eta(rate, i + 1)
            )
        return apply_gradients(self.recipe, gradients, self.state)

    def _between_steps(self, signals: Interruption) -> None:
        """What is due after `steps_done` steps: evaluation, sample, checkpoint."""
        config, step = self.config, self.steps_done
        if step == 0:
            if config.init_from != "scratch":  # what the weights that were given are worth
                self._evaluate(signals)
            return
        at_end = step == config.max_iters
        if (step % config.eval_interval == 0 or at_end) and self.progress.evaluated_at != step:
            self._evaluate(signals)
        if config.sample_interval and step % config.sample_interval == 0:
            self._show_sample()
        interval = config.checkpoint_interval or config.eval_interval
        late = 0 < config.checkpoint_minutes * 60 < time.monotonic() - self.saved_at
        overdue = self.clocks(int(late))
        if step % interval == 0 or overdue:
            self._save()

    def _evaluate(self, signals: Interruption) -> None:
        config, step = self.config, self.steps_done
        losses = {}
        for split, windows in self.eval_windows.items():

            def report(done: int, total: int, split: str = split) -> None:
                signals.check()
                self.display.working(step, f"evaluating on {split}, batch {done}/{total}")

            losses[split] = sampled_loss(
                self.state.model,
                windows,
                batch_size=config.batch_size,
                n_batch=config.eval_iters,
                micro_batch_size=self.execution.micro_batch_size,
                dtype=self.execution.dtype,
                progress=report,
                mesh=self.mesh,
            )
        best = self.progress.best_val_loss
        improved = best is None or math.isnan(best) or losses["val"] < best
        self.progress = dataclasses.replace(
            self.progress,
            evaluated_at=step,
            val_loss=losses["val"],
            best_val_loss=losses["val"] if improved else best,
        )
        mark = "" if best is None or not improved else ", the best so far"
        self.display.line(
            f"eval {step}/{config.max_iters} val loss {losses['val']:.4f}, "
            f"train loss {losses['train']:.4f}{mark}"
        )
        self._log({"iter": step, "val_loss": losses["val"], "eval_train_loss": losses["train"]})
        if improved and not config.always_save_checkpoint and not config.eval_only:
            self.checkpoints.save_best(self.state.params, step)
        if is_writer() and time.monotonic() - self.plotted_at > PLOT_EVERY_S:
            plot_losses(self.directory)
            self.plotted_at = time.monotonic()

    def _show_sample(self) -> None:
        prompt = jnp.asarray(self.data.tokens("val")[:1], jnp.int32)
        key = jax.random.key(self.steps_done)
        tokenizer = self.data.tokenizer()
        model = cast(self.state.model, self.execution.dtype)  # which the frozen parts have
        model = with_tokens_of(model, tokenizer)
        tokens = generate(model, prompt, 200, key=key, temperature=0.8, top_k=200)
        text = tokenizer.decode(tokens.tolist())
        self.display.line(f"sample at {self.steps_done}: {text}")

    def _save(self) -> None:
        """Nothing if a checkpoint of this step knows of this step's evaluation already."""
        now = (self.steps_done, self.progress.evaluated_at)
        if self.saved == now:
            return
        elapsed = time.monotonic() - self.started_at
        self.progress = dataclasses.replace(self.progress, elapsed_s=elapsed)
        self.checkpoints.save(self.state, self.steps_done, dataclasses.asdict(self.progress))
        self.saved = now
        self.saved_at = time.monotonic()

    def _log_step(self, step: int, metrics: StepMetrics, tokens_per_s: float) -> None:
        record = {
            "iter": step,
            "train_loss": float(metrics.loss),
            "lr": float(self.learning_rate(step)),
            "grad_norm": float(metrics.grad_norm),
            "tokens_per_s": tokens_per_s,
            "mfu": self._mfu(tokens_per_s),
        }
        self._log(record)
        self.display.step(record, self._eta(tokens_per_s))

    def _log(self, record: dict[str, Any]) -> None:
        record["elapsed_s"] = time.monotonic() - self.started_at
        record["dataset"] = self.data.name
        for logger in self.loggers:
            logger(record)

    def _mfu(self, tokens_per_s: float) -> float | None:
        if self.peak_flops is None:
            return None
        return tokens_per_s * self.flops_per_token / self.peak_flops

    def _eta(self, tokens_per_s: float, micro_done: int = 0) -> float:
        """Seconds of training to come at this rate, evaluations apart."""
        steps = self.config.max_iters - self.steps_done - micro_done / self.execution.n_micro
        return steps * self.config.global_batch_size * self.config.block_size / tokens_per_s
