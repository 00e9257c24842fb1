"""Settings that all tests share: they run on the core with hooks, the same source with guards that can be switched."""

import os

os.environ.setdefault("FAULT_A2A_CORE", "hooks")
