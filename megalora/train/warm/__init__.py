"""Start ranks again from memory: a parent that has imported everything holds their snapshots."""
