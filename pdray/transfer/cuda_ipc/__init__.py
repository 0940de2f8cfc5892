"""The cuda_ipc channel: a prefill worker's kernel writes blocks straight into the decode worker's pool."""
