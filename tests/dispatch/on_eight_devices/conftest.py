"""These tests need eight devices; `test_on_eight_devices.py` runs them so."""

from tests.eight_devices import mesh_of, to_ignore

__all__ = ["mesh_of"]
collect_ignore_glob = to_ignore()
