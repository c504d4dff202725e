"""The loop that ties data, step, evaluation, checkpoints and what a person sees together."""

import dataclasses
import math
import operator
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
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
from eqx_gpt.ops.onednn import stored_if_by
from eqx_gpt.text import with_tokens_of
from eqx_gpt.tree import cast, count_params
from train.batches import bad_steps
from train.checkpoint import Checkpoints
from train.clock import Clock
from train.cluster import Hosts
from train.config import TrainConfig
from train.data import prefetched
from train.devices import Execution
from train.display import Display
from train.evaluate import sampled_loss
from train.guard import BadSteps
from train.header import header
from train.history import add_sample
from train.hosts import Vote, ending_together, in_lockstep, is_writer, join, met_by_all
from train.interrupt import Interrupted, Interruption
from train.lock import locked
from train.loggers import Logger, extra_loggers
from train.manifest import SPLITS, Manifest
from train.memory import give_back
from train.mesh import (
    around,
    batch_on,
    choose_mesh,
    n_parts,
    on_every_device,
    with_shardings,
)
from train.metrics import MetricsFile, flops_per_token
from train.packing import Packed, windows_of
from train.peaks import peak_flops
from train.plot import plot_losses
from train.profile import Profile
from train.provenance import add_process, process_record
from train.report import try_report
from train.run import (
    RunError,
    check_startable,
    has_checkpoint,
    read_run,
    resumed_model,
    write_run,
)
from train.saving import Saver, Unharmed, silent_writers
from train.schedules import learning_rate
from train.start import computing, new_state, recipe, skeleton, started_model
from train.step import (
    Gradients,
    StepMetrics,
    TrainState,
    add_gradients,
    apply_gradients,
    compile_step,
    train_step,
)
from train.summary import account, summary
from train.target import seconds_since_start, whole_val_loss
from train.watch import Watch

PLOT_EVERY_S = 60.0  # drawing takes a second, and a short run gets its plot at the end


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the steps done, the signal that interrupted it, its last evaluation, and
    whether its last step is on disk."""

    steps_done: int
    interrupted_by: str | None
    val_loss: float | None
    saved: bool = True

    @property
    def exit_code(self) -> int:
        """As of a process that the signal ended; 1 if what it did is not on disk."""
        if self.interrupted_by is not None:
            return 128 + signal.Signals[self.interrupted_by]
        return 0 if self.saved else 1


@dataclass(frozen=True)
class Progress:
    """What a checkpoint holds beside the state. Times are of all the run's processes."""

    elapsed_s: float = 0.0
    seconds: Mapping[str, float] | None = None
    evaluated_at: int | None = None
    val_loss: float | None = None
    best_val_loss: float | None = None
    best_step: int | None = None
    whole_val_loss: float | None = None


def train(
    config: TrainConfig,
    data: Manifest,
    *,
    pretrained: Callable[..., GPT] | None = None,
    resume: bool = False,
    process: str | None = None,
    hosts: Hosts | None = None,
    preset: str | None = None,
) -> Outcome:
    """Run `config` on `data`, in `config.out_dir`.

    **Arguments:**

    - `pretrained`: loads the model to start from, on a mesh if called with `mesh=`; None is a new
      one. Not called to resume, once there is a checkpoint.
    - `resume`: go on with the run in `config.out_dir`, exactly where it was.
    - `process`: what the header says of the process's environment.
    - `hosts`: where the run's other processes are; None is a run of this process, or of those that
      have joined already.
    - `preset`: the name of the recipe that `config` was made from, whose curve and settings the
      run is compared with.

    **Raises:** ValueError (also as RunError, DatasetError) for what the user can mend. Whatever
    happens, the directory keeps its last whole checkpoint.
    """
    began = time.monotonic()
    config.check_together()
    if hosts is not None:
        join(hosts)

    def run() -> Outcome:
        mesh = choose_mesh(config.mesh_shape, config.global_batch_size)
        with around(mesh):
            return _train(config, data, pretrained, resume, process, mesh, began, preset)

    return ending_together(run)


def _train(
    config: TrainConfig,
    data: Manifest,
    pretrained: Callable[..., GPT] | None,
    resume: bool,
    process: str | None,
    mesh: Mesh | None,
    began: float,
    preset: str | None,
) -> Outcome:
    if not resume:
        config.check_new()
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
    writes = is_writer() and not (resume and config.eval_only)
    with (
        locked(config.out_dir) if writes else nullcontext(),
        Display(config.max_iters, silent=not is_writer()) as display,
        silent_writers(),
    ):
        if not resume and writes:
            check_startable(config.out_dir)  # another may have run here in the meantime
            write_run(config, model_cfg, data, preset)
        trainer = Trainer(config, data, model_cfg, start, display, process, began, mesh, writes)
        del start  # its arrays are copied
        if resume and not config.eval_only and is_writer():
            write_run(config, model_cfg, data, resumed=True)
        trainer.begin_watching()
        with Interruption(
            lambda: display.line("stopping soon; once more ends at once, unsaved"),
            config.preemption_s,
            Vote(),
        ) as signals:
            try:
                return trainer.run(signals)
            except BaseException as error:
                if not met_by_all(error):
                    trainer.checkpoints.abandon()
                raise
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
        began: float | None = None,
        mesh: Mesh | None = None,
        writes: bool = True,
    ) -> None:
        """`began`: what `time.monotonic()` was when the time of the run began; None is now.
        `writes`: is the directory this process's to write to? A look at a run is no part of it."""
        began = time.monotonic() if began is None else began
        self.config, self.data, self.display, self.mesh = config, data, display, mesh
        self.model_cfg, self.unharmed = model_cfg, Unharmed(display.line)
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
            config, model_cfg, n_params, platform, n_frozen, n_parts(mesh), mesh is not None
        )
        model_cfg = dataclasses.replace(model_cfg, unroll=self.execution.unroll)
        self.flops_per_token = flops_per_token(
            n_params, model_cfg.n_layer, model_cfg.n_embd, config.block_size, n_frozen
        )
        self.tokens_per_step = config.global_batch_size * config.block_size
        self.peak_flops = peak_flops(self.execution.dtype)

        key_model, key_steps = jax.random.split(jax.random.key(config.seed))
        key_steps = on_every_device(key_steps, mesh)
        self.recipe = recipe(config, self.execution.dtype, key_steps, self.execution.products)
        self.learning_rate = jax.jit(learning_rate(config))
        self.newest: tuple[int, StepMetrics] | None = None
        self.checkpoints = Checkpoints(
            self.directory, config.keep_checkpoints, read_only=config.eval_only, warn=display.line
        )
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
        self.saver = Saver(self.checkpoints, self.directory, self._mend_directory, display.line)
        if self.steps_done:
            self.saver.restored(self.steps_done, self.progress.evaluated_at)
        if self.steps_done >= config.max_iters and not config.eval_only:
            self.checkpoints.close()
            raise RunError(
                f"the run in {config.out_dir!r} has done {self.steps_done} steps of "
                f"max_iters={config.max_iters}; to go on, give a larger --max_iters"
            )

        self.metrics: MetricsFile | None = None
        self.closing = ExitStack()
        self.loggers: dict[int, Logger] = {}
        self.watch: Watch | None = None
        self.n_params = n_params
        self.preset: str | None = None
        if writes:
            self.preset = read_run(self.directory).get("preset")
            self.metrics = MetricsFile(
                self.directory / "metrics.jsonl", self.steps_done, self.progress.evaluated_at
            )
            more = extra_loggers(
                config, n_params, resumed=self.steps_done > 0, closing=self.closing
            )
            self.loggers = dict(enumerate([self.metrics.write, *more]))
        self.reached = self._at_target()
        self.clocks = Vote()
        self.plotted_at = time.monotonic()
        self.profile = Profile(self.directory, config.profiled if writes else range(0))
        self.clock = Clock(self.progress.seconds, self.progress.elapsed_s, since=began)
        self.display.header(
            header(
                config, model_cfg, data,
                windows=self.windows, execution=self.execution, n_params=n_params,
                n_frozen=n_frozen, peak_flops=self.peak_flops, steps_done=self.steps_done,
                mesh=mesh,
            )
            | ({} if process is None else {"process": process})
        )  # fmt: skip

    def begin_watching(self) -> None:
        """Of a run whose directory describes it."""
        if self.metrics is not None and not self.config.eval_only:
            with self.unharmed("watching"):
                self.watch = Watch(self.directory, self.n_params)
                self._tell(*self.watch.start())

    def close(self) -> None:
        self.checkpoints.close()
        if self.metrics is not None:
            self.metrics.close()
        with self.unharmed("closing the loggers"):
            self.closing.close()

    def run(self, signals: Interruption) -> Outcome:
        """Train to the end or to the interruption, and leave the last whole step on disk."""
        out_dir, interrupted_by, saved = self.config.out_dir, None, True
        if is_writer() and not self.config.eval_only:
            precision = jnp.dtype(self.execution.dtype).name
            record = process_record(
                steps_done=self.steps_done, precision=precision, products=self.execution.products
            )
            with self.unharmed("run.json"):
                add_process(self.directory, record)
        try:
            if self.config.eval_only:
                with self.clock.phase("evaluation"):
                    self._evaluate(signals)
            else:
                self._train(signals)
        except Interrupted as interrupted:
            interrupted_by = str(interrupted)
        if not self.config.eval_only:
            if self.steps_done:
                with self.clock.phase("checkpoint"):
                    saved = self._save(wait=True)
                if saved:
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
        with self.clock.phase("other"):
            with self.unharmed("profile"):
                self._tell(*self.profile.close(self.steps_done))
            self._draw()
        if not self.config.eval_only:
            tokens = self.steps_done * self.tokens_per_step
            flops = tokens * self.flops_per_token
            self._tell(*summary(self.clock.seconds(), tokens, flops, self.peak_flops))
            if self.watch is not None and self.steps_done:
                with self.unharmed("watching"):
                    self._tell(*self.watch.verdict().lines())
        return Outcome(self.steps_done, interrupted_by, self.progress.val_loss, saved)

    def _train(self, signals: Interruption) -> None:
        config, clock = self.config, self.clock
        self._between_steps(signals)
        if self.reached:  # already before
            return
        previous: StepMetrics | None = None
        lockstep = in_lockstep()
        logged_at = self.steps_done
        with prefetched(self._windows_of, self.steps_done, config.max_iters) as batches:
            first = self._windows_of(self.steps_done)
            compile_step(self.recipe, first, self.state, self.execution.accumulate)
            self.learning_rate(self.steps_done)
            del first
            give_back()  # of loading, evaluating and compiling
            with clock.phase("step"):
                for windows in clock.timed(batches, "data"):
                    signals.check()
                    step = self.steps_done
                    with self.unharmed("profile"):
                        self.profile.begin(step)
                    # It is compiled already; should it be once more, it is not stored either.
                    with self.profile.step(step), stored_if_by(self.recipe.products):
                        if self.execution.accumulate == "device":
                            self.state, metrics = train_step((self.recipe, windows), self.state)
                        else:
                            self.state, metrics = self._step_from_host(windows, signals)
                        # The device works on this step while the host prepares the next; waiting
                        # for the one before keeps the host from running further ahead. In lockstep
                        # it waits for this one.
                        jax.block_until_ready(metrics if lockstep else previous)
                    self.steps_done += 1
                    if previous is not None:
                        self._check_guard()
                    previous, self.newest = metrics, (step, metrics)
                    with clock.phase("other"), self.unharmed("profile"):
                        self._tell(*self.profile.after(self.steps_done, metrics))
                    if step % config.log_interval == 0 or self.steps_done == config.max_iters:
                        jax.block_until_ready(metrics)
                        tokens = (self.steps_done - logged_at) * self.tokens_per_step
                        logged_at = self.steps_done
                        with clock.phase("log"):
                            self._log_step(step, metrics, clock.rate(tokens))
                    self._between_steps(signals)
                    if self.reached:
                        return

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
                with self.clock.phase("evaluation"), self.unharmed("evaluation", once=False):
                    self._evaluate(signals)
            return
        self.saver.poll()
        at_end = step == config.max_iters
        evaluates = step % config.eval_interval == 0 or at_end
        samples = config.sample_interval and step % config.sample_interval == 0
        late = 0 < config.checkpoint_minutes * 60 < time.monotonic() - self.saver.saved_at
        overdue = self.clocks(int(late)) > 0
        saves = step % (config.checkpoint_interval or config.eval_interval) == 0 or overdue
        if evaluates or samples or saves:
            jax.block_until_ready(self.state)  # which is still time of the step
        if evaluates and self.progress.evaluated_at != step:
            with self.clock.phase("evaluation"), self.unharmed("evaluation", once=False):
                self._evaluate(signals)
        if samples:
            with self.clock.phase("other"), self.unharmed("sample", once=False):
                self._show_sample()
        if saves:
            with self.clock.phase("checkpoint"):
                self._save()

    def _evaluate(self, signals: Interruption) -> None:
        config, step = self.config, self.steps_done
        if config.target_val_loss is not None and not config.eval_only:
            self._evaluate_whole(signals, config.target_val_loss)
            return
        losses = {}
        for split, windows in self.eval_windows.items():

            def report(done: int, total: int, split: str = split) -> None:
                signals.check()
                self.display.working(step, f"evaluating on {split}, batch {done}/{total}")

            losses[split] = sampled_loss(
                self.state.best_model,
                windows,
                batch_size=config.batch_size,
                n_batch=config.eval_iters,
                micro_batch_size=self.execution.micro_batch_size,
                dtype=self.execution.dtype,
                progress=report,
                mesh=self.mesh,
            )
        mark = self._keep_if_best(losses["val"])
        self.display.line(
            f"eval {step}/{config.max_iters} val loss {losses['val']:.4f}, "
            f"train loss {losses['train']:.4f}{mark}"
        )
        record = {"iter": step, "val_loss": losses["val"], "eval_train_loss": losses["train"]}
        self._log(record)
        self._watch(record)
        if time.monotonic() - self.plotted_at > PLOT_EVERY_S:
            with self.clock.phase("other"):
                self._draw()
            self.plotted_at = time.monotonic()

    def _evaluate_whole(self, signals: Interruption, target: float) -> None:
        """Of a run with a target: every token of the validation split."""
        step = self.steps_done

        def report(done: int, total: int) -> None:
            signals.check()
            self.display.working(step, f"evaluating on val, {done}/{total}")

        loss = whole_val_loss(
            self.state.best_model, self.data, self.config.block_size, self.execution.dtype, report
        )
        mark, seconds = self._keep_if_best(loss), seconds_since_start()
        self.display.line(f"eval {step}/{self.config.max_iters} whole val loss {loss:.4f}{mark}")
        record = {"iter": step, "val_loss": loss, "val_split": "whole", "process_s": seconds}
        self._log(record)
        self._watch(record)
        self.progress = dataclasses.replace(self.progress, whole_val_loss=loss)
        self.reached = self._at_target()
        if self.reached:
            self.display.line(
                f"target_val_loss={target} reached: {loss:.4f} over the whole validation split "
                f"after {step} steps, {seconds:.1f} s from the start of the process"
            )
        elif step == self.config.max_iters:
            self.display.line(
                f"target_val_loss={target} not reached: {loss:.4f} over the whole validation split "
                f"after the last of max_iters={step} steps; give more of them, or another --seed"
            )

    def _at_target(self) -> bool:
        """Was the target reached by the newest step?"""
        target, loss = self.config.target_val_loss, self.progress.whole_val_loss
        if target is None or loss is None or self.progress.evaluated_at != self.steps_done:
            return False
        return loss <= target

    def _keep_if_best(self, val_loss: float) -> str:
        """Note an evaluation; what to say of it."""
        config, best, step = self.config, self.progress.best_val_loss, self.progress.best_step
        if step is not None and not self.checkpoints.holds_best(step):
            best, step = None, None  # writing it failed, or a kill came between
        improved = best is None or math.isnan(best) or val_loss < best
        kept = True
        if improved and not config.always_save_checkpoint and not config.eval_only:
            kept = False
            with self.clock.phase("checkpoint"), self.unharmed("best checkpoint", once=False):
                self.checkpoints.save_best(self.state.best_params, self.steps_done)
                kept, step = True, self.steps_done
        self.progress = dataclasses.replace(
            self.progress,
            evaluated_at=self.steps_done,
            val_loss=val_loss,
            best_val_loss=val_loss if improved and kept else best,
            best_step=step,
        )
        return "" if best is None or not improved else ", the best so far"

    def _show_sample(self) -> None:
        prompt = jnp.asarray(self.data.tokens("val")[:1], jnp.int32)
        key = jax.random.key(self.steps_done)
        tokenizer = self.data.tokenizer()
        model = cast(self.state.best_model, self.execution.dtype)  # which the frozen parts have
        model = with_tokens_of(model, tokenizer)
        tokens = generate(model, prompt, 200, key=key, temperature=0.8, top_k=200)
        text = tokenizer.decode(tokens.tolist())
        self.display.line(f"sample at {self.steps_done}: {text}")
        if is_writer():
            add_sample(self.directory, self.steps_done, text)

    def _save(self, *, wait: bool = False) -> bool:
        """Is the newest step on disk, or without `wait`, on its way? See `Saver`."""
        self._check_guard()
        seconds = self.clock.seconds()
        self.progress = dataclasses.replace(
            self.progress, elapsed_s=sum(seconds.values()), seconds=seconds
        )
        progress = dataclasses.asdict(self.progress)
        return self.saver.save(self.state, self.steps_done, progress, wait=wait)

    def _mend_directory(self) -> None:
        if is_writer():
            write_run(self.config, self.model_cfg, self.data, self.preset)
        if self.metrics is not None:
            self.metrics.rescue()

    def _check_guard(self) -> None:
        """Say that the newest step was skipped. BadSteps if too many were in a row."""
        if self.newest is None or not (in_row := int(self.newest[1].in_row)):
            return
        (step, metrics), self.newest = self.newest, None
        self.display.line(
            f"STEP {step} SKIPPED, {in_row} in a row: loss {float(metrics.loss):.4g}, "
            f"gradient norm {float(metrics.grad_norm):.4g}"
        )
        if in_row >= self.config.max_skipped:
            raise BadSteps(
                bad_steps(
                    self.data, self.windows, step, self.config.global_batch_size, in_row,
                    self.config.out_dir,
                )
            )  # fmt: skip

    def _log_step(self, step: int, metrics: StepMetrics, tokens_per_s: float) -> None:
        # The schedule is the optimizer's, which has not seen the steps skipped.
        skipped_before = int(metrics.skipped) - (int(metrics.in_row) > 0)
        record = {
            "iter": step,
            "train_loss": float(metrics.loss),
            "lr": float(self.learning_rate(step - skipped_before)),
            "grad_norm": float(metrics.grad_norm),
            "skipped": int(metrics.skipped),
            "tokens_per_s": tokens_per_s,
            "mfu": self._mfu(tokens_per_s),
        }
        self._log(record)
        self.display.step(record, self._eta(tokens_per_s))
        self._watch(record)

    def _log(self, record: dict[str, Any]) -> None:
        tokens = self.steps_done * self.tokens_per_step
        record |= account(self.clock.seconds(), tokens, tokens * self.flops_per_token)
        record["dataset"] = self.data.name
        for i, logger in self.loggers.items():
            with self.unharmed(f"logger {i}" if i else "metrics.jsonl"):
                logger(record)

    def _watch(self, record: dict[str, Any]) -> None:
        """Say whether the curve is normal, where that is news."""
        if self.watch is not None:
            plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v
                     for k, v in record.items()}  # fmt: skip
            with self.unharmed("watching"):
                self._tell(*self.watch.after(plain))

    def _draw(self) -> None:
        """The pictures of the run so far."""
        if self.metrics is not None:
            with self.unharmed("loss.png"):
                plot_losses(self.directory)
            self._tell(*try_report(self.directory))

    def _tell(self, *lines: str) -> None:
        for line in lines:
            self.display.line(line)

    def _mfu(self, tokens_per_s: float) -> float | None:
        if self.peak_flops is None:
            return None
        return tokens_per_s * self.flops_per_token / self.peak_flops

    def _eta(self, tokens_per_s: float, micro_done: int = 0) -> float:
        """Seconds of training to come at this rate, evaluations apart."""
        steps = self.config.max_iters - self.steps_done - micro_done / self.execution.n_micro
        return steps * self.tokens_per_step / tokens_per_s
