"""What several commands need: options, the control client, the mesh's state on a screen, weights on the
disk."""
