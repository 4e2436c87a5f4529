"""For all tests: no test asserts a time, so Hypothesis must not either."""

from hypothesis import settings

settings.register_profile("pixloom", deadline=None)
settings.load_profile("pixloom")
