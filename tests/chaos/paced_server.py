"""The whole serving path in one process, without Ray, around an engine that only keeps a pace.

A colocated worker on its engine's thread, a router with a session to it, and the API under uvicorn. Prompts are token
ids. Prints "ready <url>" once requests can be served; SIGTERM ends it.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
from typing import Any, cast

import torch
import uvicorn
from fastapi import FastAPI
from paced_engine import Pace, PacedEngine

from pdray.actors.assembly import Assembly
from pdray.actors.decode_worker import DecodeWorker
from pdray.config import Config
from pdray.engine.engine import Engine
from pdray.router.router import Router
from pdray.serve.api import create_app
from pdray.wire.cluster_view import ClusterView, WorkerInfo

MODEL = "paced"


class PacedWorker(DecodeWorker):
    """A DecodeWorker with a PacedEngine."""

    def __init__(self, config: Config, secret: bytes, pace: Pace) -> None:
        super().__init__(config, "worker-0", "1", secret)
        self._pace = pace

    def _assemble(self) -> Assembly:
        torch.set_num_threads(1)
        return Assembly(torch.device("cpu"), {}, cast(Engine, PacedEngine(self.config, self._pace)))


async def watch_one(info: WorkerInfo, version: int) -> ClusterView:
    """The view of a cluster that is one worker for ever."""
    if version >= 1:
        await asyncio.Event().wait()
    return ClusterView(1, [info], [])


def add_integrity(app: FastAPI, worker: PacedWorker, router: Router) -> None:
    """GET /debug/integrity: what is in use now, and what is wrong with the accounts."""

    @app.get("/debug/integrity")
    async def integrity() -> dict[str, Any]:
        stats = worker.engine.stats()
        return {
            "problems": await worker.check_integrity(),
            "blocks_in_use": stats.num_blocks - 1 - stats.free_blocks,
            "leases": [info._asdict() for info in worker.leases.leases(worker._now())],
            "router": router.stats(),
        }


async def serve(config: Config, pace: Pace, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        port: 0 chooses a free one.
    """
    secret = secrets.token_bytes(32)
    worker = PacedWorker(config, secret, pace)
    info = await worker.start()
    router = Router(config, None, router_id="router-0", secret=secret, watch=lambda version: watch_one(info, version))
    await router.start()
    app = create_app(config, lambda: router)
    add_integrity(app, worker, router)
    server = uvicorn.Server(uvicorn.Config(app, host, port, log_level="warning", access_log=False, lifespan="off"))
    announcing = asyncio.create_task(_announce(server, router))
    try:
        await server.serve()
    finally:
        announcing.cancel()
        await router.stop()
        await worker.stop()


async def _announce(server: uvicorn.Server, router: Router) -> None:
    await router.wait_ready()
    while not server.started:
        await asyncio.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    print(f"ready http://{host}:{port}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--max-queue-size", type=int, default=32)
    parser.add_argument("--max-queue-wait-s", type=float, default=10.0)
    parser.add_argument("--num-kv-blocks", type=int, default=512)
    parser.add_argument("--step-ms", type=float, default=10.0, help="length of a step")
    parser.add_argument("--prompt-token-ms", type=float, default=0.01, help="more for each prompt token in it")
    args = parser.parse_args()
    config = Config(
        model=MODEL,
        skip_tokenizer_init=True,
        mode="colocated",
        device="cpu",
        max_num_seqs=args.max_num_seqs,
        num_kv_blocks=args.num_kv_blocks,
        max_queue_size=args.max_queue_size,
        max_queue_wait_s=args.max_queue_wait_s,
    )
    asyncio.run(serve(config, Pace(args.step_ms / 1e3, args.prompt_token_ms / 1e3), args.host, args.port))


if __name__ == "__main__":
    main()
