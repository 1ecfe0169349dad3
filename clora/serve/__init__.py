"""One base, one collection, many requests: an HTTP server of edits."""
