"""Inject faults into small runs and see that nothing is lost (``make chaos``)."""
