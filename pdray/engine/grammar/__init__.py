"""Grammars: what a request's output must look like, and which tokens may come next."""
