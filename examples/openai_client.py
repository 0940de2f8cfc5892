"""Talk to a running server (`pdray serve`, or `serve deploy configs/cpu.yaml`) with the openai package."""

import argparse
import os

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--prompt", default="What is the capital of France?")
    args = parser.parse_args()

    client = OpenAI(base_url=args.base_url, api_key=os.environ.get("PDRAY_API_KEY") or "none")
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": args.prompt}]

    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=32, temperature=0)
    print(answer.choices[0].message.content)
    print(answer.usage)

    for chunk in client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=32,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ):
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
