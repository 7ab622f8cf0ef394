from cluster.errors import CheckpointError, PlanError, StartupError
from cluster.launch.driver import _failure, _own_error

TRACEBACK = """The deployment failed to start 1 times in a row. Error: ray::ServeReplica.__init__ (pid=1)
  File "x.py", line 1, in load
cluster.errors.CheckpointError: shard 3 is truncated: copy it again
"""


def test_deepsplits_own_error_is_found_in_a_traceback() -> None:
    error = _own_error(TRACEBACK)
    assert isinstance(error, CheckpointError)
    assert str(error) == "shard 3 is truncated: copy it again"


def test_own_error_goes_first() -> None:
    error = _failure(["", TRACEBACK, "deployments are UNHEALTHY"])
    assert isinstance(error, CheckpointError)
    assert "UNHEALTHY" not in str(error)


def test_other_errors_are_shown_whole_and_once() -> None:
    error = _failure(["ValueError: no", "ValueError: no", ""])
    assert isinstance(error, StartupError)
    assert str(error) == "a deployment failed to start:\nValueError: no"


def test_no_error() -> None:
    assert _own_error("all is well; PlanError is only mentioned") is None
    assert _own_error(f"{PlanError.__module__}.PlanError: a\nb") is not None
