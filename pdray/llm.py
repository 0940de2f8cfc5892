"""pdray from a driver script: `LLM` and `generate`, with vLLM's argument and result names."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import sys
import uuid
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

import msgspec
from tqdm import tqdm

from pdray.actors.client import CoordinatorClient
from pdray.background import start_thread
from pdray.config import OFFLINE_TARGET_TPOT_MS, Config
from pdray.errors import ConfigError, InvalidRequestError, NoWorkerError, PdrayError
from pdray.event_loop import new_event_loop
from pdray.models import load_tokenizer
from pdray.models.generation_config import SamplingDefaults, load_sampling_defaults
from pdray.outputs import RequestOutput
from pdray.ray_hold import hold_ray
from pdray.router.batch import Batch, answer
from pdray.router.chat_template import ChatOptions, ChatTemplate
from pdray.router.conversation import parse_messages
from pdray.router.router import Router
from pdray.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

T = TypeVar("T")
Prompt = str | list[int] | dict[str, Any]

CONNECT_TIMEOUT_S = 30.0
OFFLINE_QUEUE_WAIT_S = 7 * 24 * 3600.0  # a batch job waits its turn; admission control is for servers


class _Texts(NamedTuple):
    """What this process needs for texts. Takes seconds to load, in which Ray and the workers start."""

    tokenizer: PreTrainedTokenizerBase | None
    sampling_defaults: SamplingDefaults
    chat_template: ChatTemplate

    @classmethod
    def load(cls, config: Config) -> Self:
        tokenizer = load_tokenizer(config)
        return cls(tokenizer, load_sampling_defaults(config), ChatTemplate(tokenizer))


class LLM:
    """A model served by prefill and decode actors that live as long as this object.

    Joins the Ray cluster that RAY_ADDRESS names or that runs on this machine, and starts a local one
    if there is none; it ends with the last LLM of the process. A connection that the driver has opened itself is used
    as it is, and stays. The router runs in this process, on a thread of its own. Use it as a context
    manager, or call shutdown(); a driver that ends without either takes its actors with it.

    The router opens a TCP connection to each worker. Through Ray Client (`ray://`) too, so a client on another machine
    needs a route to the workers' nodes, on any port; and since workers of a one-node cluster listen on loopback,
    `host` must then be set to the node's address.

    Args:
        model: Hugging Face id, folder, .gguf file or config.json; default: Config's. A relative path is this process's.
        ray_address: the cluster to join, as host:port or ray://host:port; "local" starts one; None as above.
        config: fields of pdray.config.Config.

    Raises:
        ConfigError: a setting is wrong. ModelLoadError, OutOfMemoryError: what a worker met, where trying again does
            not help. PlacementError: Ray's cluster is too small. StartTimeoutError: the workers were not ready within
            start_timeout_s; the text holds the last error, or what they wait for.
    """

    def __init__(self, model: str | None = None, *, ray_address: str | None = None, **config: Any) -> None:
        if model is not None:
            config["model"] = model
        config.setdefault("max_queue_wait_s", OFFLINE_QUEUE_WAIT_S)
        config.setdefault("target_tpot_ms", OFFLINE_TARGET_TPOT_MS)
        try:
            self.config = Config(**config).with_absolute_paths()
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._failure: BaseException | None = None  # of the router's thread
        self._pending: set[concurrent.futures.Future[Any]] = set()
        self._closed = False
        self._coordinator: CoordinatorClient | None = None
        self._router: Router | None = None
        with concurrent.futures.ThreadPoolExecutor(1, "pdray-texts") as beside:
            texts = beside.submit(_Texts.load, self.config)
            self._ray = hold_ray(ray_address)
            self._loop = new_event_loop()
            self._thread = start_thread("pdray-router", self._loop.run_forever, self._thread_failed)
            try:
                self._run(self._start(texts))
            except BaseException:
                self.shutdown()
                raise

    async def _start(self, texts: concurrent.futures.Future[_Texts]) -> None:
        app_name = f"llm-{uuid.uuid4().hex[:8]}"
        self._coordinator = await CoordinatorClient.open(self.config, app_name, detached=False)
        ready = asyncio.ensure_future(self._coordinator.wait_ready(self.config.start_timeout_s))
        try:
            loaded = await asyncio.wrap_future(texts)
            self.tokenizer, self._sampling_defaults, self._chat_template = loaded
            await ready
        finally:
            ready.cancel()
        # A batch job waits its turn: answer() bounds what waits, and nothing is refused.
        self._router = Router(
            self.config.model_copy(update={"max_queue_size": sys.maxsize}),
            self.tokenizer,
            router_id=f"router-{uuid.uuid4().hex[:8]}",
            secret=self._coordinator.secret,
            watch=self._coordinator.watch,
            report_broken=self._coordinator.report_broken,
        )
        await self._router.start()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._router.wait_ready()
        except TimeoutError:
            workers = (await self._coordinator.describe())["workers"]
            where = ", ".join(str(worker["address"]) for worker in workers if "address" in worker)
            raise NoWorkerError(
                f"the workers are ready, but this process could not connect to them within {CONNECT_TIMEOUT_S:g} s "
                f"({self._router.why_not_ready}); they listen at {where or 'no address now'}: set host to an address "
                "of their nodes that this process can reach, or run this where they are"
            ) from None

    def _thread_failed(self, error: BaseException) -> None:
        """Fail every call that waits for the router, now or later, because its thread has ended."""
        logger.critical("the router's thread has ended", exc_info=error)
        self._failure = error
        pending, self._pending = self._pending, set()
        for future in pending:
            future.cancel()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if self._failure is not None:
            coroutine.close()
            raise PdrayError(f"the router's thread has ended ({self._failure!r}); make another LLM") from self._failure
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        self._pending.add(future)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise PdrayError(f"the router's thread has ended ({self._failure!r}); make another LLM") from self._failure
        except BaseException:
            future.cancel()
            raise
        finally:
            self._pending.discard(future)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete every prompt; results in the prompts' order.

        Args:
            prompts: one or many of: text, token ids, {"prompt": text}, {"prompt_token_ids": ids}.
            sampling_params: one for all, or one for each; default get_default_sampling_params().

        Raises:
            InvalidRequestError: a prompt or parameter that cannot be served. All are checked before any is computed.
        """
        many = _as_list(prompts)
        default_max_tokens = None
        if sampling_params is None:
            default = self.get_default_sampling_params()
            default_max_tokens = default.max_tokens
            params = [msgspec.structs.replace(default, max_tokens=None)] * len(many)
        elif isinstance(sampling_params, SamplingParams):
            params = [sampling_params] * len(many)
        else:
            params = list(sampling_params)
        if len(params) != len(many):
            raise InvalidRequestError(
                f"{len(params)} sampling_params for {len(many)} prompts; give one, or one for each"
            )
        return self._run(self._answer(Batch(many, params, default_max_tokens), use_tqdm))

    def get_default_sampling_params(self) -> SamplingParams:
        """Parameters that generate() and chat() use by default: the model's, see Config.generation_config."""
        return self._sampling_defaults.params()

    def chat(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """generate() on conversations, rendered with the model's chat template.

        Args:
            messages: one conversation, or a list of them, each in OpenAI's form and checked as over HTTP.
            add_generation_prompt, continue_final_message, chat_template_kwargs: see ChatOptions.
            tools: that the model may call, in OpenAI's form; its calls are in the text, as the model writes them.

        Raises:
            InvalidRequestError: one cannot be rendered, and nothing was computed for the others; or see generate().
        """
        options = ChatOptions(add_generation_prompt, continue_final_message, chat_template_kwargs or {}, tools or ())
        is_many = isinstance(messages, list | tuple) and all(isinstance(each, list | tuple) for each in messages)
        conversations: Sequence[Any] = messages if is_many else [messages]
        prompts: list[Prompt] = []
        for index, conversation in enumerate(conversations):
            try:
                prompts.append(self._chat_template.render(parse_messages(conversation), options))
            except InvalidRequestError as error:
                if is_many:
                    error.add_note(f"in conversation {index} of {len(conversations)}, counted from 0")
                raise
        try:
            return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)
        except InvalidRequestError as error:
            error.param = "messages" if error.param == "prompt" else error.param
            raise

    async def _answer(self, batch: Batch, use_tqdm: bool) -> list[RequestOutput]:
        assert self._router is not None
        with tqdm(
            total=len(batch.prompts), desc="Processed prompts", disable=not use_tqdm, dynamic_ncols=True
        ) as progress:
            return await answer(batch, self._router, self.config.max_queue_size, lambda: progress.update(1))

    def status(self) -> dict[str, Any]:
        """Workers, roles, devices, queue depth, free blocks, leases: what `pdray status` prints."""
        assert self._coordinator is not None
        return self._run(self._coordinator.describe())

    def shutdown(self) -> None:
        """Stop router, actors and, if this object started it, Ray. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._thread.is_alive():
            self._run(self._stop())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
        self._ray.release()

    async def _stop(self) -> None:
        if self._router is not None:
            await self._router.stop()
        if self._coordinator is not None:
            await self._coordinator.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


def generate(
    prompts: Prompt | Sequence[Prompt],
    sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    model: str | None = None,
    use_tqdm: bool = True,
    **config: Any,
) -> list[RequestOutput]:
    """Start an LLM, complete the prompts, shut it down. For more than one call, keep an LLM."""
    with LLM(model, **config) as llm:
        return llm.generate(prompts, sampling_params, use_tqdm=use_tqdm)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[str | list[int]]:
    """Every accepted form of prompts as a list of texts and token id lists."""
    is_one = isinstance(prompts, str | dict) or (len(prompts) > 0 and isinstance(prompts[0], int))
    many: Any = [prompts] if is_one else prompts
    result: list[str | list[int]] = []
    for prompt in many:
        if isinstance(prompt, dict):
            prompt = prompt.get("prompt_token_ids") or prompt.get("prompt") or ""
        if not isinstance(prompt, str | list):
            name = type(prompt).__name__
            raise InvalidRequestError(f"a prompt is a {name}; it must be text, token ids, or a dict of either")
        result.append(prompt)
    return result
