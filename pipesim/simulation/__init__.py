"""The simulated world: SimPy as an event list around the very scheduler that real runs use."""
