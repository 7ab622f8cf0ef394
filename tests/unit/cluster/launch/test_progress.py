import io

from cluster.launch.progress import Stages


def test_elapsed_times_and_no_repeats() -> None:
    out = io.StringIO()
    times = iter([100.0, 100.5, 112.25])
    stages = Stages(out, lambda: next(times))
    stages.say("a")
    stages.say("a")
    stages.say("b")
    assert out.getvalue() == "[   0.5 s] a\n[  12.2 s] b\n"
