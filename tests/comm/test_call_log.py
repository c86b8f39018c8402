"""What a transport remembers of its calls."""

from pipemoe.comm.transport import CallLog


def test_a_transport_remembers_its_calls_between_start_and_take():
    log = CallLog()
    log._note("dispatch", 0, 0, "broadcast", 1, 64)  # nobody asked
    log.start_log()
    log._note("combine", 1, 0, "reduce", 2, 128)
    assert [tuple(call) for call in log.take_log()] == [("combine", 1, 0, "reduce", 2, 128)]
    log._note("dispatch", 0, 0, "broadcast", 1, 64)
    assert log.take_log() == []
