"""What the tests of faults share with those of the service."""

from __future__ import annotations

from tests.service.conftest import indexed

__all__ = ["indexed"]
