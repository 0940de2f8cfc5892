"""Which connected workers a leg can go to: now, or at all."""

from __future__ import annotations

from collections.abc import Sequence

from pdray.config import Config
from pdray.control.policy import Choice, choose, choose_prefill, has_credit, may_start_ahead
from pdray.engine.schedule.demand import Demand
from pdray.errors import InvalidRequestError
from pdray.router.leg import Leg
from pdray.router.link import WorkerLink
from pdray.router.workers import Workers
from pdray.wire.peers import Role


class Placement:
    """See the module. It only looks: asking and sending are Dispatch's."""

    def __init__(self, config: Config, workers: Workers) -> None:
        self._config = config
        self._workers = workers

    def choose(self, leg: Leg, demand: Demand) -> Choice | None:
        """Workers that are large enough and can take it now."""
        prefill = [link for link in self._workers.open_links(Role.PREFILL) if link.could_prefill(demand)]
        with_blocks = [link for link in prefill if not link.is_guest]
        if with_blocks and leg.ends_with_first_token:  # nobody decodes: no lease, and its KV stays where it is
            hashes = leg.prefix_hashes(self._config)
            prefill_id = choose_prefill([link.prefill_state(hashes) for link in with_blocks])
            return None if prefill_id is None else Choice(prefill_id, None)
        decode = [
            link
            for link in self._workers.open_links(Role.DECODE, Role.BOTH)
            if not link.broken and link.could_decode(demand) and has_credit(link.decode_state(), demand)
        ]
        if not decode:
            return None
        if len(decode) == 1 and decode[0].info.role == Role.BOTH:  # nothing to choose
            return Choice(None, decode[0].info.worker_id)
        hashes = leg.prefix_hashes(self._config)
        return choose(
            demand,
            [link.decode_state(hashes) for link in decode],
            [link.prefill_state(hashes) for link in prefill],
            set(self._workers.pairs),
            local_prefill_max_tokens=self._config.local_prefill_max_tokens,
        )

    def may_start_ahead(self, choice: Choice, demand: Demand) -> bool:
        """Whether the chosen prefill worker may begin before the decode worker has granted the lease."""
        prefill_id, decode_id = choice
        if prefill_id is None or decode_id is None:
            return False
        links = self._workers.links
        return not links[prefill_id].is_guest and may_start_ahead(
            links[decode_id].decode_state(), links[prefill_id].prefill_state(), demand
        )

    def needs_lease(self, leg: Leg) -> bool:
        """Whether a decode worker must take it, as far as its connected workers show."""
        return not leg.ends_with_first_token or all(link.is_guest for link in self._workers.open_links(Role.PREFILL))

    def fits(self, leg: Leg, links: Sequence[WorkerLink]) -> bool:
        """Whether these workers could serve it if nothing else were there."""
        demand = leg.demand(self._config)
        prefill = [link for link in links if link.info.role == Role.PREFILL and link.could_prefill(demand)]
        if leg.ends_with_first_token and any(not link.is_guest for link in prefill):
            return True
        is_local = demand.tokens <= self._config.local_prefill_max_tokens
        decode = [link for link in links if link.could_decode(demand)]
        return bool(decode) and (bool(prefill) or is_local or any(link.info.role == Role.BOTH for link in decode))

    def refusal(self, leg: Leg) -> InvalidRequestError | None:
        """Why it can never be served; None if it can, or if workers are missing that may be larger."""
        links = list(self._workers.links.values())
        decode = [link for link in links if link.info.role != Role.PREFILL]
        prefill = [link for link in links if link.info.role == Role.PREFILL]
        is_whole = len(decode) >= self._config.num_decode_workers and (
            self._config.mode == "colocated" or len(prefill) >= self._config.num_prefill_workers
        )
        if not is_whole or self.fits(leg, links):
            return None
        demand = leg.demand(self._config)
        num_blocks = max(link.info.num_blocks for link in decode) - 1
        if demand.blocks > num_blocks:
            return InvalidRequestError(
                f"{demand.places} completions of {demand.tokens} tokens need KV cache for "
                f"{demand.blocks * self._config.block_size} tokens at once, but no worker holds more than "
                f"{num_blocks * self._config.block_size}; lower n or shorten the prompt",
                "n" if demand.places > 1 else "prompt",
            )
        max_model_len = max(link.info.max_model_len for link in decode)
        max_num_seqs = max(link.info.max_num_seqs for link in decode)
        return InvalidRequestError(
            f"{demand.places} completions of {demand.length} tokens, {demand.tokens} of them in the prompt, fit no "
            f"worker (max_model_len is {max_model_len}, max_num_seqs {max_num_seqs}); "
            "lower n or max_tokens, or shorten the prompt",
            "max_tokens",
        )
