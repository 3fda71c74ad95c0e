"""What the commands share: how they end, stop signals, and arguments."""

import signal
import sys

# Ctrl-C while a command imports its modules ends it without a traceback. After that `run_command`
# handles signals.
_command = getattr(sys.modules["__main__"], "__package__", None) == "moi_jax"
if _command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
