"""Steps on the device: inputs, launches, graphs, draws."""
