"""The words of ``--nan_policy``."""

STOP, SKIP, ROLLBACK = NAN_POLICIES = ("stop", "skip", "rollback")
