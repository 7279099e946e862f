"""What the conductors share: the call, where queries meet keys, what travels, and the two loops."""
