"""Settings of the whole suite."""

from hypothesis import HealthCheck, settings

# The same examples on every machine and run, and no limits of time: CI is slow and shared.
settings.register_profile("kiln", derandomize=True, deadline=None, max_examples=50, print_blob=True,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.load_profile("kiln")
