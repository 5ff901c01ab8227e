"""Real execution: gRPC stages and head, transformer layers, drafters. Needs ``pipesim[real]``."""
