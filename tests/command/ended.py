"""How a started process ended."""


def finished(process):
    stdout, stderr = process.communicate(timeout=300)
    return process.returncode, stdout, stderr


def refused_in_one_line(process):
    status, stdout, stderr = finished(process)
    last = stderr.splitlines()[-1]
    assert (status, stdout, "Traceback" in stderr) == (2, "", False), stderr
    assert last.startswith("error: ") and stderr.count("error: ") == 1
    return last
