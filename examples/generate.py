"""Complete prompts from a driver script: starts or joins Ray, runs the model, prints, leaves nothing behind."""

import pdray

PROMPTS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "The three primary colors are",
]


def main() -> None:
    params = pdray.SamplingParams(temperature=0.0, max_tokens=24)
    for output in pdray.generate(PROMPTS, params, device="cpu"):
        completion = output.outputs[0]
        print(f"{output.prompt!r} -> {completion.text!r} ({completion.finish_reason})")


if __name__ == "__main__":  # Ray may import this file again in a worker
    main()
