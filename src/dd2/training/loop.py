"""The training loop: every stage of every model goes through `Trainer.run`."""

import contextlib
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from dd2.errors import InputError, Interrupted, NumericalError, TrainingFailed
from dd2.images import save_grid
from dd2.processes import answering, any_of, rank, say, sum_over_processes, world_size
from dd2.progress import progress
from dd2.seeding import seed_of, stream
from dd2.training import checkpoint
from dd2.training.checkpoint import CheckpointWriter
from dd2.training.health import KINDS, STATE, Health
from dd2.training.layers import prepare_layers
from dd2.training.metrics import MetricsLog
from dd2.training.parallel import Parallelism, local_micro_batches, sharded_units, sum_gradients, whole
from dd2.training.stage import Stage, Update
from dd2.training.timing import PartTimes, part


@dataclass(frozen=True)
class LoopConfig:
    """How a run is resumed, logged and saved."""

    resume: Annotated[Literal["auto", "never"], tyro.conf.arg(aliases=["--resume"])] = "auto"
    """auto: go on from the newest whole checkpoint of the run folder, if there is one, and say which were skipped and why. never:
    refuse a folder that holds a run."""
    log_every: int = 10
    """Iterations between rows of metrics.jsonl."""
    save_every: int = 1000
    """Iterations between checkpoints; each stage's last iteration is always saved."""
    keep: int = 2
    """Newest checkpoints kept per stage; the best one by csd.validation stays as well."""
    save_async: Literal["auto", "always", "never"] = "auto"
    """Write checkpoints in the background while training goes on; all networks and optimisers are then copied to the main memory
    first. auto: on a GPU."""
    preview_every: int = 500
    """Iterations between sample grids; 0 draws none."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the networks; losses and Eq. 1 are float32 in either case."""

    parallel: Parallelism = "ddp"
    """What the processes of torchrun share: ddp (whole copies; gradients are summed once per optimiser step) or fsdp2 (networks,
    averages, optimisers and the teacher sharded; dd2 distill)."""
    recompute: bool = False
    """Activation checkpointing: keep only what goes into each transformer layer and compute the rest again in the backward pass.
    A third more operations for a fraction of the activations' memory."""
    compile: bool = False
    """torch.compile the transformer layers (CUDA only)."""
    stop_on: tuple[str, ...] = ()
    """Signs of failure that end the training at once, with exit code 1, in place of a warning: divergence, collapse and the
    others of docs/healthy-curves.md."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, into tensorboard/ (needs the extra `logs`)."""

    def __post_init__(self) -> None:
        """Refuse intervals below 1."""
        for field in ("log_every", "save_every", "keep"):
            if getattr(self, field) < 1:
                raise InputError(f"loop.{field} must be at least 1, got {getattr(self, field)}")
        if self.resume not in ("auto", "never"):
            raise InputError(f'loop.resume must be "auto" or "never", got {self.resume!r}')
        if self.save_async not in ("auto", "always", "never"):
            raise InputError(f'loop.save_async must be "auto", "always" or "never", got {self.save_async!r}')
        if unknown := [kind for kind in self.stop_on if kind not in KINDS]:
            raise InputError(f"loop.stop_on knows {', '.join(KINDS)}, not {unknown[0]}")
        if self.parallel not in ("ddp", "fsdp2"):
            raise InputError(f'loop.parallel must be "ddp" or "fsdp2", got {self.parallel!r}')


class Trainer:
    """Runs stages inside one run folder, resuming whatever it finds there.

    Args:
        run: the run's folder; gets metrics.jsonl, checkpoints/ and samples/.
        seed: the run's seed, from which every step's randomness is derived.
        config: logging and saving.
        device: where the networks live.
        resume_hint: the command that resumes this run, for the message after an interruption.
    """

    def __init__(self, run: Path, seed: int, config: LoopConfig, device: torch.device, resume_hint: str) -> None:
        self.folder, self.seed, self.config, self.device = run, seed, config, device
        self.resume_hint = resume_hint
        self.log = MetricsLog(run / "metrics.jsonl", run / "tensorboard" if config.tensorboard else None)
        self.times = PartTimes(device)
        self._stop = False
        self._unseen: list[tuple[Update, int, torch.Tensor]] = []
        self._writer: CheckpointWriter | None = None

    def run(self, stage: Stage) -> float:
        """Run `stage` to its last iteration, from its newest checkpoint if it has one.

        Returns:
            Seconds spent on the stage over all sessions, previews and checkpoints included.

        Raises:
            Interrupted: a signal arrived; the state was saved.
            NumericalError: a loss or gradient is not finite; nothing was saved since the last checkpoint.
            TrainingFailed: a sign of `loop.stop_on` was seen.
        """
        folder = self.folder / "checkpoints" / stage.name
        done = checkpoint.steps(folder)
        if done and done[-1] > stage.iterations:
            raise InputError(
                f"{folder} holds step {done[-1]}, beyond the {stage.iterations} iterations asked for; "
                "choose another run folder with --out"
            )
        for update in stage.updates:
            local_micro_batches(update)  # refuses what cannot be shared out
        for network in stage.modules.values():
            prepare_layers(network, self.config.recompute, self.config.compile)
        step, before = self._resumed(folder, stage, done)
        if step == stage.iterations:
            return before
        self.log.rewind(stage.name, step)
        self._unseen.clear()
        health = self._health(stage, step)
        start, logged, then, fatal = time.perf_counter() - before, step, before, self._fatal(health)
        self._writer = CheckpointWriter(folder, self.config.keep, self._saves_in_background)
        with (
            self._signals(),
            self._writer as writer,
            self.times.measured(),
            progress(stage.name, stage.iterations, "it", step) as bar,
        ):
            while step < stage.iterations:
                numbers = self._iteration(stage, step)
                stage.after(step)
                step += 1
                last = step == stage.iterations
                stop = any_of(self._stop)  # all processes stop after the same iteration
                due = step % self.config.save_every == 0 or last
                logs = step % self.config.log_every == 0 or last or step == 1
                previews = stage.preview and self.config.preview_every and (step % self.config.preview_every == 0 or last)
                if due or stop or logs or previews:
                    self._refuse_nan(stage)
                if due and stage.validate:  # not when stopping: there may be seconds left, and no other run has that row
                    numbers |= stage.validate()
                if logs or "validation" in numbers:
                    row = {name: float(value) for name, value in {**numbers, **stage.measures()}.items()}
                    elapsed = round(time.perf_counter() - start, 3)
                    spent = self.times.mean(step - logged) | {"seconds/iteration": (elapsed - then) / (step - logged)}
                    new = health.see({"step": step, **row})
                    noticed = {STATE: new} if new else {}
                    self.log.append({"stage": stage.name, "step": step, **row, **spent, "seconds": elapsed, **noticed})
                    logged, then = step, elapsed
                    fatal = self._fatal(health)
                    for kind, text in new.items():
                        say(f"\nwarning: {kind} in {stage.name} at step {step}: {text}", sys.stderr)
                    shown = {name: f"{value:.3g}" for name, value in row.items() if "/lr" not in name}
                    bar.set_postfix(shown | ({STATE: ", ".join(health.known)} if health.known else {}), refresh=False)
                if stage.preview and previews:
                    images = stage.preview()  # sharded networks need all processes for it
                    if rank() == 0:
                        save_grid(images, self.folder / "samples" / f"{stage.name}-{step:08d}.png", columns=10)
                if due or stop:
                    validation = numbers.get("validation")
                    writer.save(stage, step, time.perf_counter() - start, None if validation is None else float(validation))
                bar.update()
                if fatal:
                    writer.wait()
                    where = f"at step {step} of {stage.iterations}"
                    raise TrainingFailed(f"{stage.name} stopped {where} as loop.stop_on says: {fatal}")
                if stop and not last:
                    writer.wait()  # what is announced as saved has been
                    raise Interrupted(
                        f"interrupted: {stage.name} saved at step {step} of {stage.iterations}; resume with: {self.resume_hint}"
                    )
        return time.perf_counter() - start

    def _fatal(self, health: Health) -> str:
        """The sign that training stops on, on all processes alike; empty where there is none."""
        seen = [f"{kind}: {text}" for kind, text in health.known.items() if kind in self.config.stop_on]
        if not self.config.stop_on or not any_of(bool(seen)):
            return ""
        return seen[0] if seen else "as another process saw"  # one without the log knows less than the first

    def _health(self, stage: Stage, step: int) -> Health:
        """What is watched of a stage, as far as it has come: up to `step`."""
        rows = [row for row in self.log.rows() if row["stage"] == stage.name and row["step"] <= step]
        return Health(stage.signs, stage.iterations, rows)

    @property
    def _saves_in_background(self) -> bool:
        wanted = self.config.save_async
        return wanted == "always" or (wanted == "auto" and self.device.type == "cuda")

    def _resumed(self, folder: Path, stage: Stage, done: list[int]) -> tuple[int, float]:
        """Load the newest checkpoint that is whole: its step and the seconds before it; (0, 0) where there is none.

        Raises:
            InputError: there are checkpoints, and none can be loaded.
        """
        refused: list[InputError] = []
        for number in reversed(done):
            try:
                state = checkpoint.load(folder / f"{number:08d}", stage)
            except InputError as error:
                refused.append(error)
                continue
            for error in refused:
                say(f"skipped: {error}; going on from step {number}", sys.stderr)
            return int(state["step"]), float(state["seconds"])
        if refused:
            raise refused[0]
        return 0, 0.0

    def _iteration(self, stage: Stage, step: int) -> dict[str, torch.Tensor | float]:
        numbers: dict[str, torch.Tensor | float] = {}
        for update in stage.updates:
            lr = update.optim.rate(step, stage.iterations)
            for group in update.optimizer.param_groups:
                group["lr"] = lr
            for repeat in range(update.repeats):
                logged = self.optimise(stage, update, step, repeat)
                numbers |= {f"{update.name}/{name}": value for name, value in logged.items()}
            numbers[f"{update.name}/lr"] = lr
        return numbers

    def optimise(self, stage: Stage, update: Update, step: int, repeat: int = 0) -> dict[str, torch.Tensor | float]:
        """One optimiser step of an update: this process's micro-batches, gradients clipped; what it logs."""
        update.optimizer.zero_grad(set_to_none=True)
        logged: dict[str, torch.Tensor | float] = {}
        autocast = self.config.precision == "bfloat16"
        micros = local_micro_batches(update)
        sharded = sharded_units(stage.modules.values())
        for micro in micros:
            for unit in sharded:
                unit.set_requires_gradient_sync(micro == micros[-1])
            key = (self.seed, stage.stream or stage.name, update.name, step, repeat, micro)
            random = stream(*key, device=self.device)
            torch.manual_seed(seed_of("dropout", *key))  # dropout draws from the global generator
            with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
                loss, numbers = update.loss(random)
            with part("backward"):
                self._backward(update, loss, bool(sharded))
            for name, value in {"loss": loss.detach(), **numbers}.items():
                logged[name] = logged.get(name, 0.0) + value / update.accumulate
        with part("optimiser"):
            if not update.replicated:
                sum_gradients(update.parameters)
                self._sum_logged(logged)
            limit = update.optim.clip_norm or float("inf")
            logged["grad_norm"] = whole(torch.nn.utils.clip_grad_norm_(update.parameters, limit))
            both = [torch.as_tensor(logged[name], dtype=torch.float32, device=self.device) for name in ("loss", "grad_norm")]
            self._unseen.append((update, step, torch.stack(both)))
            update.optimizer.step()
        return logged

    def _sum_logged(self, logged: dict[str, torch.Tensor | float]) -> None:
        """The numbers of all processes, whose shares add up."""
        if world_size() > 1:
            values = [torch.as_tensor(value, dtype=torch.float32, device=self.device).detach() for value in logged.values()]
            summed = torch.stack(values)
            sum_over_processes([summed])
            logged.update(zip(logged, summed.unbind(), strict=True))

    def _refuse_nan(self, stage: Stage) -> None:
        """Look at the losses and gradients since the last look. Not after every update: a look waits for the GPU.

        Raises:
            NumericalError: one is not finite.
        """
        unseen, self._unseen = self._unseen, []
        finite = torch.isfinite(torch.stack([both for _, _, both in unseen])).tolist()
        for (update, step, _), (loss, gradient) in zip(unseen, finite, strict=True):
            if not (loss and gradient):
                raise NumericalError(self._diagnosis(stage, update, step, "grad_norm" if loss else "loss"))

    @staticmethod
    def _backward(update: Update, loss: torch.Tensor, sharded: bool) -> None:
        if sharded:  # gradients are averaged over the processes, and the leaves are the gathered weights
            (loss * world_size() / update.accumulate).backward()
        else:
            # `inputs` is the guarantee that no other network's gradient is touched (Eq. 4's stop-gradients).
            (loss / update.accumulate).backward(inputs=update.parameters)

    def _diagnosis(self, stage: Stage, update: Update, step: int, name: str) -> str:
        if self._writer:
            self._writer.finish()
        saved = checkpoint.steps(self.folder / "checkpoints" / stage.name)
        where = f"the last checkpoint is step {saved[-1]}" if saved else "no checkpoint of this stage exists yet"
        what = "the gradient" if name == "grad_norm" else "the loss"
        return (
            f"{stage.name} iteration {step + 1}: {what} of the {update.name} is not finite (NaN or infinite); stopped "
            f"before saving ({where}). Lower {update.name}'s learning rate or clip_norm, or use --loop.precision float32"
        )

    def _signals(self) -> contextlib.AbstractContextManager[None]:
        """The first SIGINT or SIGTERM asks the loop to save and stop; a second SIGINT stops once nothing is being written."""

        def ask(number: int, frame: object) -> None:
            if self._stop and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._stop = True
            say("\nstopping after this iteration; saving…", sys.stderr)

        return answering((signal.SIGINT, signal.SIGTERM), ask)
