"""The house of the pipeline tests, for tests that speak to it by its contract alone."""

from tests.pipeline.conftest import house, shared_house

__all__ = ["house", "shared_house"]
