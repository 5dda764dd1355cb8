"""Command lines of reranker.py and its outputs."""


def arguments(model, features_file, output, *more):
    files = features_file if isinstance(features_file, list) else [features_file]
    return ["--model_dir", model, "--features_file", *files, "--output_scores_file", output, "--device", "cpu", *more]


def read_scores(path):
    return [(query_id, passage_id, float(score)) for query_id, passage_id, score
            in (line.split("\t") for line in path.read_text().splitlines())]
