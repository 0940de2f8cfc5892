"""Counts what one request passes through: files and functions of pdray, from the HTTP body to a streamed token.

    python tests/journey.py [--token 2] [--list]

A prefill worker, a decode worker, a router with sessions to both, and the API, all in this process, on CPU, around a
tiny random model. Every function of pdray that begins on any thread while a streamed /v1/completions request is on its
way is noted; those that all of several requests share are counted, so that background loops fall out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from fastapi import FastAPI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pdray.actors.decode_worker import DecodeWorker
from pdray.actors.prefill_worker import PrefillWorker
from pdray.config import Config
from pdray.router.router import Router
from pdray.serve.api import create_app
from pdray.testing.tiny_model import TINY_CONFIG
from pdray.wire.cluster_view import ClusterView, Pair

ROOT = Path(__file__).resolve().parents[1]
OURS = tuple(str(ROOT / folder) + "/" for folder in ("pdray", "actors", "kernels"))
SECRET = b"secret of the journey"
EPOCH = 1
NUM_WARM_UPS, NUM_REQUESTS = 2, 5
BODY = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0, "ignore_eos": True, "stream": True}


class LocalActor:
    """Stands for the decode worker's actor handle: calls run on this loop, and answer like Ray's."""

    def __init__(self, worker: DecodeWorker) -> None:
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self.receive_array = self

    def remote(self, *args: Any) -> Any:
        class Call:
            @staticmethod
            def future() -> Any:
                return asyncio.run_coroutine_threadsafe(self._worker.receive_array(*args), self._loop)

        return Call()


def ascii_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each ASCII code."""
    tokenizer = Tokenizer(models.WordLevel({chr(code): code for code in range(128)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class Recorder:
    """Notes every Python function that begins while it records, on all threads that start after it was installed."""

    def __init__(self) -> None:
        self.recording = False
        self._seen: set[CodeType] = set()

    def install(self) -> None:
        threading.setprofile(self._note)
        sys.setprofile(self._note)

    def start(self) -> None:
        self._seen = set()
        self.recording = True

    def stop(self) -> set[CodeType]:
        self.recording = False
        return self._seen

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        if self.recording and event == "call":
            self._seen.add(frame.f_code)


async def stream(app: FastAPI, recorder: Recorder, token: int) -> set[CodeType]:
    """Stream one request to its end; returns what ran until the event of its n-th token was sent."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    bodies = [{"type": "http.request", "body": json.dumps(BODY).encode(), "more_body": False}]
    seen: set[CodeType] = set()
    events: list[bytes] = []

    async def receive() -> dict[str, Any]:
        if bodies:
            return bodies.pop()
        await asyncio.Event().wait()  # the client stays
        raise AssertionError

    async def send(message: Any) -> None:
        nonlocal seen
        assert message.get("status", 200) == 200, message
        if message.get("body"):
            events.append(message["body"])
            if len(events) == token:
                seen = recorder.stop()

    recorder.start()
    await app(scope, receive, send)
    assert len(events) > token and events[-1] == b"data: [DONE]\n\n", events
    return seen


async def trace(folder: Path, token: int) -> list[set[CodeType]]:
    """What each of a few requests ran through, one after the other."""
    recorder = Recorder()
    recorder.install()  # before any thread starts
    model = folder / "config.json"
    model.write_text(json.dumps(TINY_CONFIG | {"vocab_size": 128, "eos_token_id": 127}))
    config = Config(
        model=str(model),
        load_format="dummy",
        skip_tokenizer_init=True,  # the router gets one below
        device="cpu",
        channel="object_store",
        num_kv_blocks=64,
        max_num_seqs=4,
    )
    prefill = PrefillWorker(config, "prefill-0", "1", SECRET)
    decode = DecodeWorker(config, "decode-0", "1", SECRET)
    infos = [await prefill.start(), await decode.start()]
    await prefill.connect(decode.info, EPOCH, await decode.accept(prefill.info, EPOCH), LocalActor(decode))
    view = ClusterView(1, infos, [Pair("prefill-0", "decode-0", EPOCH)])

    async def watch(version: int) -> ClusterView:
        if version >= view.version:
            await asyncio.Event().wait()
        return view

    router = Router(config, ascii_tokenizer(), router_id="router-0", secret=SECRET, watch=watch)
    await router.start()
    await router.wait_ready()
    app = create_app(config, lambda: router)
    try:
        traces = [await stream(app, recorder, token) for _ in range(NUM_WARM_UPS + NUM_REQUESTS)]
    finally:
        await router.stop()
        await prefill.stop()
        await decode.stop()
    return traces[NUM_WARM_UPS:]


def functions(traces: list[set[CodeType]]) -> dict[str, list[str]]:
    """Functions that every trace has, by file; without lambdas and comprehensions, which are part of others."""
    by_file: dict[str, list[str]] = {}
    for code in set.intersection(*traces):
        path = str(Path(code.co_filename).resolve())
        if path.startswith(OURS) and not code.co_name.startswith("<"):
            by_file.setdefault(str(Path(path).relative_to(ROOT)), []).append(code.co_qualname)
    return {path: sorted(names) for path, names in sorted(by_file.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--token", type=int, default=1, help="which one the journey ends with (default: 1)")
    parser.add_argument("--list", action="store_true", help="print every file with its functions")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        by_file = functions(asyncio.run(trace(Path(folder), args.token)))
    by_folder: dict[str, list[str]] = {}
    for path in by_file:
        by_folder.setdefault(str(Path(path).parent), []).append(path)
        if args.list:
            print(path, *by_file[path], sep="\n    ")
    for folder, paths in by_folder.items():
        print(f"{folder}: {len(paths)} files, {sum(len(by_file[path]) for path in paths)} functions")
    print(f"all: {len(by_file)} files, {sum(map(len, by_file.values()))} functions")


if __name__ == "__main__":
    main()
