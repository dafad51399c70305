"""Run a program whose processes may each allocate little: limited.py LIMIT_BYTES PROGRAM ..."""

import os
import resource
import sys

limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
os.execv(sys.argv[2], sys.argv[2:])
