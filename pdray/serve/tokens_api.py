"""/tokenize, /detokenize and /tokenizer_info, with vLLM's fields and answers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, model_validator
from transformers import PreTrainedTokenizerBase

from pdray.config import Config
from pdray.errors import InvalidRequestError
from pdray.models.vocabulary import vocabulary_of
from pdray.router.chat_template import ChatTemplate
from pdray.router.tokenization import beside_loop, encoder_of
from pdray.serve.endpoints import render_chat
from pdray.serve.fields import known_fields
from pdray.serve.protocol import ChatBody
from pdray.serve.values import TokenId

MAX_TOKENS = 1_000_000  # of /detokenize; a body's size is bounded, too


class _TokensBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: StrictStr | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, body: dict[str, Any]) -> dict[str, Any]:
        return known_fields(body, cls.model_fields)


class TokenizeBody(_TokensBody):
    """POST /tokenize of a prompt.

    Attributes:
        add_special_tokens: those that the tokenizer adds by itself.
        return_token_strs: answer with each token's text, too.
    """

    prompt: StrictStr
    add_special_tokens: StrictBool | None = True
    return_token_strs: StrictBool | None = False


class TokenizeChatBody(ChatBody):
    """POST /tokenize of a conversation: a chat request, whose prompt is counted."""

    return_token_strs: StrictBool | None = False


class DetokenizeBody(_TokensBody):
    """POST /detokenize."""

    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS)]


def parse_tokenize(value: dict[str, Any]) -> TokenizeBody | TokenizeChatBody:
    """A body of either kind."""
    return (TokenizeChatBody if "messages" in value else TokenizeBody).model_validate(value)


async def tokenize(
    body: TokenizeBody | TokenizeChatBody,
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase | None,
    max_model_len: int | None,
    config: Config,
) -> dict[str, Any]:
    """Raises:
    InvalidRequestError: there is no tokenizer, or the conversation cannot be rendered.
    """
    if tokenizer is None:
        raise _no_tokenizer("prompt")
    if isinstance(body, TokenizeBody):
        prompt, add_special_tokens = body.prompt, body.add_special_tokens is not False
    else:
        prompt = (await render_chat(body, template, config)).prompt
        add_special_tokens = bool(body.add_special_tokens)
    encoder = encoder_of(tokenizer)
    ids = await beside_loop(len(prompt), lambda: encoder.encode(prompt, add_special_tokens=add_special_tokens))
    vocabulary = vocabulary_of(tokenizer)
    texts = [vocabulary.shown(token_id) for token_id in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": max_model_len, "tokens": ids, "token_strs": texts}


async def count_tokens(
    body: ChatBody, template: ChatTemplate, tokenizer: PreTrainedTokenizerBase | None, config: Config
) -> int:
    """Of a conversation's prompt, however long.

    Raises:
        InvalidRequestError: there is no tokenizer, or the conversation cannot be rendered.
    """
    if tokenizer is None:
        raise _no_tokenizer("messages")
    prompt, encoder = (await render_chat(body, template, config)).prompt, encoder_of(tokenizer)
    return len(await beside_loop(len(prompt), lambda: encoder.encode(prompt, add_special_tokens=False)))


async def detokenize(body: DetokenizeBody, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """Raises:
    InvalidRequestError: there is no tokenizer, or it has no such token.
    """
    if tokenizer is None:
        raise _no_tokenizer("tokens")
    size = len(tokenizer)
    for token_id in body.tokens:
        if token_id >= size:
            raise InvalidRequestError(f"token id {token_id} is not in the vocabulary of {size} tokens", "tokens")
    prompt = await beside_loop(len(body.tokens), lambda: tokenizer.decode(body.tokens))
    return {"prompt": prompt}


def tokenizer_info(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """What a client needs to prepare prompts by itself, by transformers' names; lm_eval asks for it.

    Raises:
        InvalidRequestError: there is no tokenizer.
    """
    if tokenizer is None:
        raise _no_tokenizer("model")
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "unk_token": tokenizer.unk_token,
        "chat_template": tokenizer.chat_template,
    }


def _no_tokenizer(param: str) -> InvalidRequestError:
    return InvalidRequestError("this needs a tokenizer, and this server has none", param)
