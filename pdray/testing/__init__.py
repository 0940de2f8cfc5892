"""Rigs that tests, the GPU checks and the chaos suite share. Nothing that serves requests imports them."""
