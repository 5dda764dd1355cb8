"""Estimate the work of a study, and compare its teacher with BM25, before students are trained. Not a command."""
from experiments.settings import Step, Training
from experiments.study import Study
from simplified_tinybert.common.files import say, warn


def say_work(study: Study, steps: int | None) -> None:
    """Print the number of pairs, and the training runs of each step. Finished ones are counted, too."""
    settings, pairs = study.settings, {name: study.commands.examples(name) for name in ("train", "dev", "test")}
    say(f"pairs        {pairs['train']:,} to train with; each model re-ranks {pairs['dev']:,} dev and "
        f"{pairs['test']:,} test pairs")
    if not study.args.teacher_model:
        say(f"teacher      {counted_runs(study, len(settings.teacher.learning_rates), settings.teacher)}")
    for number, step in enumerate(settings.steps[:steps], 1):
        parts, methods = [], study.methods(step)
        if teachers := other_teachers(study, step):
            parts.append(f"{teachers} more teachers")
        if step.students:
            trials, runs = runs_of(study, step)
            if trials:
                parts.append(f"at least {counted_runs(study, trials, trial(study), 'trial')}")
            parts.append(("" if trials else "at least ") + counted_runs(study, runs, settings.distillation))
            parts.append(f"{', '.join(methods)} with {', '.join(study.sizes[name] for name in step.students)}")
        if left_out := [method for method in step.methods if method not in methods]:
            parts.append(f"left out, as it needs several teachers: {', '.join(left_out)}")
        if step.interpolation:
            parts.append("interpolation of the teacher and all students so far with BM25")
        say(f"step {number}       {'; '.join(parts)}")


def counted_runs(study: Study, number: int, training: Training, noun: str = "run") -> str:
    return f"{number} {noun}{'s' * (number > 1)} of {length(study, training):,} examples"


def say_teacher(study: Study, dev: dict[str, float], steps: int | None) -> None:
    """Compare the teacher with BM25 on the dev queries, and estimate the time of each step from the teacher's.

    dev: system → nDCG@10 on the dev queries.
    """
    if study.args.teacher_model:
        return
    teacher = max(value for name, value in dev.items() if name.startswith("teacher, learning rate"))
    say(f"dev nDCG@10  random order {dev['random order']:.4f}, BM25 {dev['BM25']:.4f}, teacher {teacher:.4f}")
    if teacher <= dev["BM25"]:
        warn("the teacher does not beat BM25 on the dev queries. Such a study shows how near students come to their "
             "teacher, but not whether distillation is useful. Try more training (teacher in the settings), another "
             "--bert_model, or candidates of another depth")
    settings, record = study.settings, study.records.read(study.teacher_names(study.settings.teacher.seeds[:1])[0])
    rate = length(study, settings.teacher) / max(1, record["seconds"])
    for number, step in enumerate(settings.steps[:steps], 1):
        trials, runs = runs_of(study, step)
        examples = (other_teachers(study, step) * length(study, settings.teacher)
                    + trials * length(study, trial(study)) + runs * length(study, settings.distillation))
        if examples:
            say(f"step {number}       about {examples / rate / 3600:.1f} hours at the teacher's {rate:.0f} examples/s, "
                "without validation and re-ranking")


def other_teachers(study: Study, step: Step) -> int:
    return len(study.settings.teacher.seeds) - 1 if step.teachers and not study.args.teacher_model else 0


def runs_of(study: Study, step: Step) -> tuple[int, int]:
    """Return the smallest number of trials that choose learning rates, and of full runs."""
    methods = len(study.methods(step))
    pairs = len(step.students) * methods
    rates = sum(len(study.settings.students[name].learning_rates) for name in step.students) * methods
    runs = pairs * len(study.settings.seeds)
    if study.settings.tuning.share:
        return rates, runs
    return 0, rates + runs - pairs                              # a trial is the first seed's run


def trial(study: Study) -> Training:
    return study.settings.distillation.part(study.settings.tuning.share)


def length(study: Study, training: Training) -> int:
    """Number of examples of a training run."""
    examples = study.commands.examples("train")
    return round(training.epochs(examples) * examples)
