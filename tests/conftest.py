"""Load ``tests/prepare.py`` and ``tests/fixtures.py`` into every process that runs tests.

With ``-n 2``, pytest-xdist's first process only hands tests to two others. Imports would take 10 s
and 1 GB of it for nothing."""

import gc
import importlib

import pytest

import tests.environment  # noqa: F401


def pytest_configure(config: pytest.Config) -> None:
    # Without -n, the one process is the worker.
    is_worker = hasattr(config, "workerinput")
    if is_worker or config.getoption("dist", "no") == "no":
        config.pluginmanager.register(importlib.import_module("tests.fixtures"))


def pytest_collection_finish() -> None:
    # run_ranks collects garbage before it forks. Thousands of tests are none, and to look through
    # them took 0.2 to 0.3 s each time.
    gc.collect()
    gc.freeze()
