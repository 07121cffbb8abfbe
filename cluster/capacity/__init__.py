"""Who has which slots, as pure decisions: arbiter, allocator, hand-over, ceiling. No clock, no I/O, no Ray."""
