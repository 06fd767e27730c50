from data_prep.account import Progress


def test_progress_tells_inputs_rates_and_the_time_left() -> None:
    line = str(Progress("write", 600, 1000, 500, 60, 40, 20.0, size_bytes=40 * 2**20, resumed=200))
    assert line == "600 of 1000 inputs done: 500 written, 60 filtered, 40 failed (20/s, 2.0 MiB/s, 20 s left)"
    assert str(Progress("plan", 5000, None, 0, 0, 0, 2.0)) == "5000 inputs planned (2500/s)"


def test_publishing_counts_partitions() -> None:
    assert str(Progress("publish", 10, 10, 500, 0, 0, 2.0)) == "10 of 10 partitions published (5/s)"
