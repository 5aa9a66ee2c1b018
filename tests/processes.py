"""Work in a process of its own, which may die, hang or eat memory without harm to the tests."""

import json
import os
import resource
import signal
import traceback

MEGABYTE = 1024  # of what Linux counts memory in


def in_child(work, seconds=120):
    """Fork, and give what `work()` returns (as JSON), by how many MB the memory grew, and the exit status.

    The status is that of the shell: -9 for a process that was killed. One that runs for too long is.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        status = 1
        try:
            value = work()
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / MEGABYTE
            with os.fdopen(writing, "w") as pipe:
                json.dump([value, grown], pipe)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        written = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return (*(json.loads(written) if written else (None, None)), status)
