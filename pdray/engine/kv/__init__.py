"""KV memory: its layout, its size, who holds which blocks."""
