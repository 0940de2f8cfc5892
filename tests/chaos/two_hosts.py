"""Prefill and decode on two hosts: two network namespaces of this machine, a Ray node in each, a cable between them.

Each host has a second network, which leads nowhere and whose interface comes first by name. The nccl channel is the
real one but for its communicator; see two_hosts_site. Needs root, and `ip` of iproute2.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deaths import with_problems
from rows import Row
from scale import Scale

from pdray.testing.tiny_model import TINY_CONFIG

SITE = Path(__file__).with_name("two_hosts_site")
HOSTS = {"pdray-a": "10.77.0.1", "pdray-b": "10.77.0.2"}
DEAD_END = "aa-dead-end"  # before the cable's interface by name
PORT = 6397
TIMEOUT_S = 180.0


def two_hosts(scale: Scale) -> list[Row]:
    """A row for each channel."""
    with tempfile.TemporaryDirectory() as folder, _hosts():
        model = Path(folder) / "config.json"
        model.write_text(json.dumps(TINY_CONFIG))
        return [_row(channel, model) for channel in ("nccl", "object_store")]


def _row(channel: str, model: Path) -> Row:
    """What the driver, a process on the first host, has found."""
    done = _on("pdray-a", [sys.executable, "-W", "ignore", __file__, channel, str(model)], check=False)
    limit = "one worker on each host, the channel asked for over the cable, tokens as colocated, nothing in use"
    if done.returncode:
        return Row(f"two hosts, {channel}", (done.stderr.strip() or done.stdout.strip())[-600:], limit, False)
    found = json.loads(done.stdout.splitlines()[-1])
    return Row(f"two hosts, {channel}", with_problems(found["figure"], found["problems"]), limit, not found["problems"])


@contextmanager
def _hosts() -> Iterator[None]:
    """The namespaces, and a Ray cluster of both."""
    try:
        for number, name in enumerate(HOSTS):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "add", DEAD_END, "type", "veth", "peer", "name", "zz-end")
            _ip("-n", name, "addr", "add", f"10.{88 + number}.0.1/24", "dev", DEAD_END)
            _ip("-n", name, "link", "set", DEAD_END, "up")
        first, second = HOSTS
        _ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for name, address in HOSTS.items():
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            _ip("-n", name, "link", "set", "cable", "up")
        ray = [str(Path(sys.executable).with_name("ray")), "start", "--num-cpus=1", "--disable-usage-stats"]
        head = HOSTS[first]
        _on(first, [*ray, "--head", f"--node-ip-address={head}", f"--port={PORT}", "--include-dashboard=false"])
        _on(second, [*ray, f"--address={head}:{PORT}", f"--node-ip-address={HOSTS[second]}"])
        yield
    finally:
        for name in HOSTS:
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            for pid in pids:
                subprocess.run(["kill", "-9", pid], capture_output=True)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=TIMEOUT_S)


def _on(host: str, command: list[str], *, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command on one of the hosts."""
    path = os.pathsep.join([str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {
        "PYTHONPATH": path,
        "RAY_ADDRESS": f"{HOSTS['pdray-a']}:{PORT}",
        "RAY_AUTH_MODE": "disabled",  # nobody else is in these networks
    }
    done = subprocess.run(
        ["ip", "netns", "exec", host, *command], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)} on {host}: {done.stderr.strip()[-600:]}")
    return done


def drive(channel: str, model: str) -> dict[str, object]:
    """The driver's part, on the first host: the same prompts colocated on one worker, and handed over between two."""
    from pdray import LLM, SamplingParams

    prompts: list[object] = [[index % 90 + 1] * (5 + 9 * index) for index in range(12)]
    params = [SamplingParams(temperature=0.8, seed=i, max_tokens=20, ignore_eos=True) for i in range(12)]
    common = {"load_format": "dummy", "skip_tokenizer_init": True, "device": "cpu", "num_kv_blocks": 400}
    with LLM(model, mode="colocated", **common) as llm:  # type: ignore[arg-type]
        expected = [each.outputs[0].token_ids for each in llm.generate(prompts, params, use_tqdm=False)]
    # a node has one CPU: each holds one worker
    with LLM(model, channel=channel, worker_num_cpus=0.6, **common) as llm:  # type: ignore[arg-type]
        outputs = [each.outputs[0].token_ids for each in llm.generate(prompts, params, use_tqdm=False)]
        assert llm._coordinator is not None
        infos = llm._run(llm._coordinator.watch(-1)).workers
        rows = llm.status()["workers"]
    hosts = {info.worker_id: info.host for info in infos}
    kinds = {kind for row in rows for kind in row.get("channels", {}).values()}
    interfaces = {info.channels["nccl"]["interface"] for info in infos if "nccl" in info.channels}
    differing = sum(a != b for a, b in zip(outputs, expected, strict=True))
    in_use = [row["worker_id"] for row in rows if row["free_blocks"] != row["num_blocks"] - 1]
    problems = [
        *([] if sorted(hosts.values()) == sorted(HOSTS.values()) else [f"workers at {hosts}"]),
        *([] if kinds == {channel} else [f"channels {kinds}"]),
        *([] if channel != "nccl" or interfaces == {"=cable"} else [f"NCCL was told to use {interfaces}"]),
        *([f"{differing} of {len(prompts)} answers differ"] if differing else []),
        *([f"blocks in use on {in_use}"] if in_use else []),
    ]
    return {"figure": f"{hosts}, {len(prompts)} answers over {', '.join(kinds)}", "problems": problems}


if __name__ == "__main__":
    print(json.dumps(drive(*sys.argv[1:])))
