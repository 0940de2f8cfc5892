"""Load generator for an OpenAI-compatible server, and offline throughput."""
