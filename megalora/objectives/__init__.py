"""Define what training minimises: the columns a loss reads, what divides it, the loss."""
