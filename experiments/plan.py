"""Say how much work a study is, and whether its teacher beats BM25, before the students are trained. Not a command."""
import json

from experiments.settings import Step, Training
from experiments.study import Study
from simplified_tinybert.common.files import say, warn


def say_work(study: Study, steps: int | None) -> None:
    """Print the number of pairs, and the training runs of each step."""
    settings, pairs = study.settings, {name: study.commands.examples(name) for name in ("train", "dev", "test")}
    say(f"pairs        {pairs['train']:,} to train with; each model re-ranks {pairs['dev']:,} dev and "
        f"{pairs['test']:,} test pairs")
    if not study.args.teacher_model:
        say(f"teacher      trained on {length(study, settings.teacher):,} examples")
    for number, step in enumerate(settings.steps[:steps], 1):
        if step.teachers:
            say(f"step {number}       {len(settings.teacher.seeds) - 1} more teachers")
        else:
            trials, runs = runs_of(study, step)
            say(f"step {number}       {trials} trials of {length(study, trial(study)):,} examples, or a few more, and "
                f"{runs} runs of {length(study, settings.distillation):,}: {', '.join(step.methods)} "
                f"({', '.join(study.sizes[name] for name in step.students)})")


def say_teacher(study: Study, steps: int | None) -> None:
    """Compare the teacher with BM25 on the dev queries, and estimate the time of each step from the teacher's."""
    if study.args.teacher_model:
        return
    dev = json.loads((study.out / "results.json").read_text(encoding="utf-8"))["dev"]["nDCG@10"]
    record = study.records.read(study.teacher_names(study.settings.teacher.seeds[:1])[0])
    teacher = max(value for name, value in dev.items() if name.startswith("teacher, learning rate"))
    say(f"dev nDCG@10  random order {dev['random order']:.4f}, BM25 {dev['BM25']:.4f}, teacher {teacher:.4f}")
    if teacher <= dev["BM25"]:
        warn("the teacher does not beat BM25 on the dev queries. Such a study shows how near students come to their "
             "teacher, but not whether distillation is useful. Try more training (teacher in the settings), another "
             "--bert_model, or candidates of another depth")
    examples = length(study, study.settings.teacher)
    for number, step in enumerate(study.settings.steps[:steps], 1):
        trials, runs = (0, len(study.settings.teacher.seeds) - 1) if step.teachers else runs_of(study, step)
        work = runs * length(study, study.settings.teacher if step.teachers else study.settings.distillation)
        hours = (work + trials * length(study, trial(study))) * record["seconds"] / examples / 3600
        say(f"step {number}       about {hours:.1f} hours of training, if it is as fast as the teacher's "
            f"({examples / record['seconds']:.0f} examples/s)")


def runs_of(study: Study, step: Step) -> tuple[int, int]:
    """Return the smallest number of trials that choose learning rates, and the number of full runs."""
    rates = sum(len(study.settings.students[name].learning_rates) for name in step.students) * len(step.methods)
    runs = len(step.students) * len(step.methods) * len(study.settings.seeds)
    if not study.settings.tuning.share:                         # a trial is the first seed's run
        return 0, rates + runs - len(step.students) * len(step.methods)
    return rates, runs


def trial(study: Study) -> Training:
    return study.settings.distillation.part(study.settings.tuning.share)


def length(study: Study, training: Training) -> int:
    """Number of examples of a training run."""
    examples = study.commands.examples("train")
    return round(training.epochs(examples) * examples)
