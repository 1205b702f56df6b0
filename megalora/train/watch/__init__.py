"""Find out within seconds which rank no longer works, whatever the back end waits for."""
