"""How a version goes live, as pure decisions: rollout, canary, gate, placement. No clock, no I/O, no Ray."""
