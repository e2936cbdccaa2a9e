"""The house of the pipeline tests, for tests that speak to it by its contract alone."""

from tests.pipeline.conftest import built_in_house, house, shared_house

__all__ = ["built_in_house", "house", "shared_house"]
