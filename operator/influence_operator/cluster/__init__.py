"""Everything that talks to an API server, a scheduler or a driver."""
