"""Real execution: gRPC stages and head, transformer layers, drafters. Needs ``pipesim[real]``."""

import os

# gRPC's C++ core logs on stderr, beside the one clear message that we give. It reads this when it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
