"""Model side of real execution: reading weights, exact arithmetic, and the layers that one stage drives."""
