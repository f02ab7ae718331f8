"""Watches InfluenceJobs, owns their children and tells their state. `influence-operator` starts it."""
