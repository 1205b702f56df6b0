"""Judge an adapter beside its base: loss, perplexity, and generated answers by a rule"""
