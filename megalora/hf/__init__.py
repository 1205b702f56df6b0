"""Read Hugging Face folders: JSON files, tensor headers, and what identifies a base."""
