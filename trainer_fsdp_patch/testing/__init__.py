"""Tiny runs on forked ranks, for `check` and the tests; no patch uses it."""
