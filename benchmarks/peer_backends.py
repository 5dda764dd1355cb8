"""sentence-transformers' ONNX and OpenVINO backends, in a process of their own. Not a command.

Their packages need an older transformers than this repository, so they get an environment of their own:

    python -m venv backends
    backends/bin/pip install torch==2.13.0 datasets "sentence-transformers[onnx,openvino]"
    python -m benchmarks.reranking --backends_python backends/bin/python

ways.py starts this file with that interpreter. It imports nothing of this repository. Each line of its input names one
of WAYS. It scores all pairs that way and prints their probabilities of relevance as a JSON list.
"""
import csv
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

WAYS = {f"sentence-transformers, {title}": (backend, quantized)
        for title, backend, quantized in (("ONNX", "onnx", False), ("ONNX int8", "onnx", True),
                                          ("OpenVINO", "openvino", False), ("OpenVINO int8", "openvino", True))}


def onnx_instructions() -> str:
    """Return the name of sentence-transformers' 8-bit settings for this CPU."""
    import torch
    capabilities = torch.cpu.get_capabilities()
    if capabilities["architecture"] != "x86_64":
        return "arm64"
    return "avx512_vnni" if capabilities["avx512_vnni"] else "avx512" if capabilities["avx512_f"] else "avx2"


def load(settings: dict, backend: str, quantized: bool, scratch: Path) -> object:
    """Return a CrossEncoder with this backend. With `quantized`, sentence-transformers converts it to 8 bits."""
    from sentence_transformers import CrossEncoder

    def cross_encoder(file: str | None = None) -> CrossEncoder:
        return CrossEncoder(str(scratch / backend), backend=backend, max_length=settings["max_length"], device="cpu",
                            model_kwargs={"file_name": file} if file else {"export": True})
    if not (scratch / backend).exists():
        CrossEncoder(settings["model"], device="cpu").save_pretrained(str(scratch / backend))
    model = cross_encoder()
    if not quantized:
        return model
    if backend == "onnx":
        from sentence_transformers import export_dynamic_quantized_onnx_model
        export_dynamic_quantized_onnx_model(model, onnx_instructions(), str(scratch / backend))
        file, = (scratch / backend / "onnx").glob("model_q*.onnx")
        return cross_encoder(f"onnx/{file.name}")
    from optimum.intel import OVQuantizationConfig
    from sentence_transformers import export_static_quantized_openvino_model
    texts = scratch / "texts"
    texts.mkdir()
    with open(texts / "pairs.csv", "w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([["text"], *([" ".join(pair)] for pair in settings["texts"])])
    export_static_quantized_openvino_model(
        model, OVQuantizationConfig(num_samples=min(300, len(settings["texts"]))), str(scratch / backend),
        dataset_name=str(texts), dataset_config_name="default", dataset_split="train", column_name="text")
    return cross_encoder("openvino/openvino_model_qint8_quantized.xml")


def predictor(model: object, settings: dict) -> Callable[[], list[float]]:
    """Return a function that scores all pairs with the fastest of the batch sizes."""
    def predict(size: int) -> list[float]:
        scores = model.predict(settings["texts"], batch_size=size, apply_softmax=True, show_progress_bar=False)
        return scores[:, 1].tolist()

    times = {}
    predict(settings["batch_sizes"][0])                 # the first call compiles
    for size in settings["batch_sizes"]:
        start = time.perf_counter()
        predict(size)
        times[size] = time.perf_counter() - start
    best = min(times, key=times.get)
    return lambda: predict(best)


def serve(settings: dict, answers: object) -> None:
    predictors: dict[str, Callable[[], list[float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for line in sys.stdin:
            way = line.rstrip("\n")
            if way not in predictors:
                predictors[way] = predictor(load(settings, *WAYS[way], Path(scratch)), settings)
            print(json.dumps(predictors[way]()), file=answers, flush=True)


if __name__ == "__main__":
    settings_file = Path(sys.argv[1])
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(settings_file.parent)}   # its owner removes this
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")       # the libraries print to stdout, too
    os.dup2(2, 1)
    serve(json.loads(settings_file.read_text(encoding="utf-8")), channel)
