"""Several processes as one run: joined once, for all launchers, by JAX's own distributed runtime."""

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator

from absl import flags, logging

from moe_jax import files
from moe_jax.command import errors
from moe_jax.config.mesh import MeshConfig

flags.disclaim_key_flags()

FOUND = "auto"
_GRACE_S = 60
_HEARTBEAT_S = 30  # a process that is silent for this long has died; the others then end


def define_flags() -> None:
    """Defines `--coordinator`, `--num_processes`, `--process_id` and `--join_s`."""
    flags.DEFINE_string(
        "coordinator", None, "host:port of process 0, or auto (SLURM, Open MPI, GKE, TPU): joins several processes."
    )
    flags.DEFINE_integer("num_processes", None, "The number of processes, unless --coordinator=auto.")
    flags.DEFINE_integer("process_id", None, "This process, from 0 on, unless --coordinator=auto.")
    flags.DEFINE_integer("join_s", 300, "Seconds to wait for the other processes.", lower_bound=1)


def join() -> None:
    """Joins the processes that the flags name; nothing without `--coordinator`.

    Raises:
        ValueError: the flags contradict each other, no cluster is found, the port of process 0 is taken, or a process
            did not come within `--join_s`.
    """
    coordinator, count, index, wait_s = (
        flags.FLAGS[name].value for name in ("coordinator", "num_processes", "process_id", "join_s")
    )
    if coordinator is None:
        for name, given in (("num_processes", count), ("process_id", index)):
            if given is not None:
                raise ValueError(f"--{name} = {given}: expected --coordinator with it")
        return
    arguments = {}
    if coordinator != FOUND:
        _require_flags(coordinator, count, index)
        if index == 0:
            _require_free_port(coordinator)
        arguments = {"coordinator_address": coordinator, "num_processes": count, "process_id": index}
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from `interruption`
    expected = "a cluster that JAX knows (SLURM, Open MPI, GKE, TPU)"
    if coordinator != FOUND:
        expected = f"all {count} processes to start, and to reach it, within --join_s={wait_s} seconds"
    refusal = f"--coordinator = {coordinator!r}: expected {expected}"

    def give_up() -> None:
        os._exit(errors.refuse(ValueError(refusal)))

    limit = threading.Timer(wait_s, give_up)  # JAX aborts the process at its own limit
    limit.daemon = True
    limit.start()
    try:
        jax.distributed.initialize(
            **arguments, initialization_timeout=wait_s + _GRACE_S, heartbeat_timeout_seconds=_HEARTBEAT_S
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{refusal} ({' '.join(str(error).split())[:200]})") from error
    finally:
        limit.cancel()
    _separate_output()
    if jax.process_index() > 0:
        files.leave_to_first()
        logging.set_verbosity(logging.ERROR)


def _separate_output() -> None:
    """Leaves standard output to Python; what libraries print there, as gloo does of connections, goes to stderr."""
    if sys.stdout is None:
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(kept, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)


def _require_flags(coordinator: str, count: int | None, index: int | None) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"--coordinator = {coordinator!r}: expected host:port, as 10.0.0.1:8476, or {FOUND}")
    if count is None or count < 1:
        raise ValueError(f"--num_processes = {count}: expected the number of processes, at least 1")
    if index is None or not 0 <= index < count:
        raise ValueError(f"--process_id = {index}: expected 0 to {count - 1}")


def _require_free_port(coordinator: str) -> None:
    """Refuses a port on which something listens already: JAX's service would crash there."""
    port, both = int(coordinator.rpartition(":")[2]), socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        reason = os.strerror(error.errno)
        raise ValueError(
            f"--coordinator = {coordinator!r}: process 0 cannot listen on port {port} ({reason}): expected a free port"
        ) from error


def require_mesh(mesh: MeshConfig) -> None:
    """Raises ValueError if there are too few devices for a mesh, or more than it has in several processes."""
    import jax

    mesh.require_devices(jax.device_count(), jax.process_count())


@contextlib.contextmanager
def first_prints() -> Iterator[None]:
    """Drops what processes other than the first print on standard output."""
    if files.is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
