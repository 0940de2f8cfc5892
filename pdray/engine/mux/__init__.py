"""One engine, two lanes: prompts on some of a GPU's SMs, decodes on the others."""
