"""hypothesis, for tests over drawn values; they are skipped where it is not installed."""

from typing import Any

import pytest

__all__ = ["HealthCheck", "given", "settings", "st"]

try:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    settings.register_profile("thorough", max_examples=5000)
except ModuleNotFoundError:
    from unittest.mock import MagicMock

    HealthCheck, st = MagicMock(), MagicMock()

    def settings(*args: Any, **options: Any) -> Any:
        return lambda test: test

    def given(*args: Any, **options: Any) -> Any:
        return pytest.mark.skip(reason="hypothesis is not installed")
