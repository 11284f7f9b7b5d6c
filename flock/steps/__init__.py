"""What both engines share: a step of a run, and everything that it owns."""
