"""Limits that need no library to be looked up."""

MAX_SEED = 2**63 - 1
