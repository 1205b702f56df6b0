"""Turn files of conversations into the microbatches of one data-parallel rank."""
