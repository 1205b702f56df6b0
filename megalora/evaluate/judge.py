"""Evaluate an adapter and its base on the ranks of a world: one model, with its adapters and then
with them switched off."""

from collections import Counter
from dataclasses import replace
from typing import Any

from megalora.adapters.read.adapter import read_adapter
from megalora.adapters.trained import trained_form
from megalora.adapters.training_state import read_state
from megalora.data.questions import Question
from megalora.data.splits import Split, load_data
from megalora.data.tokenizer import load_tokenizer
from megalora.evaluate.request import Plan
from megalora.evaluate.verdict import Judged, Verdict, judge_answers, kind_of, questions_of
from megalora.generate.generate import generate
from megalora.generate.options import stop_tokens
from megalora.lora.adapted_model import AdaptedModel, load_adapter
from megalora.lora.switched_off import adapters_off
from megalora.model.account import open_folder
from megalora.objectives.choose import objective_of
from megalora.parallel import Groups, parallel_groups
from megalora.train.assemble import build_for_training
from megalora.train.batches import Batches
from megalora.train.checkpoint.start import start_of
from megalora.train.references import Start
from megalora.train.step import Stepper
from megalora.train.teacher import Teacher, build_teacher


def judge(plan: Plan) -> Verdict:
    """Run an evaluation; collective over the world.

    Raises:
        ValueError: for anything in the data, the base or the adapter that the user can mend.
    """
    config = plan.config
    tokenizer = load_tokenizer(plan.base)
    train, held_out = load_data(config.data, tokenizer, objective=config.objective)
    # Without ``--data`` the part that training held out; with it, data.train is that data.
    split = held_out or train
    # Cheap to find wrong, so before any weights.
    questions: list[Question] = []
    if plan.request.generate:
        questions = questions_of(plan, split, tokenizer)
    with parallel_groups(config.parallel, config.train.seed) as groups:
        model = _build(plan, groups)
        start = None
        if config.objective.holds_start:
            assert plan.adapter is not None, "plan_of has looked for its start"
            start = start_of(read_state(plan.adapter), model)
        teacher = build_teacher(config, objective_of(config))
        judged: dict[str, Judged] = {}
        if plan.adapter is not None:
            judged["adapter"] = _judge_one(plan, model, split, questions, tokenizer, start, teacher)
        # A base has no score head of its own: there is nothing to hold the adapter's against.
        if not config.objective.num_scores:
            # The base in the memory that is there; not zeros everywhere, which magnitudes of DoRA
            # would make of its linears, too.
            with adapters_off(model.chunks):
                judged["base"] = _judge_one(
                    plan, model, split, questions, tokenizer, start, teacher
                )
        # Nothing may refer to the groups when they end.
        del model, start, teacher
    # By what the loss is of the report chooses its columns.
    kind = kind_of(config.objective)
    notes = _commonest(split, config.objective.num_scores) if kind == "labels" else []
    return Verdict(split.summary(), questions, judged, kind=kind, notes=notes)


def _commonest(split: Split, num_labels: int) -> list[str]:
    """What a classifier that always gives the commonest label would reach; nothing for values,
    which have no accuracy."""
    if num_labels == 1 or not split.samples:
        return []
    # Numbers of labels travel as floats, which hold them exactly.
    counts = Counter(int(sample.value) for sample in split.samples)
    label, count = counts.most_common(1)[0]
    # Labels that have only numbers are called by them.
    names = split.scoring.names if split.scoring is not None else ()
    called = names[label] if names else str(label)
    share = count / len(split.samples)
    return [f"the commonest label, {called}, is that of {share:.1%} of these samples"]


def _build(plan: Plan, groups: Groups) -> AdaptedModel:
    """The base with the adapter's factors on this rank; collective."""
    # Nothing is kept for a backward pass here, so that there is nothing to recompute.
    config = replace(plan.config, train=replace(plan.config.train, recompute="off"))
    shape = open_folder(plan.base).shape
    # From the file, not from the config: an adapter made elsewhere has its own ranks and scales.
    adapter = None
    if plan.adapter is not None:
        adapter = read_adapter(plan.adapter, shape, base=plan.base, score=True)
        # A checkpoint has its run's start as it was trained, without what engines want beside it.
        if config.objective.holds_start:
            adapter = trained_form(adapter, shape).adapter
        shape = adapter.shape_of(shape)
    model = build_for_training(
        config, shape, adapter.adapted if adapter else [], groups, keeps_base=True
    )
    if adapter is not None:
        load_adapter(model, adapter.tensors)
    return model


def _judge_one(
    plan: Plan,
    model: AdaptedModel,
    split: Split,
    questions: list[Question],
    tokenizer: Any,
    start: Start | None,
    teacher: Teacher | None,
) -> Judged:
    """Loss, and answers where there are questions, of the model as it is now; collective.

    Args:
        start: the adapter that the objective compares with.
        teacher: whose distributions the objective learns.
    """
    # The rows of an evaluation while training, and its step over them.
    batches = Batches(plan.config, model.groups, split, split)
    objective = objective_of(plan.config)
    stepper = Stepper(model.chunks, model.groups, objective)
    if start is not None:
        stepper.kept["start"] = start
    stepper.teacher = teacher
    values, count = stepper.evaluate_all(batches.of_eval(), batches.mismatched_of_eval())
    # The loss stands in a field of its own, all else in ``others``.
    loss = values.pop(objective.evaluated[0])
    if not questions:
        return Judged(loss, count, others=values)
    prompts = [question.tokens for question in questions]
    found = generate(model, prompts, plan.sampling, stop=stop_tokens(plan.base))
    # Every rank judges all answers: that costs nothing, and none waits for another.
    tokens = [answer.tokens for answer in found]
    answers, right = judge_answers(plan, split, questions, tokens, tokenizer)
    num_cut = sum(not answer.ended for answer in found)
    return Judged(loss, count, answers, right, num_cut, values)
