"""Make one self-contained HTML page of runs: curves, routers, adapters, samples, configuration"""
