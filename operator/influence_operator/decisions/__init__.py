"""Pure decisions: spec, observed state and now lead to actions, a status and events. No clock is read."""
