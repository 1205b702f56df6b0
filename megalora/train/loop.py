"""The training loop: a straight line from a config to an adapter folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalora.adapters.training_state import SavedState
from megalora.config import RunConfig
from megalora.config.file import flat_options, save_config
from megalora.data.probe_text import probe_tokens
from megalora.data.questions import Question
from megalora.data.splits import Split, load_data
from megalora.data.tokenizer import load_tokenizer
from megalora.data.vocabulary import check_vocabulary
from megalora.first_rank import check_agreement, on_first_rank
from megalora.hf.folder import local_folder
from megalora.lora.coverage import write_manifest
from megalora.lora.select import plan_of
from megalora.serve.live_sync import serving
from megalora.train import duration
from megalora.train.about import shown_samples, write_about
from megalora.train.announce import closing, opening, reference_notes
from megalora.train.answers import Answers, questions_of
from megalora.train.assemble import Inputs, MakeBatches, Run, assemble
from megalora.train.batches import Batches
from megalora.train.checkpoint.identity import Identity, Samples, identify
from megalora.train.checkpoint.load import load_checkpoint
from megalora.train.checkpoint.same_run import check_same_run, check_same_samples
from megalora.train.checkpoint.save import restore_best
from megalora.train.checkpoint.start import start_of
from megalora.train.checkpoint.where import Found, find_checkpoint, newer_of
from megalora.train.expert_tokens import ExpertTokens
from megalora.train.first_pass import check_first_loss, compare_layers, time_dropout
from megalora.train.held_notes import notes_of_base
from megalora.train.metrics import Metrics
from megalora.train.optim import learning_rate
from megalora.train.probe import Probe
from megalora.train.relora import Cycles
from megalora.train.run_files import CONFIG, MANIFEST
from megalora.train.run_folder import opened
from megalora.train.saver import Progress, Saver, is_due, saving
from megalora.train.signals import Stopped, terminated
from megalora.train.trace import Trace, tracing
from megalora.train.trackers import check_installed
from megalora.train.unseen_tokens import unseen_note
from megalora.train.warm.restore import InMemory
from megalora.train.watch.pulse import Pulse


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    identity: Identity
    samples: Samples
    found: Found
    """What to go on from."""
    in_memory: InMemory | None
    """Where the run puts its snapshots."""
    notes: list[str]
    """Lines for the user."""
    shown: list[dict[str, Any]]
    """The first samples as text, see ``about.py``."""
    tokenizer: Any
    questions: list[Question]
    """What ``log.samples`` asks."""

    @property
    def state(self) -> SavedState | None:
        """State to go on from; None for a fresh start."""
        return self.found.state


@dataclass(frozen=True)
class Feed:
    """Where a run's samples come from."""

    read: Callable[[RunConfig, Any], tuple[Split, Split | None]]
    """(config, tokenizer) -> what is trained and what is evaluated on."""
    batches: MakeBatches
    """Makes the rows of both."""


def read_files(config: RunConfig, tokenizer: Any) -> tuple[Split, Split | None]:
    """The samples of ``data``."""
    return load_data(config.data, tokenizer, objective=config.objective)


FILES = Feed(read_files, Batches)


def train(
    config: RunConfig, job: str | None = None, feed: Feed = FILES, pulse: Pulse | None = None,
    in_memory: InMemory | None = None,
) -> Path | None:  # fmt: skip
    """Fine-tune as ``config`` says, on the ranks of the initialised world.

    Args:
        feed: where samples come from.
        job: name of torchrun's call: when it starts the ranks again, they go on from the last one.
        pulse: is told where this rank is.
        in_memory: where snapshots are put, and were put before these ranks were started again.
    Returns:
        The last checkpoint's folder, or None when a signal stopped the run before its first step.
    Raises:
        ValueError: for anything the user can mend, before weights are read where that is possible.
    """
    # What is cheap to find wrong comes first; loading weights may take minutes.
    config.check_world(dist.get_world_size())
    config.check_training()
    check_installed(config.log)
    with opened(Path(config.checkpoint.dir), job) as run_folder:
        found = find_checkpoint(config, restarted=run_folder.same_job)
        found = newer_of(found, in_memory and in_memory.newest)
        folder = local_folder(config.model.path)
        num_scores = config.objective.num_scores
        shape, adapted = plan_of(config, folder)
        identity = identify(config, folder)
        notes = [*run_folder.notes, *found.notes, *notes_of_base(config, folder)]
        if found.state:
            notes += check_same_run(found.state, config, identity, adapted, shape)
        notes += reference_notes(config.objective, found.state)
        tokenizer = load_tokenizer(folder)
        splits = feed.read(config, tokenizer)
        for split in splits:
            check_vocabulary(split, shape.vocab)
        samples = Samples.of(splits[0].samples)
        check_agreement("training samples", samples)
        notes += unseen_note(config.lora.trainable_token_indices, splits[0].samples)
        # Raises where the warm-up is longer than the run.
        duration.num_steps(config.train, samples.count)
        if found.state:
            check_same_samples(found.state, config, samples, splits[0].samples)
        questions = questions_of(config, *splits, tokenizer)
        probe = Probe(probe_tokens(tokenizer), config.model.dtype, config.parallel, num_scores)
        inputs = Inputs(shape, adapted, tokenizer, *splits)
        with assemble(config, inputs, resumed=bool(found.state), make_batches=feed.batches) as run:
            run.pulse = pulse or run.pulse
            shown = shown_samples(splits[0].samples, tokenizer)
            start = Start(identity, samples, found, in_memory, notes, shown, tokenizer, questions)
            return _fit(run, probe, start)


def _fit(run: Run, probe: Probe, at: Start) -> Path | None:
    """Train to the last step or to a signal; returns the last checkpoint."""
    config = run.config
    num_steps = run.batches.num_steps
    folder = Path(config.checkpoint.dir)
    notes = list(at.notes)
    now = Progress(start=0, step=0, saved=None)
    # Before a checkpoint is loaded, which may hold weights of the base that were trained.
    finished = at.state.step if at.state else 0
    # Before these ranks were started again, the same job has compared the same base.
    is_compared = at.state is not None and at.state.in_memory
    compared = compare_layers(run, is_over=finished >= num_steps or is_compared)
    if at.state:
        notes += load_checkpoint(at.state, run.model, run.optimizer)
        run.bad_steps.resume(at.state.recent_losses, at.state.left_out)
        step = at.state.step
        # What the process before has saved or evaluated is not done twice.
        now = Progress(step, step, at.state.folder, step, at.state.evaluations)
    if is_compared:
        now.take_saved(at.found.on_disk)
    if config.objective.holds_start:
        run.stepper.kept["start"] = start_of(at.state, run.model)
    notes += restore_best(config, now.best)
    check_agreement("number of finished steps", now.step)
    shape = run.model.shape
    experts = None
    if shape.moe_layers:
        experts = ExpertTokens(folder, sorted(shape.moe_layers), shape.num_experts)
    metrics = _opened_metrics(config, num_steps, now.step, experts)
    with (
        metrics,
        tracing(config.train.profile, folder, metrics.say, now.step) as trace,
        serving(config, run.model, metrics.say, now.saved) as serve,
        terminated() as stop,
        run.batches.at_work(run.model, run.stepper, now.step, metrics.say, stop),
    ):
        for note in notes:
            metrics.say(note)
        cycles = Cycles(run, at.state)
        _open(run, metrics, now, at.shown, compared, cycles, is_compared)
        answers = Answers(run, at.questions, at.tokenizer)
        saver_of = saving(
            run, probe, at.samples, at.identity, serve, cycles, at.state, metrics.say, at.in_memory
        )
        with saver_of as saver:
            _train_to_the_end(run, now, metrics, stop, saver, answers, trace)
        run.pulse.at(now.step, "close")
    metrics.say(closing(now.step, num_steps, now.saved, now.best, config))
    return now.saved


def _opened_metrics(
    config: RunConfig, num_steps: int, step: int, experts: ExpertTokens | None
) -> Metrics:
    folder = Path(config.checkpoint.dir)
    metrics = Metrics(
        folder, config.log, num_steps, step, active=dist.get_rank() == 0,
        options=flat_options(config), experts=experts,
    )  # fmt: skip
    # A log that cannot be opened ends every rank.
    on_first_rank(metrics.open, f"the logs in {folder} cannot be written")
    return metrics


def _train_to_the_end(
    run: Run,
    now: Progress,
    metrics: Metrics,
    stop: Callable[[], bool],
    saver: Saver,
    answers: Answers,
    trace: Trace,
) -> None:
    """Evaluate, check, save and train, in this order, until the last step, a signal, or the end of
    ``train.patience``."""
    config = run.config
    num_steps = run.batches.num_steps
    while True:
        saver.take_note(now)
        # Collective: every rank leaves the loop at the same step.
        stopped = stop() and run.batches.may_stop(now.step)
        # Before the first step and after the last one too; a stopped run has no time for it.
        due = now.step in (0, num_steps) or is_due(now.step, config.train.eval_every)
        is_best = False
        # Before saving, so that a checkpoint knows of the evaluation at its step.
        if due and now.step != now.evaluations.last_step and not stopped:
            run.pulse.at(now.step, "evaluate")
            is_best = _evaluate(run, now, metrics, answers)
        is_over = now.best.is_out_of(config.train.patience)
        done = stopped or is_over or now.step >= num_steps
        saving = is_best and config.checkpoint.keep_best
        if now.step > 0 and now.step != now.saved_step:
            saving |= done or saver.due(now.step)
        # Replicas that differ must not be saved.
        saver.check_replicas(now, saving)
        if saving:
            saver.save(now)
            metrics.restart_clock()
        if done:
            saver.finish(now)
            break
        saver.hold(now)
        run.pulse.at(now.step, "merge")
        # Behind the checkpoint of this step, which still has the adapter by itself.
        if saver.cycles.advance(now.step, metrics.say):
            metrics.restart_clock()
        lr = learning_rate(config.train, now.step, num_steps)
        counted = metrics.experts is not None and metrics.is_logged(now.step + 1)
        with trace.step(now.step + 1):
            values = _train_step(run, now.step, lr=lr, count_experts=counted)
        # Told to stop in the middle of a rollout, which a resumed run samples anew.
        if values is not None:
            saver.count_step(now)
            _log_step(run, now, metrics, values)


def _log_step(run: Run, now: Progress, metrics: Metrics, values: dict[str, float]) -> None:
    """Log the step that has been taken; one that was left out is no point of a curve. Raises
    ``ValueError`` if there were too many of those."""
    batches = run.batches
    step = now.step
    found = (values["loss"], values["grad_norm"])
    if run.fault is not None:
        samples = batches.samples_of_step(step - 1)
        metrics.say(run.bad_steps.take(step, run.fault, *found, samples, now.saved))
        return
    metrics.train_step(
        step, **values, num_tokens=batches.num_tokens(step - 1),
        use_of_slots=batches.use_of_slots(step - 1), expert_tokens=run.expert_tokens,
    )  # fmt: skip


def _open(
    run: Run, metrics: Metrics, now: Progress, shown: list[dict[str, Any]], compared: list[str],
    cycles: Cycles, is_compared: bool,
) -> None:  # fmt: skip
    """Record and announce the run, then merge what a resumed run had merged.

    Args:
        shown: samples, as the run's folder keeps them.
        compared: lines about the comparison with transformers.
        is_compared: whether this job has looked at its first rows before these ranks began.
    """
    config = run.config
    model = run.model
    if dist.get_rank() == 0:
        folder = Path(config.checkpoint.dir)
        save_config(config, folder / CONFIG)
        write_manifest(folder / MANIFEST, model.adapted, model.whole)
        write_about(folder, shown)
    metrics.say(opening(config, model, run.batches, now.saved))
    for line in compared:
        metrics.say(line)
    cycles.restore()
    # A resumed run that is at its end trains no more.
    if now.step < run.batches.num_steps and not is_compared:
        if config.train.check_base == "loss":
            metrics.say(check_first_loss(run, now.step, now.saved))
        if config.lora.dropout:
            metrics.say(time_dropout(run, now.step))


def _evaluate(run: Run, now: Progress, metrics: Metrics, answers: Answers) -> bool:
    """Evaluate the model as it is; returns whether its loss is a new lowest one of the run, the
    same on every rank."""
    loss = None
    try:
        found = run.batches.evaluate(run.stepper, now.step)
    except Stopped:
        # A resumed run evaluates here.
        return False
    if found:
        loss = found.loss
        metrics.evaluation(now.step, loss, found.over, found.others)
    if shown := answers.now():
        metrics.answers(now.step, shown)
    before = now.best.loss
    now.evaluations = now.evaluations.followed_by(now.step, loss)
    return now.best.loss != before


def _train_step(run: Run, step: int, *, lr: float, count_experts: bool) -> dict[str, float] | None:
    """One optimizer step; returns what ``Metrics.train_step`` reports of it, or None when told to
    stop before it."""
    run.pulse.at(step, "rollout")
    try:
        prepared = run.batches.prepare(step)
    except Stopped:
        return None
    run.pulse.at(step, "train")
    loss, grad_norm = run.step(step, lr, count_experts=count_experts)
    # Nothing is compared with what a bad step has computed.
    if run.fault is None:
        run.batches.check(step, run.others)
    return {"loss": loss, **run.others, **prepared, "lr": lr, "grad_norm": grad_norm}
