"""The shared channel: a prefill worker that computes in the decode worker's pool, so that nothing moves."""
