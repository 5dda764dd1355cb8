"""Settings of a tiny study."""
SETTINGS = """
seeds = [1, 2]
measures = ["nDCG@10", "RR@10"]
proposed = "Simplified TinyBERT"
max_seq_length = 32
passages = "--title --window 12 --stride 6"
sampling = "--negatives 1"
dev_depth = 4
test_depth = 5

[tuning]
extensions = 0

[warm_up]
pairs = 24
most_epochs = 1
batch_size = 8
learning_rates = [1e-3]
flags = ""

[teacher]
pairs = 30
most_epochs = 2
batch_size = 8
learning_rates = [1e-3]
flags = "--padding masked"

[general]
pairs = 30
most_epochs = 1
batch_size = 8
flags = "--compress_teacher"

[student_warm_up]
pairs = 24
most_epochs = 1
batch_size = 8
flags = ""

[distillation]
pairs = 24
most_epochs = 9
batch_size = 8
validations = 2
flags = ""

[students]
quarter = { depth = 0.25, width = 0.5, general_learning_rate = 3e-4, learning_rates = [1e-3, 1e-2] }

[methods]
"TinyBERT" = "--distill_model tinybert"
"Simplified TinyBERT" = "--distill_model simplified"
"""


STEPS = """
like = "small.toml"
seeds = [1]
proposed = "Simplified TinyBERT"
steps = [
    { students = ["quarter"], methods = ["none"] },
    { teachers = true },
    { students = ["half"], methods = ["ensemble", "Simplified TinyBERT"] },
    { interpolation = true },
]
[tuning]
share = 0.3
extensions = 1
[teacher]
seeds = [3, 4]
[warm_up]
pairs = 0
[students]
half = { depth = 0.5, flags = "--init_from_teacher", learning_rates = [1e-3] }
[general]
flags = "--padding masked"
[methods]
none = "--distill_model finetune"
ensemble = "--distill_model standard --teacher_scores_file TEACHERS"
[titles]
none = "no distillation"
"""
