"""Motion metrics, which compare generated clips with real clips of the same world."""
