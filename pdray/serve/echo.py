"""A prompt at the beginning of its answer: its text, and its tokens' log-probabilities."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from pdray.models.vocabulary import vocabulary_of
from pdray.outputs import RequestOutput
from pdray.router.text_stream import TextStream
from pdray.serve.responses import echoed_logprobs


class Echo:
    """See the module. A prompt's ids have been checked: the router has taken them.

    Attributes:
        num_top: most likely tokens beside each of the prompt's; None without log-probabilities.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_top: int | None) -> None:
        self._tokenizer = tokenizer
        self.num_top = num_top

    def text(self, output: RequestOutput) -> str:
        """The prompt as it was sent; token ids are decoded."""
        return str(self._tokenizer.decode(output.prompt_token_ids) if output.prompt is None else output.prompt)

    def logprobs(self, output: RequestOutput) -> dict[str, Any] | None:
        """openai's completion Logprobs of the prompt's tokens; None if they are not asked for."""
        if self.num_top is None:
            return None
        assert output.prompt_logprobs is not None, "a prompt is computed before anything is answered"
        ids = output.prompt_token_ids
        name = vocabulary_of(self._tokenizer).shown(ids[0])
        return echoed_logprobs(ids, output.prompt_logprobs, self.num_top, self._offsets(output), name)

    def _offsets(self, output: RequestOutput) -> list[int]:
        """Where each token begins in text(); one that the tokenizer has put before the text begins with it."""
        stream = TextStream(self._tokenizer, [], skip_special_tokens=False)
        offsets, num_chars = [], 0
        for token_id in output.prompt_token_ids:
            offsets.append(num_chars)
            num_chars += len(stream.feed(token_id))
        length = len(self.text(output))
        added = max(0, num_chars - length)
        return [min(max(0, offset - added), length) for offset in offsets]
