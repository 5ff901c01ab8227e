"""Real execution: gRPC stages and head, transformer layers, drafters. Needs ``pipesim[real]``."""

import os
from importlib import metadata

# gRPC's C++ core reads these when it is imported. It logs on stderr, beside the one clear message that we give.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
# From version 1.80 on, a message passes through three threads instead of one before Python hears of it: 0.1 ms more.
# Later versions may not know the switch, and say so.
if (1, 80) <= tuple(int(part) for part in metadata.version("grpcio").split(".")[:2]) <= (1, 85):
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
