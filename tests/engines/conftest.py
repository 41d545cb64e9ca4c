"""Tests of an engine are collected where the engine is installed: in `make test-engines`'s environment."""

from importlib.util import find_spec

collect_ignore = [engine for engine in ("lmcache", "sglang") if find_spec(engine) is None]
