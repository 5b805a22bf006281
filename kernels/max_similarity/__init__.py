from .api import MaxSimilarity, max_similarity

__all__ = ["MaxSimilarity", "max_similarity"]
