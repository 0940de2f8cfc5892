"""The API around a router that is scripted up to its admission, with real requests and a tokenizer of ASCII codes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from fastapi import FastAPI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pdray.config import Config
from pdray.errors import WorkerDiedError
from pdray.exposition import Exposition
from pdray.models.generation_config import NEUTRAL
from pdray.outputs import Logprob, SampledToken
from pdray.prompt_scores import PromptScores
from pdray.router.grammars import check_grammar
from pdray.router.request import Request
from pdray.router.routed import RoutedRequest
from pdray.router.router import DecodePool
from pdray.router.validation import check_tokenizer, complete_params, note_thoughts, tokenize_all, tokenize_bad_words
from pdray.sampling_params import SamplingParams
from pdray.serve.api import create_app
from pdray.testing.patience import PATIENCE_S
from pdray.wire.prefill_messages import FirstTokens

EOS = 128
REPLY = "The capital of France is Paris."
MAX_MODEL_LEN = 200
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'pirate' %}{{ raise_exception('no pirates') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{{ mood }}{% if add_generation_prompt %}assistant: {% endif %}"
)


def ascii_tokenizer() -> PreTrainedTokenizerFast:
    """Token id = ASCII code; EOS is 128."""
    vocabulary = {chr(code): code for code in range(128)}
    tokenizer = Tokenizer(models.WordLevel({**vocabulary, "<eos>": EOS}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", chat_template=TEMPLATE)


class ScriptedRouter:
    """Answers every prompt with REPLY and an end-of-sequence token.

    Attributes:
        refusals: raised by the submissions to come, by their number from 0.
        admission: submissions wait for it. token: every token waits for it.
        stop_after: tokens after which an answer stands still. die_after: tokens after which it fails.
        requests: all that were admitted. aborted: ids of those that were given up before their end.
    """

    def __init__(self) -> None:
        self.tokenizer: PreTrainedTokenizerFast | None = ascii_tokenizer()
        self.max_model_len: int | None = MAX_MODEL_LEN
        self.sampling_defaults = NEUTRAL
        self.vocab_size: int | None = None
        self.ready = True
        self.pools: list[DecodePool] = []
        self.why_not_ready = "no prefill and decode worker are connected now"
        self.reply = REPLY
        self.reasoning_parser = "auto"
        self.refusals: dict[int, Exception] = {}
        self.admission = asyncio.Event()
        self.admission.set()
        self.stop_after: int | None = None
        self.die_after: int | None = None
        self.num_submitted = 0
        self.num_waiting = 0
        self.priorities: list[int] = []
        self.requests: list[RoutedRequest] = []
        self.aborted: list[str] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def tokenize(self, prompts: Sequence[str | list[int]], keep_last: int | None = None) -> list[list[int]]:
        return await tokenize_all(self.tokenizer, prompts, self.max_model_len, self.vocab_size, keep_last)

    async def submit(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        default_max_tokens: int | None = None,
        text: str | None = None,
        arrival: float | None = None,
    ) -> RoutedRequest:
        number, self.num_submitted = self.num_submitted, self.num_submitted + 1
        if (refusal := self.refusals.get(number)) is not None:
            raise refusal
        check_tokenizer(params, self.tokenizer)
        await check_grammar(params, self.tokenizer)
        params = tokenize_bad_words(params, self.tokenizer, self.vocab_size)
        params = note_thoughts(params, prompt, self.tokenizer, self.reasoning_parser)
        params = complete_params(params, len(prompt), self.max_model_len or 0, default_max_tokens)
        self.num_waiting += 1
        try:
            await self.admission.wait()
        finally:
            self.num_waiting -= 1
        arrival = time.monotonic() if arrival is None else arrival
        request = Request(request_id, text, prompt, params, priority, self.tokenizer, arrival)
        request.output.num_cached_tokens = len(prompt) // 2
        routed = RoutedRequest(request, self._abort)
        self.requests.append(routed)
        self.priorities.append(priority)
        task = asyncio.ensure_future(self._run(request, routed))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return routed

    def _abort(self, request: Request) -> None:
        self.aborted.append(request.request_id)
        routed = next(each for each in self.requests if each.output is request.output)
        self._end(request, routed)

    @staticmethod
    def _end(request: Request, routed: RoutedRequest, error: Exception | None = None) -> None:
        request.end(time.monotonic(), error)
        routed.end(error)

    async def _run(self, request: Request, routed: RoutedRequest) -> None:
        params, leg = request.params, request.start()
        assert params.max_tokens is not None
        if params.prompt_logprobs is not None:
            request.note_prefill(leg, self._first_tokens(request, params.prompt_logprobs))
        codes = [ord(char) for char in self.reply]
        tokens = [codes[i % len(codes)] for i in range(params.max_tokens)] if params.ignore_eos else [*codes, EOS]
        for position, token_id in enumerate(tokens[: params.max_tokens]):
            if position == self.stop_after or request.ended:
                return
            if position == self.die_after:
                self._end(request, routed, WorkerDiedError("decode-0 is gone"))
                return
            reason = "stop" if token_id == EOS and not params.ignore_eos else None
            reason = "length" if reason is None and position + 1 == params.max_tokens else reason
            tokens = [
                SampledToken(index, position, token_id, self._logprobs(token_id, index, params.logprobs), reason)
                for index in range(params.n)
            ]
            request.take(time.monotonic(), leg, tokens)
            routed.wake()
            if all(completion.finished for completion in request.output.outputs):
                break
            await asyncio.sleep(0)
        request.output.timings.queue = 0.001
        self._end(request, routed)

    @staticmethod
    def _first_tokens(request: Request, num_top: int) -> FirstTokens:
        """A prefill worker's message: every prompt token comes after c, d, A, B and so on, unless it is one of them."""
        rows = []
        for token_id in request.output.prompt_token_ids[1:]:
            ids = [99, 100, *range(65, 85)]
            rank = ids.index(token_id) + 1 if token_id in ids else 3
            top = np.array([-float(place + 1) for place in range(num_top)], np.float32)
            own = np.array([-float(rank)], np.float32)
            rows.append([token_id, rank, *own.view(np.int32), *ids[:num_top], *top.view(np.int32)])
        scores = PromptScores(num_top, np.array(rows, "<i4").tobytes())
        return FirstTokens(request.request_id, 0, [], 0, 0.0, 0.0, scores)

    def _logprobs(self, token_id: int, index: int, num_top: int | None) -> dict[int, Logprob] | None:
        """Completion 0 sampled the likeliest token; the others one that is not among the top."""
        if num_top is None:
            return None
        others = [other for other in range(65, 65 + num_top + 1) if other != token_id]
        top = [token_id, *others][:num_top] if index == 0 else others[:num_top]
        step = {token: Logprob(-float(rank), rank) for rank, token in enumerate(top, 1)}
        return step if token_id in step else step | {token_id: Logprob(float("-inf"), 99)}

    def stats(self) -> dict[str, Any]:
        return {"running": self.num_running, "queue_depth": self.num_waiting}

    @property
    def num_running(self) -> int:
        return sum(not request.ended for request in self.requests)


class Measured:
    """RouterMetrics' part that knows no Ray."""

    def __init__(self) -> None:
        self.exposition = Exposition({"router": "router-0"}, 'a "model"')

    def text(self, *, vllm: bool, cache_config: Any, running: int, kv_usage: float) -> bytes:
        self.exposition.samples["running"].set(running)
        self.exposition.samples["kv_usage"].set(kv_usage)
        return self.exposition.text(vllm=vllm, cache_config=cache_config)


@pytest.fixture
def metrics() -> Measured:
    return Measured()


@pytest.fixture
async def router() -> ScriptedRouter:
    return ScriptedRouter()


@pytest.fixture
def config() -> Config:
    return Config(served_model_name="smol", max_request_bytes=20_000)


@pytest.fixture
def app(config: Config, router: ScriptedRouter) -> FastAPI:
    return create_app(config, lambda: router)  # type: ignore[arg-type, return-value]


@pytest.fixture(scope="session")
def make_app() -> Callable[..., FastAPI]:
    """For tests that are no coroutines: the app of a router of its own, made in the running loop."""

    def make(config: Config, max_model_len: int = MAX_MODEL_LEN) -> FastAPI:
        router = ScriptedRouter()
        router.max_model_len = max_model_len
        return create_app(config, lambda: router, metrics=Measured())  # type: ignore[arg-type, return-value]

    return make


@pytest.fixture
async def http(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """The app in-process. What no handler expects is raised here."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://pdray") as client:
        yield client


@pytest.fixture
async def server(app: FastAPI) -> AsyncIterator[uvicorn.Server]:
    """The app behind a real server."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="off"))
    serving = asyncio.ensure_future(server.serve())
    while not server.started:
        assert not serving.done()
        await asyncio.sleep(0.01)
    yield server
    server.should_exit = server.force_exit = True
    await serving


@pytest.fixture
async def url(server: uvicorn.Server) -> str:
    return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


@pytest.fixture
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture
def until() -> Callable[[Callable[[], Any]], Any]:
    """Wait until something is true; it must become so."""

    async def wait(condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, "it did not come true"
            await asyncio.sleep(0.01)

    return wait
