"""Bugs in learning from a teacher: distances, its pass, its place, what is refused. The same form
as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

DISTANCE = "megalora/model/divergence.py"
LOSS = "megalora/objectives/distill.py"
TEACHER = "megalora/train/teacher.py"
SECOND = "megalora/model/second_model.py"
KEPT = "megalora/data/logits_header.py"
TOP = "megalora/data/top_logits.py"
OF_FILE = "tests/train/test_top_logits.py"
OF_LOSS = "tests/objectives/test_distill.py"
OF_RUN = "tests/train/test_distill.py"
GRID = "tests/parity/test_grid.py distill"

DISTILL_BUGS: tuple[Bug, ...] = (
    bug(
        0,
        "a model that learns from itself alone",
        "megalora/config/objective.py",
        'self.teacher != "base" or bool(self.sft_weight),',
        "True,",
        "tests/objectives/test_choose.py",
    ),
    # the distance
    bug(
        0,
        "a distance without the square of the temperature",
        LOSS,
        "self.divergence.temperature**2 * distance_N",
        "distance_N",
        f"{OF_LOSS} trl_s",
    ),
    bug(
        0,
        "forward and reverse divergence swapped",
        DISTANCE,
        'if self.kind == "forward":',
        'if self.kind == "reverse":',
        f"{OF_LOSS} known_distributions",
        (
            '        if self.kind == "reverse":\n            return _relative_entropy(student',
            '        if self.kind == "forward":\n            return _relative_entropy(student',
        ),
    ),
    bug(
        0,
        "the mixture's shares swapped",
        DISTANCE,
        "teacher + math.log(self.beta), student + math.log1p(-self.beta)",
        "student + math.log(self.beta), teacher + math.log1p(-self.beta)",
        f"{OF_LOSS} known_distributions",
    ),
    bug(
        0,
        "a distribution normalised over one rank's vocabulary",
        DISTANCE,
        "return chunk.logits - chunk.logsumexp[:, None]",
        "return chunk.logits.log_softmax(-1)",
        f"{OF_LOSS} trl_s",
    ),
    bug(
        0,
        "a distance of one rank's vocabulary",
        DISTANCE,
        "return chunk.sum(divergence.of_part(student, teacher))",
        "return divergence.of_part(student, teacher)",
        f"{OF_LOSS} trl_s",
    ),
    bug(
        0,
        "a teacher that is one token behind",
        DISTANCE,
        "hidden_NH[chunk.rows]",
        "hidden_NH.roll(1, 0)[chunk.rows]",
        GRID,
    ),
    bug(
        0,
        "a teacher at temperature 1",
        DISTANCE,
        "teacher = divergence.log_softmax(",
        "teacher = Divergence().log_softmax(",
        f"{OF_LOSS} trl_s",
    ),
    bug(
        0,
        "a teacher's distances divided by those of their row",
        LOSS,
        'total / divisors["tokens"]',
        "total / count",
        f"{OF_LOSS} trl_s",
    ),
    # the pass
    bug(
        0,
        "a base that teaches with its adapters on",
        TEACHER,
        "set_apart(student.chunks, student.load), adapters_off(student.chunks)",
        "set_apart(student.chunks, student.load)",
        GRID,
    ),
    bug(
        0,
        "a teacher's states of another microbatch",
        TEACHER,
        "found[batch.number]",
        "found[0]",
        GRID,
    ),
    bug(
        0,
        "the teacher's head moved by one token of the vocabulary",
        "megalora/model/head.py",
        'return {"hidden": x_NH, "weight": weight.detach()}',
        'return {"hidden": x_NH, "weight": weight.detach().roll(1, 0)}',
        GRID,
    ),
    # logits that were written before
    bug(
        0,
        "the rest of one rank's vocabulary",
        DISTANCE,
        "return chunk.gather(others.logsumexp(-1)).logsumexp(0) - chunk.logsumexp",
        "return others.logsumexp(-1) - chunk.logsumexp",
        f"{OF_LOSS} most_probable",
    ),
    bug(
        0,
        "the most probable tokens without the rest",
        DISTANCE,
        "return divergence.of_part(both, teacher.to(both.dtype))",
        "return divergence.of_part(both[:, :-1], teacher[:, :-1].to(both.dtype))",
        f"{OF_LOSS} most_probable",
    ),
    bug(
        0,
        "logits of the sample before",
        TOP,
        "self._ends(file)[number - first : number - first + 2]",
        "self._ends(file)[max(number - first - 1, 0) : max(number - first - 1, 0) + 2]",
        f"{OF_FILE} nearly_all",
    ),
    bug(
        0,
        "logits in the order of the row on every context-parallel rank",
        "megalora/train/inputs.py",
        "return own(numbers).numpy()[own(batch.loss_mask).numpy() > 0]",
        "return numbers.clamp(min=0).numpy()[: int(own(batch.loss_mask > 0).sum())]",
        f"{OF_FILE} under_any_layout",
    ),
    bug(
        0,
        "logits of another temperature",
        KEPT,
        "header.temperature == config.objective.temperature,",
        "True,",
        f"{OF_FILE} something_else",
    ),
    bug(
        0,
        "logits of another tokenizer",
        KEPT,
        'header.tokens == tokens_digest(base, "model.path"),',
        "True,",
        f"{OF_FILE} something_else",
    ),
    bug(
        0,
        "logits of other samples",
        TOP,
        'if kept["digest"] == digest:',
        "if True:",
        f"{OF_FILE} knows_it_again",
    ),
    bug(
        0,
        "logits written at temperature 1",
        "megalora/train/write_logits.py",
        "top_of(self.k, self.config.objective.temperature)",
        "top_of(self.k, 1.0)",
        f"{OF_FILE} nearly_all",
    ),
    # who may teach
    bug(
        0,
        "a dense teacher cut like experts",
        SECOND,
        "cut = replace(cut, ep=1, etp=1)",
        "pass",
        f"{OF_RUN} do_not_fit",
    ),
    bug(
        0,
        "a teacher with other tokens",
        SECOND,
        "check_same_vocabulary(folder, first, option)",
        "pass",
        f"{OF_RUN} do_not_fit",
    ),
    bug(
        0,
        "a run resumed with another teacher",
        "megalora/train/checkpoint/same_run.py",
        'if before.get("teacher") != now.teacher:',
        "if False:",
        f"{OF_RUN} goes_on",
    ),
    bug(
        0,
        "a plan that leaves the teacher out",
        "megalora/planner/memory.py",
        "teacher_bytes.weight_bytes(layout, work, stage)",
        "0",
        "tests/planner/test_teacher.py second_model",
    ),
    bug(
        0,
        "a teacher of a run's evaluations alone",
        "megalora/train/assemble.py",
        "stepper.teacher = build_teacher(config, objective)",
        "stepper.teacher = build_teacher(config, sft_of(config.train))",
        f"{OF_RUN} goes_on",
    ),
)
