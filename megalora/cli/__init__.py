"""The command line: read arguments and call the library."""
