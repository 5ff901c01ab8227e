"""One file per policy. Each holds only its own decision."""
