"""What any training needs, and nothing of the paper."""
