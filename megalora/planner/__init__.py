"""Which layout to train with, and whether it fits, before anything is paid for. Importable without
torch."""
