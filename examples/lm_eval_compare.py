"""The real lm_eval against a running server and against transformers, on the same weights.

Needs `pip install lm_eval[api]`. With the default model served by `pdray serve`:

    python examples/lm_eval_compare.py --gguf path/to/SmolLM2-135M-Instruct.Q4_1.gguf

A multiple choice task (log-likelihoods through echo and logprobs) and one that generates; both are made here, so that
nothing is downloaded. Prints both figures, and exits 1 if a log-likelihood differs by more than 0.01 or an answer
differs at all.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import lm_eval
import openai

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Russia": "Moscow",
    "Spain": "Madrid",
    "Greece": "Athens",
    "Cuba": "Havana",
}
TOLERANCE = 0.01


def make_tasks(data: str) -> list[dict[str, Any]]:
    """Two tasks over a file of one JSON object a line."""
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": data}},
        "test_split": "test",
        "doc_to_text": "The capital of {{country}} is",
    }
    choice = {
        "task": "capitals_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    text = {
        "task": "capitals_text",
        "output_type": "generate_until",
        "doc_to_target": " {{choices[answer]}}",
        "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 12, "temperature": 0, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    return [common | choice, common | text]


def evaluate(model: str, args: dict[str, Any], tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """lm_eval's own result, with every sample."""
    result: dict[str, Any] = lm_eval.simple_evaluate(
        model=model, model_args=args, tasks=[dict(task) for task in tasks], log_samples=True, bootstrap_iters=0
    )
    return result


def compare(served: dict[str, Any], reference: dict[str, Any]) -> bool:
    """Print both; whether they agree."""
    agree = True
    for task in reference["results"]:
        figures = [
            {name: value for name, value in result["results"][task].items() if isinstance(value, float)}
            for result in (served, reference)
        ]
        print(f"{task}: server {figures[0]}, transformers {figures[1]}")
        pairs = list(zip(served["samples"][task], reference["samples"][task], strict=True))
        if task == "capitals_choice":
            differences = [
                abs(ours - theirs)
                for one, other in pairs
                for (ours, _), (theirs, _) in zip(one["filtered_resps"], other["filtered_resps"], strict=True)
            ]
            print(f"{task}: {len(differences)} log-likelihoods, largest difference {max(differences):.2g}")
            agree &= max(differences) <= TOLERANCE
        else:
            num_same = sum(one["filtered_resps"] == other["filtered_resps"] for one, other in pairs)
            print(f"{task}: {num_same} of {len(pairs)} texts are the same, e.g. {pairs[0][0]['filtered_resps'][0]!r}")
            agree &= num_same == len(pairs)
    return agree


def main() -> int:
    """Returns 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--gguf", type=Path, required=True, help="the file that the server serves")
    args = parser.parse_args()
    os.environ.setdefault("OPENAI_API_KEY", os.environ.get("PDRAY_API_KEY") or "none")
    name = openai.OpenAI(base_url=args.base_url).models.list().data[0].id
    choices = list(CAPITALS.values())
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "capitals.jsonl"
        lines = [{"country": each, "choices": choices, "answer": i} for i, each in enumerate(CAPITALS)]
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        tasks = make_tasks(str(data))
        served = evaluate("local-completions", {"model": name, "base_url": f"{args.base_url}/completions"}, tasks)
        hf = {"pretrained": str(args.gguf.parent), "gguf_file": args.gguf.name, "dtype": "float32", "device": "cpu"}
        reference = evaluate("hf", hf, tasks)
    return int(not compare(served, reference))


if __name__ == "__main__":
    sys.exit(main())
