"""From a file of conversations to the microbatches of one data-parallel rank."""
