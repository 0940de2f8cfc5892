"""The workers of the cluster as a router knows them: which there are, which are connected, which pairs serve.

Pure and single-threaded.
"""

from __future__ import annotations

from typing import NamedTuple

from pdray.router.link import WorkerLink
from pdray.wire.cluster_view import ClusterView, Draining, WorkerInfo
from pdray.wire.peers import Role


class Changes(NamedTuple):
    """What a view has changed.

    Attributes:
        gone: links that are no more: their processes have ended.
        new: workers without a link.
    """

    gone: list[WorkerLink]
    new: list[WorkerInfo]


class Workers:
    """One link to each worker that the view names.

    Attributes:
        links: by worker id, open or not.
        pairs: (prefill, decode) worker ids to the epoch of their channel, without those that are broken in that epoch.
        broken: pairs that did not serve, with the epoch of their channel then.
        error: what kept a worker from starting or a pair from connecting, as the last view tells it.
        draining: the workers are about to end, as the last view tells it.
    """

    def __init__(self) -> None:
        self.links: dict[str, WorkerLink] = {}
        self.pairs: dict[tuple[str, str], int] = {}
        self.broken: dict[tuple[str, str], int] = {}
        self.error: str | None = None
        self.draining: Draining | None = None
        self._all_pairs: dict[tuple[str, str], int] = {}  # as the last view names them
        self._infos: dict[str, WorkerInfo] = {}  # likewise

    @property
    def can_serve(self) -> bool:
        """Whether a pair, or a worker that does both, is connected."""
        return any(
            (link.info.role == Role.BOTH and not link.broken)
            or any(self.is_open(p) for p, d in self.pairs if d == link.info.worker_id)
            for link in self.open_links(Role.DECODE, Role.BOTH)
        )

    @property
    def max_model_len(self) -> int | None:
        """Tokens of prompt and output that every worker takes; None before any worker is known."""
        return min((link.info.max_model_len for link in self.links.values()), default=None)

    @property
    def max_num_seqs(self) -> int:
        """Sequences that every worker runs. At least one worker must be known."""
        return min(link.info.max_num_seqs for link in self.links.values())

    @property
    def vocab_size(self) -> int | None:
        """The model's, None before any worker is known."""
        sizes = (link.info.vocab_size for link in self.links.values())
        return min((size for size in sizes if size is not None), default=None)

    def open_links(self, *roles: Role) -> list[WorkerLink]:
        return [link for link in self.links.values() if link.is_open and link.info.role in roles]

    def is_open(self, worker_id: str) -> bool:
        link = self.links.get(worker_id)
        return link is not None and link.is_open

    def update(self, view: ClusterView) -> Changes:
        """Follow a view: links to processes that it does not name are gone. For each new worker, call link()."""
        self.error, self.draining = view.error, view.draining
        self._all_pairs = {(p.prefill_worker_id, p.decode_worker_id): p.epoch for p in view.pairs}
        self._leave_out_broken()
        self._infos = {info.worker_id: info for info in view.workers}
        gone = [link for link in self.links.values() if not self._is_current(link)]
        for link in gone:
            del self.links[link.info.worker_id]
        return Changes(gone, [info for info in view.workers if info.worker_id not in self.links])

    def link(self, info: WorkerInfo) -> None:
        """From now on there is a link to this worker, not open yet."""
        self.links[info.worker_id] = WorkerLink(info)

    def opened(self, worker_id: str, incarnation: str) -> WorkerLink | None:
        """A session to that process is open. None if nobody wants it any more."""
        link = self.links.get(worker_id)
        if link is None or link.info.incarnation != incarnation:
            return None
        link.opened = True
        return link

    def closed(self, worker_id: str) -> WorkerInfo | None:
        """The session has ended, and the link with it. Returns the worker if the view still has this process."""
        link = self.links.pop(worker_id)
        return link.info if self._infos.get(worker_id) == link.info else None

    def mark_broken(self, prefill_id: str, decode_id: str) -> None:
        """The pair gets no requests until its channel was opened anew."""
        self.broken[prefill_id, decode_id] = self.pairs[prefill_id, decode_id]
        self._leave_out_broken()

    def _leave_out_broken(self) -> None:
        self.broken = {p: epoch for p, epoch in self.broken.items() if self._all_pairs.get(p) == epoch}
        self.pairs = {p: epoch for p, epoch in self._all_pairs.items() if p not in self.broken}

    def _is_current(self, link: WorkerLink) -> bool:
        info = self._infos.get(link.info.worker_id)
        return info is not None and info.incarnation == link.info.incarnation
