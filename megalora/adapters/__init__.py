"""Read, write, export, import and merge adapter folders."""
