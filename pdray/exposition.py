"""A router's metrics as Prometheus' text format 0.0.4, for the API's own port."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping

from pdray.metric_table import TABLE, Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ENGINE = "0"  # vLLM's label of one server's engines, of which a router shows one


class Samples:
    """The values of one metric, by its tag's value ("" where it has none)."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self._values: dict[str, float] = dict.fromkeys(metric.values or ("",), 0.0)
        self._buckets = {value: [0] * (len(metric.boundaries) + 1) for value in self._values}

    def set(self, value: float) -> None:
        self._values[""] = value

    def add(self, amount: float, tag: str = "") -> None:
        self._values[tag] = self._values.get(tag, 0.0) + amount

    def observe(self, value: float, tag: str = "") -> None:
        self._values[tag] += value
        self._buckets[tag][bisect.bisect_left(self.metric.boundaries, value)] += 1

    def lines(
        self, name: str, labels: Mapping[str, str], tag: str | None, only: tuple[str, ...] | None
    ) -> Iterator[str]:
        """In the text format.

        Args:
            tag: what the further tag is called. only: its values that are shown; None are all.
        """
        metric = self.metric
        name += "_total" if metric.kind == "counter" else ""
        yield f"# HELP {name} {metric.description}"
        yield f"# TYPE {name} {metric.kind}"
        for value, total in self._values.items():
            if only is not None and value not in only:
                continue
            own = {**labels, tag: value} if tag else dict(labels)
            if metric.kind != "histogram":
                yield f"{name}{_labels(own)} {_number(total)}"
                continue
            count = 0
            for bound, number in zip((*metric.boundaries, float("inf")), self._buckets[value], strict=True):
                count += number
                yield f"{name}_bucket{_labels({**own, 'le': _number(bound)})} {count}"
            yield f"{name}_count{_labels(own)} {count}"
            yield f"{name}_sum{_labels(own)} {_number(total)}"


class Exposition:
    """All samples of one router.

    Args:
        tags: of pdray's names. model: vLLM's tag model_name.
    """

    def __init__(self, tags: Mapping[str, str], model: str) -> None:
        self.samples = {key: Samples(metric) for key, metric in TABLE.items()}
        self._tags = dict(tags)
        self._vllm_tags = {"model_name": model, "engine": ENGINE}

    def text(self, *, vllm: bool, cache_config: Mapping[str, str] | None = None) -> bytes:
        """The whole page.

        Args:
            vllm: under vLLM's names, too. cache_config: tags of vLLM's cache_config_info.
        """
        lines: list[str] = []
        for samples in self.samples.values():
            metric = samples.metric
            if metric.pdray is not None:
                lines += samples.lines(metric.pdray, self._tags, metric.tag, None)
            if vllm and metric.vllm is not None:
                lines += samples.lines(metric.vllm, self._vllm_tags, metric.vllm_tag, metric.vllm_values)
        if vllm and cache_config is not None:
            name = "vllm:cache_config_info"
            lines += [f"# HELP {name} The KV cache", f"# TYPE {name} gauge"]
            lines.append(f"{name}{_labels({**self._vllm_tags, **cache_config})} 1")
        return "".join(f"{line}\n" for line in lines).encode()


def _labels(tags: Mapping[str, str]) -> str:
    pairs = (f'{name}="{_escaped(value)}"' for name, value in tags.items())
    return "{" + ",".join(pairs) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    if value == float("inf"):
        return "+Inf"
    return str(int(value)) if value == int(value) else repr(value)
